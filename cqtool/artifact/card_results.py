"""What was measured, in the two forms in which the Hub reads evaluation results.

Scores on a benchmark, which is a data set that keeps a leaderboard, are files in ``.eval_results``
(https://huggingface.co/docs/hub/eval-results). Perplexity and the like on any other data set have
the older ``model-index`` of the card's metadata.
"""

from __future__ import annotations

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from cqtool.artifact.card_content import CardContent
from cqtool.artifact.markdown import one_line
from cqtool.artifact.names import public_name
from cqtool.layout.config import text_parts
from cqtool.models.names import is_hub_id

_BENCHMARKS = {
    ("gsm8k", "exact_match (strict-match)"): ("openai/gsm8k", "gsm8k"),
    ("gsm8k_cot", "exact_match (strict-match)"): ("openai/gsm8k", "gsm8k"),
}
"""Of a task and measure of lm-evaluation-harness, the benchmark's data set and the task's name in
its ``eval.yaml``. Of tasks for one benchmark, the first that was measured counts."""


def result_name(content: CardContent) -> str:
    """What a list of results calls the artifact."""
    base = one_line(public_name(content.config.base_model.id)).rsplit("/", 1)[-1]
    return f"{base}, KV cache in {content.config.cache.name}"


def index_results(content: CardContent) -> list[EvalResult]:
    """Figures of text for ``model-index``; none where the text is no single data set of the Hub."""
    quality, own = content.quality, content.own_row
    if quality is None or own is None:
        return []
    text = quality.evaluation
    name = text.get("dataset")
    if len(text_parts(text)) > 1 or not isinstance(name, str) or not is_hub_id(name):
        return []
    config, split, revision = (
        value if isinstance(value := text.get(field), str) else None
        for field in ("config", "split", "revision")
    )
    figures = (
        ("perplexity", "Perplexity", own.perplexity),
        ("kl_divergence", "KL divergence from the unquantized cache, nats per token", own.kl),
        ("top1_agreement", "Same most probable token as with the unquantized cache", own.top1),
    )
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Next token, over a coded KV cache",
            dataset_type=name,
            dataset_name=name,
            dataset_config=config,
            dataset_split=split,
            dataset_revision=revision,
            metric_type=metric,
            metric_name=f"{said} ({quality.windows} windows of {quality.window_length} tokens)",
            metric_value=float(f"{value:.5g}"),
        )
        for metric, said, value in figures
    ]


def benchmark_results(content: CardContent) -> bytes | None:
    """A file of ``.eval_results``, in YAML; None where no benchmark was measured on all its items.

    Values are per cent, as benchmarks list them.
    """
    quality, own = content.quality, content.own_row
    # A part of the items is no score of the benchmark.
    if quality is None or own is None or quality.tasks is None or quality.tasks.items is not None:
        return None
    measured = {(s.task, s.measure): s.score for s in quality.tasks.scores if s.format == own.label}
    entries: dict[tuple[str, str], EvalResultEntry] = {}
    for (task, measure), benchmark in _BENCHMARKS.items():
        if (task, measure) in measured and benchmark not in entries:
            cache = f"KV cache in {content.config.rate} ({content.config.cache.name})"
            page = f"https://huggingface.co/{content.repo_id}" if content.repo_id else None
            entries[benchmark] = EvalResultEntry(
                *benchmark,
                value=round(100 * measured[task, measure], 2),
                source_url=page,
                source_name="Model card" if page else None,
                notes=f"lm-evaluation-harness {task}, {measure}; {cache}",
            )
    if not entries:
        return None
    listed = eval_result_entries_to_yaml([*entries.values()])
    return yaml.safe_dump(listed, sort_keys=False, allow_unicode=True).encode()

"""The card's measured sections: quality with its standard errors, and memory."""

from __future__ import annotations

from collections.abc import Iterator

from cqtool.artifact.card_commands import check_command, samples_command
from cqtool.artifact.card_content import CardContent
from cqtool.artifact.card_format import OBJECTIVES, kept_tokens
from cqtool.artifact.markdown import dataset, number, plain, size, table
from cqtool.artifact.measured import Generation, QualityRow
from cqtool.layout.config import REPORTS_NAME

_PLOTS = {
    "quality-pareto.png": "KL divergence of each cache against its bits per channel",
    "quality.png": "KL divergence and perplexity of each cache, and its KL divergence by position",
}
"""What the plots of ``quality.json`` show; the most telling one, first, is drawn of many caches."""


def headline(content: CardContent) -> str | None:
    """The two figures that a reader asks for first; None where nothing was measured."""
    quality, own = content.quality, content.own_row
    if quality is None or own is None:
        return None
    increase = _with_error(own.perplexity_increase, own.perplexity_increase_se, "+.2%", ".2%")
    return (
        f"- **Measured**: {own.cache_bytes_per_token / own.cache_bytes_per_token_full:.1%} of the "
        f"bytes of the {plain(quality.rows[0].name)} cache at {quality.window_length} tokens, "
        f"perplexity {increase} ([all figures](#measured-quality))."
    )


def quality_section(content: CardContent) -> Iterator[str]:
    """The quality table and the command that prints it again, or that there is none."""
    quality, own = content.quality, content.own_row
    download = f"hf download {content.repo} --local-dir artifact\n"
    if quality is None or own is None:
        yield (
            "**The quality of this artifact has not been measured.** Measure it before you rely "
            "on it:"
        )
        yield f"```bash\n{download}cqtool check {content.model_argument} artifact\n```"
        return
    errors = "" if own.perplexity_se is None else "; ± is the standard error over windows"
    yield (
        f"On {quality.windows} windows of {quality.window_length} tokens of "
        f"{dataset(quality.evaluation)}, {_coded(own)}. Increase, KL and top-1 are against the "
        f"unquantized cache in the first line{errors}."
    )
    yield table(
        ["Cache", "Bits per channel", "Perplexity", "Increase", "KL, nats per token", "Same top-1"],
        [
            [_label(row, own), *_quality_cells(row, first=row is quality.rows[0])]
            for row in quality.rows
        ],
    )
    objectives = dict.fromkeys(row.objective for row in quality.rows if row.objective)
    yield "In bold, this artifact. " + " ".join(
        f"`{name}` codebooks were fitted to {OBJECTIVES[name]}."
        for name in objectives
        if name in OBJECTIVES
    )
    yield from _plot(content.reports)
    if quality.generation is not None:
        yield (
            f"In text generated greedily, {quality.generation.items} built-in items of each task, "
            "and in brackets the difference to the unquantized cache on the same items:"
        )
        yield _generation_table(quality.generation)
    if quality.tasks is not None:
        items = quality.tasks.items
        yield (
            f"Tasks of lm-evaluation-harness, {'all' if items is None else f'at most {items}'} "
            "items of each, and in brackets the difference to the unquantized cache on the same "
            "items:"
        )
        yield _generation_table(quality.tasks)
    if quality.gates:
        yield "\n".join(
            f"- {plain(gate.name)}: {number(gate.value)}, limit {number(gate.limit)}: "
            f"{'passed' if gate.passed else '**missed**'}"
            for gate in quality.gates
        )
    again = check_command(content, quality, own)
    samples = f"{samples_command(content)}\n" if "--samples" in again else ""
    needs = ", with samples collected again for the formats that were fitted" if samples else ""
    yield f"To measure it again{needs}:"
    yield f"```bash\n{download}{samples}{again}\n```"
    versions = [f"{plain(name)} {plain(value)}" for name, value in quality.versions.items()]
    yield (
        f"Measured on {'the CPU' if quality.device == 'cpu' else plain(quality.device)} in "
        f"{plain(quality.dtype)}, with {', '.join(versions)}."
    )


def memory_section(content: CardContent) -> Iterator[str]:
    """Bytes per token as measured, and what follows from the format by construction."""
    config, quality = content.config, content.quality
    own, share = content.own_row, ""
    if quality is not None and own is not None:
        yield f"Measured on the stored tensors at {quality.window_length} tokens, all included:"
        yield table(
            ["Cache", "Bytes per token", "Of the unquantized cache", "Effective bits per channel"],
            [
                [
                    _label(row, own),
                    f"{row.cache_bytes_per_token:.0f}",
                    f"{row.cache_bytes_per_token / row.cache_bytes_per_token_full:.1%}",
                    number(row.effective_bits),
                ]
                for row in quality.rows
            ],
        )
        part = config.code_bytes_per_token / own.cache_bytes_per_token_full
        share = f", {part:.1%} of the unquantized cache"
        if kept_tokens(own):
            share += "; the longer the text, the closer the measured share comes to that"
    yield (
        f"By construction, the codes of a token take {number(config.code_bytes_per_token)} bytes "
        f"for its {config.geometry.channels_per_token} channels in "
        f"{len(config.geometry.layers)} layers{share}. The codebooks take "
        f"{size(content.codebook_bytes)}, once for all tokens."
    )


def _plot(reports: tuple[str, ...]) -> Iterator[str]:
    """The one plot that says most of the table above it, where `cqtool check` drew it."""
    names = (f"{REPORTS_NAME}/{name}" for name in _PLOTS)
    name = next((name for name in names if name in reports), None)
    if name is not None:
        yield f"![{_PLOTS[name.removeprefix(f'{REPORTS_NAME}/')]}]({name})"


def _generation_table(generation: Generation) -> str:
    """A line for every measure, a column for every cache."""
    caches = list(dict.fromkeys(score.format for score in generation.scores))
    lines: dict[str, dict[str, str]] = {}
    for score in generation.scores:
        name = ", ".join(part for part in (score.task, score.measure, score.group) if part)
        cell = _with_error(score.score, score.score_se, ".3g")
        if score.format != caches[0]:
            cell += f" ({_with_error(score.difference, score.difference_se, '+.3g', '.3g')})"
        lines.setdefault(name, {})[score.format] = cell
    return table(
        ["Task, measure", *caches],
        [[name, *(cells.get(cache, "–") for cache in caches)] for name, cells in lines.items()],
    )


def _quality_cells(row: QualityRow, *, first: bool) -> list[str]:
    compared = [
        _with_error(row.perplexity_increase, row.perplexity_increase_se, "+.2%", ".2%"),
        _with_error(row.kl, row.kl_se, ".4f"),
        _with_error(row.top1, row.top1_se, ".2%"),
    ]
    return [
        number(row.bits_per_channel),
        _with_error(row.perplexity, row.perplexity_se, ".3f"),
        *(["–"] * len(compared) if first else compared),
    ]


def _label(row: QualityRow, own: QualityRow) -> str:
    return f"**{row.label}**" if row is own else row.label


def _coded(own: QualityRow) -> str:
    """Which tokens were coded when `own` was measured."""
    kept = kept_tokens(own)
    return f"with {kept} in full precision" if kept else "with every token coded"


def _with_error(value: float, error: float | None, form: str, error_form: str = "") -> str:
    # A difference that rounds to zero has no sign worth a minus.
    shown = format(value, form)
    if not shown.strip("+-0.%"):
        shown = format(0.0, form)
    return shown if error is None else f"{shown} ± {format(error, error_form or form)}"

"""What a cache format costs in generated text: the built-in tasks, answered greedily.

Teacher forcing hides how errors add up: each token there follows the right ones. Here every format
answers the same items, and full precision does too, so that differences are paired by item.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from cqtool.cache import CacheFormat, CQCache
from cqtool.errors import RecipeError
from cqtool.models.load import OpenedModel
from cqtool.progress import SILENT, Progress
from cqtool.quality.items import TASKS, Item, demo_prose, make_items
from cqtool.quality.scores import Generation, Score
from cqtool.quality.statistics import compare_items
from cqtool.quality.text import context_limit

SEED = 0
"""The items are the same in every check, so that reports can be compared."""
TOGETHER = 16
"""Most items in a batch; models that compute logits for a whole context do it for all of them."""
TOKENS_TOGETHER = 8192
"""Most tokens of the contexts in a batch, padding included; what is longer is answered alone."""


def task_items(
    opened: OpenedModel, names: Sequence[str], count: int, context: int | None = None
) -> list[Item]:
    """The first `count` items of each task in `names`, of all tasks for ``all``.

    Args:
        opened: the model and its tokenizer.
        names: of tasks.
        count: items of each.
        context: tokens that pass keys are hidden in at most, as far as the model takes them; None
            for the usual lengths.

    Raises:
        RecipeError: a name is unknown.
        DataError: the demo text is not installed, or the model's context is too short for a task.
    """
    for name in names:
        if name not in (*TASKS, "all"):
            raise RecipeError(
                f"--generation: there is no task '{name}'; choose among {', '.join(TASKS)}, or all."
            )
    if not names:
        return []
    tasks = TASKS if "all" in names else dict.fromkeys(names)
    prose, tokenizer = demo_prose(), opened.tokenizer
    limit = context_limit(opened)
    return [
        item
        for task in tasks
        for item in make_items(
            task, tokenizer, prose, count=count, limit=limit, context=context, seed=SEED
        )
    ]


class TaskRun:
    """The items, answered over one format after the other; full precision comes first.

    Args:
        opened: the model and its tokenizer.
        items: as :func:`task_items` returns them, the same number for each task.

    Attributes:
        full_answers: token ids of the first format's answers, item by item.
    """

    def __init__(self, opened: OpenedModel, items: Sequence[Item]) -> None:
        self._opened, self._items = opened, items
        self.full_answers: list[list[int]] = []
        self._full: list[dict[str, float]] = []

    def measure(
        self, label: str, format: CacheFormat | None, progress: Progress = SILENT
    ) -> tuple[Score, ...]:
        """Answer all items over a cache of `format`; its scores.

        Args:
            label: of the format's row.
            format: on the model's device; None is full precision.
            progress: where to report to.
        """
        answers: dict[int, list[int]] = {}
        with progress.task(f"generation, {label}", total=len(self._items)) as bar:
            for numbers in batches(self._items, may_pad(self._opened.model, format)):
                together = [self._items[number] for number in numbers]
                new = continuations(self._opened.model, together, format)
                answers.update(zip(numbers, new, strict=True))
                bar.advance(len(numbers))
        return self.scored(label, [answers[number] for number in range(len(self._items))])

    def scored(self, label: str, answers: list[list[int]]) -> tuple[Score, ...]:
        """The scores of a format by its `answers` (token ids) to all items."""
        self.full_answers = self.full_answers or answers
        found = [
            outcome(item, str(self._opened.tokenizer.decode(new)), new, reference)
            for item, new, reference in zip(self._items, answers, self.full_answers, strict=True)
        ]
        self._full = self._full or found
        return tuple(summarise_items(label, self._items, self._full, found))

    def result(self, scores: Sequence[Score]) -> Generation:
        """`scores` of all formats, and what they are of."""
        tasks = tuple(dict.fromkeys(item.task for item in self._items))
        return Generation(tasks, len(self._items) // len(tasks), SEED, tuple(scores))


def batches(items: Sequence[Item], padded: bool) -> list[list[int]]:
    """Which items are answered together, as their numbers.

    Args:
        items: of all tasks.
        padded: whether the contexts of a batch may differ in length.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, item in enumerate(items):
        shape = len(item.question), item.new_tokens, 0 if padded else len(item.context)
        alike.setdefault(shape, []).append(number)
    found = []
    for numbers in alike.values():
        numbers.sort(key=lambda number: len(items[number].context))
        batch: list[int] = []
        for number in numbers:
            tokens = (len(batch) + 1) * len(items[number].context)
            if batch and (len(batch) == TOGETHER or tokens > TOKENS_TOGETHER):
                found.append(batch)
                batch = []
            batch.append(number)
        found.append(batch)
    return found


def may_pad(model: PreTrainedModel, format: CacheFormat | None) -> bool:
    """Whether a context may have padding on its left.

    Not where tokens are coded in blocks, since a row's tokens would come into other blocks; nor
    where positions cannot be given (ALiBi), or the longest row decides the RoPE of all.
    """
    told = "position_ids" in inspect.signature(model.forward).parameters
    tables = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {one.get("rope_type") for one in (tables, *tables.values()) if isinstance(one, dict)}
    alone = format is None or all(codecs.block == 1 for codecs in format.layers)
    return told and alone and not kinds & {"dynamic", "longrope"}


def continuations(
    model: PreTrainedModel, items: Sequence[Item], format: CacheFormat | None
) -> list[list[int]]:
    """The most likely tokens, one after the other: `new_tokens` ids for each item of a batch.

    Nothing but the cache may make two formats differ, and `generate` takes penalties and tokens to
    stop at from the model's own configuration; so this is the plain loop.

    Args:
        model: the model.
        items: as :func:`batches` puts them together.
        format: on the model's device; None is full precision.
    """
    cache: Cache = DynamicCache(config=model.config) if format is None else CQCache(format, model)
    device, longest = model.device, max(len(item.context) for item in items)
    missing = torch.tensor([[longest - len(item.context)] for item in items], device=device)
    # What stands in place of the missing tokens is never looked at.
    rows = [(0,) * (longest - len(item.context)) + item.context for item in items]
    ids, known, new = torch.tensor(rows, device=device), 0, list[Tensor]()
    padding = bool((missing > 0).any())

    def places(count: int) -> dict[str, Tensor]:
        """Which columns are real, and where the newest `count` stand; nothing without padding."""
        if not padding:
            return {}
        columns = torch.arange(known + count, device=device)
        real = (columns >= missing).long()
        return {"attention_mask": real, "position_ids": (columns - missing)[:, known:].clamp(min=0)}

    with torch.no_grad():
        model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            **places(longest),
            **_last_only(model),
        )
        known = longest
        ids = torch.tensor([item.question for item in items], device=device)
        while len(new) < items[0].new_tokens:
            count = ids.shape[1]
            logits = model(
                input_ids=ids, past_key_values=cache, use_cache=True, **places(count)
            ).logits
            known += count
            ids = logits[:, -1:].argmax(dim=-1)
            # Read at the end: a GPU need not wait for Python after each token.
            new.append(ids)
    answers: list[list[int]] = torch.cat(new, dim=1).tolist()
    return answers


def _last_only(model: PreTrainedModel) -> dict[str, int]:
    """What keeps a model from computing logits for a whole context, where it can be told."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known else {}


def outcome(item: Item, text: str, new: list[int], reference: list[int]) -> dict[str, float]:
    """The measures of one answer.

    Args:
        item: the question.
        text: the answer as text.
        new: the same as token ids.
        reference: the token ids of full precision.
    """
    if not item.answer:
        pairs = zip(new, reference, strict=True)
        agreeing = next((at for at, (a, b) in enumerate(pairs) if a != b), len(new))
        return {"tokens": float(agreeing), "equal": float(agreeing == len(new))}
    text = text.lstrip()
    end = len(item.answer)
    # 48213 is not answered by 482139.
    exact = text.startswith(item.answer) and not text[end : end + 1].isalnum()
    measures = {"exact": float(exact)}
    if item.task == "copy":
        words = item.answer.split()
        right = sum(a == b for a, b in zip(text.split(), words, strict=False))
        measures["words"] = right / len(words)
    return measures


def summarise_items(
    label: str,
    items: Sequence[Item],
    full: Sequence[dict[str, float]],
    found: Sequence[dict[str, float]],
) -> list[Score]:
    """The scores of one format, each task as a whole and then in its groups.

    Args:
        label: of the format.
        items: of all tasks.
        full: full precision's measures of each item.
        found: the format's.
    """
    parts: dict[tuple[str, str, str | None], list[int]] = {}
    for task in dict.fromkeys(item.task for item in items):
        own = [number for number, item in enumerate(items) if item.task == task]
        for group in dict.fromkeys((None, *(items[number].group for number in own))):
            members = [number for number in own if group in (None, items[number].group)]
            for measure in found[own[0]]:
                parts[task, measure, group] = members
    return [
        Score(
            format=label,
            task=task,
            measure=measure,
            group=group,
            items=len(members),
            per_item=() if group else tuple(found[number][measure] for number in members),
            **compare_items(  # type: ignore[arg-type]
                [full[number][measure] for number in members],
                [found[number][measure] for number in members],
            ),
        )
        for (task, measure, group), members in parts.items()
    ]

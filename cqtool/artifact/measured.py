"""reports/quality.json: what `cqtool check` measured, read for the model card and `inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cqtool.errors import ArtifactError
from cqtool.layout.config import MAX_JSON_BYTES, QUALITY_NAME, REPORTS_NAME
from cqtool.layout.fields import Fields
from cqtool.strictjson import read_object

FORMAT_VERSION = 1

_REMEDY = "Run `cqtool check` again."


@dataclass(frozen=True)
class QualityRow:
    """One cache format, measured; the first row of a report is the unquantized cache.

    Attributes:
        name: format, for example ``cq-8c8b``.
        label: the same for a reader.
        objective: what the codebooks were fitted to, None where nothing was fitted.
        fitted: whether it was fitted to samples of the model.
        effective_bits: stored bits per number, all counted, at the evaluation's window length.
        cache_bytes_per_token: the same in bytes per token of the whole model.
        cache_bytes_per_token_full: bytes per token of the unquantized cache.
        perplexity: `perplexity_se` is its standard error, None with a single window; the other
            figures have theirs.
        perplexity_increase: ratio to the perplexity with the unquantized cache, minus 1.
        kl: mean KL divergence per token from the unquantized cache, in nats.
        top1: share of tokens whose most probable successor is the same.
    """

    name: str
    label: str
    objective: str | None
    fitted: bool
    window: int
    sinks: int
    bits_per_channel: float
    effective_bits: float
    cache_bytes_per_token: float
    cache_bytes_per_token_full: float
    perplexity: float
    perplexity_se: float | None
    perplexity_increase: float
    perplexity_increase_se: float | None
    kl: float
    kl_se: float | None
    top1: float
    top1_se: float | None


@dataclass(frozen=True)
class PairedRow:
    """The checked format minus another one in one measure, on the same windows or items.

    Attributes:
        other: label of the other format's row.
        better: in how many of the `pairs` the checked format was the better one.
    """

    other: str
    measure: str
    pairs: int
    difference: float
    difference_se: float | None
    better: int


@dataclass(frozen=True)
class Gate:
    """A bound that the quality had to keep."""

    name: str
    limit: float
    value: float
    passed: bool


@dataclass(frozen=True)
class TaskScore:
    """A format's mean over the items of a task in generated text, or of a `group` of them.

    Attributes:
        format: label of the format's row.
        measure: ``exact`` and ``words`` are shares of what is right; ``tokens`` counts those before
            the first that differs from full precision, ``equal`` is the share of texts without one.
        difference: to the unquantized cache on the same items.
    """

    format: str
    task: str
    measure: str
    group: str | None
    items: int
    score: float
    score_se: float | None
    difference: float
    difference_se: float | None


@dataclass(frozen=True)
class Generation:
    """What was measured on tasks: `items` items of each, None for all."""

    tasks: tuple[str, ...]
    items: int | None
    scores: tuple[TaskScore, ...]


@dataclass(frozen=True)
class PartCost:
    """What the keys or values of a layer, or of one `head` of it, cost when they alone are coded;
    None for all heads."""

    layer: int
    head: int | None
    kind: str
    bits_per_channel: float
    kl: float
    kl_se: float | None


@dataclass(frozen=True)
class QualityReport:
    """``quality.json``, checked; `evaluation` describes the text that was used.

    `context` is the number of tokens that bits are also computed for, by which tasks of growing
    length go as well. `generation` (built-in tasks) and `tasks` (of lm-evaluation-harness) are None
    where none were asked for, or the report is older than they are; older ones have nothing
    `paired` and no `context` either. `by_layer` and `by_head` are empty where not asked for.
    """

    model: str
    evaluation: Mapping[str, Any]
    windows: int
    window_length: int
    mode: str
    device: str
    dtype: str
    versions: Mapping[str, Any]
    rows: tuple[QualityRow, ...]
    gates: tuple[Gate, ...]
    generation: Generation | None
    tasks: Generation | None
    paired: tuple[PairedRow, ...]
    context: int
    by_layer: tuple[PartCost, ...] = ()
    by_head: tuple[PartCost, ...] = ()

    def row_of(self, name: str, objective: str) -> QualityRow | None:
        """The row of the format `name` fitted to `objective`, if it was measured."""
        for row in self.rows:
            if row.name == name and row.objective == objective:
                return row
        return None


def read_quality(folder: Path) -> QualityReport | None:
    """Read ``reports/quality.json`` of a calibration folder or artifact; None if there is none.

    Raises:
        ArtifactError: the file is damaged or of another version.
    """
    path = folder / REPORTS_NAME / QUALITY_NAME
    if not path.exists():
        return None
    root = Fields(read_object(path, _REMEDY, limit=MAX_JSON_BYTES), str(path), _REMEDY)
    if root.integer("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has a format version other than {FORMAT_VERSION}; upgrade cqtool (pip install "
            "-U cqtool), or run `cqtool check` again."
        )
    evaluation = root.child("evaluation")
    length = evaluation.integer("window_length", minimum=1)
    return QualityReport(
        model=root.string("model"),
        evaluation=evaluation.values,
        windows=evaluation.integer("windows", minimum=1),
        window_length=length,
        mode=root.string("mode"),
        device=root.string("device"),
        dtype=root.string("dtype"),
        versions=root.mapping("versions"),
        rows=tuple(_row(row) for row in root.children("rows")),
        gates=tuple(
            Gate(
                name=gate.string("name"),
                limit=gate.number("limit"),
                value=gate.number("value"),
                passed=gate.boolean("passed"),
            )
            for gate in root.children("gates", empty=True)
        ),
        generation=_scores(root, "generation"),
        tasks=_scores(root, "tasks"),
        paired=_paired(root) if "paired" in root.values else (),
        context=root.integer("context", minimum=1) if "context" in root.values else length,
        by_layer=_costs(root, "by_layer"),
        by_head=_costs(root, "by_head"),
    )


class Scored(Protocol):
    """What a score is of; `group` is a part of the task, or None for all of it."""

    @property
    def task(self) -> str: ...
    @property
    def measure(self) -> str: ...
    @property
    def group(self) -> str | None: ...


AnyScore = TypeVar("AnyScore", bound=Scored)


def by_measure(scores: Sequence[AnyScore]) -> list[tuple[str, AnyScore]]:
    """Scores as tables show them, the formats under each other for every measure of every task.

    Args:
        scores: of all formats.

    Returns:
        Each score, and before it what it measures: ``exact``, or of a group of items
        ``exact, 1024 tokens``.
    """
    measures: dict[tuple[str, str, str | None], list[AnyScore]] = {}
    for one in scores:
        measures.setdefault((one.task, one.measure, one.group), []).append(one)
    return [
        (f"{measure}, {group}" if group else measure, one)
        for (_, measure, group), alike in measures.items()
        for one in alike
    ]


def _paired(root: Fields) -> tuple[PairedRow, ...]:
    return tuple(
        PairedRow(
            other=one.string("other"),
            measure=one.string("measure"),
            pairs=one.integer("pairs", minimum=1),
            difference=one.number("difference"),
            difference_se=one.optional_number("difference_se"),
            better=one.integer("better", minimum=0),
        )
        for one in root.children("paired", empty=True)
    )


def _costs(root: Fields, name: str) -> tuple[PartCost, ...]:
    return tuple(
        PartCost(
            layer=one.integer("layer", minimum=0),
            head=one.integer("head", minimum=0) if name == "by_head" else None,
            kind=one.string("kind"),
            bits_per_channel=one.number("bits_per_channel"),
            kl=one.number("kl"),
            kl_se=one.optional_number("kl_se"),
        )
        for one in (root.children(name) if root.values.get(name) else ())
    )


def _scores(root: Fields, name: str) -> Generation | None:
    if root.values.get(name) is None:
        return None
    section = root.child(name)
    scores = tuple(
        TaskScore(
            format=score.string("format"),
            task=score.string("task"),
            measure=score.string("measure"),
            group=score.optional_string("group"),
            items=score.integer("items", minimum=1),
            score=score.number("score"),
            score_se=score.optional_number("score_se"),
            difference=score.number("difference"),
            difference_se=score.optional_number("difference_se"),
        )
        for score in section.children("scores")
    )
    # The harness is asked for groups of tasks too: a command repeats what was asked for.
    asked = section.values.get("tasks") if name == "tasks" else None
    tasks = asked if isinstance(asked, list) else [score.task for score in scores]
    items = None if section.values.get("items") is None else section.integer("items", minimum=1)
    return Generation(tuple(dict.fromkeys(map(str, tasks))), items, scores)


def _row(row: Fields) -> QualityRow:
    return QualityRow(
        name=row.string("name"),
        label=row.string("label"),
        objective=row.optional_string("objective"),
        # Before there was this field, only codebooks were fitted.
        fitted=row.values.get("fitted", row.values.get("objective") is not None) is True,
        window=row.integer("window", minimum=0),
        sinks=row.integer("sinks", minimum=0),
        bits_per_channel=row.number("bits_per_channel"),
        effective_bits=row.number("effective_bits"),
        cache_bytes_per_token=row.number("cache_bytes_per_token"),
        cache_bytes_per_token_full=row.number("cache_bytes_per_token_full", above=0),
        perplexity=row.number("perplexity"),
        perplexity_se=row.optional_number("perplexity_se"),
        perplexity_increase=row.number("perplexity_increase"),
        perplexity_increase_se=row.optional_number("perplexity_increase_se"),
        kl=row.number("kl"),
        kl_se=row.optional_number("kl_se"),
        top1=row.number("top1"),
        top1_se=row.optional_number("top1_se"),
    )

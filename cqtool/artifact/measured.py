"""reports/quality.json: what `cqtool check` measured, read for the model card and `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """What was measured on generated text: `items` items of each of the tasks."""

    tasks: tuple[str, ...]
    items: int
    scores: tuple[TaskScore, ...]


@dataclass(frozen=True)
class QualityReport:
    """``quality.json``, checked; `evaluation` describes the text that was used.

    `generation` is None where no tasks were asked for, or the report is older than they are.
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
    return QualityReport(
        model=root.string("model"),
        evaluation=evaluation.values,
        windows=evaluation.integer("windows", minimum=1),
        window_length=evaluation.integer("window_length", minimum=1),
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
        generation=_generation(root) if root.values.get("generation") is not None else None,
    )


def _generation(root: Fields) -> Generation:
    section = root.child("generation")
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
    tasks = tuple(dict.fromkeys(score.task for score in scores))
    return Generation(tasks, section.integer("items", minimum=1), scores)


def _row(row: Fields) -> QualityRow:
    return QualityRow(
        name=row.string("name"),
        label=row.string("label"),
        objective=row.optional_string("objective"),
        window=row.integer("window", minimum=0),
        sinks=row.integer("sinks", minimum=0),
        bits_per_channel=row.number("bits_per_channel"),
        effective_bits=row.number("effective_bits"),
        cache_bytes_per_token=row.number("cache_bytes_per_token"),
        cache_bytes_per_token_full=row.number("cache_bytes_per_token_full"),
        perplexity=row.number("perplexity"),
        perplexity_se=row.optional_number("perplexity_se"),
        perplexity_increase=row.number("perplexity_increase"),
        perplexity_increase_se=row.optional_number("perplexity_increase_se"),
        kl=row.number("kl"),
        kl_se=row.optional_number("kl_se"),
        top1=row.number("top1"),
        top1_se=row.optional_number("top1_se"),
    )

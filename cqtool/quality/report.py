"""Rows of the quality table, their standard errors, and the gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from cqtool.quality.layers import HeadCost, LayerCost
from cqtool.quality.measure import WindowFigures
from cqtool.quality.positions import PositionFigures, by_position
from cqtool.quality.scores import Generation, HarnessScores, Score
from cqtool.quality.statistics import Paired, compare_pairs, standard_error

FORMAT_VERSION = 1
MOST_ITEMS = 200_000
"""Figures of single items, over all formats and tasks, that a report keeps: some 3 MB of JSON."""


@dataclass(frozen=True)
class Gates:
    """Limits; None is no limit.

    Attributes:
        max_ppl_increase: largest relative increase of perplexity (0.03 is 3 %).
        max_kl: largest mean KL per token, in nats.
        min_top1: smallest share of positions with the same most likely token.
    """

    max_ppl_increase: float | None = None
    max_kl: float | None = None
    min_top1: float | None = None


@dataclass(frozen=True)
class GateResult:
    """One gate's verdict."""

    name: str
    limit: float
    value: float
    passed: bool


@dataclass(frozen=True)
class Row:
    """One format's figures. Standard errors are over windows, None with a single one.

    Attributes:
        name: the format, such as ``cq-8c8b`` or ``int4``.
        label: how tables call it.
        objective: how its codebooks were fitted, None without codebooks.
        fitted: whether it was fitted to samples of the model.
        origin: what it was made from: digests of a calibration's files, of a recipe (with its
            seed) or of samples, or the name of a scheme; empty for full precision.
        key_bits: bits a channel of the keys costs, scales counted, window and sinks not.
        value_bits: the same for values.
        bits_per_channel: the mean of both, weighted by channels.
        window: newest tokens in full precision.
        sinks: first tokens in full precision.
        effective_bits: measured bits a channel at the evaluated length, everything counted; at
            the :func:`cqtool.quality.storage.typical_length` of formats with blocks.
        context_bits: the same, computed for the report's `context`, see
            :func:`cqtool.quality.storage.context_bits`.
        cache_bytes_per_token: the same in bytes a token, over all layers.
        cache_bytes_per_token_full: what transformers' own cache holds for a token.
        perplexity: exp of the mean negative log-likelihood.
        perplexity_increase: relative to full precision (paired: same windows).
        kl: mean KL(full || this) per token, in nats.
        top1: share of positions with the same most likely token.
        per_window: what these are means of, for each window: ``nll``, the mean negative
            log-likelihood, ``kl`` and ``top1``.
        positions: KL and agreement by position in the window.
    """

    name: str
    label: str
    objective: str | None
    fitted: bool
    origin: dict[str, str | int]
    key_bits: float
    value_bits: float
    bits_per_channel: float
    window: int
    sinks: int
    effective_bits: float
    context_bits: float
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
    per_window: dict[str, list[float]]
    positions: tuple[PositionFigures, ...]


@dataclass(frozen=True)
class Skipped:
    """A format that could not be measured here, and the sentence that says why: one of ``--compare
    all``, or one that did not fit into memory."""

    name: str
    reason: str


@dataclass(frozen=True)
class QualityReport:
    """All rows of one check; the first is full precision, the second the checked calibration.

    `paired` holds the differences of the checked row to every further one, first to those of
    ``--against``, whose labels are `against`. `context` is in tokens.
    """

    model: str
    evaluation: dict[str, Any]
    mode: str
    device: str
    dtype: str
    versions: dict[str, str]
    rows: tuple[Row, ...]
    gates: tuple[GateResult, ...]
    generation: Generation | None
    tasks: HarnessScores | None
    context: int
    against: tuple[str, ...]
    paired: tuple[Paired, ...]
    skipped: tuple[Skipped, ...]
    by_layer: tuple[LayerCost, ...] = ()
    by_head: tuple[HeadCost, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no gate was missed."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, as kept in reports/quality.json.

        Without the single items of tasks where these come to more than :data:`MOST_ITEMS`: readers
        refuse files that are too large.
        """
        value = {
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "rows": [asdict(row) for row in self.rows],
            "gates": [asdict(gate) for gate in self.gates],
        }
        for part in (value["generation"], value["tasks"]):
            scores = part["scores"] if part else ()
            if sum(len(score["per_item"]) for score in scores) > MOST_ITEMS:
                for score in scores:
                    score["per_item"] = ()
        return value


def summarise(full: WindowFigures, figures: WindowFigures) -> dict[str, float | None]:
    """The statistical columns of a row.

    The window is the unit: tokens of one text are not independent. The error of an exponential is
    the delta method's, exp(mean) times the error of the mean; the increase is paired by window.
    """
    difference = [b - a for a, b in zip(full.nll, figures.nll, strict=True)]
    perplexity, ratio = math.exp(fmean(figures.nll)), math.exp(fmean(difference))
    return {
        "perplexity": perplexity,
        "perplexity_se": _scaled(standard_error(figures.nll), perplexity),
        "perplexity_increase": ratio - 1,
        "perplexity_increase_se": _scaled(standard_error(difference), ratio),
        "kl": fmean(figures.kl),
        "kl_se": standard_error(figures.kl),
        "top1": fmean(figures.top1),
        "top1_se": standard_error(figures.top1),
    }


def row_figures(full: WindowFigures, figures: WindowFigures, tokens: int) -> dict[str, Any]:
    """What of a :class:`Row` comes from its windows of `tokens` tokens."""
    return {
        **summarise(full, figures),
        "per_window": {"nll": figures.nll, "kl": figures.kl, "top1": figures.top1},
        "positions": by_position(tokens, figures.kl_at, figures.top1_at),
    }


def paired_with(
    checked: Row, others: Sequence[Row], scores: Sequence[Score] = ()
) -> tuple[Paired, ...]:
    """The checked row against each of `others`: its windows, then the items of the tasks.

    Args:
        checked: the calibration's row.
        others: rows over the same windows.
        scores: of all formats, in any order.
    """
    found = []
    for other in others:
        names = checked.label, other.label
        for measure in ("kl", "nll", "top1"):
            values = (row.per_window[measure] for row in (checked, other))
            higher = measure == "top1"
            found.append(compare_pairs(names, measure, *values, higher_is_better=higher))
        own = {
            (one.task, one.measure): one
            for one in scores
            if one.format == checked.label and one.per_item
        }
        for theirs in scores:
            mine = own.get((theirs.task, theirs.measure))
            if theirs.format != other.label or mine is None or not theirs.per_item:
                continue
            found.append(
                compare_pairs(
                    names,
                    theirs.measure,
                    mine.per_item,
                    theirs.per_item,
                    task=theirs.task,
                    higher_is_better=theirs.higher_is_better,
                )
            )
    return tuple(found)


def judge(row: Row, gates: Gates) -> tuple[GateResult, ...]:
    """Hold a row to the gates that have a limit; NaN never passes."""
    bounds = (
        ("max_ppl_increase", gates.max_ppl_increase, row.perplexity_increase, 1),
        ("max_kl", gates.max_kl, row.kl, 1),
        ("min_top1", gates.min_top1, row.top1, -1),
    )
    return tuple(
        GateResult(name, limit, value, sign * value <= sign * limit)
        for name, limit, value, sign in bounds
        if limit is not None
    )


def _scaled(error: float | None, factor: float) -> float | None:
    return None if error is None else error * factor

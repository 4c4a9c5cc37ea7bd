"""Rows of the quality table, their standard errors, and the gates."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from cqtool.quality.measure import WindowFigures

FORMAT_VERSION = 1


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
        key_bits: bits a channel of the keys costs, scales counted, window and sinks not.
        value_bits: the same for values.
        bits_per_channel: the mean of both, weighted by channels.
        window: newest tokens in full precision.
        sinks: first tokens in full precision.
        effective_bits: measured bits a channel at the evaluated length, everything counted.
        cache_bytes_per_token: the same in bytes a token, over all layers.
        cache_bytes_per_token_full: what transformers' own cache holds for a token.
        perplexity: exp of the mean negative log-likelihood.
        perplexity_increase: relative to full precision (paired: same windows).
        kl: mean KL(full || this) per token, in nats.
        top1: share of positions with the same most likely token.
    """

    name: str
    label: str
    objective: str | None
    key_bits: float
    value_bits: float
    bits_per_channel: float
    window: int
    sinks: int
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
class Score:
    """One format's mean over the items of a task. Standard errors are over items.

    Attributes:
        format: the label of the format's row.
        task: ``passkey``, ``multi-key``, ``copy``, ``arithmetic`` or ``divergence``.
        measure: ``exact`` for the share of right answers, ``words`` for that of right words,
            ``tokens`` for the tokens before the first that differs from full precision, ``equal``
            for the share of continuations without such a token.
        group: the part of the task, such as ``1024 tokens``; None for all of it.
        items: how many.
        score: the mean.
        difference: to full precision, paired: the items are the same.
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
    """Scores of generated text: all tasks of the first format, then of the next.

    Attributes:
        tasks: the tasks' names.
        items: items of each.
        seed: that they were made from.
        scores: one for each format, task, measure and group.
    """

    tasks: tuple[str, ...]
    items: int
    seed: int
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class QualityReport:
    """All rows of one check; the first is full precision, the second the checked calibration."""

    model: str
    evaluation: dict[str, Any]
    mode: str
    device: str
    dtype: str
    versions: dict[str, str]
    rows: tuple[Row, ...]
    gates: tuple[GateResult, ...]
    generation: Generation | None = None

    @property
    def passed(self) -> bool:
        """Whether no gate was missed."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, as kept in reports/quality.json."""
        return {
            "format_version": FORMAT_VERSION,
            **asdict(self),
            "rows": [asdict(row) for row in self.rows],
            "gates": [asdict(gate) for gate in self.gates],
        }


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


def compare_items(full: list[float], found: list[float]) -> dict[str, float | None]:
    """The statistical columns of a score, from the outcomes of the same items."""
    difference = [b - a for a, b in zip(full, found, strict=True)]
    return {
        "score": fmean(found),
        "score_se": standard_error(found),
        "difference": fmean(difference),
        "difference_se": standard_error(difference),
    }


def standard_error(values: list[float]) -> float | None:
    """Standard error of the mean, None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


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

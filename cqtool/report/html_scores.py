"""Tables of the HTML report that compare formats, paired by window and by scores of tasks, and the
parts of a cache by what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from cqtool.artifact.measured import Generation, PartCost, QualityReport, by_measure
from cqtool.report.markup import Markup, table

_MOST_PARTS = 12
"""Parts that a table shows: models have hundreds."""


def costliest(costs: Sequence[PartCost]) -> Markup:
    """The layers, or heads, whose keys or values cost the most when they alone are coded."""
    if not costs:
        return Markup()
    shown = sorted(costs, key=lambda one: -one.kl)[:_MOST_PARTS]
    by_head = shown[0].head is not None
    total = sum(one.kl for one in costs) or 1.0
    rows = [
        (
            one.layer,
            *([one.head] if by_head else []),
            f"{one.kind}s",
            f"{one.bits_per_channel:.2f}",
            with_error(one.kl, one.kl_se, ".5f"),
            f"{one.kl / total:.1%}",
        )
        for one in shown
    ]
    columns = ("Layer", *(["Head"] if by_head else []), "Of", "Bits", "KL (nats)", "Share")
    part = "one head" if by_head else "one layer"
    caption = (
        f"Only the keys or values of {part} coded, all else exact: the {len(shown)} costliest of "
        f"{len(costs)}"
    )
    numbers = range(len(columns) - 3, len(columns))
    return table(columns, rows, right=numbers, caption=caption)


def scores(title: str, measured: Generation | None) -> Markup:
    """Scores of tasks, the formats under each other for every measure."""
    if measured is None:
        return Markup()
    rows = [
        (
            one.task,
            measure,
            one.format,
            str(one.items),
            with_error(one.score, one.score_se, ".3g"),
            with_error(one.difference, one.difference_se, "+.3g"),
        )
        for measure, one in by_measure(measured.scores)
    ]
    caption = f"{title}; the difference is to full precision on the same items"
    columns = ("Task", "Measure", "Format", "Items", "Score", "Difference")
    return table(columns, rows, right=(3, 4, 5), caption=caption)


def paired(quality: QualityReport) -> Markup:
    """The checked format against each other one, window by window."""
    rows = [
        (
            one.other,
            with_error(one.difference, one.difference_se, "+.4f"),
            f"{one.better} of {one.pairs}",
        )
        for one in quality.paired
        if one.measure == "kl"
    ]
    if not rows:
        return Markup()
    caption = f"{quality.rows[1].label} minus each other format, on the same windows"
    return table(("Against", "KL (nats)", "Better in"), rows, right=(1, 2), caption=caption)


def with_error(value: float, error: float | None, form: str, scale: float = 1) -> str:
    """A figure, and its standard error if it has one, both times `scale`."""
    shown = f"{value * scale:{form}}"
    # A single window has no standard error.
    return shown if error is None else f"{shown} ± {error * scale:{form.lstrip('+')}}"

"""Tables of the HTML report that compare formats: paired by window, and by scores of tasks."""

from __future__ import annotations

from cqtool.artifact.measured import Generation, QualityReport, by_measure
from cqtool.report.markup import Markup, table


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

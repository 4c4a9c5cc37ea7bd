"""The tables that `cqtool check` prints, from the rows of its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cqtool.artifact.measured import by_measure

if TYPE_CHECKING:
    from cqtool.quality.scores import Score

COLUMNS = [
    "format",
    "bits",
    "eff. bits",
    "perplexity",
    "increase",
    "KL",
    "top-1",
    "bytes/token",
    "ratio",
]
GENERATION_COLUMNS = ["task", "measure", "format", "items", "score", "difference"]
LAYER_COLUMNS = ["layer", "of", "bits", "KL", "share"]
HEAD_COLUMNS = ["layer", "head", "of", "bits", "KL", "share"]
PAIRED_COLUMNS = ["against", "KL difference", "better in", "NLL difference"]
WIDTH = 100
"""Columns of a terminal that a table should fit."""

MOST_HEADS = 20
"""Heads that a table shows: a model has hundreds, and the report names all."""

_GAP = 2


def table_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of :data:`COLUMNS` for the rows of a quality report."""
    return [
        [
            row.get("label") or row["name"],
            _number(row.get("bits_per_channel"), "{:.2f}"),
            _number(row.get("effective_bits"), "{:.2f}"),
            _measured(row, "perplexity", "{:.3f}"),
            _measured(row, "perplexity_increase", "{:.2%}"),
            _measured(row, "kl", "{:.4f}"),
            _measured(row, "top1", "{:.2%}"),
            _number(row.get("cache_bytes_per_token"), "{:.0f}"),
            _ratio(row),
        ]
        for row in rows
    ]


def quality_table(
    rows: list[dict[str, Any]], context: int | None
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells for a terminal.

    Where they would be wider than :data:`WIDTH`, the columns that others say as well go (bytes a
    token; beside bits at a context also the ratio), the error of the perplexity (that of the
    increase, paired, is the one to look at), and the second decimal of percentages.

    Args:
        rows: of a quality report.
        context: adds a column of the bits at so many tokens; None for none.
    """
    columns, cells = list(COLUMNS), table_rows(rows)
    if context is not None:
        columns.insert(3, f"at {context}")
        for row, line in zip(rows, cells, strict=True):
            line.insert(3, _number(row["context_bits"], "{:.2f}"))
    if _width([columns, *cells]) > WIDTH:
        gone = {"bytes/token"} if context is None else {"bytes/token", "ratio"}
        kept = [at for at, name in enumerate(columns) if name not in gone]
        for row, line in zip(rows, cells, strict=True):
            line[columns.index("perplexity")] = _number(row["perplexity"], "{:.3f}")
            line[columns.index("increase")] = _measured(row, "perplexity_increase", "{:.1%}")
            line[columns.index("top-1")] = _measured(row, "top1", "{:.1%}")
        columns, *cells = [[line[at] for at in kept] for line in (columns, *cells)]
    return columns, cells


def paired_rows(paired: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of :data:`PAIRED_COLUMNS`: the checked format minus each other one."""
    windows = [one for one in paired if one["unit"] == "windows"]
    likelihood = {one["other"]: one for one in windows if one["measure"] == "nll"}
    return [
        [
            one["other"],
            _measured(one, "difference", "{:+.4f}", "{:.4f}"),
            f"{one['better']} of {one['pairs']}",
            _measured(likelihood[one["other"]], "difference", "{:+.4f}", "{:.4f}"),
        ]
        for one in windows
        if one["measure"] == "kl"
    ]


def generation_rows(scores: Sequence[Score]) -> list[list[str]]:
    """The cells of :data:`GENERATION_COLUMNS`: the formats under each other for every measure."""
    return [
        [
            one.task,
            measure,
            one.format,
            str(one.items),
            _measured(vars(one), "score", "{:.3g}"),
            _measured(vars(one), "difference", "{:.3g}"),
        ]
        for measure, one in by_measure(scores)
    ]


def _width(lines: Sequence[Sequence[str]]) -> int:
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return sum(widths) + _GAP * (len(widths) - 1)


def layer_rows(costs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of :data:`LAYER_COLUMNS`, by cost; the share is of the sum of all."""
    total = sum(one["kl"] for one in costs) or 1.0
    return [
        [
            str(one["layer"]),
            f"{one['kind']}s",
            _number(one["bits_per_channel"], "{:.2f}"),
            _measured(one, "kl", "{:.5f}"),
            f"{one['kl'] / total:.1%}",
        ]
        for one in sorted(costs, key=lambda one: -one["kl"])
    ]


def head_rows(costs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of :data:`HEAD_COLUMNS` of the costliest :data:`MOST_HEADS`; the share is of the
    sum of all."""
    costliest = sorted(costs, key=lambda one: -one["kl"])
    return [
        [layer, str(one["head"]), *cells]
        for one, (layer, *cells) in zip(costliest, layer_rows(costs), strict=True)
    ][:MOST_HEADS]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _measured(row: dict[str, Any], name: str, form: str, error_form: str = "") -> str:
    value, error = row.get(name), row.get(f"{name}_se")
    if value is None or not error:
        return _number(value, form)
    return f"{form.format(value)} ± {(error_form or form).format(error)}"


def _ratio(row: dict[str, Any]) -> str:
    part, whole = row.get("cache_bytes_per_token"), row.get("cache_bytes_per_token_full")
    return f"{whole / part:.1f}x" if part and whole else "-"

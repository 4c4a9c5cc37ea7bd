"""A table for a reader, and how its cells are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Cells to print, and what stands above and below.

    Attributes:
        title: a line above.
        columns: headings.
        rows: as many cells each as there are headings.
        notes: lines below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def unavailable(found: dict[str, Any]) -> Iterator[str]:
    """What of a part was not timed, and why."""
    # A package that is not there is the common case, and no news.
    missing = [row["name"] for row in found["unavailable"] if row["reason"] == "not installed"]
    for row in found["unavailable"]:
        if row["reason"] != "not installed":
            yield f"not timed: {row['name']}: {row['reason']}"
    if missing:
        yield f"not installed: {', '.join(missing)}"


def micro(spread: dict[str, Any]) -> str:
    """The median in microseconds."""
    return f"{spread['median'] * 1e6:.1f}"


def times(value: float | None) -> str:
    """How many times as much."""
    return "-" if value is None else f"{value:.2f}x"


def gigabytes(value: int | None) -> str:
    """Bytes in units of 10^9."""
    return "-" if value is None else f"{value / 1e9:.2f}"

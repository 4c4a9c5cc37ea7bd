"""Prints a report through the command line's sink, and draws its figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cqtool.bench.tables import headline, tables


class Sink(Protocol):
    """The part of the command line's output that a report needs."""

    def text(self, line: str = "") -> None:
        """Print a line for the reader."""

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
    ) -> None:
        """Print a table for the reader."""

    def warn(self, message: str) -> None:
        """Say on stderr what the reader should know in any case."""


def show(report: dict[str, Any], sink: Sink) -> None:
    """Print a report as tables, and say why some of it is missing."""
    sink.text(headline(report))
    for table in tables(report):
        sink.text()
        sink.table(table.columns, table.rows, table.title)
        for line in table.notes:
            sink.text(line)
    for reason in dict.fromkeys(item["reason"] for item in report["skipped"]):
        sink.warn(reason)


def draw(report: dict[str, Any], path: Path, sink: Sink) -> None:
    """Write the figure, if anything was measured that it shows.

    Raises:
        EnvironmentProblem: `path` cannot be written.
    """
    from cqtool.bench.plot import can_plot, plot_bench

    if can_plot(report):
        plot_bench(report, path)
        sink.text(str(path))
    else:
        sink.warn(f"Nothing was measured that could be drawn; {path} is not written.")

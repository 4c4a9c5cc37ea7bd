"""Where every command prints: data to stdout, everything else to stderr.

On a terminal there are rich tables and moving bars; anywhere else plain lines that a log keeps
readable. Nothing below `cli/` prints.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cqtool.errors import EnvironmentProblem
from cqtool.files import explain_os_errors
from cqtool.progress import SILENT, Progress, Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_NUMBER_MARKS = frozenset("0123456789.,+-±%x× einfa–—")
"""Characters a numeric cell consists of, such as `12.3 ± 0.4`, `1.5e-3`, `nan`, `-`."""


class Output:
    """The one sink of a command's output.

    Args:
        json: print nothing on stdout but the one document of :meth:`result`.
        quiet: no human text, no notes and no progress; warnings and errors stay.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self._bars: _Bars | None = None
        _calm_libraries(show_bars=sys.stderr.isatty() and not quiet)

    @property
    def human(self) -> bool:
        """Whether text for a reader goes to stdout."""
        return not (self.json or self.quiet)

    def text(self, line: str = "") -> None:
        """Print a line for the reader."""
        if self.human:
            write_stdout(line + "\n")

    def raw(self, text: str) -> None:
        """Print `text` for the reader as it is, without a line end (streamed tokens)."""
        if self.human:
            write_stdout(text)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        title: str | None = None,
        right: Collection[int] | None = None,
    ) -> None:
        """Print a table for the reader.

        Args:
            columns: headings.
            rows: cells, as many per row as there are headings.
            title: a line above the table.
            right: indices of the right-aligned columns; by default those that hold only numbers.
        """
        if not self.human:
            return
        if right is None:
            right = _numeric_columns(len(columns), rows)
        if sys.stdout.isatty():
            write_stdout(_rich_table(columns, rows, title, right))
        else:
            write_stdout(_plain_table(columns, rows, title, right))

    def result(self, value: dict[str, Any]) -> None:
        """With --json, print `value` as the one JSON document on stdout; numbers that JSON lacks
        (NaN, infinity) become null."""
        if self.json:
            ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
            text = json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, allow_nan=False)
            write_stdout(text + "\n")

    def note(self, message: str) -> None:
        """Say on stderr what is going on; nothing with --quiet."""
        if not self.quiet:
            self._stderr(message)

    def warn(self, message: str) -> None:
        """Say on stderr what the reader should know even with --quiet."""
        self._stderr(message, label="warning", style="yellow")

    def progress(self) -> Progress:
        """Where long work reports to: bars on a terminal, plain lines elsewhere."""
        if self.quiet:
            return SILENT
        if not sys.stderr.isatty():
            return _PlainProgress()
        if self._bars is None:
            self._bars = _Bars()
        return self._bars

    def _stderr(self, message: str, label: str = "", style: str = "") -> None:
        if self._bars is not None and self._bars.console is not None:
            # A bar is on the screen: print above it.
            from rich.text import Text

            head = (Text(label + ": ", style=style),) if label else ()
            self._bars.console.print(Text.assemble(*head, message))
        else:
            write_stderr(message, label=label, style=style)


def write_stdout(text: str) -> None:
    """Write to stdout at once; when the reader has gone (`| head`), carry on without one.

    Raises:
        EnvironmentProblem: stdout is a file on a full disk.
    """
    try:
        with explain_os_errors(Path("standard output")):
            sys.stdout.write(text)
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
    except EnvironmentProblem:
        _discard_stdout()
        raise


def _discard_stdout() -> None:
    # What could not be written is still in the buffer: at exit it shall not fail a second time.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def write_stderr(message: str, label: str = "", style: str = "") -> None:
    """Write one message to stderr, its label coloured where colours are wanted."""
    if label and sys.stderr.isatty():
        from rich.text import Text

        _console(sys.stderr).print(Text.assemble((label + ": ", style), message), soft_wrap=True)
    else:
        print(f"{label}: {message}" if label else message, file=sys.stderr, flush=True)


class _PlainTask:
    def advance(self, amount: int = 1) -> None:
        pass


class _PlainProgress:
    """One line when a task begins and one when it is done."""

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Task]:
        resumed = f", {done} done before" if done else ""
        self.note(f"{label} ({total}{resumed})")
        start = time.monotonic()
        yield _PlainTask()
        self.note(f"{label}: done in {time.monotonic() - start:.1f} s")

    def note(self, message: str) -> None:
        write_stderr(message)


class _BarTask:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._task, amount)


class _Bars:
    """Rich bars on stderr, shown while at least one task is open."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._open = 0

    @property
    def console(self) -> Console | None:
        """The console that prints above the bars, or None while there are none."""
        return self._bars.console if self._bars is not None else None

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Task]:
        bars = self._show()
        task = bars.add_task(label, total=total, completed=done)
        try:
            yield _BarTask(bars, task)
        finally:
            self._open -= 1
            if self._open == 0:
                bars.stop()
                self._bars = None

    def note(self, message: str) -> None:
        if self.console is None:
            write_stderr(message)
        else:
            self.console.print(message, markup=False, highlight=False)

    def _show(self) -> Bars:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self._open += 1
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=_console(sys.stderr),
            )
            self._bars.start()
        return self._bars


def _calm_libraries(*, show_bars: bool) -> None:
    """Keep the libraries' own bars and chatter off stderr, before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not show_bars:
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _console(file: TextIO) -> Console:
    from rich.console import Console

    # Console itself honours NO_COLOR and TERM=dumb.
    return Console(file=file, highlight=False)


def _numeric_columns(count: int, rows: Sequence[Sequence[str]]) -> set[int]:
    def numeric(cell: str) -> bool:
        return set(cell) <= _NUMBER_MARKS

    return {i for i in range(1, count) if all(numeric(row[i]) for row in rows)}


def _plain_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None,
    right: Collection[int],
) -> str:
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    lines = [title] if title else []
    lines += [line(columns), line(["-" * width for width in widths]), *map(line, rows)]
    return "\n".join(lines) + "\n"


def _rich_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None,
    right: Collection[int],
) -> str:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i in right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console = _console(sys.stdout)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

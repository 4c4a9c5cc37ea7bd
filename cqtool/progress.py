"""Progress reporting that knows nothing of terminals.

Long work takes a :class:`Progress`; the command line passes one that draws bars, everybody else
gets the silent default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: int = 1) -> None:
        """Report `amount` further units done."""


class Progress(Protocol):
    """Where long work reports to."""

    def task(self, label: str, total: int, done: int = 0) -> AbstractContextManager[Task]:
        """Open a bar of `total` units, `done` of them finished by an earlier run."""

    def note(self, message: str) -> None:
        """Say one line about what is going on (to stderr, never to stdout)."""


class _SilentTask:
    def advance(self, amount: int = 1) -> None:
        pass


class SilentProgress:
    """Reports nothing."""

    @contextmanager
    def task(self, label: str, total: int, done: int = 0) -> Iterator[Task]:
        """See :meth:`Progress.task`."""
        yield _SilentTask()

    def note(self, message: str) -> None:
        """See :meth:`Progress.note`."""


SILENT: Progress = SilentProgress()

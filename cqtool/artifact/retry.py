"""Trying again what failed because of a passing trouble of the Hub or the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import sleep
from typing import TypeVar

from cqtool.artifact.hub_errors import passing_trouble
from cqtool.progress import SILENT, Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """How often and how patiently.

    Attributes:
        attempts: tries in all.
        doubtful_attempts: tries where it may be that no Hub is there at all.
        first: seconds before the second try; they double from try to try.
        longest: the most they grow to.
        patience: the longest wait that the Hub may ask for, in seconds; the Hub counts requests in
            windows of 300.
    """

    attempts: int = 6
    doubtful_attempts: int = 3
    first: float = 1.0
    longest: float = 30.0
    patience: float = 330.0

    def call(self, action: Callable[[], T], progress: Progress = SILENT) -> T:
        """The result of `action`, which must be safe to repeat.

        Raises:
            Exception: what `action` raised last, or first where trying again would not help.
        """
        done = 0
        while True:
            try:
                return action()
            except Exception as error:
                done += 1
                trouble = passing_trouble(error)
                if trouble is None:
                    raise
                wait = min(self.longest, self.first * 2 ** (done - 1))
                if trouble.wait is not None:
                    wait = max(wait, trouble.wait)
                limit = self.doubtful_attempts if trouble.doubtful else self.attempts
                if done >= limit or wait > self.patience:
                    raise
                progress.note(f"{trouble.what}; trying again in {wait:.0f} s")
            sleep(wait)

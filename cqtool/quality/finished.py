"""Finished rows on disk, so that a check that was interrupted goes on where it stopped.

Each row is a file of its own in ``<calibration>.check.partial``, as a calibration works in
``<out>.partial``. Its name is the digest of everything that decides the row: a later check finds
the rows that are still true, whatever else it is asked for, and measures the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cqtool.errors import EnvironmentProblem
from cqtool.files import digest_json, write_json
from cqtool.layout.config import MAX_JSON_BYTES
from cqtool.progress import Progress
from cqtool.quality.candidates import Candidate
from cqtool.quality.positions import PositionFigures
from cqtool.quality.report import Row
from cqtool.quality.scores import Score
from cqtool.strictjson import read_object


@dataclass(frozen=True)
class Measured:
    """All about one format: its row, and its scores in generated text and in the harness."""

    row: Row
    generation: tuple[Score, ...] = ()
    tasks: tuple[Score, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measured:
        """What ``dataclasses.asdict`` made, back from JSON."""
        row = dict(value["row"])
        row["positions"] = tuple(PositionFigures(**one) for one in row["positions"])
        return cls(Row(**row), _scores(value["generation"]), _scores(value["tasks"]))


@dataclass(frozen=True)
class FullScores:
    """Full precision in the tasks, which every format is paired with.

    Attributes:
        answers: token ids of its answers to the items of the built-in tasks.
        tasks: its scores in the harness.
    """

    answers: list[list[int]]
    tasks: tuple[Score, ...]


def _scores(values: Sequence[Mapping[str, Any]]) -> tuple[Score, ...]:
    return tuple(Score(**{**one, "per_item": tuple(one["per_item"])}) for one in values)


class FinishedRows:
    """The rows of checks of one calibration that did not come to their end.

    Args:
        calibration: the folder that is checked.
        about: what decides all rows of this check: model, text, settings, versions.
        progress: where notes go.
    """

    def __init__(self, calibration: Path, about: Mapping[str, Any], progress: Progress) -> None:
        # Resolved, because `.` has no name to put something beside.
        calibration = calibration.resolve()
        self.folder = calibration.with_name(f"{calibration.name}.check.partial")
        self._about, self._progress = dict(about), progress
        self._writable = True

    def find(self, candidate: Candidate) -> Measured | None:
        """What an earlier check measured of `candidate`, None if none did.

        Raises:
            ArtifactError: the file was damaged since.
        """
        value = self._read(self._path(candidate))
        if value is None:
            return None
        self._progress.note(f"{candidate.label}: measured before the last check was interrupted")
        return Measured.from_json(value)

    def find_full(self) -> FullScores | None:
        """Full precision in the same tasks, None if no earlier check got so far.

        Raises:
            ArtifactError: the file was damaged since.
        """
        value = self._read(self._path(None))
        return None if value is None else FullScores(value["answers"], _scores(value["tasks"]))

    def keep(self, candidate: Candidate | None, measured: Measured | FullScores) -> None:
        """Write what was measured, in one step; where nothing can be written, say so once.

        Args:
            candidate: the format, None for full precision.
            measured: of it.
        """
        if not self._writable:
            return
        try:
            write_json(self._path(candidate), asdict(measured))
        except (EnvironmentProblem, OSError):
            # An artifact may well lie where nobody writes, and can be checked all the same.
            self._writable = False
            self._progress.note(
                f"{self.folder} cannot be written: if this check is interrupted, it starts over."
            )

    def clear(self) -> None:
        """Remove all rows, once they are part of a report."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        remedy = f"Delete {self.folder} and check again."
        return read_object(path, remedy, limit=MAX_JSON_BYTES)

    def _path(self, candidate: Candidate | None) -> Path:
        key = dict(self._about)
        if candidate is not None:
            key |= {"label": candidate.label, "origin": candidate.origin}
        return self.folder / f"{digest_json(key)}.json"

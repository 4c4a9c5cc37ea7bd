"""What a release folder's files were made from, so that a step is done once and no more.

``release.json`` holds for each step what it was made from (its inputs) and what came out (SHA-256
by file). A step is still valid when both are as they were. The inputs are written before the work
begins, after the outputs of other inputs were removed: whatever stands at a step's place while its
outputs are missing from the journal belongs to those inputs, and can be continued or taken over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cqtool.errors import ArtifactError
from cqtool.files import sha256_file, write_json
from cqtool.layout.config import MAX_JSON_BYTES
from cqtool.layout.fields import Fields
from cqtool.strictjson import read_object

JOURNAL_NAME = "release.json"
FORMAT_VERSION = 1


class Journal:
    """The journal of one release folder.

    Args:
        folder: the release folder; it need not exist.

    Raises:
        ArtifactError: the folder holds something else, or its journal is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / JOURNAL_NAME
        self._steps: dict[str, dict[str, Any]] = {}
        if self._path.is_file():
            self._steps = _read(self._path)
        elif folder.exists() and not _is_new(folder):
            raise ArtifactError(
                f"{folder} holds other files, and a release has a folder of its own; choose "
                "another one with --out."
            )

    def changes(self, step: str, inputs: Mapping[str, Any]) -> list[str] | None:
        """Which inputs of `step` are others than they were; None where it was never begun."""
        if step not in self._steps:
            return None
        before, now = self._steps[step]["inputs"], _as_read(inputs)
        return sorted(name for name in before.keys() | now if before.get(name) != now.get(name))

    def has_begun(self, step: str, inputs: Mapping[str, Any]) -> bool:
        """Whether `step` was begun with these inputs and has not come to its end."""
        return self.changes(step, inputs) == [] and self._steps[step]["outputs"] is None

    def is_done(self, step: str, inputs: Mapping[str, Any]) -> bool:
        """Whether `step` was done with these inputs and its outputs are as it left them."""
        if self.changes(step, inputs) != [] or self._steps[step]["outputs"] is None:
            return False
        outputs: dict[str, str] = self._steps[step]["outputs"]
        return all(
            (path := self.folder / name).is_file() and sha256_file(path) == digest
            for name, digest in outputs.items()
        )

    def begin(self, step: str, inputs: Mapping[str, Any]) -> None:
        """Note that `step` begins; what other inputs made must be gone from its place."""
        self._steps[step] = {"inputs": _as_read(inputs), "outputs": None}
        self._write()

    def finish(self, step: str, outputs: Iterable[Path]) -> None:
        """Note that the step that was begun left these files."""
        self._steps[step]["outputs"] = {
            path.relative_to(self.folder).as_posix(): sha256_file(path) for path in sorted(outputs)
        }
        self._write()

    def _write(self) -> None:
        write_json(self._path, {"format_version": FORMAT_VERSION, "steps": self._steps})


def _is_new(folder: Path) -> bool:
    """Whether `folder` is empty but for a journal that a killed process did not finish."""
    return folder.is_dir() and all(
        path.name.startswith(f".{JOURNAL_NAME}.") for path in folder.iterdir()
    )


def _as_read(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` as they come back from a file: lists instead of tuples."""
    value: dict[str, Any] = json.loads(json.dumps(inputs))
    return value


def _read(path: Path) -> dict[str, dict[str, Any]]:
    remedy = f"Delete {path.parent} and release again."
    root = Fields(read_object(path, remedy, limit=MAX_JSON_BYTES), str(path), remedy)
    if root.values.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} is of another version of cqtool; release into another folder with --out, or "
            f"delete {path.parent}."
        )
    steps = root.child("steps")
    for name in steps.values:
        step = steps.child(name)
        step.child("inputs")
        if step.values.get("outputs") is not None:
            outputs = step.child("outputs")
            for file in outputs.values:
                outputs.string(file)
    return dict(steps.values)

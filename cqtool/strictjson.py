"""Reading JSON that somebody else may have written, without surprises.

Python's parser keeps the last of two equal keys, takes NaN, and reads whatever size it is given. A
file that decides what is loaded is read more narrowly here: bounded, UTF-8, every key once, numbers
that JSON knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from cqtool.errors import ArtifactError


def parse_object(text: bytes, name: str, remedy: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        text: the file's bytes.
        name: what the error calls it.
        remedy: the sentence that tells the reader of the error what to do.

    Raises:
        ArtifactError: not UTF-8, not JSON, not an object, a key twice, NaN or infinity in it.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        detail = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(f"{name} is not valid JSON ({detail}). {remedy}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{name} must hold one JSON object. {remedy}")
    return value


def read_object(path: Path, remedy: str, *, limit: int) -> dict[str, Any]:
    """Read one JSON object from a file of at most `limit` bytes.

    Raises:
        ArtifactError: the file is missing, larger than `limit`, or refused by :func:`parse_object`.
    """
    try:
        if not path.is_file():
            raise ArtifactError(f"{path} is missing. {remedy}")
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise ArtifactError(f"Cannot read {path} ({error.strerror}). {remedy}") from error
    if len(text) > limit:
        raise ArtifactError(f"{path} is larger than {limit} bytes, which it never is. {remedy}")
    return parse_object(text, str(path), remedy)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

"""Reading JSON that somebody else may have written, without surprises.

Python's parser keeps the last of two equal keys, takes NaN, turns 1e999 into infinity and half of a
surrogate pair into a text that nothing can print, and reads whatever size it is given. A file that
decides what is loaded is read more narrowly here: bounded in size and depth, UTF-8, every key once,
finite numbers, whole characters.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from cqtool.errors import ArtifactError

MAX_DEPTH = 64
"""Objects and lists inside one another; what cqtool writes has about 10. Far below where Python's
own recursion ends, so that whoever walks through a file that was read need not fear for it."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(text: bytes, name: str, remedy: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        text: the file's bytes.
        name: what the error calls it.
        remedy: the sentence that tells the reader of the error what to do.

    Raises:
        ArtifactError: not UTF-8, not JSON, not an object, a key twice, half of a surrogate pair, a
            number that is not finite or has thousands of digits, more than :data:`MAX_DEPTH`
            levels.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check_depth(value)
        if _SURROGATE.search(text):
            # Pairs have become characters; what is left of surrogates has no UTF-8.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArtifactError(f"{name} holds half of a surrogate pair. {remedy}") from error
    except (ValueError, RecursionError) as error:
        detail = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(f"{name} is not valid JSON ({detail:.200}). {remedy}") from error
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
        # In one pass: somebody may have written a million keys.
        twice, _ = (Counter(key for key, _ in pairs) - Counter(value.keys())).most_common(1)[0]
        raise ValueError(f"the key {twice!r:.80} stands twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.40} is too large for a number")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        # Level by level, because what is nested deeply must not be walked by recursion.
        level = [inner for one in level if isinstance(one, (dict, list)) for inner in _items(one)]
        if not level:
            return
    raise RecursionError


def _items(value: dict[str, Any] | list[Any]) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return [one for one in inner if isinstance(one, (dict, list))]

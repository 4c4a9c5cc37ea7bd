"""Typed access to a parsed JSON object, each complaint naming the file and the field."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cqtool.errors import ArtifactError

MAX_INTEGER = 2**53 - 1
"""The largest whole number that every reader of JSON can hold (RFC 8259, section 6)."""

MAX_TEXT, MAX_LIST = 100, 4096
"""Characters of a text, and items of a list, of what :func:`is_plain` takes."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Fields:
    """One JSON object of a file.

    Every method raises :class:`ArtifactError` when the field is missing or of another type.

    Attributes:
        values: the object.
        name: the file, and the path to the object inside it.
        remedy: the sentence that tells the reader of an error what to do.
    """

    values: Mapping[str, Any]
    name: str
    remedy: str

    def string(self, key: str) -> str:
        """A text that is not empty and, because terminals show it, has no control characters but
        ends of lines and tabs."""
        value = self._get(key)
        if not isinstance(value, str) or not value or _CONTROL.search(value):
            raise self._error(key, "a text without control characters")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of the texts in `allowed`."""
        value = self._get(key)
        if value not in allowed:
            raise self._error(key, f"one of {', '.join(allowed)}")
        return str(value)

    def optional_string(self, key: str) -> str | None:
        """A text, or None where the field is null."""
        return None if self._get(key) is None else self.string(key)

    def integer(self, key: str, *, minimum: int | None = None) -> int:
        """A whole number, at least `minimum` and of at most 53 bits."""
        value = self._get(key)
        least = -MAX_INTEGER if minimum is None else minimum
        if type(value) is not int or not least <= value <= MAX_INTEGER:
            at_least = "" if minimum is None else f" of at least {minimum}"
            raise self._error(key, f"a whole number{at_least}")
        return value

    def optional_integer(self, key: str, *, minimum: int | None = None) -> int | None:
        """A whole number, or None where the field is null."""
        return None if self._get(key) is None else self.integer(key, minimum=minimum)

    def number(self, key: str, *, above: float | None = None) -> float:
        """A finite number, larger than `above`."""
        value = self._get(key)
        if not is_number(value) or (above is not None and value <= above):
            raise self._error(key, "a number" if above is None else f"a number above {above:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None where the field is null."""
        return None if self._get(key) is None else self.number(key)

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._error(key, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object, as it is."""
        value = self._get(key)
        if not isinstance(value, dict):
            raise self._error(key, "an object")
        return value

    def child(self, key: str) -> Fields:
        """An object, to be read field by field."""
        return Fields(self.mapping(key), f"{self.name}: {key}", self.remedy)

    def children(
        self, key: str, *, empty: bool = False, most: int | None = None
    ) -> Iterator[Fields]:
        """A list of objects, of at least one unless it may be `empty`, and of at most `most`."""
        value = self._get(key)
        if not isinstance(value, list) or not (value or empty):
            raise self._error(key, "a list that is not empty")
        if most is not None and len(value) > most:
            raise self._error(key, f"a list of at most {most}")
        for item in value:
            if not isinstance(item, dict):
                raise self._error(key, "a list of objects")
        # One after the other: millions of them would take gigabytes before the first is refused.
        return (
            Fields(item, f"{self.name}: {key}[{index}]", self.remedy)
            for index, item in enumerate(value)
        )

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise ArtifactError(f"{self.name} has no field '{key}'. {self.remedy}")
        return self.values[key]

    def _error(self, key: str, wanted: str) -> ArtifactError:
        return ArtifactError(f"{self.name}: '{key}' must be {wanted}. {self.remedy}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def is_plain(value: Any) -> bool:
    """Whether a JSON value is null, true, false, a number that a float can hold, a text without
    control characters of 1 to :data:`MAX_TEXT` characters, or a list of at most :data:`MAX_LIST`
    of these."""
    if isinstance(value, list):
        return len(value) <= MAX_LIST and all(map(_is_scalar, value))
    return _is_scalar(value)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= MAX_TEXT and not _CONTROL.search(value)
    return value is None or isinstance(value, bool) or is_number(value)

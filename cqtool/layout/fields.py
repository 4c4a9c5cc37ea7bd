"""Typed access to a parsed JSON object, each complaint naming the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cqtool.errors import ArtifactError


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
        """A text that is not empty."""
        value = self._get(key)
        if not isinstance(value, str) or not value:
            raise self._error(key, "a text")
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
        """A whole number, at least `minimum`."""
        value = self._get(key)
        if type(value) is not int or (minimum is not None and value < minimum):
            least = "" if minimum is None else f" of at least {minimum}"
            raise self._error(key, f"a whole number{least}")
        return value

    def optional_integer(self, key: str, *, minimum: int | None = None) -> int | None:
        """A whole number, or None where the field is null."""
        return None if self._get(key) is None else self.integer(key, minimum=minimum)

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._get(key)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._error(key, "a number")
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

    def children(self, key: str, *, empty: bool = False) -> tuple[Fields, ...]:
        """A list of objects, of at least one unless it may be `empty`."""
        value = self._get(key)
        if not isinstance(value, list) or not (value or empty):
            raise self._error(key, "a list that is not empty")
        for item in value:
            if not isinstance(item, dict):
                raise self._error(key, "a list of objects")
        return tuple(
            Fields(item, f"{self.name}: {key}[{index}]", self.remedy)
            for index, item in enumerate(value)
        )

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise ArtifactError(f"{self.name} has no field '{key}'. {self.remedy}")
        return self.values[key]

    def _error(self, key: str, wanted: str) -> ArtifactError:
        return ArtifactError(f"{self.name}: '{key}' must be {wanted}. {self.remedy}")

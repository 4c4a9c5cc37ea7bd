"""What a recipe says of codes: the formats of keys and values, and which channels form groups."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import field_validator, model_serializer, model_validator

from cqtool.errors import RecipeError
from cqtool.recipe_texts import Section
from cqtool.spec import GROUPS_SUFFIX, PAIRED_GROUPINGS, CQSpec, Grouping


class Format(Section):
    """Codes of keys and values; a single name in a recipe stands for both."""

    key: str
    value: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        names = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(name, list) for name in names):
            raise ValueError(
                "a list names the codes of a layer's heads; write it under layers, such as "
                "layers: {7: [cq-8c8b, cq-4c8b]}, and one code for all other layers here"
            )
        return {"key": value, "value": value} if isinstance(value, str) else value

    @field_validator("key", "value")
    @classmethod
    def _is_a_format(cls, name: str) -> str:
        return _parsed(name)

    @model_serializer
    def _to_name(self) -> str | dict[str, str]:
        return self.key if self.key == self.value else {"key": self.key, "value": self.value}


class LayerFormat(Section):
    """Codes of the keys and values of a layer; a single name stands for both, and a list names one
    for each key/value head."""

    key: str | list[str]
    value: str | list[str]

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"key": value, "value": value} if isinstance(value, str | list) else value

    @field_validator("key", "value", mode="before")
    @classmethod
    def _name_each_head(cls, names: object) -> object:
        if not isinstance(names, str | list):
            raise ValueError("give a name, or a list with one for each head")
        if isinstance(names, list):
            if len(names) < 2:
                raise ValueError(
                    "a list of codes names one for each head; write a single code as it is"
                )
            wrong = [name for name in names if not isinstance(name, str)]
            if wrong:
                raise ValueError(f"'{wrong[0]}' is not a name; write one such as cq-8c8b")
        return names

    @field_validator("key", "value")
    @classmethod
    def _are_formats(cls, names: str | list[str]) -> str | list[str]:
        return _parsed(names) if isinstance(names, str) else [_parsed(name) for name in names]

    @model_serializer
    def _to_name(self) -> Any:
        return self.key if self.key == self.value else {"key": self.key, "value": self.value}


def _parsed(name: str) -> str:
    try:
        return CQSpec.parse(name).name
    except RecipeError as error:
        raise ValueError(str(error)) from error


class Groups(Section):
    """Which channels form groups; a single name stands for keys and values.

    `pairs` and `balanced-pairs` alone are those of keys, with `correlation` and `balanced` for
    values, which nothing turns. The name of a .safetensors file stands for groups that it lists,
    see :func:`cqtool.codebooks.groups_file.read_groups`.
    """

    key: Grouping = "contiguous"
    value: Literal["contiguous", "correlation", "balanced", "file"] = "contiguous"
    file: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.endswith(GROUPS_SUFFIX):
            return {"key": "file", "value": "file", "file": value}
        # A name that is none is complained of once, for keys.
        known = value if value in get_args(Grouping) else "contiguous"
        return {"key": value, "value": PAIRED_GROUPINGS.get(known, known)}

    @model_validator(mode="after")
    def _file_has_a_use(self) -> Self:
        if ("file" in (self.key, self.value)) != (self.file is not None):
            raise ValueError(
                "groups of a file need its name, and the name needs keys or values to use it for; "
                "write {key: file, value: file, file: groups.safetensors}, or the file's name alone"
            )
        return self

    @model_serializer
    def _to_name(self) -> str | dict[str, str]:
        groups: dict[str, str] = {"key": self.key, "value": self.value}
        if self.file is not None:
            return self.file if self.key == self.value else groups | {"file": self.file}
        return self.key if self.key == self.value else groups

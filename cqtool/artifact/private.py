"""Paths of this machine, taken out of what is about to be published.

A calibration names its text as the user did, which for a local file is a path, and so it does with
a file of groups. Whoever pulls the artifact has no use for more than the file's name.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cqtool.artifact.names import public_name
from cqtool.files import write_json, write_text
from cqtool.layout.config import MAX_JSON_BYTES, REMEDY
from cqtool.models.names import is_hub_id
from cqtool.spec import GROUPS_SUFFIX
from cqtool.strictjson import read_object

_BUILT_IN = frozenset({"demo", "auto"})
_NAMES = frozenset({"dataset", "grouping", "file"})
"""Fields that may hold a path."""


def hide_local_paths(files: list[Path]) -> None:
    """Replace every path of a local data set, or of a file of groups, in JSON and HTML files by
    ``./`` and its last part.

    Files without one keep their bytes.
    """
    documents = {
        path: read_object(path, REMEDY, limit=MAX_JSON_BYTES)
        for path in files
        if path.suffix == ".json"
    }
    found = {name for value in documents.values() for name in _local_paths(value)}
    public = {name: f"./{public_name(name)}" for name in found}
    public = {name: short for name, short in public.items() if name != short}
    for path, value in documents.items():
        if any(name in public for name in _local_paths(value)):
            write_json(path, _replaced(value, public))
    for path in files:
        if path.suffix == ".html":
            text = before = path.read_text(encoding="utf-8")
            for name, short in public.items():
                text = text.replace(html.escape(name), html.escape(short))
            if text != before:
                write_text(path, text)


def _local_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        name = value.get("dataset")
        if isinstance(name, str) and name not in _BUILT_IN and not is_hub_id(name):
            yield name
        grouping = value.get("grouping")
        groups = grouping.get("file") if isinstance(grouping, dict) else grouping
        if isinstance(groups, str) and groups.endswith(GROUPS_SUFFIX):
            yield groups
        for item in value.values():
            yield from _local_paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _local_paths(item)


def _replaced(value: Any, public: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            key: public.get(item, item)
            if key in _NAMES and isinstance(item, str)
            else _replaced(item, public)
            for key, item in value.items()
        }
    return [_replaced(item, public) for item in value] if isinstance(value, list) else value

"""Pieces of Markdown: escaped text, tables, numbers and data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cqtool.artifact.names import is_hub_id, public_name

_MARKUP = {ord(char): f"\\{char}" for char in "|<>[]`"}


def one_line(value: object) -> str:
    """`value` as text without line ends."""
    return " ".join(str(value).split())


def plain(value: object) -> str:
    """`value` without what Markdown would take for markup or for the end of a line or cell."""
    return one_line(value).translate(_MARKUP)


def number(value: float) -> str:
    """`value` with as many digits as a reader needs."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is left-aligned and whose others are right-aligned."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(map(plain, line)) + " |" for line in lines)


def dataset(source: Mapping[str, Any]) -> str:
    """A text source for a reader: linked where the Hub has it, without local folders."""
    name = str(source.get("dataset"))
    if is_hub_id(name):
        shown = f"[{name}](https://huggingface.co/datasets/{name})"
    elif name == "demo":
        shown = "cqtool's demo text (Wikipedia articles)"
    else:
        shown = f"`{plain(public_name(name))}`"
    parts = [str(source[key]) for key in ("config", "split") if source.get(key)]
    return shown + (f" ({plain(', '.join(parts))})" if parts else "")

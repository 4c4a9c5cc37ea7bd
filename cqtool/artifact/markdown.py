"""Pieces of Markdown: escaped text, tables, numbers and data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cqtool.artifact.names import public_name
from cqtool.models.names import is_hub_id

_MARKUP = {ord(char): f"\\{char}" for char in "\\|<>[]`"}


def one_line(value: object) -> str:
    """`value` as text without line ends."""
    return " ".join(str(value).split())


def plain(value: object) -> str:
    """`value` without what Markdown would take for markup or for the end of a line or cell."""
    return one_line(value).translate(_MARKUP)


def number(value: float) -> str:
    """`value` with as many digits as a reader needs."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def size(count: int) -> str:
    """`count` bytes in the decimal unit that a reader needs, such as ``7.77 MB``."""
    value, units = float(count), ["kB", "MB", "GB", "TB"]
    if value < 1000:
        return f"{count} bytes"
    while (value := value / 1000) >= 999.5 and len(units) > 1:
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is left-aligned and whose others are right-aligned.

    No line of a cell ends beside a ``±``: a long label takes two lines before a figure does.
    """
    lines = [columns, [":---"] + ["---:"] * (len(columns) - 1), *rows]
    cells = "\n".join("| " + " | ".join(map(plain, line)) + " |" for line in lines)
    return cells.replace(" ± ", "\u00a0±\u00a0")


def dataset(source: Mapping[str, Any]) -> str:
    """A text source for a reader: linked where the Hub has it, without local folders."""
    name = str(source.get("dataset"))
    parts = [str(source[key]) for key in ("config", "split") if source.get(key)]
    if is_hub_id(name):
        shown = f"[{name}](https://huggingface.co/datasets/{name})"
    elif name == "demo":
        shown = "cqtool's demo text of Wikipedia articles"
    else:
        shown = f"`{plain(public_name(name))}`"
        # Local files have one split that is all of them.
        parts = [part for part in parts if part != "all"]
    return shown + (f" ({plain(', '.join(parts))})" if parts else "")

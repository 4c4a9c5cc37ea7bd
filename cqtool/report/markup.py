"""Pieces of HTML. Whatever comes from a file or a user is escaped here and nowhere else."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --muted: #5b6470; --line: #d8dde3;
  --page: #ffffff; --panel: #f5f7f9; --good: #00664a; --bad: #a83200; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --muted: #a3adb8; --line: #3a424b;
  --page: #15191d; --panel: #1f252b; --good: #5fd0a8; --bad: #ff9d6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 3rem; background: var(--page);
  color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.muted, caption, figcaption, footer { color: var(--muted); font-size: .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; padding: 0;
  list-style: none; }
.tiles li { flex: 1 1 9rem; background: var(--panel); border: 1px solid var(--line);
  border-radius: 8px; padding: .7rem .9rem; }
.tiles strong { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .32rem .8rem .32rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
td:first-child, th:first-child { min-width: 8rem; }
td:last-child, th:last-child { padding-right: 0; }
th { font-weight: 600; vertical-align: bottom; }
tbody th { vertical-align: top; }
.right { text-align: right; }
td.right { white-space: nowrap; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; padding: .6rem;
  border: 1px solid var(--line); border-radius: 8px; }
footer { margin-top: 3rem; }
"""


class Markup(str):
    """HTML that is finished; everything else is text and gets escaped."""


def text(value: object) -> Markup:
    """`value` as escaped text; an en dash for None."""
    if isinstance(value, Markup):
        return value
    return Markup("–" if value is None else escape(str(value)))


def element(tag: str, *content: object, css: str = "") -> Markup:
    """An element around `content`."""
    attribute = f' class="{escape(css)}"' if css else ""
    return Markup(f"<{tag}{attribute}>{''.join(map(text, content))}</{tag}>")


def verdict(passed: bool) -> Markup:
    """Whether a gate was passed, told by a word and a colour."""
    return element("span", "passed" if passed else "missed", css="good" if passed else "bad")


def table(
    columns: Sequence[object],
    rows: Iterable[Sequence[object]],
    right: Collection[int] = (),
    caption: str = "",
) -> Markup:
    """A table with headings; the columns in `right` are right-aligned."""

    def line(tag: str, cells: Sequence[object]) -> Markup:
        return element(
            "tr",
            *(
                element(tag, cell, css="right" if i in right else "")
                for i, cell in enumerate(cells)
            ),
        )

    return element(
        "div",
        element(
            "table",
            element("caption", caption) if caption else Markup(),
            element("thead", line("th", columns)),
            element("tbody", *(line("td", row) for row in rows)),
        ),
        css="wide",
    )


def facts(pairs: Iterable[tuple[str, object]]) -> Markup:
    """A table of names and values."""
    rows = [element("tr", element("th", name), element("td", value)) for name, value in pairs]
    return element("div", element("table", element("tbody", *rows)), css="wide")


def tiles(pairs: Iterable[tuple[str, object]]) -> Markup:
    """A row of large figures, each with what it is below."""
    items = (element("li", element("strong", value), name) for name, value in pairs)
    return element("ul", *items, css="tiles")


def figure(path: Path, caption: str) -> Markup:
    """A PNG as a data URI, or nothing when `path` does not exist."""
    if not path.is_file():
        return Markup()
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    image = Markup(f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">')
    return element("figure", image, element("figcaption", caption))


def page(title: str, *content: Markup) -> str:
    """A whole document that loads nothing from anywhere and runs no script."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"{element('title', title)}\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in content if part)
        + "\n</body>\n</html>\n"
    )

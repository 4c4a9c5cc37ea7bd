"""Writes the command reference, one Markdown page per command, from the typer application.

`python -m cqtool.cli.docs` writes docs/commands; with `--check` it only says whether the pages are
current. It runs in a checkout.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperArgument, TyperGroup
from typer.main import get_command

from cqtool.cli.app import EXAMPLES, app, command_examples

FOLDER = Path(__file__).parents[2] / "docs" / "commands"
_SHARED_OPTIONS = {"--help", "--install-completion", "--show-completion"}


def pages() -> dict[str, str]:
    """The reference: file name to Markdown text."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    commands = dict(sorted(group.commands.items()))
    index = [
        "# Commands",
        *_paragraphs(group.help),
        "Every command takes `--help`. `cqtool --install-completion` sets up completion for your "
        "shell, `cqtool --show-completion` prints it.",
        _table(
            ["Command", ""],
            [
                [f"[{name}]({name}.md)", _paragraphs(command.help)[0]]
                for name, command in commands.items()
            ],
        ),
        "## Example",
        _code(EXAMPLES),
    ]
    result = {"README.md": _join(index)}
    for name, command in commands.items():
        result[f"{name}.md"] = _join(_page(name, command, command_examples(name)))
    return result


def _page(name: str, command: Any, examples: Sequence[str]) -> list[str]:
    arguments = [p for p in command.params if isinstance(p, TyperArgument)]
    options = [
        p
        for p in command.params
        if not isinstance(p, TyperArgument)
        and not p.hidden
        and not _SHARED_OPTIONS.intersection(p.opts)
    ]
    usage = " ".join(
        [
            "cqtool",
            name,
            *(
                f"{'' if p.required else '['}{_metavar(p)}{'' if p.required else ']'}"
                for p in arguments
            ),
            "[OPTIONS]",
        ]
    )
    parts = [f"# cqtool {name}", *_paragraphs(command.help), _code([usage])]
    if arguments:
        rows = [[f"`{_metavar(p)}`", _help(p)] for p in arguments]
        parts += ["## Arguments", _table(["Argument", ""], rows)]
    rows = [[_spelling(p), _help(p), _default(p)] for p in options]
    parts += ["## Options", _table(["Option", "", "Default"], rows)]
    return [*parts, "## Example", _code(examples)]


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in inspect.cleandoc(text or "").split("\n\n")]


def _metavar(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _spelling(param: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    if param.is_flag:
        return names
    choices = param.type_descriptor.choices
    value = " \\| ".join(map(str, choices)) if choices else _metavar_or_type(param)
    return f"{names} {value}"


def _metavar_or_type(param: Any) -> str:
    if param.metavar:
        return str(param.metavar)
    annotation = param.type_descriptor.annotation
    return {int: "N", float: "X"}.get(annotation, "TEXT")


def _help(param: Any) -> str:
    return " ".join((param.help or "").split()).replace("|", "\\|")


def _default(param: Any) -> str:
    if param.required:
        return "required"
    if param.default is None or param.default is False or not param.show_default:
        return ""
    if param.is_flag:
        return f"`{param.opts[0]}`"
    return f"`{param.default}`"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _code(lines: Sequence[str]) -> str:
    return "\n".join(["```console", *lines, "```"])


def _join(parts: Sequence[str]) -> str:
    notice = "<!-- Written by `make docs` from the command itself; do not edit. -->"
    return "\n\n".join([notice, *parts]) + "\n"


def stale(folder: Path) -> list[str]:
    """Names of the pages in `folder` that are missing, differ, or belong to no command."""
    wanted = pages()
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )


def write(folder: Path) -> None:
    """Make `folder` hold exactly the current pages."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for path in folder.glob("*.md"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with `--check` name the stale ones; the exit code."""
    if "--check" not in arguments:
        write(FOLDER)
        return 0
    names = stale(FOLDER)
    if names:
        print(f"Stale in {FOLDER.name}: {', '.join(names)}. Run `make docs`.", file=sys.stderr)
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The modules of cqtool that an artifact carries, rewritten to need no installed cqtool.

They are all that loading a cache imports, found by following the imports. Rewritten, they import
one another relatively, and use names of their own where a name is global to a process, so that they
work beside an installed cqtool of any version, and beside another artifact's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import cqtool

ROOTS = ("cqtool.cache", "cqtool.kernels.decode.op", "cqtool.kernels.encode.op")
"""What a consumer uses; everything else follows from their imports."""

PACKAGE = Path(cqtool.__file__).parent

_IMPORT = re.compile(r"from\s+cqtool(?:\.([\w.]+))?\s+import")
# Torch ops ("cqtool::encode"), attributes and registered names ("_cqtool_tap", "cqtool").
_GLOBAL_NAME = re.compile(r"(_?)cqtool((?:::|_)\w+)?")


def runtime_modules() -> dict[str, str]:
    """The rewritten modules, without the package's own ``__init__``.

    Returns:
        Path in the package, with ``/``, to text.

    Raises:
        ValueError: a module refers to cqtool in a way that cannot be rewritten.
    """
    texts: dict[str, str] = {}
    waiting = list(ROOTS)
    seen = {"cqtool"}
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        file = _file(module)
        if file is None:
            raise ValueError(f"{module} is no module of cqtool")
        waiting.append(module.rpartition(".")[0])
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text)
        waiting += _imports(tree, module)
        path = file.relative_to(PACKAGE).as_posix()
        texts[path] = rewrite(text, path)
    return dict(sorted(texts.items()))


def _file(module: str) -> Path | None:
    """The file of a module, None where `module` names none."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    candidates = (place / "__init__.py", place.with_suffix(".py"))
    return next((file for file in candidates if file.is_file()), None)


def _imports(tree: ast.AST, module: str) -> Iterator[str]:
    """The modules of cqtool that a module imports, in functions too, but not for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and _is_own(node.module or ""):
            assert node.module is not None
            if node.module != "cqtool":
                yield node.module
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if _file(name) is not None:
                    yield name
                elif node.module == "cqtool":
                    raise ValueError(f"{module} imports {alias.name}, which a runtime lacks")
        yield from _imports(node, module)


def _is_own(module: str) -> bool:
    return module == "cqtool" or module.startswith("cqtool.")


def rewrite(text: str, path: str) -> str:
    """The text of a module for its place `path` in a package of another name.

    Raises:
        ValueError: it refers to cqtool in a way that is not understood.
    """
    up = "." * (path.count("/") + 1)
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    tree = ast.parse(text)
    edits: list[tuple[int, int, int, str]] = []  # line, first and last byte in it, new text
    renamed = False
    for node in _visit(tree):
        if isinstance(node, ast.ImportFrom) and _is_own(node.module or ""):
            found = _IMPORT.match(lines[node.lineno - 1][node.col_offset :].decode())
            if found is None:
                raise ValueError(f"{path}:{node.lineno}: this import cannot be rewritten")
            end = node.col_offset + len(found[0])
            edits.append((node.lineno, node.col_offset, end, f"from {up}{found[1] or ''} import"))
        elif isinstance(node, ast.Constant) and (name := _global_name(node.value)):
            edits.append((node.lineno, node.col_offset, node.end_col_offset or 0, name))
            renamed = True
        elif _is_hidden_reference(node):
            line = getattr(node, "lineno", 0)
            raise ValueError(f"{path}:{line}: cqtool is named in a way that cannot be rewritten")
    for line, first, last, new in sorted(edits, reverse=True):
        old = lines[line - 1]
        lines[line - 1] = old[:first] + new.encode() + old[last:]
    if renamed:
        lines.insert(_after_future_imports(tree), f"\nfrom {up} import NAMESPACE\n".encode())
    return b"".join(lines).decode()


def _visit(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes; f-strings as a whole, because their parts have no places of their own."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, ast.JoinedStr):
            yield from _visit(node)


def _global_name(value: object) -> str | None:
    """An expression for a name that is global to a process, None for any other constant."""
    found = _GLOBAL_NAME.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    before, after = (f'"{part}"' if part else None for part in found.groups())
    return " + ".join(part for part in (before, "NAMESPACE", after) if part)


def _is_hidden_reference(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(_is_own(alias.name) for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.level > 0  # cqtool's modules have none; a rewritten one would lead elsewhere
    if isinstance(node, ast.Attribute):
        return node.attr == "cqtool"  # torch.ops.cqtool
    if isinstance(node, ast.JoinedStr):
        parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
        return any(str(part).startswith(("cqtool::", "cqtool_", "_cqtool_")) for part in parts)
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"cqtool(\.\w+)+", node.value) is not None
        and _file(node.value) is not None
    )


def _after_future_imports(tree: ast.Module) -> int:
    """The number of lines up to the end of the docstring and the imports from __future__."""
    end = 0
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not (is_docstring or is_future):
            break
        end = node.end_lineno or 0
    return end

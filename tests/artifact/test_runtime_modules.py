"""The modules in an artifact are those that a cache needs, and no longer those of cqtool."""

from __future__ import annotations

import ast
import sys

import pytest

from cqtool.artifact.runtime_modules import rewrite, runtime_modules


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    return runtime_modules()


def test_nothing_but_the_runtime_and_its_few_dependencies_is_in_it(modules: dict[str, str]) -> None:
    outside = set()
    for text in modules.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                outside |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                outside.add(str(node.module).split(".")[0])
    assert outside - sys.stdlib_module_names == {
        "huggingface_hub", "numpy", "safetensors", "torch", "transformers",
    }  # fmt: skip
    folders = {path.split("/")[0] for path in modules if "/" in path}
    assert folders == {"cache", "codebooks", "kernels", "layout", "models"}
    assert {path for path in modules if path.startswith("codebooks/")} == {
        "codebooks/__init__.py",
        "codebooks/codes.py",
    }
    assert "models/demo.py" not in modules


def test_every_relative_import_leads_to_a_module_of_the_package(modules: dict[str, str]) -> None:
    for path, text in modules.items():
        package = path.split("/")[:-1]
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or node.level == 0:
                continue
            base = package[: len(package) - node.level + 1]
            target = "/".join([*base, *(node.module or "").split(".")]).strip("/")
            names = [f"{target}.py", f"{target}/__init__.py"]
            assert any(name in modules for name in names) or node.names[0].name == "NAMESPACE", (
                path,
                node.lineno,
            )


def test_imports_become_relative_and_global_names_their_own() -> None:
    text = (
        '"""See ``cqtool::encode``; run `cqtool export`."""\n'
        "from __future__ import annotations\n"
        "import torch\n"
        "from cqtool.errors import KernelError\n"
        'NAME, OTHER = "cqtool", "_cqtool_tap"\n'
        '@torch.library.custom_op("cqtool::encode", mutates_args=())\n'
        "def encode():\n"
        '    from cqtool.kernels import load; return f"run `cqtool export` {load}"\n'
    )
    assert rewrite(text, "kernels/encode/op.py") == (
        '"""See ``cqtool::encode``; run `cqtool export`."""\n'
        "from __future__ import annotations\n"
        "\nfrom ... import NAMESPACE\n"
        "import torch\n"
        "from ...errors import KernelError\n"
        'NAME, OTHER = NAMESPACE, "_" + NAMESPACE + "_tap"\n'
        '@torch.library.custom_op(NAMESPACE + "::encode", mutates_args=())\n'
        "def encode():\n"
        '    from ...kernels import load; return f"run `cqtool export` {load}"\n'
    )
    assert rewrite("from cqtool import errors\n", "files.py") == "from . import errors\n"
    assert rewrite("é = 1; from cqtool.spec import Kind\n", "cache/__init__.py") == (
        "é = 1; from ..spec import Kind\n"
    )


@pytest.mark.parametrize(
    "line",
    [
        "import cqtool.errors",
        "from . import errors",
        "torch.ops.cqtool.encode(x)",
        'f"cqtool::{name}"',
        'importlib.import_module("cqtool.errors")',
    ],
)
def test_a_reference_that_would_still_mean_the_installed_cqtool_stops_the_export(line: str) -> None:
    with pytest.raises(ValueError, match=r"files\.py:1"):
        rewrite(line, "files.py")

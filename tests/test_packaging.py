"""What an installed cqtool contains."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_and_every_recipe_gets_into_a_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    sources = {path.parent.relative_to(ROOT) for path in (ROOT / "cqtool").rglob("*.py")}
    packages = {".".join(path.parts) for path in sources}
    assert set(setuptools["packages"]) == packages | {"cqtool.recipes"}
    assert setuptools["package-dir"] == {"cqtool.recipes": "recipes"}
    assert {path.suffix for path in (ROOT / "recipes").iterdir()} == {".yaml"}
    assert setuptools["package-data"]["cqtool.recipes"] == ["*.yaml"]


def test_every_cuda_source_gets_into_a_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    sources = [p for p in (ROOT / "cqtool").rglob("*") if p.suffix in (".cu", ".cuh")]
    for source in sources:
        package = ".".join(source.parent.relative_to(ROOT).parts)
        assert f"*{source.suffix}" in setuptools["package-data"][package], source

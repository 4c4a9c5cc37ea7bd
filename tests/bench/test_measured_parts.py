"""Figures that are added to docs/results/gpu get a place on the page of the kernels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from cqtool.bench.run import run
from cqtool.bench.settings import make_settings
from cqtool.files import write_json

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """docs/update_kernels.py with a folder of results of its own."""
    monkeypatch.syspath_prepend(DOCS)
    spec = importlib.util.spec_from_file_location("update_kernels", DOCS / "update_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_parts_without_figures_are_empty_and_others_have_a_heading(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_COMMIT", "0123456789abcdef")
    page = script.updated((DOCS / "kernels.md").read_text(encoding="utf-8"))
    for part in script.PARTS:
        assert f"<!-- {part} -->\n<!-- /{part} -->" in page
    assert "Making codebooks" not in page
    wanted = {"target": "tiny", "device": "cpu", "formats": ["cq-8c2b"], "batches": ["1"]}
    for kind in ("tune", "kmeans"):
        settings = make_settings(**wanted, parts=[kind], tokens=["64"], prompt=8, repeats=2)
        write_json(tmp_path / f"{kind}-tiny.json", run(settings))
    page = script.updated(page)
    added = page.split("<!-- calibrating -->")[1].split("<!-- /calibrating -->")[0]
    assert added.startswith("\n\n## Making codebooks\n")
    assert added.index("**k-means of one layer, tiny") < added.index("**Tuning, tiny, cq-8c2b")
    assert "\n| 1 | 1 | no | no | " in added
    assert added.count("commit `0123456789ab`") == 2
    assert "<!-- groupings -->\n<!-- /groupings -->" in page
    assert script.updated(page) == page

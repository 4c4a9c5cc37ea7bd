"""The code in docs/python.md runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"
BLOCK = re.compile(r"^<!-- test -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_python_page_runs_from_top_to_bottom(
    tiny_model_dir: Path,
    tiny_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    # Every marker belongs to a block, and every block is run.
    assert len(blocks) == text.count("<!-- test -->") == text.count("```python") > 0
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page", "MODEL": str(tiny_model_dir), "TEXT": str(tiny_text_file)}
    for block in blocks:
        # As many empty lines as stand before it, so that a traceback names the page's line.
        above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], str(PAGE), "exec"), namespace)

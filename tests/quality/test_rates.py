"""The guide's table of rates is what its script computes, and what the sum by hand gives."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RATES = {
    "cq-8c6b": 0.75,
    "cq-8c8b": 1,
    "cq-8c10b": 1.25,
    "cq-k8c8b-v4c8b": 1.5,
    "cq-4c8b": 2,
    "cq-k4c8b-v2c8b": 3,
    "cq-2c8b": 4,
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location("update_rates", ROOT / "docs/update_rates.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_shows_the_current_table(script):
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.updated(page), "run: python docs/update_rates.py"


def test_every_rate_counts_codes_window_sinks_and_positions(script):
    head, _, *lines = (line.strip("| \n").split(" | ") for line in script.table().splitlines())
    contexts = [int(name.removeprefix("at ")) for name in head[2:-1]]
    assert len(contexts) == 4 and [line[0].strip("`") for line in lines] == list(RATES)
    for (name, said, *counted, _), bits in zip(lines, RATES.values(), strict=True):
        assert float(said) == bits, name
        for tokens, shown in zip(contexts, counted, strict=True):
            # 132 exact tokens of 16 bits: 128 of the window, and 4 sinks, which are coded as well.
            channels = 32 * 8 * 2 * 128
            total = (tokens - 128) * channels * bits + 132 * channels * 16 + tokens * 32
            assert float(shown) == pytest.approx(total / (tokens * channels), abs=0.0051), name


def test_codebooks_stand_apart_in_bytes(script):
    sizes = {line[0]: float(line[-1]) for line in map(cells, script.table().splitlines()[2:])}
    for name, bits in (("cq-8c6b", 6), ("cq-4c8b", 8), ("cq-8c10b", 10)):
        assert sizes[name] == 2**bits * 128 * 8 * 32 * 2 * 2 / 2**20


def cells(line):
    return re.findall(r"[^| `]+", line)

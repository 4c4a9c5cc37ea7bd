"""The part about calibrating: every engine on the same samples, and nobody gets it unasked."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from cqtool.bench.run import run
from cqtool.bench.settings import BenchSettings, make_settings
from cqtool.bench.tables import tables
from cqtool.errors import RecipeError

WANTED: dict[str, Any] = {
    "target": "tiny",
    "parts": ["kmeans"],
    "tokens": ["300,700"],
    "formats": ["k-cq-8c4b-v-cq-4c5b"],
    "device": "cpu",
}


def test_engines_are_timed_on_a_layer_and_reach_the_same_objective() -> None:
    kept: list[int] = []
    report = run(
        make_settings(**WANTED), checkpoint=lambda found: kept.append(len(found["kmeans"]))
    )
    assert kept == [1]
    (found,) = report["kmeans"]
    # 2 heads of 64 channels: 16 groups of keys and 32 of values.
    assert [(row["engine"], row["samples"], row["codebooks"]) for row in found["rows"]] == [
        ("faiss", 300, 48),
        ("batched", 300, 48),
        ("faiss", 700, 48),
        ("batched", 700, 48),
    ]
    for faiss, batched in (found["rows"][:2], found["rows"][2:]):
        assert batched["objective"] == pytest.approx(faiss["objective"], rel=5e-3)
        best = min(faiss["objective"], batched["objective"])
        for row in (faiss, batched):
            assert row["over_best"] == pytest.approx(row["objective"] / best - 1)
    for row in found["rows"]:
        assert row["seconds_per_codebook"] > 0
        assert row["layer_seconds"] == pytest.approx(48 * row["seconds_per_codebook"])
    assert found["rows"][0]["objective"] < found["rows"][2]["objective"]
    (table,) = tables(report)
    assert [row[0] for row in table.rows] == ["faiss", "batched", "faiss", "batched"]
    assert table.notes[0].endswith("limit 0.5%: met")
    found["rows"][1]["over_best"] = 0.006
    (table,) = tables(report)
    assert table.notes[0].endswith("by 0.60% at most, limit 0.5%: missed")
    assert not report["skipped"]


def test_without_faiss_the_batched_engine_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    report = run(make_settings(**WANTED | {"groupings": ["correlation,contiguous"]}))
    (found,) = report["kmeans"]
    assert {row["engine"] for row in found["rows"]} == {"batched"}
    (table,) = tables(report)
    assert "not installed: faiss" in table.notes


def test_k_means_is_timed_only_when_asked_for_with_a_shape() -> None:
    assert "kmeans" not in BenchSettings(target="tiny").chosen_parts
    with pytest.raises(RecipeError, match="targets has only decode and encode"):
        _ = make_settings(parts=["kmeans"]).chosen_parts

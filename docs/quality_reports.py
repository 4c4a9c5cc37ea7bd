"""The reports of docs/results/quality, under the names that docs/quality.md has for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "quality"

WIKITEXT = (
    *("cq-8c8b", "by-layer-1", "by-layer-1.25", "by-layer-2", "by-layer-2.5"),
    *("by-layer-2.5-balanced", "other-rates", "cq-2c10b"),
    *("balanced-8c8b", "balanced-4c8b", "balanced-2c8b", "balanced-2c8b-64"),
    *("balanced-2c8b-ldlq", "blocks", "nsnquant-tasq", "commvq-1", "commvq-2", "transformers"),
    *("kvquant", "kvquant-3-4", "vecinfer"),
)
"""Reports on the same windows of WikiText-2."""

ONE, MORE = "1 bit by layer, tuned", "1.25 bits by layer, tuned"
TWO, HALF_MORE = "2 bits by layer, tuned", "2.5 bits by layer, by correlation, tuned"
"""The formats with bits by layer, as this page calls them."""
FOUR = "cq-2c8b balanced pairs, 64 sequences, as calibrated"
LDLQ = "cq-2c8b balanced, error feedback, as calibrated"
"""At 4 bits the best one, and one with error feedback, which no kernel encodes."""

OWN = {
    ("by-layer-1", 1): ONE,
    ("by-layer-1.25", 1): MORE,
    ("by-layer-2", 1): TWO,
    ("by-layer-2.5", 1): HALF_MORE,
    ("by-layer-2.5-balanced", 1): "2.5 bits by layer, as calibrated",
    ("cq-2c10b", 1): "cq-2c10b as calibrated",
    ("balanced-8c8b", 1): "cq-8c8b balanced pairs, as calibrated",
    ("balanced-4c8b", 1): "cq-4c8b balanced pairs, as calibrated",
    ("balanced-2c8b", 1): "cq-2c8b balanced pairs, as calibrated",
    ("balanced-2c8b-64", 1): FOUR,
    ("balanced-2c8b-ldlq", 1): LDLQ,
    ("by-layer-window-128", 1): ONE,
    ("by-layer-c-headers", 1): ONE,
    ("by-layer-dictionary", 1): ONE,
    ("transformers", 1): "1 bit by layer, by correlation, as calibrated",
    ("kvquant", 1): "1 bit by layer, by correlation, as calibrated",
    ("cq-8c8b", 1): "cq-8c8b tuned",
    ("cq-8c8b", "cq-8c8b fisher (b1)"): "cq-8c8b tuned, L2 encoder",
    ("cq-8c8b", "cq-8c8b query (cal)"): "cq-8c8b as calibrated",
    ("other-rates", 1): "cq-8c10b tuned",
    ("other-rates", "cq-4c8b fisher (b2)"): "cq-4c8b tuned, L2 encoder",
    ("other-rates", "cq-2c8b query (b4)"): "cq-2c8b as calibrated",
    ("gemma-3-270m", 1): "cq-4c8b balanced pairs, as calibrated",
    ("window-128", 1): "cq-8c8b tuned, L2 encoder",
    ("dictionary", 1): "cq-8c8b tuned",
    ("dictionary", "cq-8c8b fisher (b1)"): "cq-8c8b tuned, L2 encoder",
    ("dictionary", "cq-8c8b query (cal)"): "cq-8c8b as calibrated",
    ("c-headers", 1): "cq-8c8b tuned",
    ("c-headers", "cq-8c8b fisher (b1)"): "cq-8c8b tuned, L2 encoder",
    ("c-headers", "cq-8c8b query (cal)"): "cq-8c8b as calibrated",
}
"""What reports call this project's own formats after folders, by report and label or place."""

CARRIERS = {("kvquant-3-4", 1), ("vecinfer", 1)}
"""Rows that only carried the samples which other formats were fitted to, by report and place."""

RECALL = "1.25 bits by head for recall, tuned"
"""What was tuned for generation."""
LAYERS = "1.25 bits by layer for recall"

OTHERS: dict[str, str | None] = {
    "cq-8c6b-mixed query, tuned": None,
    "nsnquant-1": "nsnquant-1",
    "kivi-2": "kivi-2",
}
UNFITTED: dict[str, str | None] = {
    "cq-8c6b-mixed query, tuned": None,
    "calibquant": "calibquant",
    "kitty": "kitty",
    "vidkv": "vidkv",
}
GENERATION: dict[str, Mapping[str, str | None]] = {
    "generation-recall": {"cq-8c6b-mixed query, tuned": RECALL},
    "generation-recall-passkey": {"cq-8c6b-mixed query, tuned": RECALL},
    "generation-recall-by-layer": {"cq-8c6b-mixed query, tuned": f"{LAYERS}, tuned"},
    "generation-recall-by-layer-passkey": {"cq-8c6b-mixed query, tuned": f"{LAYERS}, tuned"},
    "generation-recall-by-layer-prefill": {
        "cq-8c6b-mixed query, tuned": f"{LAYERS}, tuned in mode prefill",
    },
    "generation-recall-before": {"cq-8c6b-mixed query, tuned": f"{LAYERS}, before"},
    "generation": {
        "cq-8c6b-mixed query, tuned": f"{LAYERS}, earlier",
        "cq-8c10b fisher (PAPER)": "cq-8c10b paper",
    },
    "generation-rivals": OTHERS,
    "generation-rivals-passkey": OTHERS,
    "generation-more-rivals": UNFITTED,
    "generation-more-rivals-passkey": UNFITTED,
}
"""Reports on the same questions, or the first of them, and what this page calls their formats; None
for what another report asked more of them."""

HEAD_COSTS = tuple(RESULTS / f"by-head-recall-at-{bits}.json" for bits in (1, 2, 4))
"""What single heads cost on text that recalls, by which the recipe for recall gives them bits."""


def read(name: str) -> dict[str, Any]:
    """A committed report, its rows under the names of this page."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for place, row in enumerate(report["rows"]):
        label = OWN.get((name, place)) or OWN.get((name, row["label"])) or row["label"]
        row["own"], row["label"] = label != row["label"], label
        if place:
            # Measured in fp32; a released model's window takes half of that.
            bits, exact = row["bits_per_channel"], 32 - row["bits_per_channel"]
            row["effective_bits"] = bits + (16 - bits) * (row["effective_bits"] - bits) / exact
    return report


def wikitext() -> dict[str, Any]:
    """All reports on WikiText-2 without a window as one; those of a format twice are the same."""
    whole, *others = map(read, WIKITEXT)
    rows = {row["label"]: row for row in whole["rows"]}
    for name, report in zip(WIKITEXT[1:], others, strict=True):
        assert report["evaluation"] == whole["evaluation"]
        for place, row in enumerate(report["rows"]):
            # The format that a report checked stands in all of them, under its objective here.
            if row["label"] != "cq-8c8b query" and (name, place) not in CARRIERS:
                rows.setdefault(row["label"], row)
    return {**whole, "rows": list(rows.values())}


def both(name: str) -> list[dict[str, Any]]:
    """A report's rows with those of the format by layer on the same text."""
    report, own = read(name), read(f"by-layer-{name}")
    assert report["evaluation"] == own["evaluation"]
    return [*report["rows"], own["rows"][1]]


@dataclass(frozen=True)
class Answers:
    """What a format answered of one task's questions.

    Attributes:
        score: as the report has it.
        own: 1 for each right answer, else 0.
        full: the same of full precision, on the same questions.
    """

    score: dict[str, Any]
    own: list[float]
    full: list[float]


def answers() -> dict[str, dict[str, Answers]]:
    """Exact answers by format, as this page calls it, and task; full precision first."""
    found: dict[str, dict[str, Answers]] = {"full precision": {}}
    for name, formats in GENERATION.items():
        report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        scores = [
            one
            for one in report["generation"]["scores"]
            if one["group"] is None and one["measure"] == "exact"
        ]
        unquantized = report["rows"][0]["label"]
        full = {one["task"]: one for one in scores if one["format"] == unquantized}
        for task, score in full.items():
            known = found["full precision"].setdefault(task, _answers(score, score))
            # The same questions, as far as both go.
            for one, other in zip(known.own, score["per_item"], strict=False):
                assert one == other
        for one in scores:
            if one["format"] == unquantized:
                continue
            label = formats[one["format"]]
            if label is not None:
                found.setdefault(label, {})[one["task"]] = _answers(one, full[one["task"]])
    return found


def _answers(score: dict[str, Any], full: dict[str, Any]) -> Answers:
    return Answers(score, score["per_item"], full["per_item"])

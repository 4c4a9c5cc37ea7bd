"""Writes the measured tables and plots of docs/quality.md from the figures in docs/results/quality.

    python docs/update_quality.py           rewrite the part between the markers, draw the plots
    python docs/update_quality.py --check   only say whether the page is current

The figures are the JSON of `cqtool check` and the records of `cqtool tune`, as they came, but for
the folders of texts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import replaced, rewrite

from cqtool.report.pareto import plot_pareto

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quality.md"
RESULTS = ROOT / "docs" / "results" / "quality"
PLOT = ROOT / "docs" / "images" / "quality-pareto.png"

WIKITEXT = (
    *("cq-8c8b", "by-layer-tuned", "other-rates", "blocks", "nsnquant-tasq"),
    *("commvq-1", "commvq-2", "transformers", "kvquant"),
)
"""Reports on the same windows of WikiText-2."""

ONE, MORE = "1 bit by layer, tuned", "1.25 bits by layer, tuned"
"""The formats with bits by layer, as this page calls them."""

OWN = {
    ("by-layer-tuned", 1): ONE,
    ("by-layer-tuned", 2): MORE,
    ("by-layer-window-128", 1): ONE,
    ("by-layer-c-headers", 1): ONE,
    ("by-layer-dictionary", 1): ONE,
    ("transformers", 1): "1 bit by layer, as calibrated",
    ("kvquant", 1): "1 bit by layer, as calibrated",
    ("cq-8c8b", 1): "cq-8c8b tuned",
    ("cq-8c8b", "cq-8c8b fisher (b1)"): "cq-8c8b tuned, L2 encoder",
    ("cq-8c8b", "cq-8c8b query (cal)"): "cq-8c8b as calibrated",
    ("other-rates", 1): "cq-8c10b tuned",
    ("other-rates", "cq-4c8b fisher (b2)"): "cq-4c8b tuned, L2 encoder",
    ("other-rates", "cq-2c8b query (b4)"): "cq-2c8b as calibrated",
    ("window-128", 1): "cq-8c8b tuned, L2 encoder",
    ("dictionary", 1): "cq-8c8b tuned",
    ("dictionary", "cq-8c8b fisher (b1)"): "cq-8c8b tuned, L2 encoder",
    ("dictionary", "cq-8c8b query (cal)"): "cq-8c8b as calibrated",
    ("c-headers", 1): "cq-8c8b tuned",
    ("c-headers", "cq-8c8b fisher (b1)"): "cq-8c8b tuned, L2 encoder",
    ("c-headers", "cq-8c8b query (cal)"): "cq-8c8b as calibrated",
}
"""What reports call this project's own formats after folders, by report and label or place."""


KEPT = 0.8
"""Of the gain over the paper's method, how much shall stay on text of another domain."""


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
    for report in others:
        assert report["evaluation"] == whole["evaluation"]
        for row in report["rows"]:
            # The format that a report checked stands in all of them, under its objective here.
            if row["label"] != "cq-8c8b query":
                rows.setdefault(row["label"], row)
    return {**whole, "rows": list(rows.values())}


def both(name: str) -> list[dict[str, Any]]:
    """A report's rows with those of the format by layer on the same text."""
    report, own = read(name), read(f"by-layer-{name}")
    assert report["evaluation"] == own["evaluation"]
    return [*report["rows"], own["rows"][1]]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table, by effective bits."""
    yield "| format | bits | eff. bits | perplexity | increase | KL | top-1 |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for row in sorted(rows, key=lambda one: (one["effective_bits"], one["kl"])):
        name = f"**{row['label']}**" if row["own"] else row["label"]
        error = f" ± {row['kl_se']:.4f}" if row["kl_se"] else ""
        yield (
            f"| {name} | {row['bits_per_channel']:.2f} | {row['effective_bits']:.2f} "
            f"| {row['perplexity']:.2f} | {row['perplexity_increase']:+.1%} "
            f"| {row['kl']:.4f}{error} | {row['top1']:.1%} |"
        )


def targets(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What was aimed at, and what was reached."""
    one, paper = rows[ONE], rows["cq-8c8b paper"]
    gain = 1 - one["kl"] / paper["kl"]
    unseen = {row["label"]: row for row in both("c-headers")}
    kept = (1 - unseen[ONE]["kl"] / unseen["cq-8c8b paper"]["kl"]) / gain
    window = {row["label"]: row for row in read("window-128")["rows"]}
    two, four = rows["cq-4c8b tuned, L2 encoder"], rows["cq-2c8b as calibrated"]
    at_most = (
        ("1 bit: KL of the paper's 2 bits", one["kl"], rows["cq-4c8b paper"]["kl"]),
        (
            "1 bit: perplexity increase, a sixth of the paper's",
            one["perplexity_increase"],
            paper["perplexity_increase"] / 6,
        ),
        ("1.25 bits: KL", rows[MORE]["kl"], 0.22),
        ("2 bits: KL", two["kl"], 0.12),
        ("2 bits: perplexity increase", two["perplexity_increase"], 0.06),
        ("4 bits: KL", four["kl"], 0.012),
        ("1 bit, 4 sinks, last 128: KL", window["cq-8c8b tuned, L2 encoder"]["kl"], 0.06),
    )
    yield "| | target | measured | |"
    yield "| --- | ---: | ---: | --- |"
    for name, found, limit in at_most:
        met = "met" if found <= limit else "missed"
        yield f"| {name} | ≤ {limit:.3f} | {found:.4f} | {met} |"
    met = "met" if kept >= KEPT else "missed"
    yield f"| C headers: gain over the paper, of WikiText-2's | ≥ {KEPT} | {kept:.4f} | {met} |"


def layers(name: str, text_of: str) -> Iterator[str]:
    """Which layers cost most, and what keys and values cost in all."""
    report = read(name)
    costs, text, row = report["by_layer"], report["evaluation"], report["rows"][1]
    total = sum(one["kl"] for one in costs)
    share = sum(one["kl"] for one in costs if one["kind"] == "value") / total
    kept = f", {row['sinks']} sinks and the last {row['window']} tokens exact" * bool(row["window"])
    yield (
        f"On {text['windows']} windows of {text['window_length']} tokens of {text_of}{kept}: "
        f"values make up {share:.0%} of the sum, keys {1 - share:.0%}; with everything coded the "
        f"KL is {row['kl']:.3f}, the sum is {total:.3f}. The costliest of {len(costs)}:"
    )
    rows = "\n".join(
        f"| {one['layer']} | {one['kind']}s | {one['kl']:.4f} | {one['kl'] / total:.1%} |"
        for one in sorted(costs, key=lambda one: -one["kl"])[:6]
    )
    yield f"| layer | | KL | share |\n| ---: | --- | ---: | ---: |\n{rows}"


def generation() -> Iterator[str]:
    """Scores of tasks, and the paired difference to full precision."""
    yield "| task | format | items | score | difference |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for path in sorted(RESULTS.glob("generation-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        for score in report["generation"]["scores"]:
            if score["group"] is None and score["measure"] == "exact":
                own = "full precision" if "full" in score["format"] else "cq-8c10b tuned"
                error = score["difference_se"]
                yield (
                    f"| {score['task']} | {own} | {score['items']} | {score['score']:.2f} "
                    f"| {score['difference']:+.2f}{f' ± {error:.2f}' if error else ''} |"
                )


def measured() -> str:
    """What stands between the markers."""
    whole = wikitext()
    rows = {row["label"]: row for row in whole["rows"]}
    evaluation = whole["evaluation"]
    parts = [
        "## Targets",
        "\n".join(targets(rows)),
        "## Without a window",
        f"{evaluation['windows']} windows of {evaluation['window_length']} tokens of WikiText-2's "
        "test split, every token coded:",
        "\n".join(table(whole["rows"])),
        "## With 4 sinks and the last 128 tokens",
        "The same windows; at 1024 tokens the window is most of what is stored. The format by "
        "layer was tuned without a window, the other one with this window:",
        "\n".join(table(both("window-128"))),
        "## Other text",
        "C header files, of which the mixture has none:",
        "\n".join(table(both("c-headers"))),
        "A dictionary of computing (FOLDOC), some of whose entries are from the Jargon File, as "
        "part of the mixture is:",
        "\n".join(table(both("dictionary"))),
        "## Where bits matter",
        "`cqtool check --by-layer`: the KL of cq-8c8b tuned with the keys or values of one layer "
        "coded and all else exact.",
        "\n\n".join(layers("by-layer", "the calibration text")),
        "\n\n".join(layers("by-layer-recall", "text that says again what stood long before")),
        "## Generation",
        "Greedy answers, 1.25 bits with 4 sinks and the last 64 tokens, on a CPU; few items, and "
        "codebooks that were tuned without a window:",
        "\n".join(generation()),
        "## Tuning",
        "\n".join(tuning()),
    ]
    return "\n" + "\n\n".join(parts) + "\n\n"


def tuning() -> Iterator[str]:
    """What tuning took, and what it did to the held-out part of its own text."""
    yield "| format | window | steps | seconds | held-out KL before | after |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for path in sorted(RESULTS.glob("tuning-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))["tuning"]
        name, _, window = path.stem.removeprefix("tuning-").partition("-window-")
        before, after = record["held_out_kl"][0], record["held_out_kl"][record["kept"]]
        yield (
            f"| {name} | {window or 0} | {record['steps']} | {record['seconds']:.0f} "
            f"| {before:.4f} | {after:.4f} |"
        )


def updated(page: str) -> str:
    """`page` with the current figures."""
    return replaced(page, "quality", measured())


def main() -> int:
    """Rewrite docs/quality.md and draw its plot, or with --check only compare the page."""
    code = rewrite(PAGE, updated)
    if "--check" not in sys.argv[1:]:
        plot_pareto(_within(wikitext()), PLOT)
    return code


def _within(report: dict[str, Any]) -> dict[str, Any]:
    """Full precision, the best 1-bit format, and what costs at most 6 bits and a KL of 1."""
    full, *rest = report["rows"]
    shown = [row for row in rest if row["effective_bits"] <= 6 and row["kl"] <= 1]
    shown.sort(key=lambda row: row["label"] != ONE)
    return {**report, "rows": [full, *shown]}


if __name__ == "__main__":
    sys.exit(main())

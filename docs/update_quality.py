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
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pages import replaced, rewrite
from quality_reports import (
    FOUR,
    HALF_MORE,
    HEAD_COSTS,
    LDLQ,
    MORE,
    ONE,
    RECALL,
    RESULTS,
    TWO,
    answers,
    both,
    read,
    wikitext,
)

from cqtool.quality.allocate import Size, allocate, modelled_kl, usable_codes
from cqtool.quality.costs import Curve, Part, measured_costs
from cqtool.report.pareto import plot_pareto

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quality.md"
PLOT = ROOT / "docs" / "images" / "quality-pareto.png"

GROUPINGS = (
    ("correlation", "cq-8c8b as calibrated"),
    ("balanced pairs", "cq-8c8b balanced pairs, as calibrated"),
    ("correlation", "cq-2c8b as calibrated"),
    ("balanced pairs", "cq-2c8b balanced pairs, as calibrated"),
    ("balanced pairs, 64 sequences", FOUR),
    ("balanced, with error feedback", LDLQ),
)
"""Formats with the objective `query` that differ in their groups."""

KEPT = 0.8
"""Of the gain over the paper's method, how much shall stay on text of another domain."""
KV_HEADS, HEAD_DIM, RATE = 3, 64, 1.25
"""Of the model, and the bits a channel that the recipe for recall spends."""
HALF = 40
"""Questions of each task that all formats had."""
OF_FULL = 0.95
"""Of full precision's score, how much shall stay in generation."""

PAIRS = (
    (ONE, "cq-4c8b paper"),
    (ONE, "tasq-1"),
    (MORE, "tasq-1.25"),
    (TWO, "commvq-2"),
    (HALF_MORE, "nsnquant-2"),
    (HALF_MORE, "kivi-2"),
    (FOUR, "kitty-pro"),
    (FOUR, "hqq-4"),
    ("cq-2c10b as calibrated", "kivi-4"),
)
"""Own formats, and the best of others at as many bits or more."""


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


def groupings(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The same codes in other groups, as calibrated."""
    yield "| bits | groups | KL | perplexity |"
    yield "| ---: | --- | ---: | ---: |"
    for name, label in GROUPINGS:
        row = rows[label]
        yield (
            f"| {row['bits_per_channel']:.0f} | {name} | {row['kl']:.4f} ± {row['kl_se']:.4f} "
            f"| {row['perplexity_increase']:+.1%} |"
        )


def targets(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What was aimed at, and what was reached."""
    one, paper = rows[ONE], rows["cq-8c8b paper"]
    gain = 1 - one["kl"] / paper["kl"]
    unseen = {row["label"]: row for row in both("c-headers")}
    kept = (1 - unseen[ONE]["kl"] / unseen["cq-8c8b paper"]["kl"]) / gain
    window = {row["label"]: row for row in both("window-128")}
    two = rows[TWO]
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
        ("4 bits, in the kernels: KL", rows[FOUR]["kl"], 0.012),
        ("1 bit, 4 sinks, last 128: KL", window[ONE]["kl"], 0.06),
    )
    yield "| | target | measured | |"
    yield "| --- | ---: | ---: | --- |"
    for name, found, limit in at_most:
        met = "met" if found <= limit else "missed"
        yield f"| {name} | ≤ {limit:.3f} | {found:.4f} | {met} |"
    met = "met" if kept >= KEPT else "missed"
    yield f"| C headers: gain over the paper, of WikiText-2's | ≥ {KEPT} | {kept:.4f} | {met} |"
    share = {name: score for name, score, _ in generation_of_full()}[RECALL]
    met = "met" if share >= OF_FULL else "missed"
    yield (
        "| generation at 1.25 bits, 4 sinks, last 64: right answers, of full precision's "
        f"| ≥ {OF_FULL} | {share:.4f} | {met} |"
    )


def paired(rows: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Formats beside others window by window, which says more than their standard errors do."""
    yield "| | against | KL, difference | better in |"
    yield "| --- | --- | ---: | ---: |"
    for one, other in PAIRS:
        pairs = zip(*(rows[name]["per_window"]["kl"] for name in (one, other)), strict=True)
        gaps = [a - b for a, b in pairs]
        error = stdev(gaps) / sqrt(len(gaps))
        better = sum(gap < 0 for gap in gaps)
        yield f"| {one} | {other} | {mean(gaps):+.4f} ± {error:.4f} | {better} of {len(gaps)} |"


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


def heads() -> Iterator[str]:
    """Which heads cost most on text that recalls, and what it is worth to give them codes of their
    own."""
    report = json.loads(HEAD_COSTS[0].read_text(encoding="utf-8"))
    costs, text = report["by_head"], report["evaluation"]
    total = sum(one["kl"] for one in costs)
    by_head = measured_costs(HEAD_COSTS)
    points: dict[Part, list[tuple[float, float]]] = {}
    for part, curve in by_head.items():
        points.setdefault(part._replace(head=None), []).extend(curve.points)
    # `through` takes the mean of what is measured at the same rate.
    of_head, of_layer = Size(1, HEAD_DIM), Size(KV_HEADS, HEAD_DIM)
    by_layer = {
        part: Curve.through((bits, KV_HEADS * kl) for bits, kl in found)
        for part, found in points.items()
    }
    expected = []
    for curves, size in ((by_layer, of_layer), (by_head, of_head)):
        sizes = dict.fromkeys(curves, size)
        chosen = allocate(curves, sizes, usable_codes(None, {HEAD_DIM}), RATE)
        expected.append(modelled_kl(curves, chosen, sizes))
    yield (
        f"`--by-head --mode prefill`, on {text['windows']} windows of {text['window_length']} "
        "tokens of text that recalls, held out, 4 sinks and the last 64 tokens exact. The "
        f"costliest of {len(costs)} at 1 bit, whose sum is {total:.4f}:"
    )
    rows = "\n".join(
        f"| {one['layer']} | {one['head']} | {one['kind']}s | {one['kl']:.4f} "
        f"| {one['kl'] / total:.1%} |"
        for one in sorted(costs, key=lambda one: -one["kl"])[:6]
    )
    yield f"| layer | head | | KL | share |\n| ---: | ---: | --- | ---: | ---: |\n{rows}"
    yield (
        f"With such costs at 1, 2 and 4 bits, `cqtool allocate --bits {RATE}` expects "
        f"{expected[1]:.4f} with codes by head, and would expect {expected[0]:.4f} with codes by "
        "layer (costs of heads added up)."
    )


def generation_of_full(
    without: str | None = None, questions: slice = slice(None)
) -> Iterator[tuple[str, float, float]]:
    """Each format's share of full precision's right answers over all tasks but one, and its error.

    The error is that of the paired differences; full precision's own score counts as given.
    """
    _, *others = answers().items()
    for name, tasks in others:
        kept = [one for task, one in tasks.items() if task != without]
        own = [right for one in kept for right in one.own[questions]]
        full = [right for one in kept for right in one.full[questions]]
        gaps = [a - b for a, b in zip(own, full, strict=True)]
        yield name, sum(own) / sum(full), stdev(gaps) / sqrt(len(gaps)) / mean(full)


def shares(without: str | None = None) -> str:
    """What :func:`generation_of_full` says, as one sentence."""
    found = generation_of_full(without)
    return "; ".join(f"{name} {score:.0%} ± {error:.0%}" for name, score, error in found)


def halves() -> str:
    """The same of the recall format: of the questions that all formats had, and of the others."""
    parts = []
    for questions in (slice(HALF), slice(HALF, None)):
        _, score, error = next(generation_of_full(None, questions))
        parts.append(f"{score:.0%} ± {error:.0%}")
    return " and ".join(parts)


def kept() -> str:
    """Which of full precision's right answers the recall format has right too, and which others."""
    pairs = [
        (right, was)
        for one in answers()[RECALL].values()
        for right, was in zip(one.own, one.full, strict=True)
    ]
    both = sum(1 for right, was in pairs if right and was)
    others = sum(1 for right, was in pairs if right and not was)
    return f"{both} of these {sum(1 for _, was in pairs if was)}, and {others} others"


def generation() -> Iterator[str]:
    """Scores of tasks, and the paired difference to full precision."""
    yield "| task | format | items | score | difference |"
    yield "| --- | --- | ---: | ---: | ---: |"
    found = answers()
    for task in found[RECALL]:
        for name, tasks in found.items():
            score = tasks[task].score
            error = score["difference_se"]
            yield (
                f"| {task} | {name} | {score['items']} | {score['score']:.2f} "
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
        "Beside other formats, window by window of WikiText-2 without a window of recent tokens:",
        "\n".join(paired(rows)),
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
        "## Another model",
        "Gemma-3-270M, its 4-bit GGUF file dequantized: 18 layers with 1 key/value head of 256 "
        "channels, 15 of them with a window of 512 tokens. Calibrated on 16 sequences of 1024 "
        "tokens of the mixture, on a CPU; 8 windows of 1024 tokens of WikiText-2's test split, "
        "every token coded:",
        "\n".join(table(read("gemma-3-270m")["rows"])),
        "## Which channels form a group",
        "Codebooks as calibrated, every token coded, on the same windows of WikiText-2:",
        "\n".join(groupings(rows)),
        "## Where bits matter",
        "`cqtool check --by-layer`: the KL of cq-8c8b in balanced pairs, as calibrated, with the "
        "keys or values of one layer coded and all else exact.",
        "\n\n".join(layers("by-layer", "the calibration text")),
        "\n\n".join(layers("by-layer-recall", "text that says again what stood long before")),
        "\n\n".join(heads()),
        "## Generation",
        "Greedy answers at 1.25 bits with 4 sinks and the last 64 tokens exact, on a CPU. The "
        "format by head is that of the recipe `smollm2-135m-1.25bit-recall`, tuned with this "
        "window on text that says again what stood before:",
        "\n".join(generation()),
        f"Of full precision's right answers in all tasks together: {shares()}. Without sums, of "
        "which the text that recalls gave away some before it took the form that it has now: "
        f"{shares('arithmetic')}. Of the questions that all formats had and of the others, "
        f"{RECALL}: {halves()}; it has {kept()} right.",
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
    """Full precision, the best 1-bit format, and what costs at most 6 bits and a KL of 1; of this
    project's own formats those that no other of them beats."""
    full, *rest = report["rows"]
    own = [row for row in rest if row["own"]]
    shown = [
        row
        for row in rest
        if row["effective_bits"] <= 6
        and row["kl"] <= 1
        and not (row["own"] and any(_beats(other, row) for other in own))
    ]
    shown.sort(key=lambda row: row["label"] != ONE)
    return {**report, "rows": [full, *shown]}


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["effective_bits"] <= other["effective_bits"] and one["kl"] < other["kl"]


if __name__ == "__main__":
    sys.exit(main())

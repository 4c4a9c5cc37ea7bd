"""Writes the measured tables into docs/kernels.md from the figures in docs/results/gpu.

    python docs/update_kernels.py           rewrite the parts between the markers
    python docs/update_kernels.py --check   only say whether they are current

The figures are the JSON of `cqtool bench`, as it came; what is not there is left out:

    targets.json, generation-*.json     --suite targets, --suite generation
    groupings*.json                     --part decode --grouping contiguous,pairs,correlation
    by-head*.json                       an artifact whose heads have codes of their own, --format
    kmeans*.json                        --part kmeans
    tune-*.json                         --part tune
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import replaced, rewrite

from cqtool.bench.tables import headline, tables

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "docs" / "results" / "gpu"
PARTS = {
    "kernels": ("", ("targets.json", "generation-160.json", "generation-4k.json")),
    "groupings": (
        """### Groups of other channels

The tables above are of contiguous groups, which half-split RoPE pairs as they are. Here the same
codes stand beside groups that are other ones in each head: with `pairs` the keys' plan is closed
(of 2 channels, a scatter plan), with `balanced-pairs` closed or of partners, with `correlation` a
scatter plan. Values are permuted in all of them. `balanced-pairs` are what the recipes for quality
have.
""",
        ("groupings*.json",),
    ),
    "heads": (
        """### Heads with codes of their own, measured

The recipe `smollm2-135m-1.25bit-recall`, whose heads have five codes in fifteen pairs, beside the
plain code of as many bits and the one of 1 bit. *Mean of 30 layers* is the format as it decodes:
all parts of all layers. The other rows are of a layer whose heads all have one pair of codes. The
model is so small that its steps wait for the host, which launches more for each part of a layer.
""",
        ("by-head*.json",),
    ),
    "calibrating": (
        """## Making codebooks

What `cqtool calibrate` and `cqtool tune` spend their time on, with random samples and weights.
Steps of tuning are timed after the first one, which records a CUDA graph. Sequences go through the
model as many at a time as fit, and layers are computed again in the backward pass only where
nothing else fits.
""",
        ("kmeans*.json", "tune-*.json"),
    ),
}
"""Of each marker: what stands above its tables, and the names of their reports in order."""


def _lines(report: dict[str, Any]) -> Iterator[str]:
    versions = report["versions"]
    yield f"{headline(report)}, commit `{versions['commit'][:12]}`."
    for table in tables(report):
        yield ""
        yield f"**{table.title}**"
        yield ""
        for row in (table.columns, ["---"] * len(table.columns), *table.rows):
            yield "| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |"
        notes = [note for note in table.notes if not note.startswith("not timed")]
        if notes:
            yield ""
            yield from (f"{note}  " for note in notes)


def measured(part: str) -> str:
    """What stands between the markers of a part; nothing without figures."""
    heading, names = PARTS[part]
    found = [
        "\n".join(_lines(json.loads(path.read_text(encoding="utf-8"))))
        for name in names
        for path in sorted(RESULTS.glob(name))
    ]
    if not found:
        return ""
    return "\n" + "\n\n".join([*filter(None, [heading.rstrip()]), *found]) + "\n\n"


def updated(page: str) -> str:
    """`page` with the current figures."""
    for part in PARTS:
        page = replaced(page, part, measured(part))
    return page


if __name__ == "__main__":
    sys.exit(rewrite(PAGE, updated))

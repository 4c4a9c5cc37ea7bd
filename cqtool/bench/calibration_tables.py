"""The tables about making codebooks: k-means engines, and steps of tuning."""

from __future__ import annotations

from typing import Any

from cqtool.bench.cells import Table, gigabytes, unavailable
from cqtool.bench.suites import OBJECTIVE_LIMIT


def kmeans_table(found: dict[str, Any]) -> Table:
    """Engines beside each other, and how far they are from the best of them."""
    worst = max(row["over_best"] for row in found["rows"])
    rows = tuple(
        (
            row["engine"],
            row["detail"],
            f"{row['samples']:,}",
            f"{row['codebooks']:,}",
            f"{row['seconds_per_codebook'] * 1e3:.2f}",
            f"{row['layer_seconds']:.2f}",
            f"{row['objective']:.5g}",
            f"{row['over_best']:.2%}",
        )
        for row in found["rows"]
    )
    return Table(
        f"k-means of one layer, {found['shape']}, {found['format']}, weighted samples, at most "
        f"{found['iterations']} iterations",
        (
            "engine",
            "ran",
            "samples",
            "codebooks",
            "ms/codebook",
            "layer s",
            "objective",
            "above best",
        ),
        rows,
        (
            "objective: mean over the codebooks that every engine fits; above the lowest of the "
            f"same samples by {worst:.2%} at most, limit {OBJECTIVE_LIMIT:.1%}: "
            + ("met" if worst <= OBJECTIVE_LIMIT else "missed"),
            *unavailable(found),
        ),
    )


def tuning_table(found: dict[str, Any]) -> Table:
    """Steps of tuning, and what a whole run of them would take."""
    rows = tuple(
        (
            f"{row['batch']}",
            f"{row['micro_batch']}",
            "yes" if row["gradient_checkpointing"] else "no",
            "yes" if row["cuda_graph"] else "no",
            f"{row['step']['median']:.3f}",
            f"{row['step']['iqr']:.3f}",
            f"{row['first_step']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            gigabytes(row["memory"]["torch_peak_bytes"]),
            gigabytes(row["memory"]["driver_peak_bytes"]),
            f"{row['recipe_seconds'] / 60:.1f}",
        )
        for row in found["rows"]
    )
    recipe = found["recipe"]
    return Table(
        f"Tuning, {found['shape']}, {found['format']}, sequences of {found['sequence_length']:,} "
        f"tokens, window {found['window']}, sinks {found['sinks']}, {found['dtype']}",
        (
            "batch",
            "at a time",
            "recomputed",
            "CUDA graph",
            "s/step",
            "IQR",
            "first s",
            "tokens/s",
            "torch GB",
            "driver GB",
            "recipe min",
        ),
        rows,
        (
            f"recipe: the {recipe['tokens']:,} tokens of {recipe['name']}, without looks at "
            "held-out text",
            *unavailable(found),
        ),
    )

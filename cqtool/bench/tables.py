"""The report as tables for a reader: headings and rows of text, whoever prints them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cqtool.bench.calibration_tables import kmeans_table, tuning_table
from cqtool.bench.cells import Table, gigabytes, micro, times, unavailable
from cqtool.bench.suites import ENCODE_SHARE, LARGEST_BATCH, THROUGHPUT


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """Every table of a report."""
    sliding = (report["shape"] or {}).get("sliding_window")
    for case in report["decode"]:
        yield _decode_table(case, report["settings"]["dtype"], sliding)
    for found in report["encode"]:
        yield from _encode_tables(found)
    for found in report["end_to_end"]:
        yield _generation_table(found, in_suite=report["suite"] is not None)
    for found in report.get("kmeans", []):  # older reports lack it
        yield kmeans_table(found)
    for found in report.get("tune", []):
        yield tuning_table(found)


def headline(report: dict[str, Any]) -> str:
    """What it was measured on, in a line."""
    device, versions = report["device"], report["versions"]
    if device["type"] != "cuda":
        return f"CPU ({device['name']}), torch {versions['torch']}"
    line = f"{device['name']}, driver {device['driver']}, torch {versions['torch']}"
    if report["bandwidth"] is not None:
        line += f"; reads {report['bandwidth']['read_bytes_per_second'] / 1e12:.2f} TB/s"
    return line


def _decode_table(found: dict[str, Any], dtype: str, sliding: int | None) -> Table:
    case = found["case"]
    rows = tuple(
        (
            row["name"],
            row["format"],
            micro(row["time"]),
            f"{row['time']['iqr'] * 1e6:.1f}",
            f"{row['cache_bytes'] / 1e6:.1f}",
            f"{row['over_floor']:.2f}",
            f"{row['relative_error']:.0e}",
            times(row["speedup"]),
            _target(row),
        )
        for row in found["kernels"]
    )
    best = found["best_16bit"]
    notes = [
        f"{row['format']} is slower than 16 bits here; use it for memory, not for speed."
        for row in found["kernels"]
        if row["name"] == "cqtool" and row["speedup"] is not None and row["speedup"] < 1
    ]
    if sliding is not None and sliding < case["tokens"]:
        notes.append(f"of a layer that attends to all tokens; sliding layers see {sliding:,}")
    if best is not None:
        notes.append(
            f"speedup over {best['name']}: {micro(best['time'])} us, {micro(best['again'])} us "
            "when measured again at the end"
        )
    return Table(
        f"Decode attention, {case['name']}: batch {case['batch']}, {case['kv_heads']} kv heads, "
        f"{case['heads']} heads of {case['head_dim']}, {case['tokens']:,} tokens, {dtype}",
        ("kernel", "format", "us", "IQR", "cache MB", "x floor", "error", "speedup", "target"),
        rows,
        (*notes, *unavailable(found)),
    )


def _encode_tables(found: dict[str, Any]) -> Iterator[Table]:
    prefill = found["prefill"]
    rows = tuple(
        (
            row["format"],
            f"{row['tokens']:,}",
            micro(row["key"]),
            micro(row["value"]),
            f"{row['all_layers'] * 1e3:.2f}",
            f"{row['all_layers'] / row['tokens'] * 1e6:.2f}",
            f"{row['share']:.1%}" if row["share"] is not None else "-",
        )
        for row in found["prompt"]
    )
    notes = []
    if prefill is not None:
        how = (
            f", from models of {prefill['layers_timed'][0]} and {prefill['layers_timed'][1]} layers"
            if prefill["extrapolated"]
            else ""
        )
        notes.append(
            f"prefill of {prefill['tokens']:,} tokens with random weights: "
            f"{prefill['all_layers'] * 1e3:.1f} ms{how}; target for encoding: {ENCODE_SHARE:.0%}"
        )
    columns = ("format", "tokens", "keys us", "values us", "model ms", "us/token", "of prefill")
    yield Table(
        f"Encoding a prompt, {found['shape']}", columns, rows, (*notes, *unavailable(found))
    )
    steps = tuple(
        (
            row["format"],
            f"{row['batch']}",
            micro(row["key"]),
            micro(row["value"]),
            f"{row['all_layers'] * 1e3:.3f}",
        )
        for row in found["step"]
    )
    yield Table(
        f"Encoding one decode step, {found['shape']}",
        ("format", "batch", "keys us", "values us", "model ms"),
        steps,
    )


def _generation_table(found: dict[str, Any], *, in_suite: bool) -> Table:
    rows = tuple(
        (
            row["cache"],
            row["format"],
            f"{row['batch']}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['decode_tokens_per_second']:,.1f}",
            f"{row['prefill_seconds']:.2f}",
            gigabytes(row["memory"]["torch_peak_bytes"]),
            gigabytes(row["memory"]["driver_peak_bytes"]),
            times(row["speedup"]),
            times(row["batch_ratio"]),
        )
        for row in found["rows"]
    )
    notes = [
        "tokens/s counts the prefill; speedup and batch are over the better 16-bit cache"
        + (f"; targets {THROUGHPUT:.1f}x and {LARGEST_BATCH:.0f}x" if in_suite else ""),
        *(
            f"{row['format']} is slower than 16 bits at batch {row['batch']}; use it for memory, "
            "not for speed."
            for row in found["rows"]
            if row["cache"] == "cq" and row["speedup"] is not None and row["speedup"] < 1
        ),
        *dict.fromkeys(
            f"{row['format']} ran its {row['implementation']} implementation, not the kernels"
            for row in found["rows"]
            if row["implementation"] not in (None, "fused")
        ),
    ]
    return Table(
        f"Generating, {found['shape']}, prompt {found['prompt']:,} and {found['new']:,} new "
        f"tokens, {found['dtype']}" + (", largest batches" if found["largest"] else ""),
        (
            "cache",
            "format",
            "batch",
            "tokens/s",
            "decode tokens/s",
            "prefill s",
            "torch GB",
            "driver GB",
            "speedup",
            "batch x",
        ),
        rows,
        (*notes, *unavailable(found)),
    )


def _target(row: dict[str, Any]) -> str:
    target = row.get("target")
    if target is None or row["speedup"] is None:
        return "-"
    return f"{target:.1f}x {'met' if row['speedup'] >= target else 'missed'}"

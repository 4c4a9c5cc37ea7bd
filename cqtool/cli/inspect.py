"""`cqtool inspect`: what a folder that cqtool wrote is, and whether it is whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from cqtool.cli import options
from cqtool.cli.output import Output
from cqtool.errors import ArtifactError
from cqtool.layout.config import text_parts
from cqtool.spec import GROUPED_CHANNELS, KINDS

EXAMPLES = ("cqtool inspect artifact", "cqtool inspect calibration --json")


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A calibration folder, an artifact, or a sample store.",
            show_default=False,
        ),
    ],
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Show format, geometry, sizes and quality, and verify every digest of an artifact.

    Exit code 2 when a file is damaged.
    """
    sink = Output(json=json, quiet=quiet)
    from cqtool.artifact.describe import describe

    found = describe(path)
    lines = _store_lines(found) if found["kind"] == "samples" else _codebook_lines(found)
    sink.table(["", found["kind"]], lines, right=())
    sink.result(found)
    if found.get("problem"):
        raise ArtifactError(found["problem"])


def _codebook_lines(found: dict[str, Any]) -> list[list[str]]:
    base, cache, data = found["base_model"], found["cache"], found["calibration"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    groups = [
        f"{kind}s of {cache[kind]['channels']} {GROUPED_CHANNELS[cache[kind]['grouping']]}"
        + (", one codebook for all heads" if cache[kind]["sharing"] == "heads" else "")
        for kind in KINDS
    ]
    return [
        ["format", f"{found['format']}, {found['rate']}"],
        ["groups", ", ".join(groups)],
        ["base model", f"{base['id']}{revision}, license {base['license'] or 'not known'}"],
        ["unquantized", f"first {cache['sinks']} and last {cache['window']} tokens"],
        *[["layers", _shape(shape)] for shape in found["geometry"]["shapes"]],
        ["codes", f"{found['code_bytes_per_token']:.4g} bytes per token"],
        ["objective", f"{found['objective']}, recipe {found['recipe'] or 'without name'}"],
        [
            "calibrated on",
            f"{data['sequences']} x {data['sequence_length']} tokens of "
            f"{_texts(data['dataset'])}, seed {data['seed']}",
        ],
        *_size_lines(found["bytes"]),
        ["digests", _digests(found)],
        ["quality", _quality(found["quality"])],
        *_kernel_lines(found["kernels"]),
    ]


def _texts(source: dict[str, Any]) -> str:
    parts = text_parts(source)
    if len(parts) == 1:
        return str(parts[0].get("dataset"))
    return ", ".join(f"{part.get('dataset')} ({part.get('sequences')})" for part in parts)


def _kernel_lines(kernels: dict[str, Any] | None) -> list[list[str]]:
    if kernels is None:
        return []
    if not kernels["variants"]:
        return [["runtime", "included, without compiled kernels"]]
    sources = Counter(
        variant["source"].rsplit("/", 1)[-1] for variant in kernels["variants"].values()
    )
    counts = ", ".join(f"{count} of {source}" for source, count in sorted(sources.items()))
    compiler = kernels["compiler"] or "an unknown compiler"
    return [
        ["runtime", f"included, kernels compiled by {compiler}"],
        ["kernels for", ", ".join(kernels["architectures"])],
        ["kernel variants", counts],
    ]


def _store_lines(found: dict[str, Any]) -> list[list[str]]:
    total = sum(found["bytes"].values())
    return [
        ["model", str(found["meta"].get("model"))],
        ["tokens", f"{found['tokens']:,}"],
        ["layers", str(found["layers"])],
        ["gradients", "yes" if found["gradients"] else "no"],
        ["size", f"{total:,} bytes"],
    ]


def _shape(shape: dict[str, Any]) -> str:
    window = shape["sliding_window"]
    return (
        f"{shape['layers']} with {shape['kv_heads']} kv heads, keys of {shape['key_dim']} and "
        f"values of {shape['value_dim']} channels"
        + (f", sliding window of {window}" if window else "")
    )


def _size_lines(sizes: dict[str, int]) -> list[list[str]]:
    return [[f"size of {name}", f"{size:,} bytes"] for name, size in sizes.items()]


def _digests(found: dict[str, Any]) -> str:
    if found["problem"]:
        return "DAMAGED"
    return "all verified" if found["verified"] else "none to verify (not exported)"


def _quality(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return "not measured"

    def figure(name: str, form: str) -> str:
        error = quality[f"{name}_se"]
        return format(quality[name], form) + ("" if error is None else f" ± {error:{form}}")

    return (
        f"perplexity {figure('perplexity', '.3f')}, increase "
        f"{figure('perplexity_increase', '.2%')}, KL {figure('kl', '.4f')}, "
        f"top-1 {figure('top1', '.2%')}"
    )

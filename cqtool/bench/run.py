"""Runs what the settings ask for and gathers it into one report, the content of the JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from cqtool.bench.device import describe_device, describe_software, resolve_device
from cqtool.bench.formats import (
    BenchFormat,
    open_artifact,
    parse_formats,
    require_divisible,
    require_geometry,
)
from cqtool.bench.kernels import KernelSettings, bench_decode
from cqtool.bench.models import Target, find_target, public_name
from cqtool.bench.problem import AttentionLoad
from cqtool.bench.settings import DEFAULT_BATCHES, BenchSettings, Part
from cqtool.bench.suites import GENERATIONS, TARGET_LOADS, Generation, decode_target
from cqtool.bench.timing import measure_bandwidth
from cqtool.errors import EnvironmentProblem, RecipeError
from cqtool.progress import SILENT, Progress

FORMAT_VERSION = 1
NO_GPU = (
    "Kernel times need a CUDA GPU, and torch sees none (`cqtool doctor` says more). Only the "
    "parts end-to-end and tune, with small shapes such as tiny, and kmeans run on a CPU."
)
_ENCODED_PROMPT = 4096
"""Tokens of the prompt whose encoding the targets are about."""

Checkpoint = Callable[[dict[str, Any]], None]


def run(
    settings: BenchSettings,
    progress: Progress = SILENT,
    checkpoint: Checkpoint = lambda report: None,
) -> dict[str, Any]:
    """Measure.

    Args:
        settings: what.
        progress: is told which case runs.
        checkpoint: is given the report so far after each case.

    Returns:
        ``device``, ``versions``, ``settings``, ``bandwidth``, and a list each for ``decode``,
        ``encode``, ``end_to_end``, ``kmeans`` and ``tune``; ``skipped`` holds what could not run at
        all, and why. All times are seconds.

    Raises:
        RecipeError: the settings contradict each other.
        ArtifactError: the artifact is missing, damaged or of another geometry.
        EnvironmentProblem: there is no such device, not enough memory, or no GPU for kernels.
    """
    parts = settings.chosen_parts
    target = find_target(settings.target or "llama-2-7b")
    formats = _formats(settings, target)
    device = resolve_device(settings.device)
    dtype = _dtype(settings, device)
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "suite": settings.chosen_suite,
        "shape": target.shape.to_json() if settings.target is not None else None,
        "artifact": public_name(settings.artifact) if settings.artifact is not None else None,
        "device": describe_device(device),
        "versions": describe_software(),
        "settings": _settings_json(settings, dtype),
        "bandwidth": None,
        "decode": [],
        "encode": [],
        "end_to_end": [],
        "kmeans": [],
        "tune": [],
        "skipped": [],
    }
    kernel_parts: list[Part] = [part for part in parts if part in ("decode", "encode")]
    if kernel_parts and device.type != "cuda":
        if len(kernel_parts) == len(parts):
            raise EnvironmentProblem(NO_GPU)
        report["skipped"] += [{"name": part, "reason": NO_GPU} for part in kernel_parts]
    elif kernel_parts:
        kernels = KernelSettings(device, dtype, settings.repeats, settings.seed)
        _run_kernels(report, kernel_parts, settings, target, formats, kernels, progress, checkpoint)
    if "end-to-end" in parts:
        _run_generation(report, settings, target, formats, device, dtype, progress, checkpoint)
    if "kmeans" in parts:
        from cqtool.bench.kmeans import bench_kmeans

        # Samples are random: which channels they would be of makes no difference.
        codes = {format.spec.name: format for format in _wanted(settings, formats)}
        for format in codes.values():
            report["kmeans"].append(
                bench_kmeans(target.shape, format, settings.tokens, device, settings.seed, progress)
            )
            checkpoint(report)
    if "tune" in parts:
        from cqtool.bench.tune import bench_tuning

        for found in bench_tuning(target, _wanted(settings, formats), settings, device, progress):
            report["tune"].append(found)
            checkpoint(report)
    return report


def _wanted(settings: BenchSettings, formats: Sequence[BenchFormat]) -> Sequence[BenchFormat]:
    """What of the formats to spend minutes on: more codes than one have to be asked for."""
    if settings.formats:
        return formats
    return [format for format in formats if format.spec.name == formats[0].spec.name]


def _formats(settings: BenchSettings, target: Target) -> list[BenchFormat]:
    window, sinks = settings.window, settings.sinks
    formats = []
    if settings.artifact is not None:
        own = open_artifact(settings.artifact)
        # What it is compared with keeps as many tokens.
        window = own.spec.window if window is None else window
        sinks = own.spec.sinks if sinks is None else sinks
        formats = [replace(own, spec=replace(own.spec, window=window, sinks=sinks))]
    groupings = settings.groupings or ("contiguous",)
    others = parse_formats(settings.chosen_formats, window or 0, sinks or 0, groupings)
    formats += [replace(other, beside=settings.artifact is not None) for other in others]
    for format in formats:
        require_geometry(format, target.shape)
        require_divisible(format, target.shape)
    return formats


def _settings_json(settings: BenchSettings, dtype: torch.dtype) -> dict[str, Any]:
    shown = settings.to_json() | {"dtype": str(dtype).removeprefix("torch.")}
    return {
        name: public_name(value) if name in ("target", "artifact") and value else value
        for name, value in shown.items()
    }


def _dtype(settings: BenchSettings, device: torch.device) -> torch.dtype:
    dtype: torch.dtype = getattr(
        torch, settings.dtype or ("float16" if device.type == "cuda" else "float32")
    )
    if dtype == torch.float32 and device.type == "cuda":
        raise RecipeError("On a GPU, --dtype float32 compares with nothing; use float16.")
    return dtype


def _loads(settings: BenchSettings, target: Target) -> Sequence[AttentionLoad]:
    if settings.target is None:
        return TARGET_LOADS
    shape = target.shape
    return [
        AttentionLoad(
            f"{shape.name}, batch {batch}, {tokens} tokens",
            batch,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            tokens,
            shape.rope_theta,
        )
        for batch in settings.batches or DEFAULT_BATCHES
        for tokens in settings.tokens
    ]


def _run_kernels(
    report: dict[str, Any],
    parts: Sequence[Part],
    settings: BenchSettings,
    target: Target,
    formats: Sequence[BenchFormat],
    kernels: KernelSettings,
    progress: Progress,
    checkpoint: Checkpoint,
) -> None:
    models = [format for format in formats if format.spec.layers]
    formats = [one for format in formats for one in format.of_each_code]
    codes = {format.name: format.spec.name for format in formats}
    bandwidth = measure_bandwidth(kernels.device)
    report["bandwidth"] = bandwidth.to_json()
    if "decode" in parts:
        loads = _loads(settings, target)
        with progress.task("Decode attention", len(loads)) as task:
            for load in loads:
                progress.note(load.name)
                found = bench_decode(load, formats, kernels, bandwidth, models)
                for row in found["kernels"]:
                    row["target"] = (
                        decode_target(load.name, codes.get(row["format"], ""))
                        if settings.target is None
                        else None
                    )
                report["decode"].append(found)
                checkpoint(report)
                task.advance()
    if "encode" in parts:
        from cqtool.bench.encode import bench_encode

        progress.note(f"Encoding, {target.shape.name}")
        prompt = settings.prompt if settings.target is not None else _ENCODED_PROMPT
        past = max(settings.tokens) - 1
        report["encode"].append(
            bench_encode(
                target, formats, kernels, prompt, settings.batches or DEFAULT_BATCHES, past
            )
        )
        checkpoint(report)


def _run_generation(
    report: dict[str, Any],
    settings: BenchSettings,
    target: Target,
    formats: Sequence[BenchFormat],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    checkpoint: Checkpoint,
) -> None:
    from cqtool.bench.end_to_end import bench_generation
    from cqtool.bench.runner import GenerationSettings

    in_suite = settings.target is None
    generations = GENERATIONS if in_suite else (Generation(settings.prompt, settings.new),)
    chosen = _wanted(settings, formats)
    done: list[dict[str, Any]] = report["end_to_end"]
    for count, generation in enumerate(generations):
        wanted = GenerationSettings(
            prompt=generation.prompt,
            new=generation.new,
            caches=settings.caches,
            batches=None if in_suite or settings.largest else settings.batches or DEFAULT_BATCHES,
            most=settings.most,
            device=device,
            dtype=dtype,
            seed=settings.seed,
        )

        def keep(found: dict[str, Any], count: int = count) -> None:
            done[count:] = [found]
            checkpoint(report)

        bench_generation(target, chosen, wanted, progress, keep)

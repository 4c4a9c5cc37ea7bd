"""Times the k-means engines on the codebooks of one layer, and compares what they reach."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cqtool.bench.formats import BenchFormat
from cqtool.bench.shapes import Shape
from cqtool.codebooks.batched import BatchedEngine
from cqtool.codebooks.engines import FaissEngine, import_faiss
from cqtool.codebooks.kmeans import Engine
from cqtool.errors import EnvironmentProblem
from cqtool.progress import Progress
from cqtool.spec import KINDS

ITERATIONS = 100
_COMPARED = 32
"""Codebooks of a kind that engines other than the batched one fit; of these are the objectives."""


def bench_kmeans(
    shape: Shape,
    format: BenchFormat,
    samples: Sequence[int],
    device: torch.device,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Fit a layer's codebooks to random samples with every engine that is installed.

    Channels of a sample are correlated and its weight has a heavy tail, as with squared gradients.

    Args:
        shape: the model's.
        format: the channels of a group and the bits of its code.
        samples: how many a codebook is fitted to, one case each.
        device: of the batched engine; faiss runs on the CPU, and on the GPU if it can.
        seed: of samples and fits.
        progress: is told what runs.

    Returns:
        ``rows``: seconds a codebook of each engine and case, its mean objective over the codebooks
        that all of them fit, and by which part that is above the lowest of the case.
    """
    engines, unavailable = _engines(device)
    rows: list[dict[str, Any]] = []
    for count in samples:
        problems = [_problem(shape, format.spec.code(kind).channels, count, seed) for kind in KINDS]
        case: list[dict[str, Any]] = []
        for engine in engines:
            progress.note(f"k-means of {count:,} samples: {engine.detail}")
            case.append(_measure(engine, format, problems, seed) | {"samples": count})
        best = min(row["objective"] for row in case)
        rows += [row | {"over_best": row["objective"] / best - 1} for row in case]
    return {
        "shape": shape.name,
        "format": format.spec.name,
        "iterations": ITERATIONS,
        "rows": rows,
        "unavailable": unavailable,
    }


def _engines(device: torch.device) -> tuple[list[Engine], list[dict[str, str]]]:
    batched = BatchedEngine(ITERATIONS, "kmeans++", device.type)
    try:
        faiss = import_faiss()
    except EnvironmentProblem:
        return [batched], [{"name": "faiss", "reason": "not installed"}]
    on_gpu = device.type == "cuda" and getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    places = (False, True) if on_gpu else (False,)
    return [*(FaissEngine(ITERATIONS, "kmeans++", gpu=gpu) for gpu in places), batched], []


def _problem(shape: Shape, channels: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples ``[codebooks, samples, channels]`` and weights, laid out as a sample store's are."""
    generator = torch.Generator().manual_seed(seed)
    codebooks = shape.kv_heads * shape.head_dim // channels
    mixing = torch.randn(codebooks, channels, channels, generator=generator)
    noise = torch.randn(samples, codebooks, channels, generator=generator)
    points = torch.einsum("scd,cde->sce", noise, mixing)
    weights = torch.randn(samples, codebooks, generator=generator) ** 4
    return points.transpose(0, 1), weights.transpose(0, 1)


def _measure(
    engine: Engine, format: BenchFormat, problems: list[tuple[Tensor, Tensor]], seed: int
) -> dict[str, Any]:
    seconds, fitted, errors = 0.0, 0, []
    for kind, (points, weights) in zip(KINDS, problems, strict=True):
        count = len(points) if engine.name == "batched" else min(_COMPARED, len(points))
        centroids = format.spec.code(kind).centroids
        seeds = range(seed, seed + count)
        # The first fit loads libraries.
        list(engine.fit_many(points[:1], weights[:1], centroids, seeds[:1]))
        start = time.perf_counter()
        fits = list(engine.fit_many(points[:count], weights[:count], centroids, seeds))
        seconds += time.perf_counter() - start
        fitted += count
        errors += [fit.error for fit in fits[:_COMPARED]]
    return {
        "engine": engine.name,
        "detail": engine.detail,
        "codebooks": fitted,
        "seconds_per_codebook": seconds / fitted,
        "layer_seconds": seconds / fitted * sum(len(points) for points, _ in problems),
        "objective": sum(errors) / len(errors),
    }

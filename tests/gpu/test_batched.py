"""The batched k-means on a GPU: the CPU's objective, the same bytes twice, little memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cqtool.codebooks import kmeans
from cqtool.codebooks.batched import BatchedEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def problem(problems=16, samples=4096, channels=8):
    """Correlated samples with a bias, and weights with a heavy tail."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(problems, channels, channels, generator=generator)
    points = torch.randn(problems, samples, channels, generator=generator) @ mixing
    points += 20 * torch.randn(problems, 1, channels, generator=generator)
    return points, torch.randn(problems, samples, generator=generator) ** 4


def fits(engine, points, weights, count, seeds):
    return list(engine.fit_many(points, weights, count, seeds))


def same(first, second):
    return all(
        a.error == b.error and np.array_equal(a.centroids, b.centroids)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_the_objective_is_the_cpus(init, weighted):
    points, weights = problem()
    own = weights if weighted else None
    for seed in (0, 100):
        cpu, gpu = (
            fits(BatchedEngine(60, init, device), points, own, 64, range(seed, seed + 16))
            for device in ("cpu", "cuda")
        )
        assert np.mean([f.error for f in gpu]) == pytest.approx(
            np.mean([f.error for f in cpu]), rel=5e-3
        )


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_the_bytes_depend_on_samples_and_seed_alone(init, monkeypatch):
    engine = BatchedEngine(30, init, "cuda")
    points, weights = problem()
    seeds = list(range(16))
    together = fits(engine, points, weights, 256, seeds)
    assert same(together, fits(engine, points, weights, 256, seeds))
    for order in ([3], [15, 3, 0], list(range(15, -1, -1))):
        apart = fits(engine, points[order], weights[order], 256, [seeds[i] for i in order])
        assert same(apart, [together[i] for i in order])
    monkeypatch.setattr(kmeans, "WORKING_BYTES", 4 << 20)
    assert same(together, fits(engine, points, weights, 256, seeds))


def test_empty_clusters_are_repaired_and_zero_weights_do_no_harm():
    points, weights = problem(samples=1000)
    points[:, :900] = points[:, :1]
    weights[:, ::3] = 0
    for fit in fits(BatchedEngine(40, "random", "cuda"), points, weights, 32, range(16)):
        assert np.isfinite(fit.centroids).all()
        assert len(np.unique(fit.centroids, axis=0)) == 32


def test_a_layer_takes_no_more_memory_than_stated():
    points, weights = problem(problems=512, samples=8192)
    engine = BatchedEngine(3, "kmeans++", "cuda")
    assert len(list(kmeans.in_parts(points, torch.device("cuda")))) > 1
    fits(engine, points[:1], weights[:1], 256, [0])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fits(engine, points, weights, 256, range(512))
    # Distances come on top.
    assert torch.cuda.max_memory_allocated() - before < kmeans.WORKING_BYTES + (256 << 20)

"""k-means against independent references, and the weights of the Fisher objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cqtool.codebooks import engines
from cqtool.codebooks.engines import FaissEngine
from cqtool.codebooks.files import read_fit, write_fit
from cqtool.codebooks.fit import (
    LayerFit,
    check_enough_samples,
    check_fits_geometry,
    codebook_seed,
    fisher_weights,
    fit_layer,
)
from cqtool.codebooks.grouping import choose_groups
from cqtool.errors import RecipeError, SampleError
from cqtool.geometry import NO_ROTATION, KeyRotation
from cqtool.models.probe import read_geometry
from cqtool.progress import SILENT
from cqtool.spec import CacheSpec, CQSpec


def spread(seed=0, samples=600, channels=2):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((samples, channels)).astype(np.float32)


def error(points, centroids, weights=None):
    distances = ((points[:, None] - centroids[None]).astype(np.float64) ** 2).sum(-1).min(1)
    return np.average(distances, weights=weights)


def lloyd(points, weights, centroids, iterations):
    """Textbook weighted Lloyd in float64."""
    points, centroids = points.astype(np.float64), centroids.astype(np.float64)
    for _ in range(iterations):
        nearest = ((points[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
        for k in range(len(centroids)):
            if (nearest == k).any():
                centroids[k] = np.average(
                    points[nearest == k], axis=0, weights=weights[nearest == k]
                )
    return centroids


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_a_fit_is_a_fixed_point_of_weighted_lloyd(init):
    points = spread()
    weights = np.random.default_rng(1).random(600).astype(np.float32) ** 3
    fit = FaissEngine(100, init).fit(points, weights, 16, seed=3)
    assert fit.error == pytest.approx(error(points, fit.centroids, weights), rel=1e-4)
    polished = lloyd(points, weights, fit.centroids, 50)
    assert error(points, polished, weights) >= 0.99 * fit.error
    np.testing.assert_allclose(polished, fit.centroids, atol=0.05)


def test_weights_count_like_repetitions():
    # Three well separated pairs: the centroid of each lies at its weighted mean.
    points = np.array([[0, 0], [1, 0], [10, 0], [11, 0], [0, 10], [0, 11]], np.float32)
    weights = np.array([1, 3, 1, 1, 7, 1], np.float32)
    fit = FaissEngine(20, "kmeans++").fit(points, weights, 3, seed=0)
    found = sorted(map(tuple, fit.centroids.round(4).tolist()))
    assert found == [(0.0, 10.125), (0.75, 0.0), (10.5, 0.0)]


def test_every_sample_counts_however_many_there_are():
    # faiss by default takes 256 samples a centroid and leaves the rest out.
    points = np.concatenate([spread(seed=i, samples=2000) + 20 * i for i in range(3)])
    fit = FaissEngine(20, "kmeans++").fit(points, None, 3, seed=0)
    expected = points.reshape(3, 2000, 2).astype(np.float64).mean(1)
    found = fit.centroids[fit.centroids[:, 0].argsort()]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_kmeans_plus_plus_finds_rare_clusters_that_random_samples_miss():
    # One large cluster and fifteen small ones far away.
    centres = np.arange(16)[:, None] * np.array([[50.0, 0.0]])
    points = np.concatenate(
        [spread(i, 2000 if i == 0 else 20) + centre for i, centre in enumerate(centres)]
    ).astype(np.float32)
    plus, chance = (
        [FaissEngine(10, init).fit(points, None, 16, seed).error for seed in range(10)]
        for init in ("kmeans++", "random")
    )
    # k-means++ may miss one of them, too.
    assert min(plus) < 3 and np.mean(chance) > 20 * np.mean(plus)


def test_weighting_moves_precision_to_where_the_weight_is():
    points = spread(samples=3000)
    weights = np.where(points[:, 0] > 0, 100, 1).astype(np.float32)
    engine = FaissEngine(50, "kmeans++")
    plain, weighted = (engine.fit(points, w, 32, seed=0).centroids for w in (None, weights))
    assert error(points, weighted, weights) < error(points, plain, weights)
    assert error(points, weighted) > error(points, plain)


def test_zero_and_absent_weights_do_not_break_a_fit():
    points = spread()
    engine = FaissEngine(20, "kmeans++")
    plain = engine.fit(points, None, 8, seed=1)
    zero = engine.fit(points, np.zeros(600, np.float32), 8, seed=1)
    np.testing.assert_array_equal(zero.centroids, plain.centroids)
    half = np.r_[np.zeros(300), np.ones(300)].astype(np.float32)
    assert np.isfinite(engine.fit(points, half, 64, seed=1).centroids).all()


def test_the_seed_decides_the_bytes():
    points = spread()
    engine = FaissEngine(10, "kmeans++")
    first, second = (engine.fit(points, None, 32, seed=5).centroids for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, engine.fit(points, None, 32, seed=6).centroids)
    seeds = {
        codebook_seed(0, layer, kind, head, group)
        for layer in range(3)
        for kind in ("key", "value")
        for head in range(3)
        for group in range(3)
    }
    assert len(seeds) == 54
    assert codebook_seed(1, 0, "key", 0, 0) not in seeds


def test_fits_run_side_by_side_also_after_one_in_the_main_thread(monkeypatch):
    faiss = engines.import_faiss()
    faiss.omp_set_num_threads(3)
    engine = FaissEngine(5, "random")
    engine.fit(spread(), None, 8, seed=0)
    assert engine.threads == 3


def test_more_centroids_than_samples_is_refused_before_and_during():
    with pytest.raises(SampleError, match="600 samples"):
        FaissEngine(10, "kmeans++").fit(spread(), None, 601, seed=0)
    spec = CacheSpec(CQSpec(8, 8), CQSpec(8, 10))
    check_enough_samples(spec, 1024)
    with pytest.raises(SampleError, match="1024 centroids"):
        check_enough_samples(spec, 1023)


def test_groups_must_fill_the_heads():
    from zoo import tiny

    geometry = read_geometry(tiny("llama"))
    check_fits_geometry(CacheSpec(CQSpec(8, 8), CQSpec(16, 8)), geometry)
    with pytest.raises(RecipeError, match=r"couple 1, 2, 4, 8, 16 channels"):
        check_fits_geometry(CacheSpec(CQSpec(8, 8), CQSpec(3, 8)), geometry)


def test_fisher_weights_sum_squares_within_a_group():
    gradients = torch.arange(24.0).reshape(2, 2, 6) - 10
    weights = fisher_weights(gradients, 3)
    for t in range(2):
        for h in range(2):
            for g in range(2):
                part = gradients[t, h, 3 * g : 3 * g + 3]
                assert weights[t, h, g] == sum(float(x) ** 2 for x in part)


class FakeStore:
    """Two heads of four channels whose gradients all sit in the first half of the samples."""

    def __init__(self, scale=1.0):
        generator = torch.Generator().manual_seed(0)
        self.samples = scale * torch.randn(200, 2, 4, generator=generator)

    def load(self, layer, kind):
        return self.samples if kind == "key" else 10 * self.samples

    def load_gradients(self, layer, kind):
        return (torch.arange(200) < 100).float()[:, None, None].expand(200, 2, 4)


@pytest.mark.parametrize("objective", ["uniform", "fisher"])
def test_each_codebook_is_fitted_to_its_own_head_group_and_weights(objective):
    store, spec = FakeStore(), CacheSpec(CQSpec(2, 4), CQSpec(4, 3))
    engine = FaissEngine(30, "kmeans++")
    with SILENT.task("fit", 1) as task:
        fit = fit_layer(store, 7, spec, objective, engine, 42, task)
    assert fit.codebooks["key"].shape == (2, 2, 16, 2)
    assert fit.codebooks["value"].shape == (2, 1, 8, 4)
    for kind, channels in (("key", 2), ("value", 4)):
        samples = store.load(7, kind).unflatten(-1, (-1, channels)).numpy()
        gradients = store.load_gradients(7, kind).unflatten(-1, (-1, channels))
        weights = gradients.square().sum(-1).numpy() if objective == "fisher" else None
        errors = []
        for head in range(2):
            for group in range(4 // channels):
                alone = engine.fit(
                    samples[:, head, group],
                    None if weights is None else weights[:, head, group],
                    spec.code(kind).centroids,
                    codebook_seed(42, 7, kind, head, group),
                )
                errors.append(alone.error)
                np.testing.assert_allclose(
                    fit.codebooks[kind][head, group].numpy(), alone.centroids, rtol=1e-3
                )
        assert fit.errors[kind] == pytest.approx(np.mean(errors))


def test_values_beyond_float16_are_kept_in_bfloat16():
    engine = FaissEngine(5, "kmeans++")
    with SILENT.task("fit", 1) as task:
        fit = fit_layer(
            FakeStore(scale=2e4),
            0,
            CacheSpec(CQSpec(2, 4), CQSpec(2, 4)),
            "uniform",
            engine,
            0,
            task,
        )
    assert fit.codebooks["value"].dtype == torch.bfloat16
    assert fit.codebooks["value"].isfinite().all()


class CorrelatedStore:
    """Two heads of eight channels that depend on each other, keys and values in their own way."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.samples, self.gradients = {}, {}
        for kind in ("key", "value"):
            mix = torch.randn(2, 8, 8, generator=generator)
            plain = torch.randn(300, 2, 8, generator=generator)
            self.samples[kind] = torch.einsum("thd,hde->the", plain, mix)
            self.gradients[kind] = torch.randn(300, 2, 8, generator=generator)

    def load(self, layer, kind):
        return self.samples[kind]

    def load_gradients(self, layer, kind):
        return self.gradients[kind]


@pytest.mark.parametrize("keys", ["correlation", "pairs"])
def test_groups_are_chosen_first_and_their_channels_fitted_together(keys):
    store, rotation = CorrelatedStore(), KeyRotation("half", 8)
    spec = CacheSpec(CQSpec(4, 3, keys), CQSpec(2, 3, "correlation"))
    engine = FaissEngine(20, "kmeans++")
    with SILENT.task("fit", 1) as task:
        fit = fit_layer(store, 3, spec, "fisher", engine, 1, task, rotation)
    for kind, size in (("key", 4), ("value", 2)):
        turned = rotation if kind == "key" else NO_ROTATION
        order = choose_groups(store.samples[kind], spec.code(kind).grouping, size, turned)
        assert torch.equal(fit.channels[kind], order)
        assert not torch.equal(order, order.sort(dim=1).values)
        for head in range(2):
            for group in range(8 // size):
                members = order[head, group * size : (group + 1) * size]
                alone = engine.fit(
                    store.samples[kind][:, head, members].numpy(),
                    store.gradients[kind][:, head, members].square().sum(-1).numpy(),
                    8,
                    codebook_seed(1, 3, kind, head, group),
                )
                np.testing.assert_allclose(
                    fit.codebooks[kind][head, group].numpy(), alone.centroids, rtol=2e-3, atol=1e-4
                )


def test_contiguous_groups_have_no_channels():
    spec = CacheSpec(CQSpec(4, 3), CQSpec(2, 3, "correlation"))
    with SILENT.task("fit", 1) as task:
        fit = fit_layer(
            CorrelatedStore(), 0, spec, "uniform", FaissEngine(5, "kmeans++"), 0, task, NO_ROTATION
        )
    assert fit.channels["key"] is None and fit.channels["value"] is not None


def test_a_fit_comes_back_in_the_order_it_was_made_in(tmp_path):
    owners = ["key", *(f"value.heads.{head}" for head in range(12))]
    table = torch.zeros(1, 2, 4, 2)
    fit = LayerFit(
        {owner: table.clone() for owner in owners},
        {owner: float(place) for place, owner in enumerate(owners)},
        dict.fromkeys(owners),
        {owner: {} for owner in owners},
    )
    for attempt in range(8):
        write_fit(tmp_path / str(attempt), fit)
        found = read_fit(tmp_path / str(attempt))
        assert found is not None and list(found.errors.items()) == list(fit.errors.items())

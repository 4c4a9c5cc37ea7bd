"""Balanced groups against an exhaustive search; what kernels and k-means make of them."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cqtool.codebooks.balance import balanced_groups, modelled_error
from cqtool.codebooks.batched import BatchedEngine
from cqtool.codebooks.calibrate import calibrate
from cqtool.codebooks.grouping import balanced, check_grouping, choose_groups, correlation_groups
from cqtool.errors import RecipeError
from cqtool.geometry import NO_ROTATION, KeyRotation, LayerGeometry, ModelGeometry
from cqtool.kernels.decode.tables import key_plans
from cqtool.kernels.layout import CodeFormat
from cqtool.models.load import open_model
from cqtool.models.probe import read_geometry
from cqtool.recipe import load_recipe
from cqtool.sampling import SampleStore
from cqtool.spec import CacheSpec, CQSpec
from tests.codebooks.test_calibrate import small_recipe


@pytest.fixture(scope="module")
def opened(tiny_model_dir):  # type: ignore[no-untyped-def]
    return open_model(str(tiny_model_dir), device="cpu")


def spread(tokens: int, heads: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Channels whose spreads differ by orders of magnitude, somewhat dependent."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(dim) + 0.2 * torch.randn(heads, dim, dim, generator=generator)
    sizes = (2 * torch.randn(heads, 1, dim, generator=generator)).exp()
    samples = torch.randn(heads, tokens, dim, generator=generator) @ (mix * sizes)
    return (samples + 5 * torch.randn(heads, 1, dim, generator=generator)).transpose(0, 1)


def random_metric(heads: int, dim: int, seed: int = 1) -> torch.Tensor:
    root = torch.randn(heads, dim, dim, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT


def covariance(samples: torch.Tensor) -> torch.Tensor:
    centred = (samples - samples.mean(dim=0)).double()
    return torch.einsum("thi,thj->hij", centred, centred) / len(samples)


def partitions(channels: list[int], size: int):  # type: ignore[no-untyped-def]
    """Every way to fill groups of `size`."""
    if not channels:
        yield []
        return
    first, rest = channels[0], channels[1:]
    for others in combinations(rest, size - 1):
        left = [channel for channel in rest if channel not in others]
        for more in partitions(left, size):
            yield [[first, *others], *more]


def by_hand(cov: torch.Tensor, metric: torch.Tensor, groups: list[list[int]]) -> float:
    """The modelled error of one head, from determinants of what numpy would call M[ix_(g, g)]."""

    def regular(matrix: torch.Tensor) -> torch.Tensor:
        unit = torch.eye(len(matrix), dtype=torch.float64)
        return matrix.double() / matrix.double().diagonal().mean() + 1e-3 * unit

    cov, metric = regular(cov), regular(metric)
    return math.fsum(
        float((torch.det(cov[g][:, g]) * torch.det(metric[g][:, g])) ** (1 / len(g)))
        for g in groups
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_error_is_that_of_determinants_and_exchanges_come_near_the_best(size: int) -> None:
    dim = 2 * size if size > 2 else 8
    reached = 0
    for seed in range(6):
        cov, metric = covariance(spread(300, 1, dim, seed)), random_metric(1, dim, seed)
        every = list(partitions(list(range(dim)), size))
        errors = [by_hand(cov[0], metric[0], groups) for groups in every]
        for groups, error in zip(every[:5], errors, strict=False):
            found = modelled_error(cov, metric, torch.tensor([groups]))
            assert float(found) == pytest.approx(error, rel=1e-6)
        start = torch.tensor(every[errors.index(max(errors))])[None, None, :, :, None]
        chosen = balanced_groups(cov, metric, start)
        assert sorted(chosen.flatten().tolist()) == list(range(dim))
        error = by_hand(cov[0], metric[0], chosen[0].tolist())
        assert error <= min(errors) * 1.25 and error < 0.9 * max(errors)
        reached += error <= min(errors) * (1 + 1e-6)
        # A local optimum: no single exchange is better.
        for a, b in combinations(range(dim), 2):
            swapped = [[{a: b, b: a}.get(c, c) for c in group] for group in chosen[0].tolist()]
            assert by_hand(cov[0], metric[0], swapped) >= error * (1 - 2e-6)
    assert reached >= 3


def test_heads_are_independent_and_the_same_samples_give_the_same_groups() -> None:
    samples, metric = spread(400, 3, 16), random_metric(3, 16)
    together = balanced(samples, 4, metric)
    for head in range(3):
        alone = balanced(samples[:, head : head + 1], 4, metric[head : head + 1])
        assert torch.equal(alone[0], together[head])
    assert torch.equal(together, balanced(samples, 4, metric))
    # The metric counts: without it other channels meet.
    assert not torch.equal(together, balanced(samples, 4, None))
    unit = torch.eye(16).expand(3, -1, -1)
    assert torch.equal(balanced(samples, 4, unit), balanced(samples, 4, None))


def test_channels_that_never_change_or_that_nothing_reads_do_no_harm() -> None:
    samples = spread(100, 2, 16)
    samples[:, 0] = 3.0
    samples[:, 1, 4:9] = 0.5
    for metric in (None, torch.zeros(2, 16, 16)):
        found = balanced(samples, 4, metric)
        assert found.sort(dim=1).values.tolist() == [list(range(16))] * 2


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_kernels_need_not_rearrange_keys(style: str, size: int) -> None:
    wide = KeyRotation(style, 64)  # type: ignore[arg-type]
    kinds = set()
    for seed in range(4):
        samples, metric = spread(300, 2, 64, seed), random_metric(2, 64, seed)
        order = choose_groups(samples, "balanced-pairs", size, wide, metric)
        assert order is not None
        plans = key_plans(CodeFormat(64, size, 8), wide, order, 2)
        assert len({plan.pairing for plan in plans}) == 1
        kinds.add(plans[0].pairing)
        # What regard for pairs costs is little beside what balance brings.
        cov = covariance(samples)

        def error(order: torch.Tensor, cov=cov, metric=metric) -> float:  # type: ignore[no-untyped-def]
            return float(modelled_error(cov, metric, order.view(2, -1, size)).sum())

        free = choose_groups(samples, "balanced", size, wide, metric)
        assert free is not None
        assert error(free) <= error(order) < error(correlation_groups(samples, size))
    assert kinds <= {"paired", "closed"} and "scatter" not in kinds
    if size == 2:
        assert kinds == {"paired"}


@pytest.mark.parametrize("rotation", [KeyRotation("half", 32), KeyRotation("half", 8, 4)])
def test_channels_that_are_not_turned_keep_pairs_whole(rotation: KeyRotation) -> None:
    order = balanced(spread(200, 2, 64), 4, None, rotation)
    plans = key_plans(CodeFormat(64, 4, 8), rotation, order, 2)
    assert {plan.pairing for plan in plans} == {"closed"}


def test_a_layer_without_rope_has_free_groups_and_odd_groups_are_refused() -> None:
    samples = spread(100, 2, 16)
    free = balanced(samples, 4, None)
    found = choose_groups(samples, "balanced-pairs", 4, NO_ROTATION)
    assert found is not None and torch.equal(found, free)

    def geometry(*rotations: KeyRotation) -> ModelGeometry:
        return ModelGeometry(2, tuple(LayerGeometry(2, 24, 24, None, r) for r in rotations))

    spec = CacheSpec(CQSpec(3, 8, "balanced-pairs"), CQSpec(3, 8, "balanced"))
    with pytest.raises(RecipeError, match="an even number of channels, or use 'correlation' or 'b"):
        check_grouping(spec, geometry(KeyRotation("half", 24)))
    even = CacheSpec(CQSpec(4, 8, "balanced-pairs"), CQSpec(4, 8, "balanced"))
    with pytest.raises(RecipeError, match="no RoPE; use 'balanced'"):
        check_grouping(even, geometry(NO_ROTATION, NO_ROTATION))
    with pytest.raises(RecipeError, match="no pairs; use 'balanced'"):
        CacheSpec(CQSpec(4, 8), CQSpec(4, 8, "balanced-pairs"))


def test_kmeans_has_less_error_in_balanced_groups() -> None:
    samples = spread(3000, 6, 16)
    engine = BatchedEngine(20, "kmeans++", "cpu")

    def errors(order: torch.Tensor) -> torch.Tensor:
        groups = samples.gather(2, order.expand_as(samples)).view(3000, 48, 2).transpose(0, 1)
        fits = engine.fit_many(groups, None, 64, list(range(48)))
        return torch.tensor([fit.error for fit in fits]).view(6, 8).sum(dim=1)

    ratio = errors(balanced(samples, 2, None)) / errors(correlation_groups(samples, 2))
    assert ratio.max() < 1.05 and ratio.log().mean().exp() < 0.75


@pytest.mark.parametrize("objective", ["uniform", "fisher", "query"])
def test_a_recipe_says_so_and_errors_count_as_the_objective_says(
    opened, tiny_text_file, tmp_path: Path, objective: str
) -> None:
    recipe = small_recipe(tiny_text_file, grouping="balanced-pairs", objective=objective)
    out = tmp_path / "cal"
    calibrate(opened, recipe, out)
    store, geometry = SampleStore.open(out), read_geometry(opened.model)
    config = json.loads((out / "cq_config.json").read_text())
    assert config["cache"]["key"]["grouping"] == "balanced-pairs"
    assert config["cache"]["value"]["grouping"] == "balanced"
    tensors = load_file(out / "codebooks.safetensors")
    for layer in range(len(geometry.layers)):
        for kind, rotation in (("key", geometry.layers[layer].rotation), ("value", NO_ROTATION)):
            metric = None
            if objective == "query":
                metric = store.load_moment(layer, kind)  # type: ignore[arg-type]
            if objective == "fisher":
                gradients = store.load_gradients(layer, kind)  # type: ignore[arg-type]
                metric = gradients.square().mean(dim=0).diag_embed()
            samples = store.load(layer, kind)  # type: ignore[arg-type]
            expected = balanced(samples, 8, metric, rotation)
            assert torch.equal(tensors[f"layers.{layer}.{kind}.channels"].long(), expected)


def test_one_name_stands_for_keys_and_values() -> None:
    recipe = load_recipe("cq-8c8b", {"grouping": "balanced-pairs"})
    assert (recipe.grouping.key, recipe.grouping.value) == ("balanced-pairs", "balanced")
    recipe = load_recipe("cq-8c8b", {"grouping": "balanced"})
    assert (recipe.grouping.key, recipe.grouping.value) == ("balanced", "balanced")

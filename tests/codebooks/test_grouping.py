"""Groups of channels against a brute-force loop, and what the kernels make of them."""

from __future__ import annotations

import math

import pytest
import torch

from cqtool.codebooks.grouping import (
    absolute_correlation,
    check_grouping,
    choose_groups,
    correlation_groups,
    pair_groups,
    rope_pairs,
)
from cqtool.errors import RecipeError
from cqtool.geometry import NO_ROTATION, KeyRotation, LayerGeometry, ModelGeometry
from cqtool.kernels.decode.tables import key_plans
from cqtool.kernels.layout import CodeFormat
from cqtool.spec import CacheSpec, CQSpec


def mixed(tokens: int, heads: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Channels that depend on each other, of another scale and mean each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return torch.einsum("thd,hde->the", normal(tokens, heads, dim), normal(heads, dim, dim)) + (
        10 * normal(heads, dim)
    )


def pearson(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    both = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    own = math.fsum((x - mean_a) ** 2 for x in a) * math.fsum((y - mean_b) ** 2 for y in b)
    return both / math.sqrt(own)


def brute_force(head: torch.Tensor, units: list[list[int]], size: int) -> list[int]:
    """The order of one head's channels ``[tokens, dim]``, by loops over units of channels."""
    columns = [head[:, channel].tolist() for channel in range(head.shape[1])]

    def strength(a: int, b: int) -> float:
        return sum(abs(pearson(columns[x], columns[y])) for x in units[a] for y in units[b])

    table = {(a, b): strength(a, b) for a in range(len(units)) for b in range(len(units)) if a != b}
    free, groups = list(range(len(units))), []
    while free:
        group = [max(free, key=lambda u: sum(table[u, v] for v in free if v != u))]
        free.remove(group[0])
        while len(group) < size:
            group.append(max(free, key=lambda u: sum(table[u, v] for v in group)))
            free.remove(group[-1])
        groups.append(sorted(channel for unit in group for channel in units[unit]))
    return [channel for group in sorted(groups) for channel in group]


@pytest.mark.parametrize("size", [1, 2, 4, 12])
def test_correlation_groups_are_those_of_a_loop_over_each_head(size: int) -> None:
    samples = mixed(50, 3, 12)
    found = correlation_groups(samples, size)
    assert found.dtype == torch.int64
    for head in range(3):
        units = [[channel] for channel in range(12)]
        assert found[head].tolist() == brute_force(samples[:, head], units, size)
    if size in (2, 4):
        assert not torch.equal(found[0], found[1])


ROTATIONS = [
    KeyRotation("half", 16),
    KeyRotation("interleaved", 16),
    KeyRotation("half", 8, 4),
    KeyRotation("interleaved", 4),
]


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda r: f"{r.style}-{r.dim}-{r.offset}")
@pytest.mark.parametrize("size", [2, 4, 8])
def test_pair_groups_are_those_of_a_loop_over_pairs(rotation: KeyRotation, size: int) -> None:
    samples = mixed(40, 2, 16, seed=1)
    turned = range(rotation.offset, rotation.offset + rotation.dim)
    if rotation.style == "half":
        units = [[p, p + rotation.dim // 2] for p in turned[: rotation.dim // 2]]
    else:
        units = [[p, p + 1] for p in turned[::2]]
    still = [channel for channel in range(16) if channel not in turned]
    units += [still[k : k + 2] for k in range(0, len(still), 2)]
    assert sorted(rope_pairs(rotation, 16).tolist()) == sorted(units)
    found = pair_groups(samples, size, rotation)
    for head in range(2):
        assert found[head].tolist() == brute_force(samples[:, head], units, size // 2)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("turned", [64, 32])
@pytest.mark.parametrize("channels", [4, 8])
def test_the_kernels_find_pair_groups_closed(style: str, turned: int, channels: int) -> None:
    rotation = KeyRotation(style, turned)  # type: ignore[arg-type]
    order = pair_groups(mixed(200, 3, 64), channels, rotation)
    plans = key_plans(CodeFormat(64, channels, 8), rotation, order, 3)
    assert {plan.pairing for plan in plans} == {"closed"}
    assert len(set(plans)) == 3


def test_dependent_channels_meet_and_the_sign_does_not_matter() -> None:
    base = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    # Channels 0 to 7: each of four signals twice, far apart, once turned over.
    samples = torch.cat((base, -3 * base + 5), dim=1)[:, None]
    assert correlation_groups(samples, 2).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]


def test_equal_channels_are_taken_from_the_lowest_and_constant_ones_last() -> None:
    assert correlation_groups(torch.zeros(10, 1, 6), 2).tolist() == [[0, 1, 2, 3, 4, 5]]
    signal = torch.arange(10.0)
    samples = torch.full((10, 1, 6), 0.1)
    samples[:, 0, 2] = samples[:, 0, 5] = signal
    correlation = absolute_correlation(samples)[0]
    assert correlation[2, 5] == pytest.approx(1)
    assert int((correlation > 0).sum()) == 2
    assert correlation_groups(samples, 2).tolist() == [[0, 1, 2, 5, 3, 4]]


def test_the_choice_goes_by_kind_of_grouping_and_layer() -> None:
    samples, rotation = mixed(60, 2, 16), KeyRotation("half", 16)
    by_correlation = correlation_groups(samples, 4)
    assert choose_groups(samples, "contiguous", 4, rotation) is None
    for grouping, turned, expected in (
        ("correlation", rotation, by_correlation),
        ("pairs", rotation, pair_groups(samples, 4, rotation)),
        ("pairs", NO_ROTATION, by_correlation),
    ):
        found = choose_groups(samples, grouping, 4, turned)  # type: ignore[arg-type]
        assert found is not None and torch.equal(found, expected)
    assert not torch.equal(by_correlation, pair_groups(samples, 4, rotation))


def test_pairs_that_cannot_be_are_refused_with_what_to_do() -> None:
    def spec(channels: int) -> CacheSpec:
        return CacheSpec(CQSpec(channels, 8, "pairs"), CQSpec(3, 8, "correlation"))

    def geometry(*rotations: KeyRotation) -> ModelGeometry:
        return ModelGeometry(2, tuple(LayerGeometry(2, 24, 24, None, r) for r in rotations))

    turned = KeyRotation("half", 24)
    check_grouping(spec(4), geometry(turned, NO_ROTATION))
    with pytest.raises(RecipeError, match="an even number of channels, or use 'correlation'"):
        check_grouping(spec(3), geometry(turned))
    with pytest.raises(RecipeError, match="no RoPE; use 'correlation'"):
        check_grouping(spec(4), geometry(NO_ROTATION, NO_ROTATION))
    with pytest.raises(RecipeError, match="an even number"):
        pair_groups(mixed(10, 1, 24), 3, turned)
    with pytest.raises(RecipeError, match="'correlation'"):
        pair_groups(mixed(10, 1, 24), 4, NO_ROTATION)
    with pytest.raises(RecipeError, match="Nothing turns values"):
        CacheSpec(CQSpec(4, 8), CQSpec(4, 8, "pairs"))

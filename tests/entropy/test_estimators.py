"""The entropy estimators against brute force, against numpy and against analytic values."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from cqtool.entropy.estimators import (
    bin_channels,
    cell_count,
    cell_ids,
    correlation_matrix,
    entropy_of_cells,
    joint_entropy,
    marginal_entropies,
    mutual_information,
    total_correlation,
)
from cqtool.errors import CqtoolError, SampleError


def samples(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))


def brute_force(x: torch.Tensor, bins: int) -> tuple[float, int, int]:
    """Plug-in entropy, occupied cells and singletons by a loop over the tokens, in float64."""
    exact = x.double().numpy()
    low, high = exact.min(axis=0), exact.max(axis=0)
    cells: Counter[tuple[int, ...]] = Counter()
    for row in exact:
        cell = []
        for value, lo, hi in zip(row, low, high, strict=True):
            cell.append(0 if hi == lo else min(int((value - lo) / (hi - lo) * bins), bins - 1))
        cells[tuple(cell)] += 1
    total = sum(cells.values())
    entropy = -sum(n / total * math.log2(n / total) for n in cells.values())
    return entropy, len(cells), sum(n == 1 for n in cells.values())


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
@pytest.mark.parametrize("bins", [2, 5, 16])
def test_joint_entropy_equals_a_loop_over_the_tokens(channels: int, bins: int) -> None:
    x = samples(700, channels)
    x[:, channels // 2] = x[:, 0].abs() + x[:, channels // 2] / 3
    bits, occupied, singletons = brute_force(x, bins)
    estimate = joint_entropy(x, bins)
    assert estimate.bits.tolist() == pytest.approx([bits], abs=1e-12)
    assert estimate.occupied.tolist() == [occupied]
    assert estimate.singletons.tolist() == [singletons]
    corrected = bits + (occupied - 1) / (2 * 700 * math.log(2))
    assert estimate.miller_madow.tolist() == pytest.approx([corrected], abs=1e-12)


def test_many_groups_at_once_equal_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = samples(300, 12).view(300, 4, 3)
    alone = [float(joint_entropy(x[:, group]).bits[0]) for group in range(4)]
    assert joint_entropy(x).bits.tolist() == pytest.approx(alone, abs=1e-12)
    monkeypatch.setattr("cqtool.entropy.estimators._CHUNK", 700)
    assert joint_entropy(x).bits.tolist() == pytest.approx(alone, abs=1e-12)


def test_bins_are_those_of_numpys_histogram() -> None:
    x = samples(5000, 1)
    counts, _ = np.histogram(x.double().numpy(), bins=16)
    binned = bin_channels(x, 16)
    assert torch.bincount(binned[0].long(), minlength=16).tolist() == counts.tolist()
    assert int(binned.min()) == 0 and int(binned.max()) == 15


def test_independent_uniform_channels_share_nothing() -> None:
    # Every combination of 4 x 4 x 4 levels exactly once: uniform and independent without noise.
    level = torch.arange(4.0)
    x = torch.cartesian_prod(level, level, level)
    estimate = joint_entropy(x, bins=4)
    assert float(estimate.bits[0]) == pytest.approx(6.0, abs=1e-12)
    assert marginal_entropies(x, bins=4).bits.tolist() == pytest.approx([2.0] * 3, abs=1e-12)
    assert total_correlation(x, bins=4) == pytest.approx(0.0, abs=1e-12)


def test_a_copied_channel_adds_no_entropy() -> None:
    x = samples(4000, 1).repeat(1, 4) * torch.tensor([1.0, 2.0, -0.5, 8.0])
    marginal = float(joint_entropy(x[:, :1]).bits[0])
    # The mirrored copy has its bins mirrored too, so only samples on an edge could differ.
    assert float(joint_entropy(x).bits[0]) == pytest.approx(marginal, abs=1e-3)
    assert total_correlation(x) == pytest.approx(3 * marginal, abs=1e-3)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_mutual_information_of_a_gaussian_pair(rho: float) -> None:
    x, noise = samples(400_000, 2, seed=1).T
    y = rho * x + math.sqrt(1 - rho**2) * noise
    analytic = -0.5 * math.log2(1 - rho**2)
    assert mutual_information(x, y, bins=64) == pytest.approx(analytic, abs=0.02)


def test_mutual_information_is_symmetric_and_agrees_with_a_joint_histogram() -> None:
    x, y = samples(3000, 2, seed=4).T
    y = y + x
    table, _, _ = np.histogram2d(x.double().numpy(), y.double().numpy(), bins=8)
    p = table / table.sum()
    product = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    expected = float((p[p > 0] * np.log2(p[p > 0] / product[p > 0])).sum())
    assert mutual_information(x, y, bins=8) == pytest.approx(expected, abs=1e-10)
    assert mutual_information(y, x, bins=8) == pytest.approx(expected, abs=1e-10)


def test_miller_madow_is_nearer_the_truth_when_samples_are_few() -> None:
    ids = torch.randint(0, 64, (200, 256), generator=torch.Generator().manual_seed(3))
    estimate = entropy_of_cells(ids, 64)
    assert float(estimate.bits.mean()) < 5.9 < float(estimate.miller_madow.mean())
    assert float(estimate.miller_madow.mean()) == pytest.approx(6.0, abs=0.03)


def test_small_samples_are_marked() -> None:
    assert joint_entropy(samples(4095, 3)).small_sample.tolist() == [True]  # 16**3 = 4096 cells
    assert joint_entropy(samples(40_000, 3)).small_sample.tolist() == [False]
    spread = torch.arange(1000)[None]
    assert entropy_of_cells(spread, 1000).small_sample.tolist() == [True]  # all singletons
    assert entropy_of_cells(spread // 4, 1000).small_sample.tolist() == [False]


def test_a_constant_channel_has_no_entropy() -> None:
    x = samples(500, 3)
    x[:, 1] = 7.25
    assert marginal_entropies(x).bits[1].item() == 0.0
    without = float(joint_entropy(x[:, [0, 2]]).bits[0])
    assert float(joint_entropy(x).bits[0]) == pytest.approx(without, abs=1e-12)


def test_one_sample_has_no_entropy() -> None:
    estimate = joint_entropy(samples(1, 4))
    assert estimate.bits.tolist() == [0.0]
    assert estimate.miller_madow.tolist() == [0.0]
    assert estimate.small_sample.tolist() == [True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_names_the_place_and_the_fix(bad: float) -> None:
    x = samples(50, 4)
    x[17, 2] = bad
    with pytest.raises(SampleError, match=r"layer 3, key; .*--dtype float32"):
        bin_channels(x, 16, where="layer 3, key")


def test_no_sample_is_an_error_not_a_crash() -> None:
    with pytest.raises(SampleError, match="at least one sequence"):
        joint_entropy(torch.zeros(0, 2))
    with pytest.raises(SampleError, match="at least one sequence"):
        entropy_of_cells(torch.zeros(1, 0, dtype=torch.int64), 4)


def test_too_many_cells_say_how_many_channels_fit() -> None:
    assert cell_count(16, 15) == 2**60
    with pytest.raises(CqtoolError, match="--max-coupled 15"):
        cell_count(16, 16)
    with pytest.raises(CqtoolError, match="--max-coupled 7"):
        joint_entropy(samples(20, 8), bins=256)
    with pytest.raises(CqtoolError, match="2 to 32768"):
        joint_entropy(samples(20, 2), bins=1)


def test_the_last_cell_of_the_largest_group_is_numbered_without_overflow() -> None:
    top = torch.full((1, 15, 1), 15, dtype=torch.int16)
    assert cell_ids(top, 16).tolist() == [[2**60 - 1]]


def test_correlation_equals_numpys() -> None:
    x = samples(1000, 6) @ samples(6, 6, seed=2)
    x = x * 3 + 1000  # far from zero, where a one-pass float32 formula fails
    expected = np.corrcoef(x.double().numpy(), rowvar=False)
    np.testing.assert_allclose(correlation_matrix(x).numpy(), expected, atol=1e-9)


def test_correlation_of_a_constant_channel_is_not_defined() -> None:
    x = samples(1001, 3).double()
    x[:, 1] = 0.1
    assert x[:, 1].mean() != x[0, 1], "the mean's rounding is the trap here"
    matrix = correlation_matrix(x)
    assert matrix[1].isnan().all() and matrix[:, 1].isnan().all()
    assert matrix[0, 0] == 1.0 and not matrix[0, 2].isnan()

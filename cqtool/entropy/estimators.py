"""Entropy, mutual information and correlation of channels, estimated from samples.

The estimator is the one of "KV Cache is 1 Bit Per Channel" (Zhang, Yi, Xu and Shrivastava, 2024,
Section 3.1): each channel is cut into equal-width bins between its smallest and largest sample, a
group of c channels thereby into ``bins**c`` cells, and the frequencies of the cells go into
``-sum p log2 p``. All results are in bits and in float64.

Bias: this plug-in estimate is too small, by about ``(occupied - 1) / (2 N ln 2)`` bits when the N
samples are many against the occupied cells (Miller, 1955), and it can never exceed ``log2 N``. With
few samples a joint entropy therefore looks smaller, and a saving by coupling larger, than it is.
Every :class:`EntropyEstimate` carries the Miller-Madow corrected value and a mark for the case
where neither value can be trusted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cqtool.errors import RecipeError, SampleError

DEFAULT_BINS = 16
"""Bins per channel in the paper."""

MAX_BINS = 1 << 15
_MAX_CELLS = 2**63
"""So that the last cell, numbered from 0, still fits an int64."""

_CHUNK = 1 << 22
"""Numbers handled at once, so that temporary tensors stay near 100 MB."""


@dataclass(frozen=True)
class EntropyEstimate:
    """Entropies of several groups of channels, estimated from the same number of samples.

    Attributes:
        bits: plug-in estimate, float64 [groups].
        miller_madow: the same with the Miller-Madow bias correction, float64 [groups].
        occupied: cells that hold at least one sample, int64 [groups].
        singletons: cells that hold exactly one sample, int64 [groups].
        samples: samples per group.
        cells: cells a group has, occupied or not.
    """

    bits: Tensor
    miller_madow: Tensor
    occupied: Tensor
    singletons: Tensor
    samples: int
    cells: int

    @property
    def small_sample(self) -> Tensor:
        """Bool [groups]: fewer samples than cells, or most occupied cells hold a single sample."""
        if self.samples < self.cells:
            return torch.ones_like(self.occupied, dtype=torch.bool)
        return 2 * self.singletons > self.occupied


def bin_channels(samples: Tensor, bins: int = DEFAULT_BINS, where: str = "the samples") -> Tensor:
    """Number the equal-width bin each sample falls into, channel by channel.

    A channel that never changes has everything in bin 0 and so an entropy of 0.

    Args:
        samples: floating point [tokens, channels].
        bins: bins between a channel's smallest and largest sample.
        where: what the samples are, for the error message ("layer 3, key").

    Returns:
        int16 [channels, tokens], values 0 .. bins - 1; a channel's samples lie side by side.

    Raises:
        SampleError: no sample, or a NaN or infinity among them.
        RecipeError: `bins` is out of range.
    """
    if not 2 <= bins <= MAX_BINS:
        raise RecipeError(f"{bins} bins cannot be used; take 2 to {MAX_BINS} (the paper has 16).")
    tokens, channels = samples.shape
    if tokens == 0:
        raise SampleError(f"There is no sample in {where}; sample at least one sequence.")
    binned = torch.empty(channels, tokens, dtype=torch.int16)
    step = max(1, _CHUNK // tokens)
    for start in range(0, channels, step):
        # float64, so that a sample on a bin's edge falls where exact arithmetic puts it.
        part = samples[:, start : start + step].T.contiguous().to(torch.float64)
        low, high = part.amin(dim=1, keepdim=True), part.amax(dim=1, keepdim=True)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise SampleError(
                f"NaN or infinite activations in {where}; sample again with a wider type, for "
                "example --dtype float32, and check that the model's weights are sound."
            )
        width = high - low
        part.sub_(low).div_(torch.where(width > 0, width, 1.0)).mul_(bins).clamp_(max=bins - 1)
        binned[start : start + step] = part.to(torch.int16)
    return binned


def cell_ids(binned: Tensor, bins: int) -> Tensor:
    """Number the cell each sample of each group falls into.

    Args:
        binned: integers 0 .. bins - 1, [groups, c, tokens].
        bins: bins per channel.

    Returns:
        int64 [groups, tokens], values 0 .. bins**c - 1.

    Raises:
        RecipeError: ``bins**c`` cells cannot be numbered in 64 bits.
    """
    channels = binned.shape[1]
    cell_count(bins, channels)
    ids = binned[:, 0].to(torch.int64)
    for channel in range(1, channels):
        ids.mul_(bins).add_(binned[:, channel])
    return ids


def cell_count(bins: int, channels: int) -> int:
    """Cells of a group of `channels` channels.

    Raises:
        RecipeError: there are more than an int64 can number.
    """
    cells: int = bins**channels
    if cells > _MAX_CELLS:
        most = max(c for c in range(channels) if bins**c <= _MAX_CELLS)
        raise RecipeError(
            f"{channels} channels of {bins} bins have more cells than 64 bits can number; use at "
            f"most --max-coupled {most} or fewer --bins."
        )
    return cells


def entropy_of_cells(ids: Tensor, cells: int) -> EntropyEstimate:
    """Entropy of each row of cell numbers.

    Args:
        ids: int64 [groups, tokens].
        cells: how many cells there are.

    Raises:
        SampleError: no sample.
    """
    groups, tokens = ids.shape
    if tokens == 0:
        raise SampleError("An entropy needs samples; sample at least one sequence.")
    step = max(1, _CHUNK // tokens)
    parts = [_count_cells(ids[start : start + step]) for start in range(0, groups, step)]
    bits = torch.cat([part[0] for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)
    empty = torch.zeros(0, dtype=torch.int64)
    occupied = torch.cat([part[1] for part in parts]) if parts else empty
    singletons = torch.cat([part[2] for part in parts]) if parts else empty
    correction = (occupied - 1).to(torch.float64) / (2 * tokens * math.log(2))
    return EntropyEstimate(bits, bits + correction, occupied, singletons, tokens, cells)


def _count_cells(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plug-in entropy, occupied cells and singletons of each row, all [groups].

    The rows are sorted, and the lengths of the runs of equal numbers are the cells' counts: one
    sort whatever the number of cells, which may be 2**32 and more.
    """
    groups, tokens = ids.shape
    # numpy sorts integers with SIMD, 8 times as fast as torch does on a CPU.
    ids = torch.from_numpy(np.sort(ids.numpy(), axis=1))
    starts_run = torch.ones(groups, tokens, dtype=torch.bool)
    starts_run[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = starts_run.flatten().nonzero().flatten()
    counts = torch.diff(first, append=torch.tensor([groups * tokens]))
    group = first // tokens
    share = counts.to(torch.float64) / tokens
    bits = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, -share * share.log2())
    occupied = torch.bincount(group, minlength=groups)
    singletons = torch.bincount(group[counts == 1], minlength=groups)
    return bits.clamp_(min=0.0), occupied, singletons


def joint_entropy(samples: Tensor, bins: int = DEFAULT_BINS) -> EntropyEstimate:
    """Joint entropy of the c channels of each group.

    Args:
        samples: floating point [tokens, c], or [tokens, groups, c] for many groups at once.
        bins: equal-width bins per channel.

    Raises:
        SampleError: no sample, or NaN.
        RecipeError: too many cells, or `bins` out of range.
    """
    channels = samples.shape[-1]
    binned = bin_channels(samples.flatten(1), bins)
    ids = cell_ids(binned.view(-1, channels, samples.shape[0]), bins)
    return entropy_of_cells(ids, cell_count(bins, channels))


def marginal_entropies(samples: Tensor, bins: int = DEFAULT_BINS) -> EntropyEstimate:
    """Entropy of each channel of `samples` [tokens, channels] on its own, groups = channels."""
    return joint_entropy(samples[:, :, None], bins)


def total_correlation(samples: Tensor, bins: int = DEFAULT_BINS) -> float:
    """Sum of the marginal entropies minus the joint entropy of `samples` [tokens, c], in bits.

    The bits that coupling the c channels saves: 0 when they are independent (Watanabe, 1960). Both
    terms are plug-in estimates, so the difference is too large when the sample is small.
    """
    marginals = marginal_entropies(samples, bins).bits.sum()
    return float(marginals - joint_entropy(samples, bins).bits[0])


def mutual_information(x: Tensor, y: Tensor, bins: int = DEFAULT_BINS) -> float:
    """Mutual information of two channels, each [tokens], in bits: H(x) + H(y) - H(x, y)."""
    return total_correlation(torch.stack([x, y], dim=1), bins)


def correlation_matrix(samples: Tensor) -> Tensor:
    """Pearson correlation of every pair of channels.

    Args:
        samples: floating point [tokens, channels].

    Returns:
        float64 [channels, channels] in -1 .. 1 with ones on the diagonal; NaN in the rows and
        columns of a channel that never changes, whose correlation is not defined.
    """
    exact = samples.to(torch.float64)
    centered = exact - exact.mean(dim=0)
    # Asked of the samples themselves: the rounding of the mean may leave a tiny variance.
    constant = exact.amin(dim=0) == exact.amax(dim=0)
    norm = centered.norm(dim=0)
    norm[constant] = torch.nan
    unit = centered / norm
    matrix: Tensor = (unit.T @ unit).clamp_(-1.0, 1.0)
    diagonal = matrix.diagonal()
    diagonal[~constant] = 1.0
    return matrix

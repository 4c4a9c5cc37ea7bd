"""Where k-means starts: samples chosen by k-means++ or by chance, the same for every engine.

What is summed over samples is summed in 64-bit fixed point: integers add up to the same whatever
the order, so neither a GPU's way of adding, nor the number of cores, nor the other problems of a
batch change a choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cqtool.codebooks.kmeans import Init, check_finite

FIXED_ONE = 2.0**61
"""The integer that stands for the bound of a sum in :func:`fixed_point`."""
# Above zero, so that it divides, and below any product of two numbers in float32.
_TINIEST = 1e-100


def choose_start(
    points: Tensor, weights: Tensor, centroids: int, init: Init, seeds: Sequence[int]
) -> Tensor:
    """Choose the samples that centroids start at; each problem's depend on its own data and seed.

    Args:
        points: float32 ``[problems, samples, channels]``.
        weights: positive float32 ``[problems, samples]``.
        centroids: how many; at most the number of samples.
        init: ``kmeans++`` (Arthur and Vassilvitskii, 2007): one sample after the other, drawn in
            proportion to weight times squared distance from those before; or ``random``: any.
        seeds: one for each problem.

    Returns:
        int64 ``[problems, centroids]``, indices of samples.

    Raises:
        SampleError: a sample is infinite or NaN.
    """
    check_finite(points)
    samples = points.shape[1]
    generators = [np.random.default_rng(seed) for seed in seeds]
    if init == "random":
        chosen = [generator.choice(samples, centroids, replace=False) for generator in generators]
        return torch.from_numpy(np.stack(chosen)).to(points.device)
    uniforms = np.stack([generator.random(centroids) for generator in generators])
    return _plus_plus(points, weights, torch.from_numpy(uniforms).to(points.device))


def _plus_plus(points: Tensor, weights: Tensor, uniforms: Tensor) -> Tensor:
    """The choice of k-means++, each draw decided by a number of `uniforms` in [0, 1)."""
    # Sums over channels run many times faster along rows of samples.
    planes = points.transpose(1, 2).contiguous()
    rows = torch.arange(len(points), device=points.device)
    nearest = torch.full_like(weights, torch.inf)
    mass = weights
    chosen = []
    for uniform in uniforms.unbind(dim=1):
        chosen.append(_draw(mass, uniform))
        distance = (planes - planes[rows, :, chosen[-1], None]).square_().sum(dim=1)
        nearest = torch.minimum(nearest, distance)
        mass = nearest * weights
    return torch.stack(chosen, dim=1)


def _draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """One sample a problem in proportion to ``[problems, samples]``; any where all mass is 0."""
    most = mass.amax(dim=1).double() * mass.shape[1]
    shares = fixed_point(mass, most).cumsum(dim=1)
    total = shares[:, -1]
    # The product is rounded, maybe up to the total, which no sample's share goes beyond.
    target = torch.minimum((uniform * total).long(), total - 1)
    return torch.searchsorted(shares, target[:, None], right=True)[:, 0]


def fixed_point(values: Tensor, bound: Tensor) -> Tensor:
    """Integers in proportion to `values`, as large as their sum allows; it is exact.

    Args:
        values: ``[problems, ...]``.
        bound: float64 ``[problems]``, what the absolute values of a problem sum up to at most.

    Returns:
        int64 ``[problems, ...]``, :data:`FIXED_ONE` for the bound.
    """
    scale = FIXED_ONE / bound.clamp_min(_TINIEST)
    return (values.double() * scale.reshape(-1, *[1] * (values.dim() - 1))).long()

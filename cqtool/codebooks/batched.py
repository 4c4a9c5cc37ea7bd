"""k-means of many codebooks at once, in plain torch on a CPU or GPU.

Weighted Lloyd iterations of all problems in lockstep. What is summed over samples is summed in
fixed point (:func:`cqtool.codebooks.start.fixed_point`), so neither the atomic additions of a GPU,
nor the number of cores, nor the other problems of a batch change a result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cqtool.codebooks.kmeans import Fit, Init, check_samples, in_parts, usable_weights
from cqtool.codebooks.start import FIXED_ONE, choose_start, fixed_point

_DISTANCES_CUDA, _DISTANCES_CPU = 1 << 25, 1 << 18
"""Distances held at once: on a GPU enough to be busy, on a CPU so few that they stay in the cache
until their minimum is found."""


class BatchedEngine:
    """Weighted Lloyd for all codebooks of a layer side by side.

    Args:
        iterations: Lloyd iterations; a problem whose assignments no longer change stops earlier.
        init: ``kmeans++`` (Arthur and Vassilvitskii, 2007; samples drawn in proportion to their
            weighted squared distance) or ``random`` samples.
        device: where to compute, such as ``cpu`` or ``cuda``.
    """

    name = "batched"

    def __init__(self, iterations: int, init: Init, device: str) -> None:
        self._iterations = iterations
        self._init = init
        self._device = torch.device(device)

    @property
    def detail(self) -> str:
        """What runs where, for the record."""
        return f"torch {torch.__version__} on {'GPU' if self._device.type == 'cuda' else 'CPU'}"

    def fit_many(
        self, points: Tensor, weights: Tensor | None, centroids: int, seeds: Sequence[int]
    ) -> Iterator[Fit]:
        """Fit one codebook to each problem; its bytes depend on its own samples and seed alone.

        Args:
            points: float32 ``[problems, samples, channels]``, best in the CPU's memory: what is
                worked on is copied to the device.
            weights: non-negative float32 ``[problems, samples]``, or None for equal ones.
            centroids: how many; at most the number of samples.
            seeds: of the initialisation, one for each problem.

        Yields:
            The fits in order.

        Raises:
            SampleError: fewer samples than centroids, or samples that are not finite.
        """
        check_samples(points.shape[1], centroids)
        for part in in_parts(points, self._device):
            own = None if weights is None else weights[part]
            yield from self._fit_part(points[part], own, centroids, seeds[part])

    @torch.inference_mode()
    def _fit_part(
        self, points: Tensor, weights: Tensor | None, centroids: int, seeds: Sequence[int]
    ) -> list[Fit]:
        heavy = usable_weights(points, weights).to(self._device)
        points = points.to(self._device).contiguous()
        start = choose_start(points, heavy, centroids, self._init, seeds)
        # Distances from products lose digits far from the origin, where keys with a bias lie. A
        # median, unlike a mean, has the same bytes in whatever order it is found.
        origin = points.median(dim=1, keepdim=True).values
        points = points - origin
        rows = torch.arange(len(points), device=self._device)[:, None]
        tables = lloyd(points, heavy, points[rows, start], self._iterations)
        errors = _errors(points, heavy, tables).tolist()
        fitted = (tables + origin).cpu().numpy()
        return [Fit(table, error) for table, error in zip(fitted, errors, strict=True)]


def lloyd(points: Tensor, weights: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Weighted Lloyd iterations (assign, then move to the mean) of independent problems.

    Args:
        points: float32 ``[problems, samples, channels]``.
        weights: positive float32 ``[problems, samples]`` of mean 1.
        centroids: float32 ``[problems, centroids, channels]`` to start from.
        iterations: at most so many.

    Returns:
        float32 ``[problems, centroids, channels]``.
    """
    problems, samples, _ = points.shape
    count = centroids.shape[1]
    # Weights have mean 1, which bounds the sum of the terms.
    bound = samples * points.abs().amax(dim=(1, 2)).double()
    heavy = weights.double()
    terms = torch.cat(
        [
            fixed_point(points * heavy[..., None], bound),
            fixed_point(heavy, torch.full_like(bound, samples))[..., None],
        ],
        dim=-1,
    )
    centroids = centroids.clone()
    codes = points.new_full((problems, samples), -1, dtype=torch.long)
    active = torch.arange(problems, device=points.device)
    for _ in range(iterations):
        found = _assign(points, centroids, active)
        moving = (found != codes[active]).any(dim=1)
        active, found = active[moving], found[moving]
        if not len(active):
            break
        codes[active] = found
        rows = count * torch.arange(len(active), device=points.device)[:, None] + found
        sums = terms.new_zeros(len(active) * count, terms.shape[-1])
        sums.index_add_(0, rows.flatten(), terms[active].flatten(0, 1))
        sums = sums.reshape(len(active), count, -1)
        share = sums[..., :-1].double() / sums[..., -1:].double()
        # A sum of weights is in units of `samples`, a sum of points in units of `bound`.
        means = (share * (bound[active] / samples)[:, None, None]).float()
        empty = sums[..., -1] == 0
        centroids[active] = torch.where(empty[..., None], centroids[active], means)
        lacking = empty.any(dim=1)
        if lacking.any():
            _repair(points, weights, codes, centroids, active[lacking], empty[lacking])
    return centroids


def _assign(points: Tensor, centroids: Tensor, active: Tensor) -> Tensor:
    """The nearest centroid of each sample of the problems `active`, int64 ``[active, samples]``."""
    samples, count = points.shape[1], centroids.shape[1]
    held = _DISTANCES_CUDA if points.is_cuda else _DISTANCES_CPU
    step = min(samples, max(1, held // count))
    together = max(1, held // (step * count))
    own, table = points[active], centroids[active]
    # |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x|^2 does not change the order.
    offset = table.square().sum(dim=-1).unsqueeze(1)
    table = table.transpose(1, 2)
    codes = torch.empty(own.shape[:2], dtype=torch.long, device=own.device)
    for first in range(0, len(active), together):
        block = slice(first, first + together)
        for start in range(0, samples, step):
            part = slice(start, start + step)
            distances = torch.baddbmm(offset[block], own[block, part], table[block], alpha=-2)
            codes[block, part] = distances.argmin(dim=-1)
    return codes


def _distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances ``[problems, samples]`` to one centroid a problem or one a sample."""
    return (points - centroids).square().sum(dim=-1)


def _errors(points: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
    """The weighted mean squared distance to the nearest centroid, float64 ``[problems]``."""
    samples = points.shape[1]
    codes = _assign(points, centroids, torch.arange(len(points), device=points.device))
    chosen = centroids.gather(1, codes[..., None].expand_as(points))
    errors = _distances(points, chosen).double() * weights
    most = errors.amax(dim=1) * samples
    total = fixed_point(errors, most).sum(dim=1) * (most / FIXED_ONE)
    full = torch.full_like(most, samples)
    return total / (fixed_point(weights, full).sum(dim=1) * (full / FIXED_ONE))


def _repair(
    points: Tensor,
    weights: Tensor,
    codes: Tensor,
    centroids: Tensor,
    problems: Tensor,
    empty: Tensor,
) -> None:
    """Move centroids without samples, in place, to the samples that cost most.

    One after the other, so that two of them do not go to samples side by side.

    Args:
        points: ``[all problems, samples, channels]``.
        weights: ``[all problems, samples]``.
        codes: ``[all problems, samples]``.
        centroids: ``[all problems, centroids, channels]``.
        problems: int64, those that have empty clusters.
        empty: bool ``[len(problems), centroids]``.
    """
    own, heavy = points[problems], weights[problems]
    chosen = centroids[problems].gather(1, codes[problems][..., None].expand_as(own))
    nearest = _distances(own, chosen)
    rows = torch.arange(len(problems), device=points.device)
    for _ in range(int(empty.sum(dim=1).amax())):
        cost, worst = (nearest * heavy).max(dim=1)
        # The slots of a problem with fewer empty clusters, or with samples left to improve, end.
        at = empty.long().argmax(dim=1)
        moves = empty[rows, at] & (cost > 0)
        if not moves.any():
            return
        target = own[rows, worst]
        kept = centroids[problems, at]
        centroids[problems, at] = torch.where(moves[:, None], target, kept)
        nearest = torch.where(
            moves[:, None], torch.minimum(nearest, _distances(own, target[:, None])), nearest
        )
        empty[rows, at] = False

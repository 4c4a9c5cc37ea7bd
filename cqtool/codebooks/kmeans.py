"""What every k-means engine takes and gives: one codebook a problem, and how samples weigh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cqtool.errors import SampleError

Init = Literal["kmeans++", "random"]
Floats = NDArray[np.float32]
WORKING_BYTES = 1 << 30
"""Problems are taken in as many at a time as samples and sums of samples stay below this together
(but one at least); on a GPU also below half of what is free."""


@dataclass(frozen=True)
class Fit:
    """One fitted codebook.

    Attributes:
        centroids: float32 ``[centroids, channels]``.
        error: weighted mean squared distance of a sample to its centroid, summed over channels.
    """

    centroids: Floats
    error: float


class Engine(Protocol):
    """Fits codebooks; the same arguments give the same bytes on the same machine."""

    @property
    def name(self) -> str:
        """As a recipe calls it."""

    @property
    def detail(self) -> str:
        """What runs where, for the record."""

    def fit_many(
        self, points: Tensor, weights: Tensor | None, centroids: int, seeds: Sequence[int]
    ) -> Iterator[Fit]:
        """Fit one codebook to each problem.

        Args:
            points: float32 ``[problems, samples, channels]`` in the CPU's memory.
            weights: non-negative float32 ``[problems, samples]``, or None for equal ones.
            centroids: how many in each; at most the number of samples.
            seeds: of the initialisation, one for each problem.

        Yields:
            The fits in order, as they are done.

        Raises:
            SampleError: fewer samples than centroids, or what is infinite or NaN.
        """


def check_samples(samples: int, centroids: int) -> None:
    """Refuse more centroids than samples.

    Raises:
        SampleError: with what to change.
    """
    if samples < centroids:
        raise SampleError(
            f"{centroids} centroids cannot be fitted to {samples} samples; use more "
            "--sequences, a longer --sequence-length, or a format with fewer bits."
        )


def check_finite(values: Tensor) -> None:
    """Refuse samples or weights that k-means cannot add up.

    Raises:
        SampleError: with what to look at.
    """
    if not torch.isfinite(values).all():
        raise SampleError(
            "k-means was given samples or weights that are infinite or NaN; check the samples with "
            "`cqtool analyze-entropy`, or use --objective uniform."
        )


def in_parts(points: Tensor, device: torch.device) -> Iterator[slice]:
    """Split ``[problems, samples, channels]`` into the problems that are worked on at once."""
    problems, samples, channels = points.shape
    limit = WORKING_BYTES
    if device.type == "cuda":
        # What torch holds without using it is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = min(limit, (torch.cuda.mem_get_info(device)[0] + unused) // 2)
    # Points, weights, codes and terms of sums in 64 bits stay; copies of points and terms come and
    # go.
    step = max(1, limit // (samples * (32 * channels + 96)))
    for start in range(0, problems, step):
        yield slice(start, start + step)


def usable_weights(points: Tensor, weights: Tensor | None) -> Tensor:
    """Weights of mean 1 in each problem, zeros lifted a little.

    A cluster of zero-weight samples has no mean. The last token of a sequence, which nothing
    attends to, has zero gradient, and a group that the model ignores has nothing else.

    Args:
        points: ``[problems, samples, channels]``.
        weights: non-negative ``[problems, samples]`` in the CPU's memory, or None for equal ones.

    Returns:
        float32 ``[problems, samples]`` in the CPU's memory.

    Raises:
        SampleError: a weight is infinite or NaN.
    """
    if weights is None:
        return torch.ones(points.shape[:2])
    check_finite(weights)
    # One after the other: a mean's last bits must not depend on how many problems there are.
    return torch.from_numpy(np.stack([_usable(row) for row in weights.contiguous().numpy()]))


def _usable(weights: Floats) -> Floats:
    mean = weights.mean(dtype=np.float64)
    if mean == 0:
        return np.ones_like(weights)
    lifted: Floats = np.maximum(weights / mean, 1e-6).astype(np.float32)
    return lifted

"""The two large steps of tuning on a GPU, without their matrices of vectors times centroids.

Torch writes such a matrix, and reads it, for every operation on it: for one layer of a small model
it is hundreds of megabytes, and a step of tuning is mostly that. Here every entry is computed where
it is needed, and again where it is needed again (FlashAttention's way with a softmax and its
gradient, Dao et al. 2022, arXiv 2205.14135, sections 3.1 and B.4). Nothing is added up in an order
that could change, so every run gives the same bytes; only in rounding do they differ from torch's.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# A thread's registers hold no more.
_MOST_CHANNELS = 16
# Vectors, or centroids, of one program, and its warps: four to a thread.
_VECTORS, _VECTOR_WARPS = 512, 4
_CENTROIDS, _CENTROID_WARPS = 256, 2
# Vectors that one program adds up for its centroids.
_SPAN = 256
# Turns of a loop written out, so that loads of the next overlap with sums of the last.
_UNROLL = 4


def usable(vectors: Tensor, channels: int) -> bool:
    """Whether the functions here can take such vectors: a GPU with a Triton that works."""
    return vectors.is_cuda and channels <= _MOST_CHANNELS and _works(vectors.device)


@cache
def _works(device: torch.device) -> bool:
    try:
        nearest(torch.zeros(1, 1, 2, device=device), torch.zeros(1, 2, 2, device=device), None)
    # Triton builds a launcher with the machine's C compiler, and where it cannot, fails in many
    # ways. Torch does the same work more slowly.
    except Exception:
        return False
    return True


def nearest(points: Tensor, tables: Tensor, metric: Tensor | None) -> Tensor:
    """The nearest centroid of each vector; ties go to the lower one.

    What :func:`cqtool.codebooks.codes.assign` computes, but for rounding.

    Args:
        points: float32 ``[tables, vectors, channels]``.
        tables: float32 ``[tables, centroids, channels]``.
        metric: M of the squared distance ``(x - c)^T M (x - c)``, ``[tables, channels, channels]``;
            None for the Euclidean one.

    Returns:
        int64 ``[tables, vectors]``.
    """
    from cqtool.tuning import fused_kernels

    points = points.contiguous()
    (count, vectors, channels), centroids = points.shape, tables.shape[1]
    # In double, which no tensor core rounds to TF32: the nearest of close centroids hangs on it.
    heavy = tables if metric is None else (tables.double() @ metric.double()).float()
    heavy = heavy.contiguous()
    offsets = (tables * heavy).sum(dim=-1)
    codes = torch.empty(count, vectors, dtype=torch.long, device=points.device)
    with torch.cuda.device_of(points):  # type: ignore[no-untyped-call]
        fused_kernels.nearest[(-(-vectors // _VECTORS), count)](
            points,
            heavy,
            offsets,
            codes,
            vectors,
            centroids,
            CHANNELS=channels,
            UNROLL=math.gcd(centroids, _UNROLL),
            BLOCK=_VECTORS,
            num_warps=_VECTOR_WARPS,
        )
    return codes


def soft_gradients(
    tables: Tensor, near: Tensor, places: Tensor, upstream: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a soft choice's weights ``softmax_k(-scale |place - near_k|^2)``.

    Args:
        tables: what is chosen from, float32 ``[tables, centroids, channels]``.
        near: where the centroids lie, the same shape; `tables` itself under the Euclidean metric.
        places: where the vectors lie, ``[tables, vectors, channels]``.
        upstream: gradients of what was chosen, the same shape.
        scale: ``[tables, 1, 1]``.

    Returns:
        Gradients of `near` and of `places`.
    """
    from cqtool.tuning import fused_kernels

    metric = near is not tables
    near, tables = near.contiguous(), tables.contiguous()
    places, upstream = places.contiguous(), upstream.contiguous()
    (count, vectors, channels), centroids = places.shape, near.shape[1]
    rates = 2 * scale
    offsets = -scale[..., 0] / math.log(2) * near.square().sum(dim=-1)
    to_places, scaled, shares = (torch.empty_like(places) for _ in range(3))
    greatest, means = places.new_empty(2, count, vectors)
    parts = -(-vectors // _SPAN)
    sums = places.new_empty(count, parts, channels + 1, centroids)
    with torch.cuda.device_of(places):  # type: ignore[no-untyped-call]
        fused_kernels.over_centroids[(-(-vectors // _VECTORS), count)](
            places,
            upstream,
            near,
            tables,
            offsets,
            rates,
            to_places,
            scaled,
            shares,
            greatest,
            means,
            vectors,
            centroids,
            CHANNELS=channels,
            METRIC=metric,
            UNROLL=math.gcd(centroids, _UNROLL),
            BLOCK=_VECTORS,
            num_warps=_VECTOR_WARPS,
        )
        block = min(_CENTROIDS, 1 << (centroids - 1).bit_length())
        fused_kernels.over_vectors[(-(-centroids // block), parts, count)](
            scaled,
            shares,
            greatest,
            means,
            near,
            tables,
            offsets,
            sums,
            vectors,
            centroids,
            _SPAN,
            CHANNELS=channels,
            METRIC=metric,
            UNROLL=math.gcd(vectors, _UNROLL),
            BLOCK=block,
            num_warps=_CENTROID_WARPS,
        )
    summed = sums.sum(dim=1).mT
    # `scaled` is the place times rate / ln 2.
    to_near = math.log(2) * summed[..., :-1] - rates * summed[..., -1:] * near
    return to_near, to_places

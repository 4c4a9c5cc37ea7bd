"""Metrics of groups: from how a head's vectors are read to what k-means and encoders need.

A head is read through a symmetric matrix M over its channels: an error e in a vector costs
``e M e^T``. For keys M is the second moment of the queries that meet them, for values ``W_o^T W_o``
(see :mod:`cqtool.sampling.readers`). Codes are chosen group by group, so either the blocks of M on
the diagonal are taken, or those of its block LDL decomposition, which error feedback calls for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cqtool.errors import SampleError

RIDGE = 1e-3
"""Added to the diagonal, relative to its mean: few queries leave directions in which any error
would be free, and with them a choice of codes that is up to rounding."""


def head_metric(moment: Tensor, channels: Tensor | None) -> Tensor:
    """M in codebook order, positive definite and of mean 1 on the diagonal.

    Args:
        moment: ``[kv_heads, head_dim, head_dim]`` in the model's order of channels.
        channels: int64 ``[kv_heads, head_dim]``, the model channel of each codebook channel, or
            None.

    Returns:
        float64 of the same shape; the identity for a head that nothing reads.

    Raises:
        SampleError: there are infinite numbers or NaN in `moment`.
    """
    if not torch.isfinite(moment).all():
        raise SampleError(
            "The sampled queries or output projections are infinite or NaN; run the model in "
            "another --dtype (bfloat16 or float32), or use --objective fisher."
        )
    matrix = moment.double()
    if channels is not None:
        heads = torch.arange(len(matrix), device=matrix.device)[:, None, None]
        matrix = matrix[heads, channels[:, :, None], channels[:, None, :]]
    unit = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    size = matrix.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    scaled = torch.where(size > 0, matrix / size.where(size > 0, torch.ones_like(size)), unit)
    return (scaled + scaled.mT) / 2 + RIDGE * unit


def group_metrics(metric: Tensor, size: int) -> Tensor:
    """The blocks of M on the diagonal: what an error in one group alone costs.

    Args:
        metric: float64 ``[kv_heads, head_dim, head_dim]``.
        size: channels of a group.

    Returns:
        float64 ``[kv_heads, groups, size, size]``.
    """
    heads, dim, _ = metric.shape
    blocks = metric.view(heads, dim // size, size, dim // size, size)
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


def block_ldl(metric: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``M = (I + U) D (I + U)^T`` with U strictly block upper triangular and D block diagonal.

    With it ``e M e^T`` is a sum over groups of ``(e_g + sum_{j<g} e_j U_jg) D_g (...)^T``, so that
    a group which is coded after others can make up for their errors (LDLQ of QuIP, arXiv
    2307.13304, section 3; with blocks as in QuIP#, arXiv 2402.04396).

    Args:
        metric: float64 ``[kv_heads, head_dim, head_dim]``, positive definite.
        size: channels of a group.

    Returns:
        D, float64 ``[kv_heads, groups, size, size]``, and U, ``[kv_heads, head_dim, head_dim]``.
    """
    rest, feedback = metric.clone(), torch.zeros_like(metric)
    blocks = []
    for start in range(metric.shape[1] - size, -1, -size):
        own = slice(start, start + size)
        block = (rest[:, own, own] + rest[:, own, own].mT) / 2
        blocks.append(block)
        above = rest[:, :start, own]
        factor = torch.linalg.solve(block, above.mT).mT
        feedback[:, :start, own] = factor
        rest[:, :start, :start] -= factor @ above.mT
    return torch.stack(blocks[::-1], dim=1), feedback


def unit_trace(metrics: Tensor) -> Tensor:
    """Metrics of groups in float32, of mean 1 on the diagonal, which changes no choice of codes."""
    mean = metrics.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    scaled = (metrics / mean).float()
    return (scaled + scaled.mT) / 2


def shared_metric(metrics: Tensor, weights: Tensor) -> Tensor:
    """One metric a group for all heads: the mean over the heads' samples, by their weight.

    It is the one metric that costs an error the same as those of the heads do on average, where the
    error is the same for all samples.

    Args:
        metrics: ``[kv_heads, groups, channels, channels]``.
        weights: of each sample, ``[tokens, kv_heads, groups]``.

    Returns:
        As `metrics`, ``[1, groups, channels, channels]``; heads count alike where none has weight.
    """
    total = weights.double().sum(dim=0)
    share = torch.where(total.sum(dim=0) > 0, total, torch.ones_like(total))[..., None, None]
    mean = (metrics * share).sum(dim=0) / share.sum(dim=0)
    return mean.to(metrics.dtype).unsqueeze(0)


def whitened(points: Tensor, metrics: Tensor) -> Tensor:
    """Points among which Euclidean distances are those of the metric: ``x L``, ``M = L L^T``.

    Args:
        points: float32 ``[tokens, kv_heads, groups, channels]``.
        metrics: ``[kv_heads, groups, channels, channels]``.

    Returns:
        float32 of the shape of `points`.
    """
    factor = torch.linalg.cholesky(metrics.double()).float()
    return torch.einsum("thgi,hgij->thgj", points, factor)


def unwhitened(centroids: Tensor, metrics: Tensor) -> Tensor:
    """Undo :func:`whitened` for centroids: float32 ``[kv_heads, groups, centroids, channels]``."""
    factor = torch.linalg.cholesky(metrics.double())
    found: Tensor = torch.linalg.solve_triangular(
        factor, centroids.double(), upper=False, left=False
    )
    return found.float().contiguous()

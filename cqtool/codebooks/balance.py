"""Groups of channels by what coding them costs: few channels of large spread in one group.

With b bits for c channels of a group, high-rate theory has the error of a group with covariance
S, counted in the metric M, as a constant times ``2^(-2b/c) (det S det M)^(1/c)`` (Zador; Gersho
and Gray, "Vector Quantization and Signal Compression", 1992, chapter 5.6). All groups of a head
have the same b and c, so the best groups are those with the least sum of ``(det S det M)^(1/c)``.
Correlation in a group makes its determinant small, which is why correlated channels belong
together; and a sum of products is small when large and small spreads meet in every group.
Optimized product quantization (Ge et al., CVPR 2013, section 3.2.2) balances its subspaces by
this criterion, free to rotate; here channels are only permuted, which costs the decoder nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cqtool.codebooks.metric import head_metric

_LEAST_GAIN = 1e-6
"""Of a head's sum: an exchange has to bring so much, so that rounding decides nothing."""


def balanced_groups(covariance: Tensor, metric: Tensor, start: Tensor) -> Tensor:
    """Exchange channels between the groups of each head for as long as the modelled error falls.

    The best of all exchanges of two units is made, again and again, all heads at once.

    Args:
        covariance: of the channels, ``[heads, dim, dim]``.
        metric: by which errors count, the same shape.
        start: int64 ``[heads, sides, groups, units, s]``: the channels of groups to start from,
            since what is found is a local optimum. The s channels of a unit stay together. Sides
            are alike: what is exchanged on one side is exchanged on all.

    Returns:
        int64 ``[heads, sides * groups, units * s]``.
    """
    heads, sides, groups, units, s = start.shape
    if units > 1 and groups > 1:
        matrices = _matrices(covariance, metric).repeat_interleave(sides, dim=1)
        chosen = start.reshape(heads * sides, groups * units, s).clone()
        group = torch.arange(groups * units, device=chosen.device) // units
        together = group[:, None] == group[None, :]
        # Each exchange lowers the sum by some share of it; far fewer are ever needed.
        for _ in range(groups * units * units * 8):
            costs = _errors(matrices, chosen.view(heads * sides, groups, units * s))
            other = _errors_with_other(matrices, chosen, units)
            own = costs[:, group]
            gain = own[:, :, None] + own[:, None, :] - other - other.mT
            gain = gain.masked_fill(together, 0.0).view(heads, sides, -1).sum(dim=1)
            best, place = gain.max(dim=1)
            moving = best > _LEAST_GAIN * costs.view(heads, -1).sum(dim=1)
            if not moving.any():
                break
            rows = moving.repeat_interleave(sides).nonzero()[:, 0]
            places = place.repeat_interleave(sides)[rows]
            one, two = places // len(group), places % len(group)
            first, second = chosen[rows, one], chosen[rows, two]
            chosen[rows, one], chosen[rows, two] = second, first
        start = chosen
    return start.reshape(heads, sides * groups, units * s)


def modelled_error(covariance: Tensor, metric: Tensor, groups: Tensor) -> Tensor:
    """The sum of ``(det S det M)^(1/c)`` over the groups of each head, of mean spread and weight 1.

    Args:
        covariance: of the channels, ``[heads, dim, dim]``.
        metric: by which errors count, the same shape.
        groups: int64 ``[heads, groups, c]``.

    Returns:
        float64 ``[heads]``.
    """
    return _errors(_matrices(covariance, metric), groups).sum(dim=1)


def _errors(matrices: Tensor, groups: Tensor) -> Tensor:
    log = _log_det(_blocks(matrices, groups, groups)).sum(dim=0)
    return (log / groups.shape[2]).exp()


def _errors_with_other(matrices: Tensor, chosen: Tensor, units: int) -> Tensor:
    """What each place's group would add to the error with another place's unit in its stead.

    By the Schur complement: with A the matrix of the group's other channels, the determinant with a
    unit j is det A times that of M_jj - M_jA A^-1 M_Aj.

    Args:
        matrices: covariance and metric, ``[2, heads, dim, dim]``.
        chosen: int64 ``[heads, places, s]``.
        units: places of a group.

    Returns:
        float64 ``[heads, places, places]``: [h, p, q] with the unit of q at place p; without
        meaning where both are of the same group.
    """
    heads, places, s = chosen.shape
    size = units * s
    in_groups = chosen.view(heads, places // units, units, s)
    others = torch.stack(
        [in_groups[:, :, [u for u in range(units) if u != unit]] for unit in range(units)], dim=2
    ).reshape(heads, places, size - s)
    rest = _blocks(matrices, others, others)
    everything = chosen.flatten(1)
    across = _blocks(matrices, others, everything[:, None].expand(-1, places, -1))
    shape = *across.shape[:-1], places, s
    solved, across = torch.linalg.solve(rest, across).view(shape), across.view(shape)
    explained = torch.einsum("khprqs,khprqt->khpqst", across, solved)
    own = _blocks(matrices, chosen, chosen)[:, :, None]
    left = torch.linalg.det(own - explained).clamp_min(1e-300)
    log: Tensor = (_log_det(rest)[..., None] + left.log()).sum(dim=0)
    return (log / size).exp()


def _log_det(matrices: Tensor) -> Tensor:
    found: Tensor = torch.linalg.slogdet(matrices).logabsdet
    return found


def _blocks(matrices: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``[k, heads, n, r, c]`` of ``[k, heads, dim, dim]`` at rows ``[heads, n, r]`` and columns."""
    heads = torch.arange(len(rows), device=rows.device)[:, None, None, None]
    return matrices[:, heads, rows[:, :, :, None], columns[:, :, None, :]]


def _matrices(covariance: Tensor, metric: Tensor) -> Tensor:
    """Both as ``[2, heads, dim, dim]``, positive definite also where channels never change."""
    return torch.stack([head_metric(covariance, None), head_metric(metric, None)])

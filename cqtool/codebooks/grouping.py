"""Which channels of a head are coded together, chosen from the samples.

Coupling pays where channels depend on each other. Contiguous groups couple whatever the model's
weights happen to put side by side, as Zhang et al. (arXiv 2405.03917) do; here each head's channels
are gathered greedily by absolute correlation, which is in the spirit of TaSQ's covariance groups,
and for balanced groups exchanged until the error that theory expects is small
(:mod:`cqtool.codebooks.balance`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cqtool.codebooks.balance import balanced_groups, modelled_error
from cqtool.errors import RecipeError
from cqtool.geometry import NO_ROTATION, KeyRotation, ModelGeometry
from cqtool.spec import PAIRED_GROUPINGS, CacheSpec, Grouping


def choose_groups(
    samples: Tensor,
    grouping: Grouping,
    channels: int,
    rotation: KeyRotation,
    metric: Tensor | None = None,
) -> Tensor | None:
    """Choose the groups of every head of a layer.

    Args:
        samples: ``[tokens, kv_heads, head_dim]``, keys before RoPE.
        grouping: how, not ``file``; ``pairs`` chooses as ``correlation`` does where the layer turns
            nothing, and ``balanced-pairs`` as ``balanced``.
        channels: channels of a group, a divisor of head_dim.
        rotation: how RoPE turns these samples; that of values is ``NO_ROTATION``.
        metric: what errors cost, ``[kv_heads, head_dim, head_dim]``: an error e costs e M e^T. Read
            by the balanced groupings only; None for the Euclidean one.

    Returns:
        int64 ``[kv_heads, head_dim]``: place p of the grouped order holds model channel
        ``result[h, p]``. Channels of a group ascend, and so do the groups' first channels. None
        for contiguous groups.

    Raises:
        RecipeError: ``pairs`` with an odd number of channels.
    """
    assert grouping != "file"
    if grouping == "contiguous":
        return None
    turned = grouping in PAIRED_GROUPINGS and rotation.style != "none"
    if is_balanced(grouping):
        return balanced(samples, channels, metric, rotation if turned else NO_ROTATION)
    if turned:
        return pair_groups(samples, channels, rotation)
    return correlation_groups(samples, channels)


def is_balanced(grouping: Grouping) -> bool:
    """Whether groups are chosen by what errors cost, for which there is a metric."""
    return grouping in ("balanced", "balanced-pairs")


def check_grouping(spec: CacheSpec, geometry: ModelGeometry) -> None:
    """Refuse groups of RoPE pairs where there can be none, before anything is sampled.

    Raises:
        RecipeError: the model turns no keys, or a group would have to cut a pair.
    """
    grouping = spec.key.grouping
    if grouping not in PAIRED_GROUPINGS:
        return
    for code in spec.codes("key"):
        _check_even(code.channels)
    if all(layer.rotation.style == "none" for layer in geometry.layers):
        raise RecipeError(
            f"The grouping '{grouping}' keeps RoPE's pairs of key channels together, but this "
            f"model has no RoPE; use '{PAIRED_GROUPINGS[grouping]}'."
        )


def correlation_groups(samples: Tensor, channels: int) -> Tensor:
    """Groups of channels, greedy by absolute correlation.

    A group starts with the free channel of the largest total correlation to the free ones; then
    the free channel with the largest sum over the group joins, until the group is full. Of equals
    the lowest is taken.

    Args:
        samples: ``[tokens, kv_heads, head_dim]``.
        channels: channels of a group.

    Returns:
        As :func:`choose_groups`.
    """
    return _ordered(_greedy(absolute_correlation(samples), channels))


def pair_groups(samples: Tensor, channels: int, rotation: KeyRotation) -> Tensor:
    """As :func:`correlation_groups`, but the two channels that RoPE turns together stay together.

    Pairs take the place of channels: how two pairs correlate is the sum over their channels.
    Channels that are not turned form pairs with their neighbours.

    Raises:
        RecipeError: `channels` is odd, or nothing is turned.
    """
    _check_even(channels)
    if rotation.style == "none":
        raise RecipeError("A layer without RoPE has no pairs; use the grouping 'correlation'.")
    pairs = rope_pairs(rotation, samples.shape[2])
    between = _between_pairs(absolute_correlation(samples), pairs)
    return _ordered(pairs[_greedy(between, channels // 2)].flatten(2))


def balanced(
    samples: Tensor, channels: int, metric: Tensor | None, rotation: KeyRotation = NO_ROTATION
) -> Tensor:
    """Groups with the least error by theory, by exchanges that start from correlation.

    Where channels are turned, the groups are such that kernels need not rearrange keys: each holds
    whole RoPE pairs, or what one holds turns with what another one holds; of the two kinds a layer
    has the one with the lesser error, since its heads share a kernel.

    Args:
        samples: ``[tokens, kv_heads, head_dim]``.
        channels: channels of a group.
        metric: what errors cost, ``[kv_heads, head_dim, head_dim]``; None for the Euclidean one.
        rotation: how the samples are turned.

    Returns:
        As :func:`choose_groups`.

    Raises:
        RecipeError: channels are turned and `channels` is odd.
    """
    covariance = torch.stack([_covariance(head) for head in samples.unbind(dim=1)])
    if metric is None:
        metric = torch.eye(samples.shape[2]).expand_as(covariance)
    correlation = absolute_correlation(samples)
    if rotation.style == "none":
        starts = [_greedy(correlation, channels)[:, None, :, :, None]]
    else:
        starts = _turned_starts(correlation, channels, rotation)
    found = [balanced_groups(covariance, metric, start) for start in starts]
    errors = [float(modelled_error(covariance, metric, groups).sum()) for groups in found]
    return _ordered(found[errors.index(min(errors))])


def _covariance(head: Tensor) -> Tensor:
    """Of one head's channels ``[tokens, head_dim]``; alone, because float64 copies are large."""
    centred = head.double() - head.double().mean(dim=0)
    return centred.T @ centred / len(head)


def _turned_starts(correlation: Tensor, channels: int, rotation: KeyRotation) -> list[Tensor]:
    """Groups to start from, of each kind there can be, as :func:`balanced_groups` wants them."""
    _check_even(channels)
    dim = correlation.shape[1]
    pairs = rope_pairs(rotation, dim)
    between = _between_pairs(correlation, pairs)
    partnered = []
    if rotation.dim == dim and len(pairs) % channels == 0:
        # The first channels of some pairs in a group, their second ones in its partner.
        chosen = pairs[_greedy(between, channels)]
        partnered.append(chosen.movedim(-1, 1)[..., None])
    if channels == 2 and partnered:
        # A group of one pair leaves no choice, and the kernels no gain.
        return partnered
    return [pairs[_greedy(between, channels // 2)][:, None], *partnered]


def _between_pairs(correlation: Tensor, pairs: Tensor) -> Tensor:
    """How pairs of channels correlate: ``[heads, pairs, pairs]``, 0 on the diagonal."""
    single = correlation[:, pairs.flatten()][:, :, pairs.flatten()]
    between = single.view(-1, len(pairs), 2, len(pairs), 2).sum(dim=(2, 4))
    between.diagonal(dim1=1, dim2=2).zero_()
    return between


def rope_pairs(rotation: KeyRotation, dim: int) -> Tensor:
    """The pairs of a head's channels, int64 ``[dim / 2, 2]``, turned ones first."""
    turned = torch.arange(rotation.dim) + rotation.offset
    pairs = turned.view(2, -1).T if rotation.style == "half" else turned.view(-1, 2)
    still = torch.ones(dim, dtype=torch.bool)
    still[turned] = False
    return torch.cat((pairs, still.nonzero().view(-1, 2)))


def absolute_correlation(samples: Tensor) -> Tensor:
    """Pearson's correlation of each head's channels, without sign.

    Args:
        samples: ``[tokens, kv_heads, head_dim]``.

    Returns:
        float64 ``[kv_heads, head_dim, head_dim]``; 0 on the diagonal, and for a channel that never
        changes.
    """
    found = []
    for head in samples.unbind(dim=1):  # one at a time: float64 copies are large
        centred = head.double() - head.double().mean(dim=0)
        length = centred.norm(dim=0)
        # Rounding leaves a constant channel a spread of its own size times 1e-16.
        varies = length > 1e-12 * head.double().norm(dim=0)
        unit = torch.where(varies, centred / length.where(varies, torch.ones_like(length)), 0.0)
        found.append((unit.T @ unit).abs())
    correlation = torch.stack(found)
    correlation.diagonal(dim1=1, dim2=2).zero_()
    return correlation


def _greedy(strength: Tensor, size: int) -> Tensor:
    """Groups of `size` of n units a head, by ``strength [heads, n, n]``: ``[heads, n/size, size]``.

    All heads go side by side.
    """
    heads, units, _ = strength.shape
    head = torch.arange(heads)
    free = torch.ones(heads, units, dtype=torch.bool)
    groups = torch.empty(heads, units // size, size, dtype=torch.long)
    for group in range(units // size):
        score = (strength * free[:, None]).sum(dim=2)
        for place in range(size):
            # argmax takes the first of equal ones.
            taken = score.masked_fill(~free, -1.0).argmax(dim=1)
            groups[:, group, place] = taken
            free[head, taken] = False
            row = strength[head, taken]
            score = row if place == 0 else score + row
    return groups


def _ordered(groups: Tensor) -> Tensor:
    """``[heads, groups, size]`` sorted within groups, groups by their first: ``[heads, dim]``."""
    groups = groups.sort(dim=2).values
    order = groups[:, :, 0].argsort(dim=1)
    return groups.gather(1, order[:, :, None].expand_as(groups)).flatten(1)


def _check_even(channels: int) -> None:
    if channels % 2:
        raise RecipeError(
            f"RoPE turns two channels together, so groups of {channels} cannot be filled with its "
            "pairs; couple an even number of channels, or use 'correlation' or 'balanced'."
        )

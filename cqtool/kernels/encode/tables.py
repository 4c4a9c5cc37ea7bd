"""What the encode kernel reads: centroids as tensor-core fragments, scales, and channel maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cqtool.geometry import NO_ROTATION, KeyRotation
from cqtool.kernels.encode.reference import FIRST, SECOND, pack_map
from cqtool.kernels.layout import CodeFormat, KeyPlan, channel_pairs

PASS = 256
"""Centroids of one table, at most."""
ENTRY_BYTES = 16 + 4
"""Bytes a centroid takes in a table: its fragment, all of which come first, and its offset."""
BIAS = 192.0
"""Scores are moved to 128..256, where all floats have the same exponent."""
REACH = 62.0
"""How far from the bias a score may lie; rounding has the rest."""


def ordered_codebook(codebook: Tensor, plans: Sequence[KeyPlan]) -> tuple[Tensor, Tensor]:
    """A key codebook in kernel order: groups as planned, channels of a group by model channel.

    Args:
        codebook: ``[kv_heads, groups, centroids, channels]``.
        plans: one per kv head.

    Returns:
        The codebook in that order, and the slot in its group of each channel, int64
        ``[kv_heads, groups, channels]``.
    """
    places, slots = [], []
    for plan in plans:
        c = plan.format.channels
        places.append(plan.groups)
        slots.append([[slot for _, slot in group] for group in _sorted_groups(plan, c)])
    device = codebook.device
    slot = torch.tensor(slots, device=device)
    heads = torch.arange(codebook.shape[0], device=device)[:, None]
    ordered = codebook[heads, torch.tensor(places, device=device)]
    return ordered.gather(3, slot[:, :, None].expand_as(ordered)), slot


def _sorted_groups(plan: KeyPlan, c: int) -> list[list[tuple[int, int]]]:
    both = list(zip(plan.channels, plan.slots, strict=True))
    return [sorted(both[k : k + c]) for k in range(0, len(both), c)]


def key_maps(plans: Sequence[KeyPlan], rotation: KeyRotation | None) -> Tensor:
    """Where the channels of a key come from and what they turn with: int32 ``[heads, head_dim]``.

    Args:
        plans: one per kv head.
        rotation: as the plans were made for; only "scatter" plans need it.
    """
    rows = []
    for plan in plans:
        turns = _turns(plan, rotation)
        channels = [ch for group in _sorted_groups(plan, plan.format.channels) for ch, _ in group]
        rows.append([pack_map(ch, *turns.get(ch, (ch, 0, 0))) for ch in channels])
    return torch.tensor(rows, dtype=torch.int32)


def _turns(plan: KeyPlan, rotation: KeyRotation | None) -> dict[int, tuple[int, int, int]]:
    """Partner, pair and part of each turning channel; pairs are numbered as `plan.frequency` is."""
    if plan.pairing == "scatter" and rotation is None:
        return {}
    # Only "scatter" plans ask what the rotation was.
    pairs = zip(*channel_pairs(plan, rotation or NO_ROTATION), strict=True)
    turns = {}
    for q, (first, second) in enumerate(pairs):
        if plan.frequency[q] >= 0:
            turns[first] = second, q, FIRST
            turns[second] = first, q, SECOND
    return turns


def value_maps(head_dim: int, heads: int, permutation: Tensor | None) -> Tensor:
    """The same for values, which nothing turns: `permutation` is ``[(kv_heads,) head_dim]``."""
    if permutation is None:
        permutation = torch.arange(head_dim)
    rows = permutation.cpu().expand(heads, -1).tolist()
    return torch.tensor([[pack_map(ch, ch, 0, 0) for ch in row] for row in rows], dtype=torch.int32)


def has_neighbours(maps: Tensor) -> bool:
    """Whether channels 2i and 2i + 1 of the map are one aligned pair in memory, partners too."""
    source, partner = maps & 255, maps >> 8 & 255
    own = (source[:, 0::2] % 2 == 0) & (source[:, 1::2] == source[:, 0::2] + 1)
    return bool((own & (partner[:, 1::2] == partner[:, 0::2] ^ 1)).all())


def build_tables(
    entries: Tensor, format: CodeFormat, metric: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernel's tables.

    Args:
        entries: float32 ``[kv_heads, groups, centroids, channels]`` in kernel order.
        format: of the codes.
        metric: M of the distance, ``[kv_heads, groups, channels, channels]``, or None.

    Returns:
        uint8 ``[kv_heads, groups, passes, bytes]``, ENTRY_BYTES for each centroid of a pass;
        float32 ``[kv_heads, groups, 4]``: the scale vectors are multiplied by, the squared length
        up to which scores are in reach, the scale of the centroids and zero; and the metric,
        float32, scaled.
    """
    longest = entries.double().square().sum(dim=3).amax(dim=2)  # [heads, groups]
    _, exponent = torch.frexp(longest)
    # The longest centroid's square becomes 8..16, in two nearly equal steps for float16's sake.
    total = torch.where(longest > 0, 4 - exponent, 0)
    own = total.div(2, rounding_mode="floor")
    scale, table_scale = _power_of_two(total - own), _power_of_two(own)
    scaled = (entries * table_scale[:, :, None, None]).half()
    exact = scaled.double()
    ratio = (scale / table_scale).double()[:, :, None]
    if metric is None:
        energy = exact.square().sum(dim=3) * (ratio / 2)
    else:
        energy = torch.einsum("hgni,hgij,hgnj->hgn", exact, metric.double(), exact) * (ratio / 2)
        top = energy.amax(dim=2)
        _, exponent = torch.frexp(top)
        factor = _power_of_two(torch.where(top > 0, 3 - exponent, 0))  # the top becomes 4..8
        energy = energy * factor.double()[:, :, None]
        metric = (metric * factor[:, :, None, None]).float().contiguous()
    reach = (REACH - energy.amax(dim=2)) / exact.square().sum(dim=3).amax(dim=2).sqrt()
    columns = (scale, reach.square().float(), table_scale, torch.zeros_like(scale))
    scaling = torch.stack(columns, dim=2).contiguous()
    size = min(PASS, format.centroids)
    code, channel = _fragment_index(format.channels, size)
    passes = format.centroids // size
    heads, groups = entries.shape[:2]
    split = scaled.view(heads, groups, passes, size, format.channels)
    fragments = split[..., code.unsqueeze(3), channel].contiguous().view(torch.uint8)
    offsets = (BIAS - energy).float().view(heads, groups, passes, size)
    offsets = offsets[..., _offset_index(size)]
    parts = (fragments.flatten(3), offsets.contiguous().view(torch.uint8).flatten(3))
    return torch.cat(parts, dim=3).contiguous(), scaling, metric


def read_entries(image: Tensor, scaling: Tensor, channels: int) -> Tensor:
    """Undo :func:`build_tables`: float32 ``[kv_heads, groups, centroids, channels]``, unscaled."""
    heads, groups, passes, total = image.shape
    size = total // ENTRY_BYTES
    code, channel = _fragment_index(channels, size)
    flat = image[..., : 16 * size].contiguous().view(torch.float16).float()
    entries = flat.new_empty(heads, groups, passes, size, channels)
    entries[..., code.unsqueeze(3), channel] = flat.view(heads, groups, passes, -1, 32, 4, 2)
    return entries.flatten(2, 3) / scaling[:, :, 2, None, None]


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponent.shape, device=exponent.device), exponent)


def _fragment_index(channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Code and channels in the order of ``[quad of blocks, lane, block, 2]`` fragments."""
    quad, lane = torch.arange(size // 32)[:, None, None], torch.arange(32)[:, None]
    block = torch.arange(4)
    column = lane // 4
    code = 8 * (4 * quad + block) + 4 * (column % 2) + column // 2
    channel = 2 * (lane % 4 % (channels // 2)) + torch.arange(2)
    return code, channel[None, :, None, :]


def _offset_index(size: int) -> Tensor:
    block, lane = torch.arange(size // 8)[:, None, None], torch.arange(4)[:, None]
    return 8 * block + 4 * torch.arange(2) + lane

"""What encoding means, in plain torch: un-rotate, normalize, find the nearest, write into tiles.

Groups and channels are in the kernels' order here: place p of a key head is codebook group
``plan.groups[p]``, and a map says where its channels lie in the model's vector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cqtool.codebooks.codes import assign, split_groups
from cqtool.kernels.layout import (
    TILE,
    CodeFormat,
    KeyPlan,
    pack_keys,
    pack_values,
    unpack_keys,
    unpack_values,
)

FIRST, SECOND = 1, 2
"""Which channel of a turning pair a map's entry is; 0 for a channel that is not turned."""


def pack_map(source: int, partner: int, pair: int, turn: int) -> int:
    """A map's entry: model channel, the one it turns with, their pair, and FIRST or SECOND."""
    return source | partner << 8 | pair << 16 | turn << 24


def unrotate(x: Tensor, maps: Tensor, steps: Tensor, position: Tensor, scale: float) -> Tensor:
    """Undo RoPE by exact fixed-point turns, and take channels in the map's order.

    Args:
        x: ``[batch, kv_heads, tokens, head_dim]``.
        maps: int32 ``[kv_heads, head_dim]`` of :func:`pack_map`.
        steps: int64 ``[pairs]`` or ``[kv_heads, pairs]``, turns a token in units of 2**-64.
        position: int ``[batch]``, of the first token.
        scale: what the model multiplied turned channels by.

    Returns:
        float32 ``[batch, kv_heads, tokens, head_dim]``.
    """
    batch, heads, tokens, _ = x.shape
    turn = maps >> 24
    own = _take(x, maps & 255).double()
    other = _take(x, maps >> 8 & 255).double()
    pairs = (maps >> 16 & 255).long()
    step = steps.expand(heads, -1).gather(1, pairs) * (turn != 0)  # [heads, head_dim]
    at = position.long()[:, None] + torch.arange(tokens, device=x.device)  # [batch, tokens]
    phase = at[:, None, :, None] * step[:, None, :]  # wraps as it should
    angle = (phase >> 32).double() * (2 * math.pi / 2**32)
    sign = torch.where(turn == FIRST, 1.0, -1.0).double()[:, None, :]
    turned = (own * angle.cos() + sign * other * angle.sin()) / scale
    return torch.where((turn != 0)[:, None, :].expand(batch, -1, tokens, -1), turned, own).float()


def take(x: Tensor, maps: Tensor) -> Tensor:
    """Channels in the map's order, as they are: float32 of the shape of `x`."""
    return _take(x, maps & 255).float()


def _take(x: Tensor, channels: Tensor) -> Tensor:
    return x.gather(3, channels.long()[None, :, None, :].expand(x.shape[0], -1, x.shape[2], -1))


def token_gains(vectors: Tensor) -> Tensor:
    """Root mean square of each vector, as stored: float16 ``[batch, kv_heads, tokens]``."""
    return vectors.square().mean(dim=3).sqrt().clamp(max=65504).half()


def nearest(vectors: Tensor, entries: Tensor, metric: Tensor | None = None) -> Tensor:
    """The nearest centroid of each group under ``(x - c)^T M (x - c)``.

    Args:
        vectors: float32 ``[batch, kv_heads, tokens, head_dim]``.
        entries: ``[kv_heads, groups, centroids, channels]``.
        metric: M, ``[kv_heads, groups, channels, channels]``; the identity when None.

    Returns:
        int64 ``[batch, kv_heads, tokens, groups]``.
    """
    if metric is None:
        return assign(vectors, entries)
    channels = entries.shape[3]
    x = split_groups(vectors.double(), channels)
    m, c = metric.double(), entries.double()
    offset = torch.einsum("hgni,hgij,hgnj->hgn", c, m, c)
    score = torch.einsum("bhtgi,hgij,hgnj->bhtgn", x, m, c)
    return (offset[:, None] - 2 * score).argmin(dim=4)


def write_codes(
    codes: Tensor,
    storage: Tensor,
    column: Tensor,
    block_table: Tensor | None,
    format: CodeFormat,
    is_key: bool,
) -> None:
    """Put codes into tiles, tile by tile, leaving all other tokens' codes as they are.

    Args:
        codes: int64 ``[batch, kv_heads, tokens, groups]`` in kernel order.
        storage: uint8 ``[pages, kv_heads, tiles_per_page, tile_bytes]``.
        column: int ``[batch]``, of each row's first token; rows with a negative one are skipped.
        block_table: int ``[batch, max_pages]``; page b is row b without. Tokens of negative pages
            and past the last page are skipped.
        format: of the codes.
        is_key: whether tiles are laid out for keys.
    """
    order = tuple(range(format.groups))
    plan = KeyPlan(format, order, (), (), "scatter", ())
    for b, start in enumerate(column.tolist()):
        stop = start + codes.shape[2]
        for tile in range(start // TILE, -(-stop // TILE)) if start >= 0 else ():
            place = _page(storage, block_table, b, tile)
            if place is None:
                continue
            old = storage[place[0], :, place[1]][None, :, None]
            own = unpack_keys(old, plan) if is_key else unpack_values(old, format)
            low, high = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
            new = codes[b, :, low - start : high - start]
            own[0, :, low - tile * TILE : high - tile * TILE] = new
            packed = pack_keys(own, plan) if is_key else pack_values(own, format)
            storage[place[0], :, place[1]] = packed[0, :, 0]


def write_gains(
    values: Tensor, gains: Tensor, column: Tensor, block_table: Tensor | None, storage: Tensor
) -> None:
    """Put gains ``[batch, kv_heads, tokens]`` into ``[pages, kv_heads, 16 * tiles_per_page]``."""
    for b, start in enumerate(column.tolist()):
        for n in range(values.shape[2]) if start >= 0 else ():
            place = _page(storage, block_table, b, (start + n) // TILE)
            if place is not None:
                gains[place[0], :, place[1] * TILE + (start + n) % TILE] = values[b, :, n]


def _page(storage: Tensor, block_table: Tensor | None, b: int, tile: int) -> tuple[int, int] | None:
    per_page = storage.shape[2]
    if block_table is None:
        return (b, tile) if tile < per_page else None
    if tile >= per_page * block_table.shape[1]:
        return None
    page = int(block_table[b, tile // per_page])
    return (page, tile % per_page) if page >= 0 else None

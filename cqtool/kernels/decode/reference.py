"""What the decode kernels compute, in plain torch: a loop over rows, float32 throughout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cqtool.kernels.layout import CodeFormat, key_codes_in_order, value_codes_in_order


def gather_tiles(storage: Tensor, block_table: Tensor | None, row: int) -> Tensor:
    """One row's tiles ``[1, kv_heads, tiles, tile_bytes]`` out of contiguous or paged storage."""
    if block_table is None:
        return storage[row : row + 1]
    pages = storage[block_table[row].long()]
    return pages.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def decode_keys(
    tiles: Tensor, table: Tensor, format: CodeFormat, pairing: str, natural_place: Tensor
) -> tuple[Tensor, Tensor]:
    """The keys that codes stand for, before RoPE, as the two channels of each pair.

    Args:
        tiles: uint8 ``[1, kv_heads, tiles, tile_bytes]``.
        table: float16 ``[kv_heads, blocks, centroids, 64]`` of :func:`layout.key_table`.
        format: of the keys.
        pairing: of the plan.
        natural_place: int16 ``[kv_heads, head_dim]``, place of each kernel channel; for "scatter".

    Returns:
        First and second channels, each float32 ``[kv_heads, tokens, head_dim / 2]``.
    """
    c = format.channels
    codes = key_codes_in_order(tiles, format)[0]
    unit = torch.arange(format.groups, device=tiles.device) // 2
    high = torch.arange(format.groups, device=tiles.device) % 2
    column = (unit // 4) * 8 + high * 4 + unit % 4
    keys = _gather(codes, table, column, format)
    heads, tokens = keys.shape[:2]
    if pairing == "scatter":
        place = natural_place.long()[:, None, :].expand(-1, tokens, -1)
        natural = torch.empty_like(keys).scatter_(2, place, keys)
        first, second = natural.chunk(2, dim=-1)
        return first, second
    part = c if pairing == "paired" else c // 2
    pairs = keys.view(heads, tokens, -1, 2, part)
    return pairs[:, :, :, 0].flatten(2), pairs[:, :, :, 1].flatten(2)


def decode_values(tiles: Tensor, table: Tensor, format: CodeFormat) -> Tensor:
    """The values of codes, float32 ``[kv_heads, tokens, head_dim]`` in codebook order."""
    codes = value_codes_in_order(tiles, format)[0]
    return _gather(codes, table, torch.arange(format.groups, device=tiles.device), format)


def _gather(codes: Tensor, table: Tensor, column: Tensor, format: CodeFormat) -> Tensor:
    """Entries of ``codes [kv_heads, tokens, groups]``, group g's in table column ``column[g]``."""
    heads = codes.shape[0]
    entries = table.view(heads, format.blocks, format.centroids, format.columns, format.channels)
    head = torch.arange(heads, device=codes.device)[:, None, None]
    picked = entries[head, column // format.columns, codes, column % format.columns]
    return picked.flatten(2).float()


def turn_pairs(
    first: Tensor, second: Tensor, position: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate pairs ``[kv_heads, tokens, pairs]`` by RoPE.

    Args:
        first: the pairs' first channels.
        second: their second ones.
        position: int ``[tokens]``.
        steps: int64 ``[kv_heads, pairs]``, turns a token as 64-bit fixed-point fractions.
    """
    turns = steps.double() / 2.0**64
    angle = 2 * math.pi * torch.frac(position.double()[:, None] * turns[:, None])
    cos, sin = angle.cos().float(), angle.sin().float()
    return first * cos - second * sin, second * cos + first * sin


def decode_attention_reference(
    query: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    key_table: Tensor,
    value_table: Tensor,
    pair_channels: Tensor,
    steps: Tensor,
    natural_place: Tensor,
    value_channels: Tensor,
    first: Tensor,
    coded: Tensor,
    total: Tensor,
    origin: Tensor,
    recent_keys: Tensor | None,
    recent_values: Tensor | None,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    block_table: Tensor | None,
    mask: Tensor | None,
    key_gain: Tensor | None,
    value_gain: Tensor | None,
    key_format: CodeFormat,
    value_format: CodeFormat,
    pairing: str,
    scale: float,
    rope_scale: float,
    sliding: int,
    softcap: float,
) -> Tensor:
    """Attention over codes, sinks and recent tokens; arguments as of the operator in op.py."""
    batch, heads, length, _ = query.shape
    kv_heads, dim = pair_channels.shape[0], value_channels.shape[1]
    out = query.new_zeros(batch, heads, length, dim)
    channel = pair_channels.long().flatten(1)
    for b in range(batch):
        begin, stop, end = int(first[b]), int(coded[b]), int(total[b])
        count = sink_keys.shape[2] if sink_keys is not None else 0
        tiles = gather_tiles(key_codes, block_table, b)
        pairs = decode_keys(tiles, key_table, key_format, pairing, natural_place)
        position = torch.arange(pairs[0].shape[1], device=query.device) - int(origin[b])
        turned = turn_pairs(*pairs, position, steps)
        stacked = torch.stack(turned, dim=-1).flatten(2) * rope_scale
        keys = torch.zeros_like(stacked).scatter_(
            2, channel[:, None].expand(-1, stacked.shape[1], -1), stacked
        )
        tiles = gather_tiles(value_codes, block_table, b)
        raw = decode_values(tiles, value_table, value_format)
        values = torch.zeros_like(raw).scatter_(
            2, value_channels.long()[:, None].expand(-1, raw.shape[1], -1), raw
        )
        keys, values = keys[:, :stop], values[:, :stop]
        if key_gain is not None:
            keys = keys * key_gain[b, :, :stop, None].float()
        if value_gain is not None:
            values = values * value_gain[b, :, :stop, None].float()
        kept = max(0, min(count, stop - begin))
        if kept and sink_keys is not None and sink_values is not None:
            keys[:, begin : begin + kept] = sink_keys[b, :, :kept].float()
            values[:, begin : begin + kept] = sink_values[b, :, :kept].float()
        if recent_keys is not None and recent_values is not None:
            place = torch.arange(stop, end, device=query.device) % recent_keys.shape[2]
            keys = torch.cat((keys, recent_keys[b][:, place].float()), dim=1)
            values = torch.cat((values, recent_values[b][:, place].float()), dim=1)
        column = torch.arange(end, device=query.device)
        at = end - length + torch.arange(length, device=query.device)
        seen = (column >= begin) & (column <= at[:, None])
        if sliding > 0:
            seen &= column > at[:, None] - sliding
        if mask is not None:
            seen &= mask[b, :end] != 0
        grouped = query[b].view(kv_heads, heads // kv_heads, length, -1).float()
        score = torch.einsum("hgld,hnd->hgln", grouped, keys) * scale
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        weight = torch.softmax(score.masked_fill(~seen, -math.inf), dim=-1).nan_to_num(0.0)
        found = torch.einsum("hgln,hnd->hgld", weight, values)
        out[b] = found.flatten(0, 1).to(query.dtype)
    return out

"""Problems for decode_attention, and their answers in float64 from codebooks and codes up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from cqtool.geometry import KeyRotation
from cqtool.kernels.decode.arguments import CodedTokens, Columns, DenseTokens
from cqtool.kernels.decode.op import decode_attention
from cqtool.kernels.decode.tables import LayerTables
from cqtool.kernels.layout import pack_keys, pack_values

FORMATS = {"8c8b": (8, 8), "4c8b": (4, 8), "2c8b": (2, 8), "8c10b": (8, 10), "8c6b": (8, 6)}


@dataclass
class Case:
    """One problem; see :func:`build`."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 1  # query heads per kv head
    tokens: int = 333
    dim: int = 128
    key: str = "8c8b"
    value: str = "8c8b"
    length: int = 1  # query tokens
    style: str = "half"
    rotary: int | None = None
    base: float = 10000.0
    scaling: float = 1.0
    permute: str = "none"  # none, all, pairs
    dtype: torch.dtype = torch.float16
    sinks: int = 0
    window: int = 0
    padded: bool = False
    ragged: bool = False
    paged: bool = False
    softcap: float = 0.0
    sliding: int = 0
    masked: bool = False
    gain: bool = False
    offset: int = 0  # added to positions
    seed: int = field(default=0)


def _permutation(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    if case.permute == "none":
        return None
    rows = []
    for _ in range(case.kv_heads):
        if case.permute == "all":
            rows.append(torch.randperm(case.dim, generator=generator))
        else:  # groups closed under RoPE pairs
            half = torch.randperm(case.dim // 2, generator=generator)
            rows.append(torch.stack((half, half + case.dim // 2), dim=1).flatten())
    return torch.stack(rows)


def build(case: Case, device: str) -> tuple[Any, Any]:
    """The kernels' answer and the float64 one."""
    g = torch.Generator().manual_seed(case.seed)
    batch, heads, dim, tokens = case.batch, case.kv_heads, case.dim, case.tokens
    rotary = case.rotary or dim
    rotation = KeyRotation(case.style, rotary) if case.style != "none" else KeyRotation("none")
    (kc, kb), (vc, vb) = FORMATS[case.key], FORMATS[case.value]
    key_book = (torch.rand(heads, dim // kc, 1 << kb, kc, generator=g) * 2 - 1).half()
    value_book = (torch.rand(heads, dim // vc, 1 << vb, vc, generator=g) * 2 - 1).half()
    key_perm, value_perm = _permutation(case, g), _permutation(case, g)
    tables = LayerTables(key_book.to(device), value_book.to(device), rotation, key_perm, value_perm)
    key_codes = torch.randint(0, 1 << kb, (batch, heads, tokens, dim // kc), generator=g)
    value_codes = torch.randint(0, 1 << vb, (batch, heads, tokens, dim // vc), generator=g)
    inv_freq = case.base ** (-torch.arange(0, rotation.dim, 2).double() / max(rotation.dim, 1))
    inv_freq = inv_freq.float()
    rope = tables.rope(inv_freq, case.scaling) if case.style != "none" else tables.no_rope
    query = torch.randn(batch, heads * case.group, case.length, dim, generator=g).to(case.dtype)
    first = torch.zeros(batch, dtype=torch.long)
    if case.padded:
        first = torch.randint(0, max(1, tokens // 3), (batch,), generator=g)
    coded = torch.full((batch,), tokens)
    if case.ragged:
        coded = torch.randint(0, tokens + 1, (batch,), generator=g)
    total, origin = coded + case.window, first - case.offset

    def noise(count: int) -> torch.Tensor | None:
        if count == 0:
            return None
        return torch.randn(batch, heads, count, dim, generator=g).to(case.dtype)

    recent, sink = (noise(case.window), noise(case.window)), (noise(case.sinks), noise(case.sinks))
    mask = (torch.rand(batch, tokens + case.window, generator=g) > 0.3) if case.masked else None
    columns = -(-tokens // 16) * 16
    gains = [
        (torch.rand(batch, heads, columns, generator=g) + 0.5).half() if case.gain else None
        for _ in range(2)
    ]
    scale = 2 / math.sqrt(dim)

    storage, table = _store(case, device, tables, key_codes, value_codes, g)
    answer = decode_attention(
        query.to(device),
        CodedTokens(*storage, tokens, table, *(_on(device, gain) for gain in gains)),
        tables,
        rope,
        Columns(*(x.int().to(device) for x in (first, coded, total, origin))),
        scale=scale,
        dense=DenseTokens(*(_on(device, x) for x in (*recent, *sink))),
        sliding=case.sliding,
        softcap=case.softcap,
        mask=_on(device, mask.to(torch.uint8)) if mask is not None else None,
    )

    expected = torch.zeros(batch, heads * case.group, case.length, dim, dtype=torch.float64)
    head = torch.arange(heads)[:, None, None]
    for b in range(batch):
        keys = key_book[head, torch.arange(dim // kc), key_codes[b]].flatten(2).double()
        values = value_book[head, torch.arange(dim // vc), value_codes[b]].flatten(2).double()
        keys, values = _unpermute(keys, key_perm), _unpermute(values, value_perm)
        if case.gain:
            keys = keys * gains[0][b, :, :tokens, None].double()
            values = values * gains[1][b, :, :tokens, None].double()
        position = (torch.arange(tokens) - origin[b]).double()
        keys = _rotate(keys, position, inv_freq.double(), rotation) * case.scaling
        stop, end, begin = int(coded[b]), int(total[b]), int(first[b])
        keys, values = keys[:, :stop], values[:, :stop]
        kept = max(0, min(case.sinks, stop - begin))
        if kept:
            keys[:, begin : begin + kept] = sink[0][b, :, :kept].double()
            values[:, begin : begin + kept] = sink[1][b, :, :kept].double()
        if case.window:
            place = torch.arange(stop, end) % case.window
            keys = torch.cat((keys, recent[0][b][:, place].double()), dim=1)
            values = torch.cat((values, recent[1][b][:, place].double()), dim=1)
        column, at = torch.arange(end), end - case.length + torch.arange(case.length)
        seen = (column >= begin) & (column <= at[:, None])
        if case.sliding:
            seen &= column > at[:, None] - case.sliding
        if mask is not None:
            seen &= mask[b, :end]
        q = query[b].view(heads, case.group, case.length, dim).double()
        score = torch.einsum("hgld,hnd->hgln", q, keys) * scale
        if case.softcap:
            score = case.softcap * torch.tanh(score / case.softcap)
        weight = torch.softmax(score.masked_fill(~seen, -math.inf), dim=-1).nan_to_num(0)
        expected[b] = torch.einsum("hgln,hnd->hgld", weight, values).flatten(0, 1)
    return answer.cpu().double(), expected


def _on(device: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.to(device) if tensor is not None else None


def _unpermute(vectors: torch.Tensor, permutation: torch.Tensor | None) -> torch.Tensor:
    if permutation is None:
        return vectors
    index = permutation[:, None, :].expand_as(vectors)
    return torch.empty_like(vectors).scatter_(2, index, vectors)


def _rotate(
    keys: torch.Tensor, position: torch.Tensor, inv_freq: torch.Tensor, rotation: KeyRotation
) -> torch.Tensor:
    if rotation.style == "none":
        return keys
    angle = position[:, None] * inv_freq
    cos, sin = angle.cos(), angle.sin()
    part = keys[..., : rotation.dim]
    if rotation.style == "half":
        x, y = part.chunk(2, dim=-1)
        part = torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1)
    else:
        x, y = part[..., 0::2], part[..., 1::2]
        part = torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1).flatten(-2)
    return torch.cat((part, keys[..., rotation.dim :]), dim=-1)


def _store(
    case: Case, device: str, tables: LayerTables, key_codes: Any, value_codes: Any, g: Any
) -> Any:
    """Tiles on the GPU, contiguous or scattered over pages among poisoned ones."""
    key_tiles = torch.cat(
        [pack_keys(key_codes[:, h : h + 1], plan) for h, plan in enumerate(tables.plans)], dim=1
    )
    value_tiles = pack_values(value_codes, tables.value_format)
    if not case.paged:
        return (key_tiles.to(device), value_tiles.to(device)), None
    pages = -(-key_tiles.shape[2] // 4)
    table = torch.randperm(case.batch * pages + 3, generator=g)[: case.batch * pages]
    table = table.view(case.batch, pages)
    stored = []
    for tiles in (key_tiles, value_tiles):
        _, heads, count, size = tiles.shape
        whole = torch.zeros(case.batch, heads, pages * 4, size, dtype=torch.uint8)
        whole[:, :, :count] = tiles
        storage = torch.full((case.batch * pages + 3, heads, 4, size), 255, dtype=torch.uint8)
        storage[table] = whole.view(case.batch, heads, pages, 4, size).transpose(1, 2)
        stored.append(storage.to(device))
    return tuple(stored), table.int().to(device)

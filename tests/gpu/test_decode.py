"""The decode kernels against float64, from the codebooks and logical codes up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from cqtool.geometry import KeyRotation
from cqtool.kernels.decode.op import CodedTokens, Columns, DenseTokens, decode_attention
from cqtool.kernels.decode.tables import LayerTables
from cqtool.kernels.layout import pack_keys, pack_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("error:.*torch reference.*"),
]
DEVICE = "cuda"
FORMATS = {"8c8b": (8, 8), "4c8b": (4, 8), "2c8b": (2, 8), "8c10b": (8, 10)}


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


def build(case: Case) -> tuple[Any, Any]:
    """The kernels' answer and the float64 one."""
    g = torch.Generator().manual_seed(case.seed)
    batch, heads, dim, tokens = case.batch, case.kv_heads, case.dim, case.tokens
    rotary = case.rotary or dim
    rotation = KeyRotation(case.style, rotary) if case.style != "none" else KeyRotation("none")
    (kc, kb), (vc, vb) = FORMATS[case.key], FORMATS[case.value]
    key_book = (torch.rand(heads, dim // kc, 1 << kb, kc, generator=g) * 2 - 1).half()
    value_book = (torch.rand(heads, dim // vc, 1 << vb, vc, generator=g) * 2 - 1).half()
    key_perm, value_perm = _permutation(case, g), _permutation(case, g)
    tables = LayerTables(key_book.to(DEVICE), value_book.to(DEVICE), rotation, key_perm, value_perm)
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

    storage, table = _store(case, tables, key_codes, value_codes, g)
    answer = decode_attention(
        query.to(DEVICE),
        CodedTokens(*storage, tokens, table, *(_gpu(gain) for gain in gains)),
        tables,
        rope,
        Columns(*(x.int().to(DEVICE) for x in (first, coded, total, origin))),
        scale=scale,
        dense=DenseTokens(*(_gpu(x) for x in (*recent, *sink))),
        sliding=case.sliding,
        softcap=case.softcap,
        mask=_gpu(mask.to(torch.uint8)) if mask is not None else None,
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


def _gpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.to(DEVICE) if tensor is not None else None


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


def _store(case: Case, tables: LayerTables, key_codes: Any, value_codes: Any, g: Any) -> Any:
    """Tiles on the GPU, contiguous or scattered over pages among poisoned ones."""
    key_tiles = torch.cat(
        [pack_keys(key_codes[:, h : h + 1], plan) for h, plan in enumerate(tables.plans)], dim=1
    )
    value_tiles = pack_values(value_codes, tables.value_format)
    if not case.paged:
        return (key_tiles.to(DEVICE), value_tiles.to(DEVICE)), None
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
        stored.append(storage.to(DEVICE))
    return tuple(stored), table.int().to(DEVICE)


def check(case: Case) -> None:
    torch.full((1 << 22,), math.nan, device=DEVICE)  # what an unwritten result would show
    answer, expected = build(case)
    error = (answer - expected).norm() / expected.norm().clamp_min(1e-9)
    # bfloat16 rounds the result itself by up to 2^-9.
    assert error <= (4e-3 if case.dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_query_heads(name: str, group: int) -> None:
    check(Case(key=name, value=name, group=group, tokens=1000, batch=3))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group", [1, 4])
def test_head_dims(dim: int, name: str, group: int) -> None:
    check(Case(dim=dim, key=name, value=name, group=group))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 65, 127, 1023, 4097, 20001])
@pytest.mark.parametrize("group", [1, 4])
def test_lengths(tokens: int, group: int) -> None:
    check(Case(tokens=tokens, group=group))


@pytest.mark.parametrize("key", FORMATS)
@pytest.mark.parametrize("value", FORMATS)
def test_keys_and_values_of_different_formats(key: str, value: str) -> None:
    check(Case(key=key, value=value, group=4))


@pytest.mark.parametrize("style", ["half", "interleaved", "none"])
@pytest.mark.parametrize("permute", ["none", "pairs", "all"])
@pytest.mark.parametrize("name", FORMATS)
def test_groups(style: str, permute: str, name: str) -> None:
    check(Case(style=style, permute=permute, key=name, value=name, group=2))


@pytest.mark.parametrize("permute", ["none", "pairs", "all"])
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_groups_of_other_head_dims(permute: str, dim: int) -> None:
    check(Case(permute=permute, dim=dim, group=1))


@pytest.mark.parametrize("rotary", [16, 32, 64])
def test_partial_rotary(rotary: int) -> None:
    check(Case(rotary=rotary, dim=80 if rotary < 64 else 128, group=2))


@pytest.mark.parametrize("offset", [1_000_000, 30_000_000])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_large_positions(offset: int, base: float) -> None:
    check(Case(offset=offset, base=base))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_whole_cache(dtype: torch.dtype, paged: bool, ragged: bool) -> None:
    check(
        Case(
            batch=5,
            group=2,
            tokens=700,
            sinks=4,
            window=37,
            padded=True,
            dtype=dtype,
            paged=paged,
            ragged=ragged,
            scaling=1.2,
        )
    )


@pytest.mark.parametrize("length", [2, 3, 5, 8])
@pytest.mark.parametrize("sliding", [0, 100])
@pytest.mark.parametrize("group", [1, 4])
def test_several_query_tokens(length: int, sliding: int, group: int) -> None:
    check(Case(length=length, sliding=sliding, group=group, window=16, tokens=500, sinks=2))


def test_softcap_mask_and_gain() -> None:
    check(Case(softcap=20.0, masked=True, gain=True, group=4, window=16, sinks=4, paged=True))


def test_a_row_that_sees_nothing_gives_zeros() -> None:
    answer, expected = build(Case(batch=16, tokens=1, ragged=True))
    empty = expected.flatten(1).abs().sum(dim=1) == 0
    assert 0 < empty.sum() < 16
    assert (answer[empty] == 0).all()
    torch.testing.assert_close(answer, expected, rtol=2e-3, atol=2e-3)


def test_many_rows_and_few_tokens() -> None:
    check(Case(batch=300, kv_heads=3, tokens=90, ragged=True))


def test_a_graph_replays_with_new_lengths() -> None:
    g = torch.Generator().manual_seed(1)
    books = [torch.randn(2, 16, 256, 8, generator=g).half().to(DEVICE) for _ in range(2)]
    tables = LayerTables(books[0], books[1], KeyRotation("half", 128))
    rope = tables.rope(10000.0 ** (-torch.arange(0, 128, 2) / 128))
    tiles = [
        torch.randint(0, 256, (3, 2, 64, 256), generator=g, dtype=torch.uint8).to(DEVICE)
        for _ in range(2)
    ]
    query = torch.randn(3, 8, 1, 128, generator=g).half().to(DEVICE)
    lengths = [torch.zeros(3, dtype=torch.int32, device=DEVICE) for _ in range(4)]
    columns = Columns(*lengths)

    def run() -> torch.Tensor:
        return decode_attention(
            query, CodedTokens(tiles[0], tiles[1], 1024), tables, rope, columns, scale=0.1
        )

    lengths[1].fill_(100), lengths[2].fill_(100)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for length in (1, 17, 1000):
        lengths[1].fill_(length), lengths[2].fill_(length)
        graph.replay()
        torch.testing.assert_close(captured, run(), rtol=0, atol=0)

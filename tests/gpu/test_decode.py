"""The decode kernels against float64, from the codebooks and logical codes up."""

from __future__ import annotations

import math

import pytest
import torch
from decode_cases import FORMATS, Case, build

from cqtool.geometry import KeyRotation
from cqtool.kernels.decode.arguments import CodedTokens, Columns
from cqtool.kernels.decode.op import decode_attention
from cqtool.kernels.decode.tables import LayerTables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Falling back to the torch reference would make every test here pass for nothing.
    pytest.mark.filterwarnings("error:.*torch reference.*"),
]
DEVICE = "cuda"


def check(case: Case) -> None:
    torch.full((1 << 22,), math.nan, device=DEVICE)  # what an unwritten result would show
    answer, expected = build(case, DEVICE)
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
    answer, expected = build(Case(batch=16, tokens=1, ragged=True), DEVICE)
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

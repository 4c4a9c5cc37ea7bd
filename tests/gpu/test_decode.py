"""The decode kernels against float64, from the codebooks and logical codes up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_cases import FORMATS, Case, build

from cqtool.geometry import KeyRotation
from cqtool.kernels.build import compile_variant
from cqtool.kernels.decode.arguments import CodedTokens, Columns
from cqtool.kernels.decode.op import decode_attention
from cqtool.kernels.decode.share import Share
from cqtool.kernels.decode.tables import LayerTables
from cqtool.kernels.module import LoadedModule, open_device
from cqtool.kernels.variants import Variant

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
@pytest.mark.parametrize("name, dim", [("8c8b", 64), ("8c8b", 80), ("8c8b", 256), ("8c6b", 192)])
def test_groups_of_other_head_dims(permute: str, name: str, dim: int) -> None:
    check(Case(permute=permute, key=name, value=name, dim=dim, group=1))


@pytest.mark.parametrize("group", [1, 8])
def test_pages_of_codes_of_any_number_of_bits(group: int) -> None:
    for key, value in (("8c6b", "8c10b"), ("8c10b", "8c6b")):
        check(Case(key=key, value=value, paged=True, ragged=True, batch=5, group=group))


def cut_like(monkeypatch: pytest.MonkeyPatch, cut: Share) -> None:
    """Have all work cut in one way, whatever is best."""

    def share(*args: Any, **options: Any) -> Share:
        return cut

    monkeypatch.setattr("cqtool.kernels.decode.op.share", share)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_a_warp_walks_many_tiles(name: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are made, turned on as often as may be, and made again."""
    cut_like(monkeypatch, Share(parts=1, splits=1, team=1))
    check(Case(key=name, value=name, group=group, tokens=1500, batch=3))


@pytest.mark.parametrize("style, permute", [("interleaved", "none"), ("half", "all")])
@pytest.mark.parametrize("dim", [80, 128])
@pytest.mark.parametrize("name", ["8c8b", "4c8b", "8c10b", "8c6b"])
def test_a_warp_walks_many_tiles_of_other_groups(
    style: str, permute: str, dim: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_like(monkeypatch, Share(parts=2, splits=1, team=1))
    check(Case(style=style, permute=permute, dim=dim, key=name, value=name, group=4, tokens=1500))


@pytest.mark.parametrize("team", [1, 2, 4, 8])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(
    "name, group", [("8c8b", 1), ("8c8b", 3), ("8c10b", 4), ("2c8b", 8), ("8c6b", 2)]
)
def test_every_cut_gives_the_same(
    team: int, splits: int, window: int, name: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With results written by the kernel itself, and merged by the next."""
    cut_like(monkeypatch, Share(parts=2, splits=splits, team=team))
    case = Case(
        key=name, value=name, group=group, tokens=700, batch=5, ragged=True, padded=True,
        window=window, sinks=4 if window else 0,
    )  # fmt: skip
    check(case)


def test_several_groups_of_query_rows_write_their_own_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_like(monkeypatch, Share(parts=1, splits=1, team=4))
    check(Case(group=20, tokens=300, batch=3))


@pytest.mark.parametrize(
    "name, dim", [("8c10b", 128), ("8c10b", 80), ("8c8b", 256), ("8c8b", 96), ("8c6b", 192)]
)
@pytest.mark.parametrize("permute", ["none", "all"])
def test_nothing_is_read_that_was_not_written(
    name: str, dim: int, permute: str, tmp_path: Path
) -> None:
    """Shared memory keeps what the kernel before left there: here, numbers that are none."""
    (tmp_path / "fill.cu").write_text(
        'extern "C" __global__ void fill(int words) {\n'
        "  extern __shared__ volatile unsigned memory[];\n"
        "  for (int i = threadIdx.x; i < words; i += blockDim.x) memory[i] = 0x7fff7fffu;\n"
        "}\n"
    )
    properties = torch.cuda.get_device_properties(0)
    variant, arch = Variant("fill.cu", ()), f"sm_{properties.major}{properties.minor}"
    cubin = compile_variant(variant, arch, tmp_path).cubin
    module = LoadedModule(variant, open_device(0), arch, cubin, "a test")
    size = properties.shared_memory_per_block_optin
    stream = torch.cuda.current_stream().cuda_stream
    grid = (4 * properties.multi_processor_count, 1, 1)
    module.launch("fill", grid, (256, 1, 1), size, stream, size // 4)
    torch.cuda.synchronize()
    check(Case(key=name, value=name, dim=dim, permute=permute, group=2, tokens=200))


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

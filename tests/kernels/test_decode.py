"""decode_attention on the CPU: the torch reference against float64, and the operator itself."""

from __future__ import annotations

import pytest
import torch
from decode_cases import FORMATS, Case, build

from cqtool.geometry import KeyRotation
from cqtool.kernels.decode.arguments import CodedTokens, Columns
from cqtool.kernels.decode.op import decode_attention
from cqtool.kernels.decode.tables import LayerTables

CASES = {
    **{f"{name}-{group}": Case(key=name, value=name, group=group) for name in FORMATS
       for group in (1, 4)},
    **{f"dim{dim}": Case(dim=dim, tokens=50) for dim in (64, 80, 96, 192, 256)},
    **{f"{style}-{permute}": Case(style=style, permute=permute, group=2)
       for style in ("half", "interleaved", "none") for permute in ("none", "pairs", "all")},
    "mixed": Case(key="4c8b", value="8c8b"),
    "one token": Case(tokens=1),
    "partial rotary": Case(rotary=32, dim=80),
    "a million": Case(offset=1_000_000, base=500000.0),
    "everything": Case(batch=4, sinks=4, window=37, padded=True, ragged=True, paged=True,
                       scaling=1.3, gain=True, masked=True, softcap=15.0),
    "several query tokens": Case(length=5, sliding=100, window=16, sinks=2, group=2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_against_float64(case: Case) -> None:
    case.dtype = torch.float32
    answer, expected = build(case, "cpu")
    torch.testing.assert_close(answer, expected, rtol=2e-3, atol=2e-3)
    error = (answer - expected).norm() / expected.norm()
    assert error < 2e-4  # codebooks and nothing else are float16


def _problem() -> tuple[torch.Tensor, LayerTables, CodedTokens, Columns]:
    g = torch.Generator().manual_seed(0)
    books = [torch.randn(2, 16, 256, 8, generator=g) for _ in range(2)]
    tables = LayerTables(books[0], books[1], KeyRotation("half", 128))
    tiles = [
        torch.randint(0, 256, (3, 2, 4, 256), generator=g, dtype=torch.uint8) for _ in range(2)
    ]
    lengths = [torch.full((3,), n, dtype=torch.int32) for n in (0, 50, 50, 0)]
    query = torch.randn(3, 8, 1, 128, generator=g)
    return query, tables, CodedTokens(tiles[0], tiles[1], 50), Columns(*lengths)


def test_the_operator_compiles_without_graph_breaks() -> None:
    query, tables, coded, columns = _problem()

    def attend(query: torch.Tensor) -> torch.Tensor:
        return 2 * decode_attention(query, coded, tables, tables.no_rope, columns, scale=0.1)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query), attend(query))


def test_the_fake_operator_gives_the_real_shape() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    query, tables, coded, columns = _problem()
    real = decode_attention(query, coded, tables, tables.no_rope, columns, scale=0.1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = decode_attention(query, coded, tables, tables.no_rope, columns, scale=0.1)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@pytest.mark.parametrize(
    "shape, reason",
    [((2, 16, 16, 8), "4-bit codes"), ((2, 6, 256, 8), "head_dim 48")],
)
def test_formats_without_a_kernel_are_refused(shape: tuple[int, ...], reason: str) -> None:
    good = torch.zeros(2, 16, 256, 8)
    with pytest.raises(ValueError, match=reason):
        LayerTables(torch.zeros(shape), good, KeyRotation("none"))


def test_heads_with_unlike_permutations_share_one_kernel() -> None:
    permutation = torch.stack((torch.arange(128), torch.randperm(128)))
    book = torch.zeros(2, 16, 256, 8)
    tables = LayerTables(book, book, KeyRotation("half", 128), permutation)
    assert {plan.pairing for plan in tables.plans} == {"scatter"}

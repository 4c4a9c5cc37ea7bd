"""Rivals get the problem in their own layout; FlashInfer's part is played by loops over its pages.

The stand-ins have the signatures of flashinfer-python 0.7.2 and refuse what that release refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cqtool.bench.kernels import reason_of
from cqtool.bench.problem import AttentionLoad, DenseProblem
from cqtool.bench.rivals import RIVALS, Prepare, _flashinfer, _flashinfer_xqa

CPU = torch.device("cpu")
LOADS = (
    AttentionLoad("one query head a kv head", 2, 3, 3, 64, 32),
    AttentionLoad("grouped, a part of a page left", 3, 8, 2, 64, 37),
    AttentionLoad("less than a page", 2, 4, 1, 32, 5),
)


def attend_pages(query: Tensor, keys: Tensor, values: Tensor, layout: str, length: int) -> Tensor:
    """One row's attention over its pages, token by token.

    Args:
        query: ``[heads, head_dim]``.
        keys: the row's pages in `layout`.
        values: likewise.
        layout: "HND" or "NHD".
        length: tokens of the row.
    """
    page = keys.shape[2 if layout == "HND" else 1]

    def token(states: Tensor, index: int) -> Tensor:
        of_page = states[index // page]
        return of_page[:, index % page] if layout == "HND" else of_page[index % page]

    row_keys = torch.stack([token(keys, index) for index in range(length)], dim=1)
    row_values = torch.stack([token(values, index) for index in range(length)], dim=1)
    return scaled_dot_product_attention(
        query[:, None], row_keys, row_values, enable_gqa=True, scale=1.0
    )[:, 0]


class BatchDecode:
    """Stands in for flashinfer.BatchDecodeWithPagedKVCacheWrapper."""

    made: list[tuple[str, bool]] = []  # noqa: RUF012

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
    ) -> None:  # fmt: skip
        assert kv_layout in ("NHD", "HND")
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any()
        self.layout, self.use_cuda_graph = kv_layout, use_cuda_graph
        BatchDecode.made.append((kv_layout, use_tensor_cores))

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, *, pos_encoding_mode: str = "NONE",
        q_data_type: torch.dtype = torch.float16, kv_data_type: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert len(indptr) == len(last_page_len) + 1
        assert int(indptr[-1]) == len(indices)
        assert bool(((last_page_len > 0) & (last_page_len <= page_size)).all())
        assert pos_encoding_mode == "NONE"
        self.rows = (indptr, indices, last_page_len)
        self.sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self.dtypes = (q_data_type, kv_data_type)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = paged_kv_cache
        (indptr, indices, last), (heads, kv_heads, head_dim, page) = self.rows, self.sizes
        assert q.shape == (len(last), heads, head_dim)
        shape = (kv_heads, page) if self.layout == "HND" else (page, kv_heads)
        assert keys.shape == values.shape == (len(indices), *shape, head_dim)
        assert (q.dtype, keys.dtype) == self.dtypes
        out = torch.empty_like(q)
        for row in range(len(last)):
            own = indices[indptr[row] : indptr[row + 1]].long()
            length = (len(own) - 1) * page + int(last[row])
            query = q[row] * head_dim**-0.5
            out[row] = attend_pages(query, keys[own], values[own], self.layout, length)
        return out


def xqa_batch_decode_with_kv_cache(
    query: Tensor, kv_cache: tuple[Tensor, Tensor], workspace_buffer: Tensor, block_tables: Tensor,
    seq_lens: Tensor, max_seq_len: int, bmm1_scale: float = 1.0, bmm2_scale: float = 1.0,
    window_left: int = -1, out: Tensor | None = None, sinks: Tensor | None = None,
    kv_layout: str = "NHD",
) -> Tensor:  # fmt: skip
    """Stands in for flashinfer.decode.xqa_batch_decode_with_kv_cache."""
    assert not workspace_buffer.any()
    workspace_buffer[0] = 1  # two calls that share it would be found out
    assert block_tables.dtype == seq_lens.dtype == torch.int32
    assert int(seq_lens.max()) <= max_seq_len
    rows = [
        attend_pages(
            query[row] * bmm1_scale,
            *(states[block_tables[row].long()] for states in kv_cache),
            kv_layout,
            int(seq_lens[row]),
        )
        for row in range(len(query))
    ]
    workspace_buffer[0] = 0
    return bmm2_scale * torch.stack(rows)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module flashinfer that computes on the CPU."""
    module: Any = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecode
    module.decode = ModuleType("flashinfer.decode")
    module.decode.xqa_batch_decode_with_kv_cache = xqa_batch_decode_with_kv_cache
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module.decode)
    monkeypatch.setattr(BatchDecode, "made", [])
    yield


def errors(prepare: Prepare, load: AttentionLoad) -> list[float]:
    """The relative error of each of two copies."""
    problem = DenseProblem(load, torch.float32, CPU, copies=2)
    calls = prepare(problem)
    found = []
    for index, call in enumerate(calls):
        for _ in range(2):  # as a graph replays it
            out = call()
        assert out.shape == (load.batch, load.heads, load.head_dim)
        states = (problem.queries, problem.keys, problem.values)
        problem.queries, problem.keys, problem.values = ([kind[index]] for kind in states)
        found.append(problem.error(out))
        problem.queries, problem.keys, problem.values = states
    return found


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.usefixtures("flashinfer")
def test_pages_hold_every_token_once(load: AttentionLoad, layout: str, page: int) -> None:
    for prepare in (
        _flashinfer(tensor_cores=False, layout=layout, page=page),
        _flashinfer_xqa(layout=layout, page=page),
    ):
        found = errors(prepare, load)
        assert len(found) == 2
        assert max(found) < 1e-6


@pytest.mark.usefixtures("flashinfer")
def test_the_named_rivals_are_right_and_use_tensor_cores_when_they_say_so() -> None:
    for name in ("flashinfer", "flashinfer, tensor cores", "flashinfer, xqa"):
        assert max(errors(RIVALS[name], LOADS[1])) < 1e-6
    assert [tensor_cores for _, tensor_cores in BatchDecode.made] == [False, False, True, True]


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_flash_attn_gets_tokens_before_heads(
    load: AttentionLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        assert q.shape == (load.batch, 1, load.heads, load.head_dim)
        states = (kind.transpose(1, 2) for kind in (q, k_cache, v_cache))
        return scaled_dot_product_attention(*states, enable_gqa=True).transpose(1, 2)

    for name, library in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
        module: Any = ModuleType(library)
        module.flash_attn_with_kvcache = flash_attn_with_kvcache
        monkeypatch.setitem(sys.modules, library, module)
        assert max(errors(RIVALS[name], load)) < 1e-6


def test_a_broken_library_is_not_called_missing() -> None:
    broken = ImportError("libcudart.so.13: cannot open shared object file")
    assert reason_of(broken) == f"ImportError: {broken}"


def test_a_missing_library_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("flashinfer", "flashinfer.decode", "flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, library, None)
    problem = DenseProblem(LOADS[0], torch.float32, CPU)
    for name in RIVALS:
        if name.startswith("flash"):
            with pytest.raises(ModuleNotFoundError) as raised:
                RIVALS[name](problem)
            assert reason_of(raised.value) == "not installed"

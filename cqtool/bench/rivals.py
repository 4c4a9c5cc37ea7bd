"""16-bit decode attention to compare with: torch's backends, FlashInfer, flash-attn.

Each rival is given its own favourite layout, and plans ahead where it can; only the attention
itself is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from cqtool.bench.problem import DenseProblem

Attend = Callable[[], Tensor]
"""Returns ``[batch, heads, head_dim]``."""
Prepare = Callable[[DenseProblem], list[Attend]]
"""The calls of a rival, one per copy of the problem; raises when it cannot take the problem."""


def _sdpa(backend: SDPBackend, *, folded: bool) -> Prepare:
    """torch's scaled_dot_product_attention with one backend.

    Args:
        backend: which.
        folded: give the query heads that share a kv head as query tokens: a kernel that reads keys
            and values once per query head then reads them once per kv head.
    """

    def prepare(problem: DenseProblem) -> list[Attend]:
        load = problem.load
        if folded and load.heads == load.kv_heads:
            raise NotImplementedError("nothing to fold: every query head has its own kv head")

        def attend(copy: int) -> Tensor:
            query = problem.queries[copy]
            if folded:
                query = query.view(load.batch, load.kv_heads, -1, load.head_dim)
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(
                    query,
                    problem.keys[copy],
                    problem.values[copy],
                    enable_gqa=not folded and load.heads != load.kv_heads,
                )
            return out.reshape(load.batch, load.heads, load.head_dim)

        return [partial(attend, copy) for copy in range(len(problem.queries))]

    return prepare


def _flash_attn(module: str) -> Prepare:
    """flash-attn's attention over a cache (FlashAttention 2 or, as another module, 3)."""

    def prepare(problem: DenseProblem) -> list[Attend]:
        function: Any = importlib.import_module(module).flash_attn_with_kvcache
        calls: list[Attend] = []
        for copy in zip(problem.queries, problem.keys, problem.values, strict=True):
            query, keys, values = (states.transpose(1, 2).contiguous() for states in copy)

            def attend(q: Tensor = query, k: Tensor = keys, v: Tensor = values) -> Tensor:
                out: Tensor = function(q, k, v)
                return out[:, 0]

            calls.append(attend)
        return calls

    return prepare


def _paged(states: Tensor, layout: str, page: int) -> Tensor:
    """Cut keys or values into pages, in order; the last one of a row is filled with zeros.

    Args:
        states: ``[batch, kv_heads, tokens, head_dim]``.
        layout: "HND" (a page holds one kv head after the other) or "NHD" (one token after the
            other).
        page: tokens of a page.

    Returns:
        ``[batch * pages, kv_heads, page, head_dim]``, or for "NHD"
        ``[batch * pages, page, kv_heads, head_dim]``.
    """
    batch, kv_heads, tokens, head_dim = states.shape
    pages = -(-tokens // page)
    states = pad(states, (0, 0, 0, pages * page - tokens))
    states = states.view(batch, kv_heads, pages, page, head_dim)
    order = (0, 2, 1, 3, 4) if layout == "HND" else (0, 2, 3, 1, 4)
    return states.permute(*order).flatten(0, 1).contiguous()


def _flashinfer(*, tensor_cores: bool, layout: str = "NHD", page: int = 16) -> Prepare:
    """FlashInfer's batch decode over pages, planned ahead; "NHD" is its own default.

    Its plan is not one for CUDA graphs, which would have to leave room for other lengths: every
    replay here has the lengths that were planned for.
    """

    def prepare(problem: DenseProblem) -> list[Attend]:
        flashinfer: Any = importlib.import_module("flashinfer")
        load, device = problem.load, problem.queries[0].device
        pages = -(-load.tokens // page)
        rows = torch.arange(load.batch + 1, device=device, dtype=torch.int32)
        calls: list[Attend] = []
        for query, keys, values in zip(problem.queries, problem.keys, problem.values, strict=True):
            workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, layout, use_tensor_cores=tensor_cores
            )
            wrapper.plan(
                rows * pages,
                torch.arange(load.batch * pages, device=device, dtype=torch.int32),
                torch.full_like(rows[1:], load.tokens - (pages - 1) * page),
                load.heads,
                load.kv_heads,
                load.head_dim,
                page,
                pos_encoding_mode="NONE",
                q_data_type=query.dtype,
                kv_data_type=keys.dtype,
            )
            paged = (_paged(keys, layout, page), _paged(values, layout, page))
            calls.append(partial(wrapper.run, query[:, :, 0], paged))
        return calls

    return prepare


def _flashinfer_xqa(*, layout: str = "NHD", page: int = 16) -> Prepare:
    """XQA: TensorRT-LLM's decode kernels for grouped queries, which FlashInfer ships."""

    def prepare(problem: DenseProblem) -> list[Attend]:
        decode: Any = importlib.import_module("flashinfer.decode")
        load, device = problem.load, problem.queries[0].device
        pages = -(-load.tokens // page)
        table = torch.arange(load.batch * pages, device=device, dtype=torch.int32)
        lengths = torch.full((load.batch,), load.tokens, device=device, dtype=torch.int32)
        calls: list[Attend] = []
        for query, keys, values in zip(problem.queries, problem.keys, problem.values, strict=True):
            # Its first 8 MiB count finished blocks: calls must not share it, nor find it dirty.
            workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
            call = partial(
                decode.xqa_batch_decode_with_kv_cache,
                query[:, :, 0],
                (_paged(keys, layout, page), _paged(values, layout, page)),
                workspace,
                table.view(load.batch, pages),
                lengths,
                pages * page,
                bmm1_scale=load.head_dim**-0.5,
                bmm2_scale=1.0,
                kv_layout=layout,
            )
            calls.append(call)
        return calls

    return prepare


RIVALS: Mapping[str, Prepare] = {
    "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION, folded=False),
    "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, folded=False),
    "sdpa efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION, folded=False),
    "sdpa flash, folded": _sdpa(SDPBackend.FLASH_ATTENTION, folded=True),
    "sdpa cudnn, folded": _sdpa(SDPBackend.CUDNN_ATTENTION, folded=True),
    "sdpa efficient, folded": _sdpa(SDPBackend.EFFICIENT_ATTENTION, folded=True),
    "flashinfer": _flashinfer(tensor_cores=False),
    "flashinfer, tensor cores": _flashinfer(tensor_cores=True),
    "flashinfer, xqa": _flashinfer_xqa(),
    "flash-attn 2": _flash_attn("flash_attn"),
    "flash-attn 3": _flash_attn("flash_attn_interface"),
}
"""Every 16-bit kernel that is tried, by name."""

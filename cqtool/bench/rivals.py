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
from torch.nn.functional import scaled_dot_product_attention

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
        for index in range(len(problem.queries)):
            query = problem.queries[index].transpose(1, 2).contiguous()
            keys = problem.keys[index].transpose(1, 2).contiguous()
            values = problem.values[index].transpose(1, 2).contiguous()

            def attend(q: Tensor = query, k: Tensor = keys, v: Tensor = values) -> Tensor:
                out: Tensor = function(q, k, v)
                return out[:, 0]

            calls.append(attend)
        return calls

    return prepare


def _flashinfer(tensor_cores: bool) -> Prepare:
    """FlashInfer's batch decode over pages of 16 tokens, planned ahead."""

    def prepare(problem: DenseProblem) -> list[Attend]:
        flashinfer: Any = importlib.import_module("flashinfer")
        load, page = problem.load, 16
        if load.tokens % page:
            raise NotImplementedError(f"{load.tokens} tokens are not whole pages of {page}")
        query = problem.queries[0]
        pages = load.tokens // page
        device = query.device
        rows = torch.arange(load.batch + 1, device=device, dtype=torch.int32)
        calls: list[Attend] = []
        for index in range(len(problem.queries)):
            workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=tensor_cores
            )
            wrapper.plan(
                rows * pages,
                torch.arange(load.batch * pages, device=device, dtype=torch.int32),
                torch.full_like(rows[1:], page),
                load.heads,
                load.kv_heads,
                load.head_dim,
                page,
                pos_encoding_mode="NONE",
                q_data_type=query.dtype,
                kv_data_type=query.dtype,
            )
            paged = tuple(
                states.transpose(1, 2).reshape(-1, page, load.kv_heads, load.head_dim).contiguous()
                for states in (problem.keys[index], problem.values[index])
            )

            def attend(
                run: Any = wrapper.run, q: Tensor = problem.queries[index][:, :, 0], kv: Any = paged
            ) -> Tensor:
                out: Tensor = run(q, kv)
                return out

            calls.append(attend)
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
    "flash-attn 2": _flash_attn("flash_attn"),
    "flash-attn 3": _flash_attn("flash_attn_interface"),
}
"""Every 16-bit kernel that is tried, by name."""

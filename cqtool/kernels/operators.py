"""Torch operators, registered so that a call costs little on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# An operator lives as long as the library that defines it.
_LIBRARY: Any = Library("cqtool", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(
    name: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
) -> Callable[..., Any]:
    """Define an operator, which graphs of ``torch.compile`` hold as one node.

    Not with ``torch.library.custom_op``, whose Python code around each call takes 0.1 ms where
    arguments are mutated: an encoded token would spend most of its time there. vLLM's
    ``direct_register_custom_op`` does the same for the same reason. Where nothing records or
    replaces operators, torch's dispatcher is left out as well, which takes a fifth of what a cache
    does on the host. The price is that torch does not refuse to differentiate the operator; the
    caches never ask (:mod:`cqtool.cache.attention`).

    Args:
        name: its name in the namespace of this package.
        cpu: what it does on a CPU; annotated, as ``torch.library.infer_schema`` wants it.
        cuda: the same on a GPU.
        fake: shapes and dtypes of what it returns, for tensors without data.
        mutates: names of the arguments that it writes to.

    Returns:
        What calls it with positional arguments, of which the first is a tensor.
    """
    schema = torch.library.infer_schema(cpu, mutates_args=mutates)
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"{_LIBRARY.ns}::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(getattr(torch.ops, _LIBRARY.ns), name).default

    def call(first: Tensor, *rest: Any) -> Any:
        watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        if watched or type(first) is not Tensor or first.device.type not in ("cuda", "cpu"):
            return operator(first, *rest)
        return (cuda if first.is_cuda else cpu)(first, *rest)

    return call

"""Matrix products of a float32 model on a GPU's tensor cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Within the block float32 matrix products on a GPU round their factors to TF32.

    TF32 has 10 bits of mantissa, three more than bfloat16, and sums in float32: the full and the
    quantized model's logits stay within a KL of 2e-6 of each other where nothing is coded (SmolLM2
    on an H100), so a step still sees what single codes change. A CPU goes on in float32.

    Args:
        device: where the products are.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

"""A ring of tokens in the model's dtype, written in place: column n lies at ``n % capacity``."""

from __future__ import annotations

import torch
from torch import Tensor


def make_ring(like: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    """Room for tokens.

    Args:
        like: ``[batch, kv_heads, any, head_dim]``, on the device to be on.
        capacity: tokens of each row.
        dtype: of the ring.

    Returns:
        Zeros ``[batch, kv_heads, capacity, head_dim]``.
    """
    batch, heads, _, dim = like.shape
    # Written to in place later on, which a tensor made in inference mode refuses.
    with torch.inference_mode(False):
        return torch.zeros((batch, heads, capacity, dim), dtype=dtype, device=like.device)


def put(ring: Tensor, states: Tensor, column: int) -> None:
    """Write up to `capacity` tokens to their places.

    Args:
        ring: ``[batch, kv_heads, capacity, head_dim]``.
        states: ``[batch, kv_heads, n, head_dim]``.
        column: of the first of them.
    """
    capacity, new = ring.shape[2], states.shape[2]
    index = column % capacity
    head = min(new, capacity - index)
    ring[:, :, index : index + head].copy_(states[:, :, :head])
    if head < new:
        ring[:, :, : new - head].copy_(states[:, :, head:])

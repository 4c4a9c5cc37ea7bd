"""How the vectors of one layer are stored: the interface, and coupled quantization behind it."""

from __future__ import annotations

from typing import Protocol, Self

import torch
from torch import Tensor

from cqtool.codebooks.codes import assign, code_bytes, lookup, pack, unpack

Stored = dict[str, Tensor]
"""Named tensors, each ``[batch, kv_heads, tokens, ...]``: all that is kept of some tokens."""


class TokenCodec(Protocol):
    """Stores key or value vectors token by token.

    Attributes:
        before_rope: whether keys are to be given as they are before RoPE.
        bits_per_channel: bits a channel costs, scales and all included.
    """

    before_rope: bool
    bits_per_channel: float

    def encode(self, vectors: Tensor) -> Stored:
        """Store vectors ``[batch, kv_heads, tokens, head_dim]`` of any float dtype."""

    def decode(self, stored: Stored) -> Tensor:
        """The float32 vectors ``[batch, kv_heads, tokens, head_dim]`` that `stored` stands for."""

    def to(self, device: torch.device) -> Self:
        """The same codec on another device."""


class CQCodec:
    """Coupled quantization: one bit-packed code a group (Zhang et al., arXiv 2405.03917).

    Args:
        codebook: ``[kv_heads, groups, 2**bits, channels]``.
    """

    before_rope = True

    def __init__(self, codebook: Tensor) -> None:
        _, self.groups, centroids, channels = codebook.shape
        self.bits = centroids.bit_length() - 1
        self.codebook = codebook
        self.bits_per_channel = 8 * code_bytes(self.groups, self.bits) / (self.groups * channels)

    def encode(self, vectors: Tensor) -> Stored:
        """See :meth:`TokenCodec.encode`."""
        return {"codes": pack(assign(vectors, self.codebook), self.bits)}

    def decode(self, stored: Stored) -> Tensor:
        """See :meth:`TokenCodec.decode`."""
        return lookup(unpack(stored["codes"], self.bits, self.groups), self.codebook).float()

    def to(self, device: torch.device) -> Self:
        """See :meth:`TokenCodec.to`."""
        return type(self)(self.codebook.to(device))

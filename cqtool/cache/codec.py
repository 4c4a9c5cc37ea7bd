"""How the vectors of one layer are stored: the interface, and coupled quantization behind it."""

from __future__ import annotations

from copy import copy
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
        channels: int ``[kv_heads, head_dim]``: the model channel of each codebook channel, group
            by group; None for contiguous groups.

    Attributes:
        channels: the same as int64; None also where each channel has its own place.
    """

    before_rope = True

    def __init__(self, codebook: Tensor, channels: Tensor | None = None) -> None:
        _, self.groups, centroids, size = codebook.shape
        self.bits = centroids.bit_length() - 1
        self.codebook = codebook
        self.bits_per_channel = 8 * code_bytes(self.groups, self.bits) / (self.groups * size)
        self.channels: Tensor | None = None
        self._places: Tensor | None = None
        if channels is not None and bool((channels.diff(dim=1) != 1).any()):
            self.channels = channels.to(codebook.device, torch.long)
            self._places = self.channels.argsort(dim=1)

    def encode(self, vectors: Tensor) -> Stored:
        """See :meth:`TokenCodec.encode`."""
        vectors = _taken(vectors, self.channels)
        return {"codes": pack(assign(vectors, self.codebook), self.bits)}

    def decode(self, stored: Stored) -> Tensor:
        """See :meth:`TokenCodec.decode`."""
        return self.look_up(unpack(stored["codes"], self.bits, self.groups))

    def look_up(self, codes: Tensor) -> Tensor:
        """The float32 vectors that int codes ``[batch, kv_heads, tokens, groups]`` stand for."""
        return _taken(lookup(codes, self.codebook).float(), self._places)

    def with_codebook(self, codebook: Tensor) -> Self:
        """The same codec with other centroids, of the same shape."""
        # Not made anew, which would compare the channels again and so wait for the device.
        other = copy(self)
        other.codebook = codebook
        return other

    def to(self, device: torch.device) -> Self:
        """See :meth:`TokenCodec.to`."""
        moved = self.with_codebook(self.codebook.to(device))
        if self.channels is not None and self._places is not None:
            moved.channels, moved._places = self.channels.to(device), self._places.to(device)
        return moved


def _taken(vectors: Tensor, order: Tensor | None) -> Tensor:
    """Channels of ``[batch, kv_heads, tokens, head_dim]`` in each head's ``[kv_heads, head_dim]``
    order."""
    return vectors if order is None else vectors.gather(3, order[:, None].expand_as(vectors))

"""How the vectors of one layer are stored: the interface, and coupled quantization behind it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from statistics import fmean
from typing import Protocol, Self

import torch
from torch import Tensor

from cqtool.codebooks.codes import (
    assign,
    assign_in_turn,
    code_bytes,
    gain_codes,
    gain_values,
    lookup,
    pack,
    unpack,
)
from cqtool.spec import GAIN_BITS

Stored = dict[str, Tensor]
"""Named tensors, each ``[batch, kv_heads, blocks, ...]``: all that is kept of some tokens. A block
is :attr:`TokenCodec.block` tokens, in most formats one."""


class TokenCodec(Protocol):
    """Stores key or value vectors, one block of tokens independently of the next.

    Attributes:
        before_rope: whether keys are to be given as they are before RoPE.
        block: tokens that are encoded together, because they share a scale for example; 1 where
            each token stands for itself.
        bits_per_channel: bits a channel costs, scales and all included.
    """

    before_rope: bool
    block: int
    bits_per_channel: float

    def encode(self, vectors: Tensor) -> Stored:
        """Store ``[batch, kv_heads, tokens, head_dim]`` of any float dtype, whole blocks."""

    def decode(self, stored: Stored) -> Tensor:
        """The float32 vectors ``[batch, kv_heads, tokens, head_dim]`` that `stored` stands for."""

    def to(self, device: torch.device) -> Self:
        """The same codec on another device."""


class ExactCodec:
    """Stores vectors as they are: what a codec costs is measured against it."""

    before_rope = False
    block = 1
    bits_per_channel = 32.0

    def encode(self, vectors: Tensor) -> Stored:
        """See :meth:`TokenCodec.encode`."""
        return {"vectors": vectors}

    def decode(self, stored: Stored) -> Tensor:
        """See :meth:`TokenCodec.decode`."""
        return stored["vectors"].float()

    def to(self, device: torch.device) -> Self:
        """See :meth:`TokenCodec.to`."""
        return self


class CQCodec:
    """Coupled quantization: one bit-packed code a group (Zhang et al., arXiv 2405.03917).

    Args:
        codebook: ``[kv_heads, groups, 2**bits, channels]``; or ``[1, groups, 2**bits, channels]``,
            which all `heads` share.
        channels: int ``[kv_heads, head_dim]``: the model channel of each codebook channel, group
            by group; None for contiguous groups.
        metric: float ``[kv_heads, groups, channels, channels]``, symmetric and positive definite:
            M of the squared distance ``(x - c)^T M (x - c)`` by which encoding chooses; None for
            the Euclidean one.
        feedback: float ``[kv_heads, head_dim, head_dim]`` in codebook order: what the error of
            a channel adds to the channels of later groups when encoding (see
            :func:`cqtool.codebooks.codes.assign_in_turn`); needs `metric`.
        gains: float ``[kv_heads, 256]``, positive and ascending: each vector is divided by the one
            nearest to its root mean square, whose index is stored; None to code vectors as
            they are.
        heads: kv_heads, for a codebook that may be shared; None for one that is not.

    Attributes:
        codebook: ``[kv_heads, groups, 2**bits, channels]``, a shared one once for each head.
        channels: the same as int64; None also where each channel has its own place.
    """

    before_rope = True
    block = 1

    def __init__(
        self,
        codebook: Tensor,
        channels: Tensor | None = None,
        metric: Tensor | None = None,
        feedback: Tensor | None = None,
        gains: Tensor | None = None,
        heads: int | None = None,
    ) -> None:
        assert feedback is None or metric is not None
        self._shared = heads is not None and heads > len(codebook)
        if heads is not None:
            codebook = codebook.expand(heads, -1, -1, -1).contiguous()
        _, self.groups, centroids, size = codebook.shape
        self.bits = centroids.bit_length() - 1
        self.codebook = codebook
        stored = 8 * code_bytes(self.groups, self.bits) + (0 if gains is None else GAIN_BITS)
        self.bits_per_channel = stored / (self.groups * size)
        self.metric, self.feedback, self.gains = metric, feedback, gains
        self.channels: Tensor | None = None
        self._places: Tensor | None = None
        if channels is not None and bool((channels.diff(dim=1) != 1).any()):
            self.channels = channels.to(codebook.device, torch.long)
            self._places = self.channels.argsort(dim=1)

    def encode(self, vectors: Tensor) -> Stored:
        """See :meth:`TokenCodec.encode`."""
        grouped, stored = self.prepare(vectors)
        return {"codes": pack(self.nearest(grouped), self.bits), **stored}

    def decode(self, stored: Stored) -> Tensor:
        """See :meth:`TokenCodec.decode`."""
        codes = unpack(stored["codes"], self.bits, self.groups)
        return self.restore(lookup(codes, self.codebook).float(), stored)

    @property
    def factor(self) -> Tensor | None:
        """L of the metric L L^T: its nearness is the Euclidean one of what L makes of both."""
        metric = self.metric
        return None if metric is None else torch.linalg.cholesky(metric.double()).float()

    @property
    def stored_codebook(self) -> Tensor:
        """The codebook as files hold it: of one head where all share it."""
        return self.codebook[:1] if self._shared else self.codebook

    def prepare(self, vectors: Tensor) -> tuple[Tensor, Stored]:
        """Vectors as they are coded, group by group and divided by their gains, and what is stored
        of them beside the codes."""
        grouped = _taken(vectors, self.channels)
        if self.gains is None:
            return grouped, {}
        gains = gain_codes(grouped, self.gains)
        return grouped.float() / gain_values(gains, self.gains), {"gains": gains}

    def nearest(self, grouped: Tensor) -> Tensor:
        """Codes of vectors from :meth:`prepare`: int64 ``[batch, kv_heads, tokens, groups]``."""
        if self.feedback is not None and self.metric is not None:
            return assign_in_turn(grouped, self.codebook, self.metric, self.feedback)
        return assign(grouped, self.codebook, self.metric)

    def restore(self, grouped: Tensor, stored: Stored) -> Tensor:
        """Undo :meth:`prepare`."""
        vectors = _taken(grouped, self._places)
        return vectors if self.gains is None else vectors * gain_values(stored["gains"], self.gains)

    def look_up(self, codes: Tensor) -> Tensor:
        """The float32 vectors that int codes ``[batch, kv_heads, tokens, groups]`` stand for, not
        multiplied by their gains yet where there are any."""
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
        for name in ("metric", "feedback", "gains"):
            tensor = getattr(self, name)
            setattr(moved, name, None if tensor is None else tensor.to(device))
        return moved


class HeadsCodec:
    """Coupled quantization with a code of its own for each head: one codec a head, side by side.

    Args:
        parts: the codec of each key/value head, each with the codebook of that one alone.

    Attributes:
        parts: the same.
    """

    before_rope = True
    block = 1

    def __init__(self, parts: Sequence[TokenCodec]) -> None:
        self.parts = tuple(parts)
        self.bits_per_channel = fmean(part.bits_per_channel for part in self.parts)

    def encode(self, vectors: Tensor) -> Stored:
        """See :meth:`TokenCodec.encode`; named ``0.codes`` and so on."""
        return {
            f"{head}.{name}": tensor
            for head, part in enumerate(self.parts)
            for name, tensor in part.encode(vectors[:, head : head + 1]).items()
        }

    def decode(self, stored: Stored) -> Tensor:
        """See :meth:`TokenCodec.decode`."""
        of_heads: list[Stored] = [{} for _ in self.parts]
        for name, tensor in stored.items():
            head, _, own = name.partition(".")
            of_heads[int(head)][own] = tensor
        vectors = [part.decode(own) for part, own in zip(self.parts, of_heads, strict=True)]
        return torch.cat(vectors, dim=1)

    def to(self, device: torch.device) -> HeadsCodec:
        """See :meth:`TokenCodec.to`."""
        return HeadsCodec([part.to(device) for part in self.parts])


def _taken(vectors: Tensor, order: Tensor | None) -> Tensor:
    """Channels of ``[batch, kv_heads, tokens, head_dim]`` in each head's ``[kv_heads, head_dim]``
    order."""
    return vectors if order is None else vectors.gather(3, order[:, None].expand_as(vectors))

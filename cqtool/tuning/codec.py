"""Coupled quantization whose centroids can be trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from cqtool.cache.codec import CQCodec, Stored
from cqtool.cache.format import CacheFormat, LayerCodecs

# Spread of a codebook whose centroids all coincide, so that it can move at all.
_LEAST_SPREAD = 1e-4


class TrainedCodec:
    """A :class:`CQCodec` as a function of its centroids.

    Each vector takes the nearest centroid of the moment; gradients reach the centroid that was
    taken and nothing else (no straight-through estimate to the vector). A codebook is
    ``start + spread * delta``: one step of `delta` means as much in a codebook of large centroids
    as in one of small ones.

    Args:
        start: the codec to start from.

    Attributes:
        delta: the parameter, ``[kv_heads, groups, centroids, channels]``, zero at the start.
    """

    before_rope = True

    def __init__(self, start: CQCodec) -> None:
        self.start = start
        self.bits_per_channel = start.bits_per_channel
        self._base = start.codebook.float()
        spread = self._base.std(dim=2, correction=0).square().mean(dim=-1).sqrt()
        self._spread = spread.clamp_min(_LEAST_SPREAD)[:, :, None, None]
        self.delta = nn.Parameter(torch.zeros_like(self._base))

    @property
    def codebook(self) -> Tensor:
        """float32 ``[kv_heads, groups, centroids, channels]``."""
        return self._base + self._spread * self.delta

    def encode(self, vectors: Tensor) -> Stored:
        """See :meth:`cqtool.cache.codec.TokenCodec.encode`."""
        with torch.no_grad():
            return self.start.with_codebook(self.codebook).encode(vectors)

    def decode(self, stored: Stored) -> Tensor:
        """See :meth:`cqtool.cache.codec.TokenCodec.decode`; differentiable in `delta`."""
        return self.start.with_codebook(self.codebook).decode(stored)

    def to(self, device: torch.device) -> Self:
        """See :meth:`cqtool.cache.codec.TokenCodec.to`; starts from the beginning there."""
        return type(self)(self.start.to(device))

    def trained(self) -> CQCodec:
        """The codec with the centroids of the moment, in the dtype of those it started from."""
        return self.start.with_codebook(self.codebook.detach().to(self.start.codebook.dtype))


def trainable(format: CacheFormat) -> tuple[CacheFormat, list[TrainedCodec]]:
    """`format` with codebooks that can be trained, and those of all layers: key, value, key, ..."""
    codecs: list[TrainedCodec] = []
    layers = []
    for layer in format.layers:
        assert isinstance(layer.key, CQCodec) and isinstance(layer.value, CQCodec)
        pair = TrainedCodec(layer.key), TrainedCodec(layer.value)
        codecs += pair
        layers.append(LayerCodecs(*pair))
    return replace(format, layers=tuple(layers)), codecs

"""Which layers and heads need their bits: the calibration with one part of the cache coded at a
time.

As in the sensitivity analyses that mixed-precision quantization goes by (HAWQ, Dong et al. 2019,
arXiv 1905.03696, measures curvature; here it is the loss itself): all else stays exact, so that
what is measured is due to that part alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from cqtool.cache.codec import ExactCodec, HeadsCodec, Stored, TokenCodec
from cqtool.cache.format import CacheFormat, LayerCodecs
from cqtool.quality.statistics import standard_error
from cqtool.spec import Kind

_EXACT = "vectors"


@dataclass(frozen=True)
class LayerCost:
    """What the codes of one layer's keys or values cost.

    Attributes:
        layer: its index.
        kind: ``key`` or ``value``.
        bits_per_channel: of these codes.
        kl: mean KL(full || only these coded) per token, in nats.
        kl_se: its standard error over windows, None with a single window.
    """

    layer: int
    kind: Kind
    bits_per_channel: float
    kl: float
    kl_se: float | None


@dataclass(frozen=True)
class HeadCost(LayerCost):
    """The same of the keys or values of one key/value head.

    Attributes:
        head: its index in the layer.
    """

    head: int


class OneHeadCodec:
    """A layer's codec for one key/value head; the vectors of the others are stored as they are.

    Args:
        codec: of all heads.
        head: the one that is coded.
    """

    def __init__(self, codec: TokenCodec, head: int) -> None:
        self._codec, self._head = codec, head
        self.before_rope, self.block = codec.before_rope, codec.block
        own = codec.parts[head] if isinstance(codec, HeadsCodec) else codec
        self.bits_per_channel = own.bits_per_channel
        """Of that head."""

    def encode(self, vectors: Tensor) -> Stored:
        """See :meth:`TokenCodec.encode`."""
        return {**self._codec.encode(vectors), _EXACT: vectors}

    def decode(self, stored: Stored) -> Tensor:
        """See :meth:`TokenCodec.decode`."""
        coded = {name: tensor for name, tensor in stored.items() if name != _EXACT}
        heads = torch.arange(stored[_EXACT].shape[1], device=stored[_EXACT].device)
        mine = (heads == self._head)[:, None, None]
        return torch.where(mine, self._codec.decode(coded), stored[_EXACT].float())

    def to(self, device: torch.device) -> OneHeadCodec:
        """See :meth:`TokenCodec.to`."""
        return OneHeadCodec(self._codec.to(device), self._head)


def only(format: CacheFormat, layer: int, kind: Kind, head: int | None = None) -> CacheFormat:
    """`format` with all keys and values exact but those of one layer, or of one head of it."""
    exact = ExactCodec()
    codec = _codec(format, layer, kind, head)
    coded = LayerCodecs(codec, exact) if kind == "key" else LayerCodecs(exact, codec)
    layers = [LayerCodecs(exact, exact)] * len(format.layers)
    layers[layer] = coded
    return replace(format, layers=tuple(layers))


def layer_cost(format: CacheFormat, layer: int, kind: Kind, kl: list[float]) -> LayerCost:
    """The cost of a layer's keys or values from its KL in each window."""
    bits = _codec(format, layer, kind, None).bits_per_channel
    return LayerCost(layer, kind, bits, fmean(kl), standard_error(kl))


def head_cost(format: CacheFormat, layer: int, kind: Kind, head: int, kl: list[float]) -> HeadCost:
    """The same of those of one head."""
    bits = _codec(format, layer, kind, head).bits_per_channel
    return HeadCost(layer, kind, bits, fmean(kl), standard_error(kl), head)


def _codec(format: CacheFormat, layer: int, kind: Kind, head: int | None) -> TokenCodec:
    own = format.layers[layer]
    codec = own.key if kind == "key" else own.value
    return codec if head is None else OneHeadCodec(codec, head)

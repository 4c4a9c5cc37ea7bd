"""The caches that text is generated with: how to make one, and how to fill it chunk by chunk.

The rows of a large batch are prefilled some at a time, so that activations are not what limits the
batch. The chunks' caches are then joined layer by layer, each chunk's layer let go at once, so that
little more than the joined cache is held at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from cqtool.bench.formats import BenchFormat, Books
from cqtool.cache import CacheFormat, CQCache, CQCodec, LayerCodecs
from cqtool.cache.codec import HeadsCodec
from cqtool.models.probe import read_geometry


class CacheMaker(Protocol):
    """Makes caches of one kind.

    Attributes:
        cache: name of the kind.
        format: name of what is stored.
        compiled: whether generation may compile the decode step.
        joins: whether chunks can be joined.
    """

    cache: str
    format: str
    compiled: bool
    joins: bool

    def make(self, rows: int, length: int) -> Cache:
        """An empty cache for at most `length` tokens of `rows` rows."""

    def chunk(self, rows: int, length: int) -> Cache:
        """An empty cache for `length` tokens of `rows` rows, to be joined or repeated."""

    def join(self, chunks: list[Cache], rows: int, length: int) -> Cache:
        """One cache for `length` tokens with the rows of all `chunks`, which are emptied."""

    def repeat(self, cache: Cache, rows: int, length: int) -> Cache:
        """A cache that holds the one row of `cache`, made by `chunk` and emptied, `rows` times."""

    def implementation(self, cache: Cache) -> str | None:
        """How the cache attends, where there is more than one way."""


class DynamicMaker:
    """transformers' DynamicCache, which grows by concatenation."""

    cache = "dynamic"
    compiled = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.format = str(model.dtype).removeprefix("torch.")
        # Layers that slide keep fewer tokens than they were given: their chunks do not add up.
        layers: list[Any] = list(self.make(1, 1).layers)
        self.joins = not any(getattr(layer, "is_sliding", False) for layer in layers)

    def make(self, rows: int, length: int) -> Cache:
        """See :meth:`CacheMaker.make`."""
        return DynamicCache(config=self.config)

    def chunk(self, rows: int, length: int) -> Cache:
        """See :meth:`CacheMaker.chunk`."""
        return DynamicCache(config=self.config)

    def join(self, chunks: list[Cache], rows: int, length: int) -> Cache:
        """See :meth:`CacheMaker.join`."""
        joined = self.make(rows, length)
        for index in range(len(chunks[0].layers)):
            parts: list[Any] = [chunk.layers[index] for chunk in chunks]
            keys, values = torch.cat([p.keys for p in parts]), torch.cat([p.values for p in parts])
            for part in parts:
                part.keys = part.values = None
            joined.update(keys, values, index)
        return joined

    def repeat(self, cache: Cache, rows: int, length: int) -> Cache:
        """See :meth:`CacheMaker.repeat`."""
        return self.join([cache] * rows, rows, length)

    def implementation(self, cache: Cache) -> str | None:
        """See :meth:`CacheMaker.implementation`."""
        return None


class StaticMaker(DynamicMaker):
    """transformers' StaticCache, allocated whole; its chunks are dynamic.

    Args:
        model: the model.
        compiled: let `generate` compile the decode step, as it does by default with such a cache.
            One cache object then serves all runs of a batch: compiled code keeps its addresses.
    """

    def __init__(self, model: PreTrainedModel, *, compiled: bool) -> None:
        self.cache = "static-compiled" if compiled else "static"
        self.compiled = compiled
        self._kept: tuple[tuple[int, int], StaticCache] | None = None
        super().__init__(model)

    def make(self, rows: int, length: int) -> Cache:
        """See :meth:`CacheMaker.make`."""
        if self._kept is not None and self._kept[0] == (rows, length):
            self._kept[1].reset()  # type: ignore[no-untyped-call]
            return self._kept[1]
        self._kept = None
        made = StaticCache(config=self.config, max_cache_len=length)
        if self.compiled:
            self._kept = (rows, length), made
        return made


def bind(format: BenchFormat, model: PreTrainedModel, seed: int) -> CacheFormat:
    """A format for a model, on its device, with random codebooks or an artifact's."""
    geometry = read_geometry(model)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    layers = []
    for index, layer in enumerate(geometry.layers):
        heads, dim = layer.kv_heads, layer.key_dim
        books: tuple[Books, Books] = (
            format.codebooks[index]
            if format.codebooks is not None
            else format.layer_codebooks(index, heads, dim, generator)
        )
        orders = format.layer_channels(index, heads, dim, layer.rotation, seed)
        codecs = (_codec(*both, model.device) for both in zip(books, orders, strict=True))
        layers.append(LayerCodecs(*codecs))
    spec = format.spec
    return CacheFormat(format.name, geometry, tuple(layers), spec.window, spec.sinks)


def _codec(books: Books, order: torch.Tensor | None, device: torch.device) -> CQCodec | HeadsCodec:
    if isinstance(books, torch.Tensor):
        return CQCodec(books.to(device), order)
    orders = [None] * len(books) if order is None else [row[None] for row in order]
    parts = zip(books, orders, strict=True)
    return HeadsCodec([CQCodec(book.to(device), own) for book, own in parts])


class CQMaker:
    """cqtool's cache, with random codebooks or an artifact's."""

    cache = "cq"
    compiled = False

    def __init__(self, model: PreTrainedModel, format: BenchFormat, seed: int) -> None:
        self.model = model
        self.format = format.name
        self.bound = bind(format, model, seed)
        self.joins = True

    def make(self, rows: int, length: int) -> Cache:
        """See :meth:`CacheMaker.make`."""
        return CQCache(self.bound, self.model, max_cache_len=length)

    def chunk(self, rows: int, length: int) -> Cache:
        """See :meth:`CacheMaker.chunk`."""
        return self.make(rows, length)

    def join(self, chunks: list[Cache], rows: int, length: int) -> Cache:
        """See :meth:`CacheMaker.join`."""
        own = [chunk for chunk in chunks if isinstance(chunk, CQCache)]
        return CQCache.join(own, max_cache_len=length)

    def repeat(self, cache: Cache, rows: int, length: int) -> Cache:
        """See :meth:`CacheMaker.repeat`."""
        # One row of the length to come, so that each copy has its room as well.
        repeated = self.join([cache], 1, length)
        repeated.batch_repeat_interleave(rows)
        return repeated

    def implementation(self, cache: Cache) -> str | None:
        """See :meth:`CacheMaker.implementation`."""
        assert isinstance(cache, CQCache)
        return getattr(cache, "implementation", None)


def make_makers(
    model: PreTrainedModel, caches: Sequence[str], formats: Sequence[BenchFormat], seed: int
) -> list[CacheMaker]:
    """A maker for each kind of cache, and one for each format of the kind ``cq``."""
    makers: list[CacheMaker] = []
    for name in caches:
        if name == "cq":
            makers += [CQMaker(model, format, seed) for format in formats]
        elif name == "dynamic":
            makers.append(DynamicMaker(model))
        else:
            makers.append(StaticMaker(model, compiled=name == "static-compiled"))
    return makers

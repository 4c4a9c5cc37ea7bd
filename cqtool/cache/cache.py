"""`CQCache`: a drop-in transformers cache whose keys and values are codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cqtool.cache.attention import Switch
from cqtool.cache.codec import CQCodec
from cqtool.cache.format import CacheFormat
from cqtool.cache.fused import FusedLayer
from cqtool.cache.layer import CQLayer
from cqtool.cache.layer_kernels import unsupported
from cqtool.cache.loading import load_format
from cqtool.cache.passes import PassState
from cqtool.cache.rotary import RotaryHistory
from cqtool.cache.sinks import SinkColumns
from cqtool.cache.tiled import TiledLayer
from cqtool.errors import KernelsUnavailable
from cqtool.kernels.load import outlook, warn_fallback
from cqtool.models.tap import AttentionTap

Implementation = Literal["auto", "fused", "reference"]


class CQCache(Cache):
    """A key/value cache at a few bits per channel.

    Example:
        >>> cache = CQCache.from_pretrained("org/name", model)  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP

    One object serves one conversation (or batch); :meth:`reset` empties it for the next, and
    ``CQCache(cache.format, model)`` makes another that shares the codebooks.

    Args:
        format: codecs, window and sinks.
        model: the model the cache will be used with; hooks on it show the cache RoPE's angles.
        implementation: ``fused`` attends to the codes as they are, on a CPU in plain torch;
            ``reference`` decodes them for the model's own attention; ``auto`` is the former on a
            CUDA device where format and architecture allow it, and says so once where they do not.

    Raises:
        KernelsUnavailable: ``fused`` was asked for and is impossible; the sentence says why.
    """

    def __init__(
        self, format: CacheFormat, model: PreTrainedModel, implementation: Implementation = "auto"
    ) -> None:
        if implementation not in get_args(Implementation):
            known = ", ".join(get_args(Implementation))
            raise ValueError(f"implementation={implementation!r}: give one of {known}.")
        self.format = format
        self._tap = AttentionTap.of(model)
        self._sinks = SinkColumns(format.sinks)
        self.state = PassState(self._sinks, self._tap)
        fused = _fusable_layers(format, model, implementation)
        sources = {layer.rotation.source for layer in format.geometry.layers} - {None}
        self._rotary = {source: RotaryHistory() for source in sources}
        layers: list[CQLayer] = []
        for index, (geometry, codecs) in enumerate(
            zip(format.geometry.layers, format.layers, strict=True)
        ):
            rotary = self._rotary.get(geometry.rotation.source)
            shared = (format.window, self._sinks, rotary, self._tap)
            layers.append(
                FusedLayer(index, geometry, codecs, *shared, self.state)
                if index in fused
                else CQLayer(index, geometry, codecs, *shared)
            )
        super().__init__(layers=list(layers))

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        model: PreTrainedModel,
        *,
        revision: str | None = None,
        allow_other_base: bool = False,
        implementation: Implementation = "auto",
        trust_kernels: bool = False,
    ) -> CQCache:
        """Make a cache from an artifact (or calibration folder), checked against `model`.

        Args:
            path: a local folder, or the id of a repository on the Hub.
            model: the loaded base model.
            revision: branch, tag or commit, for a repository.
            allow_other_base: accept a model whose weights differ, for fine-tunes.
            implementation: see :class:`CQCache`.
            trust_kernels: run the compiled kernels that the artifact ships, which are code of
                whoever made it, instead of compiling this package's own.

        Raises:
            ArtifactError: the artifact is missing, damaged, of an unknown version, or was made for
                another model.
            HubError: the repository cannot be reached.
        """
        format = load_format(
            path,
            model,
            revision=revision,
            allow_other_base=allow_other_base,
            trust_kernels=trust_kernels,
        )
        return cls(format.to(model.device), model, implementation)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored for the tokens so far; the shared codebooks not counted."""
        layers = sum(layer.nbytes for layer in self._cq_layers)
        return layers + sum(history.nbytes for history in self._rotary.values())

    @property
    def nbytes_full(self) -> int:
        """Bytes that transformers' full-precision cache would hold for the same tokens."""
        return sum(layer.nbytes_full for layer in self._cq_layers)

    @property
    def is_croppable(self) -> bool:
        """False: tokens encoded since do not return to full precision when later ones go."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens from every layer."""
        super().crop(tokens_to_remove)
        for history in self._rotary.values():
            history.crop(self.get_seq_length())

    def reset(self) -> None:
        """Forget all tokens; the codebooks stay."""
        super().reset()  # type: ignore[no-untyped-call]
        self._sinks.clear()
        self.state.clear()
        for history in self._rotary.values():
            history.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows (beam search)."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._map_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._map_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows."""
        super().batch_select_indices(indices)
        self._map_batch(lambda tensor: tensor[indices.to(tensor.device), ...])

    @classmethod
    def join(cls, caches: Sequence[CQCache]) -> CQCache:
        """Put the rows of several caches into the first of them; the others are emptied.

        Args:
            caches: of one format and model, all of the same length.

        Returns:
            The first cache, with the rows of all in order. Its layers are joined one after the
            other, so that little more than the result is held at any time.

        Raises:
            ValueError: the caches differ in format or length, or only some of them have rows with
                padding.
        """
        first, *others = caches
        length = first.get_seq_length()
        if any(c.format is not first.format or c.get_seq_length() != length for c in others):
            raise ValueError("join takes caches of one format object and the same length.")
        pairs: list[tuple[_Batched, list[_Batched]]] = [
            (first._cq_layers[i], [other._cq_layers[i] for other in others])
            for i in range(len(first.layers))
        ]
        pairs.append((first._sinks, [other._sinks for other in others]))
        pairs += [
            (history, [other._rotary[source] for other in others])
            for source, history in first._rotary.items()
        ]
        counts = [{_count(each) for each in (target, *sources)} for target, sources in pairs]
        if any(len(count) > 1 for count in counts):
            raise ValueError("join takes caches that all know padding, or none of them.")
        limit = max(cache._sinks.limit for cache in caches)
        for target, sources in pairs:
            if isinstance(target, TiledLayer):
                same = [each for each in sources if isinstance(each, TiledLayer)]
                TiledLayer.reserve_alike([target, *same])
            # Both sides are walked in the same order.
            found: list[list[Tensor]] = [[] for _ in sources]
            for source, tensors in zip(sources, found, strict=True):
                source.map_batch(_collector(tensors))
            target.map_batch(_extender(found))
            for source in sources:
                if isinstance(source, CQLayer):
                    source.reset()
        first._sinks.limit = limit
        first.state.clear()
        for other in others:
            other.reset()
        return first

    @property
    def _cq_layers(self) -> list[CQLayer]:
        return [layer for layer in self.layers if isinstance(layer, CQLayer)]

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._sinks.map_batch(change)
        for history in self._rotary.values():
            history.map_batch(change)

    @property
    def implementation(self) -> str:
        """``fused``, ``reference``, or how many of the layers are fused."""
        fused = sum(isinstance(layer, FusedLayer) for layer in self.layers)
        if fused in (0, len(self.layers)):
            return "fused" if fused else "reference"
        return f"fused in {fused} of {len(self.layers)} layers"

    def __repr__(self) -> str:
        """The format's name, the implementation, and how full the cache is."""
        return (
            f"CQCache({self.format.name}, {self.implementation}, tokens={self.get_seq_length()}, "
            f"bytes={self.nbytes})"
        )


class _Batched(Protocol):
    """Something whose tensors have a batch dimension."""

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of it to every tensor, always in the same order."""


def _extender(found: list[list[Tensor]]) -> Callable[[Tensor], Tensor]:
    rows = [iter(tensors) for tensors in found]
    return lambda mine: torch.cat([mine, *(next(tensors) for tensors in rows)])


def _count(batched: _Batched) -> int:
    tensors: list[Tensor] = []
    batched.map_batch(_collector(tensors))
    return len(tensors)


def _collector(into: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def collect(tensor: Tensor) -> Tensor:
        into.append(tensor)
        return tensor

    return collect


def _fusable_layers(
    format: CacheFormat, model: PreTrainedModel, implementation: Implementation
) -> set[int]:
    """The layers that attend to codes; says why where none can."""
    on_gpu = model.device.type == "cuda"
    coupled = any(type(c) is CQCodec for each in format.layers for c in (each.key, each.value))
    wanted = implementation == "fused" or (implementation == "auto" and on_gpu and coupled)
    if not wanted:
        return set()
    capability = torch.cuda.get_device_capability(model.device) if on_gpu else None
    query_heads = format.geometry.query_heads
    reasons = [
        unsupported(geometry, codecs, query_heads, capability)
        for geometry, codecs in zip(format.geometry.layers, format.layers, strict=True)
    ]
    layers = {index for index, reason in enumerate(reasons) if reason is None}
    reason = None if layers else reasons[0]
    if reason is None and capability is not None:
        found = outlook(capability)
        reason = found.detail if found.source == "reference" else None
    if reason is None:
        reason = Switch.of(model, format.geometry).problem
    if reason is None:
        return layers
    if implementation == "fused":
        raise KernelsUnavailable(
            f"The fused cache cannot be had: {reason} Use implementation='auto' or 'reference'."
        )
    warn_fallback(reason)
    return set()

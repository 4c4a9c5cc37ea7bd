"""`CQCache`: a drop-in transformers cache whose keys and values are codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cqtool.cache.attention import Switch
from cqtool.cache.codec import CQCodec, HeadsCodec, TokenCodec
from cqtool.cache.format import CacheFormat
from cqtool.cache.fused import FusedLayer
from cqtool.cache.joining import check_alike, check_counts, join_layers, join_rows
from cqtool.cache.layer import CQLayer
from cqtool.cache.layer_kernels import unsupported
from cqtool.cache.loading import load_format
from cqtool.cache.passes import PassState
from cqtool.cache.rotary import RotaryHistory
from cqtool.cache.sinks import SinkColumns
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
        max_cache_len: tokens of the longest text to come, prompt included, where that is known:
            room for the codes is then made once, with nothing to spare. It limits nothing; what is
            longer grows as it does without. Of no effect on ``reference``, which keeps no reserve.

    Raises:
        KernelsUnavailable: ``fused`` was asked for and is impossible; the sentence says why.
        ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        format: CacheFormat,
        model: PreTrainedModel,
        implementation: Implementation = "auto",
        *,
        max_cache_len: int | None = None,
    ) -> None:
        if implementation not in get_args(Implementation):
            known = ", ".join(get_args(Implementation))
            raise ValueError(f"implementation={implementation!r}: give one of {known}.")
        _check_length(max_cache_len)
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
                FusedLayer(index, geometry, codecs, *shared, self.state, max_cache_len)
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
        max_cache_len: int | None = None,
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
            max_cache_len: see :class:`CQCache`.

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
        format = format.to(model.device)
        return cls(format, model, implementation, max_cache_len=max_cache_len)

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
    def join(cls, caches: Sequence[CQCache], *, max_cache_len: int | None = None) -> CQCache:
        """Put the rows of several caches into the first of them; the others are emptied.

        Args:
            caches: of one format and model, all of the same length.
            max_cache_len: of the joined cache, see :class:`CQCache`; by default the first one's.
                Caches to be joined need room for their prompts only.

        Returns:
            The first cache, with the rows of all in order. Its layers are joined one after the
            other, so that little more than the result is held at any time.

        Raises:
            ValueError: the caches differ in format, length or implementation, or only some of them
                have rows with padding.
        """
        _check_length(max_cache_len)
        first, *others = caches
        length = first.get_seq_length()
        if any(c.format is not first.format or c.get_seq_length() != length for c in others):
            raise ValueError("join takes caches of one format object and the same length.")
        if any(cache.implementation != first.implementation for cache in others):
            raise ValueError("join takes caches of one implementation.")
        layers = list(zip(*(cache._cq_layers for cache in caches), strict=True))
        shared = [[cache._sinks.map_batch for cache in caches]]
        shared += [[c._rotary[source].map_batch for c in caches] for source in first._rotary]
        for each in layers:
            check_alike(each)
        for maps in shared:
            check_counts(maps)
        limit = max(cache._sinks.limit for cache in caches)
        for each in layers:
            join_layers(each, max_cache_len)
        for maps in shared:
            join_rows(maps)
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


def _check_length(max_cache_len: int | None) -> None:
    if max_cache_len is not None and max_cache_len < 1:
        raise ValueError(f"max_cache_len={max_cache_len}: give 1 or more, or leave it out.")


def _fusable_layers(
    format: CacheFormat, model: PreTrainedModel, implementation: Implementation
) -> set[int]:
    """The layers that attend to codes; says why where none can."""
    on_gpu = model.device.type == "cuda"
    coupled = any(_is_coupled(c) for each in format.layers for c in (each.key, each.value))
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


def _is_coupled(codec: TokenCodec) -> bool:
    parts = codec.parts if isinstance(codec, HeadsCodec) else (codec,)
    return any(type(part) is CQCodec for part in parts)

"""`CQCache`: a drop-in transformers cache whose keys and values are codes."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cqtool.cache.format import CacheFormat
from cqtool.cache.layer import CQLayer
from cqtool.cache.loading import load_format
from cqtool.cache.rotary import RotaryHistory
from cqtool.cache.sinks import SinkColumns
from cqtool.models.tap import AttentionTap


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
    """

    def __init__(self, format: CacheFormat, model: PreTrainedModel) -> None:
        self.format = format
        self._tap = AttentionTap.of(model)
        self._sinks = SinkColumns(format.sinks)
        sources = {layer.rotation.source for layer in format.geometry.layers} - {None}
        self._rotary = {source: RotaryHistory() for source in sources}
        layers = [
            CQLayer(
                index,
                geometry,
                codecs,
                format.window,
                self._sinks,
                self._rotary.get(geometry.rotation.source),
                self._tap,
            )
            for index, (geometry, codecs) in enumerate(
                zip(format.geometry.layers, format.layers, strict=True)
            )
        ]
        super().__init__(layers=list(layers))

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        model: PreTrainedModel,
        *,
        revision: str | None = None,
        allow_other_base: bool = False,
    ) -> CQCache:
        """Make a cache from an artifact (or calibration folder), checked against `model`.

        Args:
            path: a local folder, or the id of a repository on the Hub.
            model: the loaded base model.
            revision: branch, tag or commit, for a repository.
            allow_other_base: accept a model whose weights differ, for fine-tunes.

        Raises:
            ArtifactError: the artifact is missing, damaged, of an unknown version, or was made for
                another model.
            HubError: the repository cannot be reached.
        """
        format = load_format(path, model, revision=revision, allow_other_base=allow_other_base)
        return cls(format.to(model.device), model)

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

    @property
    def _cq_layers(self) -> list[CQLayer]:
        return [layer for layer in self.layers if isinstance(layer, CQLayer)]

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self._sinks.map_batch(change)
        for history in self._rotary.values():
            history.map_batch(change)

    def __repr__(self) -> str:
        """The format's name and how full the cache is."""
        return f"CQCache({self.format.name}, tokens={self.get_seq_length()}, bytes={self.nbytes})"

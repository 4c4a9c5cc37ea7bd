"""A cache layer whose heads have codes of their own, on the kernels.

Each kernel call serves heads of one pair of codes, so such a layer is made of several
:class:`FusedLayer`, one for each pair, that divide its heads among themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from cqtool.cache.format import LayerCodecs
from cqtool.cache.fused import MARK, FusedLayer
from cqtool.cache.head_parts import head_parts
from cqtool.cache.passes import PassState
from cqtool.cache.rotary import RotaryHistory
from cqtool.cache.sinks import SinkColumns
from cqtool.geometry import LayerGeometry
from cqtool.models.tap import AttentionTap


class _Run(NamedTuple):
    """Neighbouring heads of a layer that are neighbours in one of its parts too."""

    head: int
    part: int
    place: int
    size: int


class HeadsLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Several fused layers, each of some of the heads, that together mean one :class:`CQLayer`.

    All that is stored lies in the parts, which see the same passes and so agree on lengths.

    Args:
        parts: the layers, which share angles, sinks and the running pass's state.
        heads: the heads of each, ascending.

    Attributes:
        parts: the same.
    """

    # Those of the parts stand for them.
    keys = values = None

    def __init__(self, parts: Sequence[FusedLayer], heads: Sequence[Sequence[int]]) -> None:
        # Not DynamicLayer's, which sets what the parts answer here.
        self.parts = tuple(parts)
        self.index = self.parts[0].index
        self.sliding_window = self.parts[0].sliding_window
        self.is_sliding = self.parts[0].is_sliding
        self._kv_heads = sum(map(len, heads))
        self._runs = _runs(heads)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype, device and batch from the first states."""
        for part, *states in self._divided(key_states, value_states):
            part.lazy_initialization(*states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new states; see :meth:`FusedLayer.update`."""
        found = [
            part.update(keys, values)
            for part, keys, values in self._divided(key_states, value_states)
        ]
        if self.parts[0].pending:
            setattr(key_states, MARK, self)
            return key_states, value_states
        keys, values = zip(*found, strict=True)
        return self._in_order(keys), self._in_order(values)

    def can_attend(self, new: int) -> bool:
        """Whether a pass over `new` more tokens can attend to the codes as they are."""
        return all(part.can_attend(new) for part in self.parts)

    def attend(self, query: Tensor, scale: float, softcap: float) -> Tensor:
        """Attend to everything in the cache; see :meth:`FusedLayer.attend`."""
        found = [part.attend(own, scale, softcap) for part, own in self._divided(query)]
        return self._in_order(found)

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there were states."""
        return self.parts[0].is_initialized

    def get_seq_length(self) -> int:
        """Tokens taken in so far, forgotten ones included."""
        return self.parts[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first column of the keys that the next update returns."""
        return self.parts[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """The layer's sliding window, -1 without one."""
        return self.parts[0].get_max_length()

    def activate_past_recording(self) -> None:
        """Keep tokens beyond the sliding window until the next :meth:`crop`."""
        for part in self.parts:
            part.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; see :meth:`CQLayer.crop`."""
        for part in self.parts:
            part.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens."""
        for part in self.parts:
            part.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows (beam search)."""
        for part in self.parts:
            part.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        for part in self.parts:
            part.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows."""
        for part in self.parts:
            part.batch_select_indices(indices)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors of the layer with their reserves, codebooks not counted."""
        return sum(part.nbytes for part in self.parts)

    @property
    def nbytes_full(self) -> int:
        """Bytes that the tokens of this layer take in the model's dtype."""
        return sum(part.nbytes_full for part in self.parts)

    def _divided(self, *states: Tensor) -> list[tuple[Any, ...]]:
        """Each part with its heads of each of `states` ``[batch, heads, ...]``."""
        return [
            (part, *(self._heads_of(index, each) for each in states))
            for index, part in enumerate(self.parts)
        ]

    def _heads_of(self, part: int, states: Tensor) -> Tensor:
        # Neighbouring query heads read the same key/value head.
        readers = states.shape[1] // self._kv_heads
        own = [
            states.narrow(1, run.head * readers, run.size * readers)
            for run in self._runs
            if run.part == part
        ]
        return own[0] if len(own) == 1 else torch.cat(own, dim=1)

    def _in_order(self, found: Sequence[Tensor]) -> Tensor:
        """What the parts found, ``[batch, their heads, ...]``, in the order of the heads."""
        readers = sum(each.shape[1] for each in found) // self._kv_heads
        return torch.cat(
            [
                found[run.part].narrow(1, run.place * readers, run.size * readers)
                for run in self._runs
            ],
            dim=1,
        )


ATTENDING = (FusedLayer, HeadsLayer)
"""The layers that attend to codes."""


def fused_layer(
    index: int,
    geometry: LayerGeometry,
    codecs: LayerCodecs,
    window: int,
    sinks: SinkColumns,
    rotary: RotaryHistory | None,
    tap: AttentionTap,
    state: PassState,
    max_length: int | None = None,
) -> FusedLayer | HeadsLayer:
    """A layer on the kernels, whichever codes its heads have; arguments as of a fused one."""
    parts = head_parts(geometry, codecs)
    shared = (window, sinks, rotary, tap, state, max_length)
    layers = [FusedLayer(index, part.geometry, part.codecs, *shared) for part in parts]
    return layers[0] if len(parts) == 1 else HeadsLayer(layers, [part.heads for part in parts])


def _runs(parts: Sequence[Sequence[int]]) -> list[_Run]:
    """The heads of all parts in order, neighbours together."""
    places = sorted(
        (head, part, place) for part, heads in enumerate(parts) for place, head in enumerate(heads)
    )
    runs: list[_Run] = []
    for head, part, place in places:
        if runs and runs[-1].part == part:
            runs[-1] = runs[-1]._replace(size=runs[-1].size + 1)
        else:
            runs.append(_Run(head, part, place, 1))
    return runs

"""The heads of a layer that kernels take at once: those with the same pair of codes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cqtool.cache.codec import CQCodec, HeadsCodec, TokenCodec
from cqtool.cache.format import LayerCodecs
from cqtool.geometry import LayerGeometry


@dataclass(frozen=True)
class HeadPart:
    """Some key/value heads of a layer, as if they were one.

    Attributes:
        heads: which of the layer's they are, ascending.
        geometry: their shapes.
        codecs: how they are stored.
    """

    heads: tuple[int, ...]
    geometry: LayerGeometry
    codecs: LayerCodecs


# Kept, so that all caches of a format have the same codecs and with them the same kernels' tables.
_made: WeakKeyDictionary[LayerCodecs, tuple[HeadPart, ...]] = WeakKeyDictionary()


def head_parts(geometry: LayerGeometry, codecs: LayerCodecs) -> tuple[HeadPart, ...]:
    """The parts of a layer, in the order of their first heads.

    Groups of other channels make no other part: as in a layer with one code for all heads, each
    head may have its own.

    Args:
        geometry: the layer's shapes.
        codecs: how it is stored.

    Returns:
        One part, of the codecs as they are, where no head has a code of its own, or where not all
        codes are coupled ones.
    """
    if HeadsCodec not in (type(codecs.key), type(codecs.value)):
        return (HeadPart(tuple(range(geometry.kv_heads)), geometry, codecs),)
    if codecs not in _made:
        _made[codecs] = _make_parts(geometry, codecs)
    return _made[codecs]


def _make_parts(geometry: LayerGeometry, codecs: LayerCodecs) -> tuple[HeadPart, ...]:
    count = geometry.kv_heads
    keys, values = (_single_heads(codec, count) for codec in (codecs.key, codecs.value))
    if keys is None or values is None:
        # A copy: what is kept must not hold its own key.
        return (HeadPart(tuple(range(count)), geometry, replace(codecs)),)
    alike: dict[Hashable, list[int]] = {}
    for head, (key, value) in enumerate(zip(keys, values, strict=True)):
        alike.setdefault((_code(key), _code(value)), []).append(head)
    return tuple(
        HeadPart(
            tuple(heads),
            replace(geometry, kv_heads=len(heads)),
            LayerCodecs(
                _stacked([keys[head] for head in heads]),
                _stacked([values[head] for head in heads]),
            ),
        )
        for heads in alike.values()
    )


_Head = tuple[CQCodec, slice]
"""A codec, and the place of one head in it."""


def _single_heads(codec: TokenCodec, count: int) -> list[_Head] | None:
    """Each of `count` heads, None where they are not just so many or not all coupled."""
    codecs = codec.parts if isinstance(codec, HeadsCodec) else (codec,)
    heads: list[_Head] = []
    for one in codecs:
        if type(one) is not CQCodec:
            return None
        heads += [(one, slice(head, head + 1)) for head in range(len(one.codebook))]
    return heads if len(heads) == count else None


def _code(head: _Head) -> Hashable:
    """What must be equal for heads to be taken at once."""
    codec, _ = head
    extras = (codec.metric, codec.feedback, codec.gains)
    return (codec.codebook.shape[1:], *(extra is None for extra in extras))


def _stacked(heads: Sequence[_Head]) -> CQCodec:
    """One codec for some heads that have the same code.

    Codebooks of several dtypes get one that holds all of them exactly: of float16 and bfloat16
    together float32.
    """

    def stack(rows: Sequence[Tensor | None]) -> Tensor | None:
        own = [row[place] for row, (_, place) in zip(rows, heads, strict=True) if row is not None]
        return torch.cat(own) if own else None

    codebook = torch.cat([codec.codebook[place] for codec, place in heads])
    _, groups, _, size = codebook.shape
    channels = None
    if any(codec.channels is not None for codec, _ in heads):
        contiguous = torch.arange(groups * size, device=codebook.device)[None]
        channels = torch.cat(
            [
                contiguous if codec.channels is None else codec.channels[place]
                for codec, place in heads
            ]
        )
    return CQCodec(
        codebook,
        channels,
        stack([codec.metric for codec, _ in heads]),
        stack([codec.feedback for codec, _ in heads]),
        stack([codec.gains for codec, _ in heads]),
    )

"""Rows of several caches become the rows of one: a large batch is prefilled some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cqtool.cache.layer import CQLayer
from cqtool.cache.tiled import TiledLayer

Change = Callable[[Tensor], Tensor]
MapBatch = Callable[[Change], None]
"""Applies a change of the batch dimension to every tensor of something, in a fixed order."""


def check_alike(layers: Sequence[CQLayer]) -> None:
    """Make sure that one layer's states in several caches can be joined.

    Raises:
        ValueError: they hold other columns.
    """
    first, *others = layers
    for other in others:
        if _columns(first) != _columns(other):
            raise ValueError(
                "join takes caches with the same history; these were cropped at other places."
            )


def check_counts(maps: Sequence[MapBatch]) -> None:
    """Make sure that several things have equally many tensors.

    Raises:
        ValueError: only some of them know padding.
    """
    if len({len(_tensors(each)) for each in maps}) > 1:
        raise ValueError("join takes caches that all know padding, or none of them.")


def join_layers(layers: Sequence[CQLayer], max_length: int | None) -> None:
    """Put the rows of a layer's states behind those of the first; the others are emptied.

    Little more than the result is held at any time.

    Args:
        layers: that :func:`check_alike` has let pass.
        max_length: tokens of the longest text to come, None for what the first one knows.
    """
    tiled = [layer for layer in layers if isinstance(layer, TiledLayer)]
    if tiled:
        _join_codes(tiled, max_length)
        join_rows([layer.map_dense for layer in tiled])
    else:
        join_rows([layer.map_batch for layer in layers])
    for layer in layers[1:]:
        layer.reset()


def _join_codes(layers: Sequence[TiledLayer], max_length: int | None) -> None:
    first, *others = layers
    first.max_length = max_length or first.max_length
    for store, *more in zip(first.stores, *(other.stores for other in others), strict=True):
        store.expected = first.expected
        store.join(more)
    if any(layer.keys is not None and layer.keys.shape[2] for layer in layers):
        for layer in layers:
            layer.make_ring()


def join_rows(maps: Sequence[MapBatch]) -> None:
    """Put the rows of the tensors of all things behind those of the first one's."""
    first, *others = maps
    # All are walked in the same order.
    rows = [iter(_tensors(each)) for each in others]
    first(lambda mine: torch.cat([mine, *(next(tensors) for tensors in rows)]))


def _columns(layer: CQLayer) -> tuple[int, ...]:
    stores = layer.stores if isinstance(layer, TiledLayer) else ()
    bases = (number for store in stores for number in (store.base, store.end))
    return (layer.start, layer.coded_end, layer.length, *bases)


def _tensors(walk: MapBatch) -> list[Tensor]:
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    walk(collect)
    return found

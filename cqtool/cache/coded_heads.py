"""The codes of those heads of a fused layer that the kernels take at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cqtool.cache.head_parts import HeadPart
from cqtool.cache.layer_kernels import layer_kernels
from cqtool.cache.tiles import TileStore
from cqtool.kernels.decode.tables import RopeTable
from cqtool.kernels.encode import Rope


class CodedHeads:
    """Tiles of the keys and values of some heads, which have the same pair of codes.

    Args:
        part: the heads and their codes.
        batch: rows.
        device: where the tiles are.
        expected: columns that the first allocation makes room for; 0 when not known.

    Attributes:
        kernels: their tables and encoders, shared by all caches of a format.
        stores: their tiles, of ``key`` and ``value``.
    """

    def __init__(self, part: HeadPart, batch: int, device: torch.device, expected: int) -> None:
        self.kernels = layer_kernels(part.geometry, part.codecs, device)
        self.stores: dict[str, TileStore] = {}
        for name in ("key", "value"):
            size = self.kernels.tile_bytes(name)
            self.stores[name] = TileStore(batch, len(part.heads), size, device, expected)
            self.stores[name].reserve(1)

    def append(
        self,
        name: str,
        states: Tensor,
        column: int,
        place: Callable[[int], Tensor],
        position: Tensor | None,
        rope: RopeTable | None,
    ) -> None:
        """Encode keys or values that follow the last ones.

        Args:
            name: ``key`` or ``value``.
            states: ``[batch, heads, tokens, head_dim]`` of these heads.
            column: of the first of the tokens.
            place: makes a place in the tiles one of every row, int32 ``[batch]``.
            position: RoPE's position of it, int32 ``[batch]``, where `rope` is given.
            rope: what turned the keys, which are turned back first; None where they are not turned.
        """
        store, encoder = self.stores[name], self.kernels.encoders[name]
        assert store.end == column
        turned = None if rope is None else Rope(rope.steps, rope.scale)

        def write(tiles: Tensor, at: int) -> None:
            encoder.encode(states, tiles, place(at), position=position, rope=turned)

        store.append(states.shape[2], write)

    def decode(self, name: str, begin: int, stop: int) -> Tensor:
        """The vectors of the columns ``[begin, stop)``, float32 ``[batch, heads, n, dim]``."""
        codes = self.stores[name].read(begin, stop, self.kernels.unpack[name])
        return self.kernels.decode(name, codes)

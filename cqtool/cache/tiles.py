"""Where one layer's codes lie: tiles of 16 tokens that grow at the end and go from the front."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cqtool.kernels.layout import TILE

_LEAST = 16


class TileStore:
    """The codes of the keys or of the values of one layer, columns ``[base, end)``.

    Appending writes in place. Storage grows by a quarter, so that a token costs constant time and
    at most that much memory is spare; up to the columns that are expected, nothing is.

    Args:
        batch: rows.
        kv_heads: key/value heads.
        tile_bytes: bytes of a tile of one row and head.
        device: where the tiles are.
        expected: columns that the first allocation makes room for, no more and no less; 0 when
            their number is not known.

    Attributes:
        tiles: uint8 ``[batch, kv_heads, tiles, tile_bytes]``, the first starting at column `base`.
        base: a multiple of 16.
        end: the column after the last one stored.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        tile_bytes: int,
        device: torch.device,
        expected: int = 0,
    ) -> None:
        self.expected = expected
        self.base = self.end = 0
        self.tiles = _zeros((batch, kv_heads, 0, tile_bytes), device)

    def reserve(self, end: int) -> None:
        """Make room for the columns up to `end`."""
        batch, heads, have, size = self.tiles.shape
        needed = _tiles(end - self.base)
        if needed <= have and have:
            return
        spare = have + max(have // 4, _LEAST) if have else _tiles(self.expected) or _LEAST
        grown = _zeros((batch, heads, max(needed, spare), size), self.device)
        used = self.used
        grown[:, :, :used].copy_(self.tiles[:, :, :used])
        self.tiles = grown

    def join(self, others: Sequence[TileStore]) -> None:
        """Put the rows of `others` behind this store's own; they are left without rows.

        There is room for the columns that are expected, else for as many as in any of the stores.

        Args:
            others: stores of the same columns, heads and tiles.
        """
        stores = [self, *others]
        _, heads, _, size = self.tiles.shape
        expected = _tiles(self.expected) or max(store.tiles.shape[2] for store in stores)
        rows, used = sum(store.tiles.shape[0] for store in stores), self.used
        joined = _zeros((rows, heads, max(used, expected), size), self.device)
        row = 0
        for store in stores:
            assert (store.base, store.end) == (self.base, self.end)
            count = store.tiles.shape[0]
            joined[row : row + count, :, :used].copy_(store.tiles[:, :, :used])
            row += count
            store.tiles = store.tiles.new_empty((0, *store.tiles.shape[1:]))
        self.tiles = joined

    def append(self, tokens: int, write: Callable[[Tensor, int], None]) -> None:
        """Take in `tokens` more columns.

        Args:
            tokens: how many.
            write: called with the tiles and the first column's place in them; fills them in.
        """
        self.reserve(self.end + tokens)
        write(self.tiles, self.end - self.base)
        self.end += tokens

    def drop_before(self, column: int) -> None:
        """Give up the columns before `column`, a multiple of 16; a later one may come next."""
        assert column % TILE == 0
        if column <= self.base:
            return
        gone, used = (column - self.base) // TILE, self.used
        if column < self.end:
            # Source and target overlap, hence the copy: no more than a layer's sliding window.
            self.tiles[:, :, : used - gone].copy_(self.tiles[:, :, gone:used].clone())
        self.base, self.end = column, max(column, self.end)

    def crop(self, end: int) -> None:
        """Keep the columns before `end`."""
        self.end = max(self.base, min(self.end, end))

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension (reorder, repeat, select)."""
        self.tiles = change(self.tiles)

    def read(self, start: int, stop: int, unpack: Callable[[Tensor], Tensor]) -> Tensor:
        """The codes of columns ``[start, stop)``: int64 ``[batch, kv_heads, columns, groups]``.

        Args:
            start: first column.
            stop: the one after the last.
            unpack: turns tiles into codes, as :func:`cqtool.kernels.layout.unpack_keys` does.
        """
        assert self.base <= start <= stop <= self.end
        low, high = (start - self.base) // TILE, -(-(stop - self.base) // TILE)
        skipped = start - self.base - low * TILE
        codes = unpack(self.tiles[:, :, low:high])
        return codes[:, :, skipped : skipped + stop - start]

    @property
    def device(self) -> torch.device:
        """Where the tiles are."""
        return self.tiles.device

    @property
    def used(self) -> int:
        """Tiles that hold a column."""
        return _tiles(self.end - self.base)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, what is reserved for coming tokens included."""
        return self.tiles.nbytes


def _tiles(columns: int) -> int:
    return -(-columns // TILE)


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    # A tensor made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=torch.uint8, device=device)

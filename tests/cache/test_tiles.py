"""Tiles that grow at the end and go from the front hold what was put in."""

from __future__ import annotations

import pytest
import torch

from cqtool.cache.tiles import TileStore
from cqtool.kernels.layout import CodeFormat, pack_values, unpack_values

FORMAT = CodeFormat(64, 8, 8)


def write(codes):
    """Puts `codes` where it is told to, tile by tile."""

    def into(tiles, place):
        for n in range(codes.shape[2]):
            tile, row = divmod(place + n, 16)
            old = unpack_values(tiles[:, :, tile : tile + 1], FORMAT)
            old[:, :, row] = codes[:, :, n]
            tiles[:, :, tile : tile + 1] = pack_values(old, FORMAT)

    return into


def read(store, start, stop):
    return store.read(start, stop, lambda tiles: unpack_values(tiles, FORMAT))


def filled(tokens, parts=(1000,)):
    codes = torch.randint(0, 256, (2, 3, tokens, 8), generator=torch.Generator().manual_seed(0))
    store = TileStore(2, 3, FORMAT.tile_bytes, torch.device("cpu"))
    for part in codes.split(min(parts[0], tokens), dim=2):
        store.append(part.shape[2], write(part))
    return store, codes


def test_what_was_appended_in_pieces_is_read_back_from_any_column():
    store, codes = filled(300, parts=(7,))
    assert (store.base, store.end) == (0, 300)
    for start, stop in ((0, 300), (15, 17), (299, 300), (16, 32), (40, 40)):
        assert torch.equal(read(store, start, stop), codes[:, :, start:stop])


def test_storage_grows_by_a_quarter_and_counts_its_reserve():
    store, _ = filled(256)
    assert store.tiles.shape[2] == 16
    store.reserve(257)
    assert store.tiles.shape[2] == 32
    store.reserve(100 * 16)
    assert store.tiles.shape[2] == 100
    store.reserve(101 * 16)
    assert store.tiles.shape[2] == 125
    assert store.nbytes == store.tiles.untyped_storage().nbytes() == 2 * 3 * 125 * 16 * 8


def test_the_first_storage_is_what_is_expected_and_what_exceeds_it_grows():
    store = TileStore(2, 3, FORMAT.tile_bytes, torch.device("cpu"), expected=330)
    store.reserve(1)
    assert store.tiles.shape == (2, 3, 21, 128)
    before = store.tiles
    store.reserve(336)
    assert store.tiles is before
    store.reserve(337)
    assert store.tiles.shape[2] == 37
    short = TileStore(2, 3, FORMAT.tile_bytes, torch.device("cpu"), expected=5)
    short.reserve(100)
    assert short.tiles.shape[2] == 7


@pytest.mark.parametrize(("expected", "tiles"), [(0, 32), (50, 19), (320, 20)])
def test_joined_rows_lie_behind_one_another_with_the_room_that_is_expected(expected, tiles):
    codes = torch.randint(0, 256, (5, 3, 300, 8), generator=torch.Generator().manual_seed(1))
    stores = []
    for rows, room in ((2, 0), (1, 32 * 16), (2, 300)):
        store = TileStore(rows, 3, FORMAT.tile_bytes, torch.device("cpu"), room)
        first = sum(each.tiles.shape[0] for each in stores)
        store.append(300, write(codes[first : first + rows]))
        stores.append(store)
    first, *others = stores
    first.expected = expected
    first.join(others)
    assert first.tiles.shape[:3] == (5, 3, tiles)
    assert torch.equal(read(first, 0, 300), codes)
    assert [each.nbytes for each in others] == [0, 0]
    first.append(40, write(codes[:, :, :40]))
    assert torch.equal(read(first, 290, 340), torch.cat((codes[:, :, 290:], codes[:, :, :40]), 2))


def test_dropping_from_the_front_reuses_the_space():
    store, codes = filled(250)
    before = store.tiles
    store.drop_before(96)
    assert torch.equal(read(store, 96, 250), codes[:, :, 96:])
    more = codes[:, :, :100]
    store.append(100, write(more))
    assert store.tiles is before
    assert torch.equal(read(store, 240, 350), torch.cat((codes[:, :, 240:], more), dim=2))
    store.drop_before(48)
    assert store.base == 96


def test_dropping_beyond_the_end_leaves_an_empty_store_that_goes_on_there():
    store, codes = filled(20)
    store.drop_before(64)
    assert (store.base, store.end, store.used) == (64, 64, 0)
    store.append(20, write(codes))
    assert torch.equal(read(store, 64, 84), codes)


def test_cropped_columns_are_written_anew():
    store, codes = filled(40)
    store.crop(19)
    store.append(21, write(codes[:, :, :21]))
    expected = torch.cat((codes[:, :, :19], codes[:, :, :21]), dim=2)
    assert torch.equal(read(store, 0, 40), expected)
    store.drop_before(32)
    store.crop(5)
    assert (store.base, store.end) == (32, 32)


def test_rows_are_selected_with_their_tiles():
    store, codes = filled(33)
    order = torch.tensor([1, 1, 0])
    store.map_batch(lambda tensor: tensor.index_select(0, order))
    assert torch.equal(read(store, 0, 33), codes[order])

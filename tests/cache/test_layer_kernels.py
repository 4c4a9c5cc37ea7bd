"""Which layers the kernels take, by format and by GPU."""

from __future__ import annotations

import pytest
import torch

from cqtool.cache import CQCodec, LayerCodecs
from cqtool.cache.layer_kernels import unsupported
from cqtool.geometry import KeyRotation, LayerGeometry
from cqtool.kernels.decode.tables import LayerTables

GEOMETRY = LayerGeometry(2, 128, 128, None, KeyRotation("half", 128))


def _codecs(channels: int, bits: int) -> LayerCodecs:
    book = torch.zeros(2, 128 // channels, 1 << bits, channels)
    return LayerCodecs(CQCodec(book), CQCodec(book))


@pytest.mark.parametrize("channels, bits", [(8, 8), (4, 8), (2, 8), (8, 10), (8, 6)])
def test_hopper_and_a_cpu_take_every_format(channels: int, bits: int) -> None:
    for capability in ((9, 0), None):
        assert unsupported(GEOMETRY, _codecs(channels, bits), 8, capability) is None


def test_tables_too_large_for_a_gpu_are_told() -> None:
    reason = unsupported(GEOMETRY, _codecs(8, 10), 8, (8, 6))
    assert reason is not None and "shared memory" in reason and "8.6" in reason
    assert unsupported(GEOMETRY, _codecs(8, 8), 8, (8, 6)) is None


def test_other_formats_are_told() -> None:
    assert unsupported(GEOMETRY, _codecs(8, 4), 8) is not None
    other = LayerGeometry(2, 64, 128, None, KeyRotation("half", 64))
    assert unsupported(other, _codecs(8, 8), 8) == "The codebooks do not cover the heads."


def test_heads_have_the_rope_of_their_own_groups() -> None:
    order = torch.randperm(64)
    closed = torch.stack((order, order + 64), dim=1).flatten()
    natural = torch.stack((torch.arange(64), torch.arange(64) + 64), dim=1).flatten()
    book = torch.zeros(2, 16, 256, 8)
    rotation = KeyRotation("half", 128)
    tables = LayerTables(book, book, rotation, torch.stack((closed, natural)))
    rope = tables.rope(10000.0 ** (-torch.arange(0, 128, 2) / 128))
    for head in range(2):
        firsts = tables.pair_channels[head, :, 0].long()
        assert torch.equal(rope.steps[head].sort().values, rope.steps[0].sort().values)
        # The pair of channel 0 turns fastest: an eighth of a turn and more a token, as int64.
        assert firsts[rope.steps[head].argmax()] == 0

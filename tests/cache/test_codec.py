"""Codes of any channels of a head, against one vector at a time."""

from __future__ import annotations

import pytest
import torch
from slow_cache import nearest

from cqtool.cache import CQCodec


def problem(bits: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(3, 3, 1 << bits, 4, generator=generator)
    order = torch.stack([torch.randperm(12, generator=generator) for _ in range(3)])
    return codebook, order, torch.randn(2, 3, 5, 12, generator=generator)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_each_group_is_made_of_its_own_channels(dtype: torch.dtype) -> None:
    codebook, order, vectors = problem()
    codec = CQCodec(codebook, order.to(dtype))
    stored = codec.encode(vectors)
    # 3 codes of 3 bits.
    assert stored["codes"].shape == (2, 3, 5, 2)
    found = codec.decode(stored)
    for row in range(2):
        for head in range(3):
            for token in range(5):
                coded = nearest(vectors[row, head, token, order[head]], codebook[head])
                expected = torch.empty(12)
                expected[order[head]] = coded
                assert torch.equal(found[row, head, token], expected)


def test_an_order_that_changes_nothing_is_none() -> None:
    codebook, order, _ = problem()
    same = torch.arange(12).expand(3, -1)
    assert CQCodec(codebook, same).channels is None
    assert CQCodec(codebook).channels is None
    # One head of several is enough to need it.
    one = torch.stack((same[0], same[0], order[0]))
    channels = CQCodec(codebook, one).channels
    assert channels is not None and torch.equal(channels, one)


def test_moving_takes_the_channels_along() -> None:
    codebook, order, vectors = problem()
    codec = CQCodec(codebook, order)
    moved = codec.to(torch.device("meta"))
    assert moved.channels is not None and moved.channels.is_meta
    assert moved.codebook.is_meta
    assert moved.decode({"codes": torch.empty(2, 3, 5, 2, device="meta")}).shape == vectors.shape
    assert codec.channels is not None and not codec.channels.is_meta
    stored = codec.encode(vectors)
    again = codec.to(torch.device("cpu"))
    assert torch.equal(again.decode(again.encode(vectors)), codec.decode(stored))

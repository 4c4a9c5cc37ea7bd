"""A trainable codec is the codec it started from, and its gradient that of the centroids taken."""

from __future__ import annotations

import pytest
import torch
from formats import random_format
from zoo import tiny

from cqtool.cache import CQCodec
from cqtool.codebooks.codes import unpack
from cqtool.tuning.codec import TrainedCodec, trainable


@pytest.fixture
def codec() -> CQCodec:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.01, 1.0, 30.0])[None, :, None, None]
    return CQCodec((torch.randn(2, 3, 16, 4, generator=generator) * sizes).half())


def vectors(tokens: int) -> torch.Tensor:
    return torch.randn(2, 2, tokens, 12, generator=torch.Generator().manual_seed(1))


def test_it_starts_as_the_codec_it_is_given(codec):
    trained = TrainedCodec(codec)
    x = vectors(50)
    assert torch.equal(trained.decode(trained.encode(x)), codec.decode(codec.encode(x)))
    assert torch.equal(trained.trained().codebook, codec.codebook)
    assert trained.bits_per_channel == codec.bits_per_channel


def test_the_gradient_is_the_sum_over_the_vectors_of_a_centroid(codec):
    trained = TrainedCodec(codec)
    x, upstream = vectors(40), vectors(40).flip(2)
    stored = trained.encode(x)
    torch.autograd.backward((trained.decode(stored) * upstream).sum())
    codes = unpack(stored["codes"], 4, 3)
    expected = torch.zeros_like(trained.delta)
    for batch in range(2):
        for head in range(2):
            for token in range(40):
                for group in range(3):
                    code = int(codes[batch, head, token, group])
                    part = upstream[batch, head, token, 4 * group : 4 * group + 4]
                    expected[head, group, code] += part
    spread = codec.codebook.float().var(dim=2, correction=0).mean(dim=-1).sqrt()
    torch.testing.assert_close(trained.delta.grad, expected * spread[:, :, None, None])


def test_a_step_is_relative_to_the_spread_of_its_codebook(codec):
    trained = TrainedCodec(codec)
    trained.delta.data.fill_(0.1)
    moved = (trained.codebook - codec.codebook.float()).mean(dim=(0, 2, 3))
    spread = codec.codebook.float().var(dim=2, correction=0).mean(dim=-1).sqrt().mean(dim=0)
    torch.testing.assert_close(moved, 0.1 * spread)


def test_vectors_take_the_nearest_centroid_of_the_moment(codec):
    trained = TrainedCodec(codec)
    with torch.no_grad():
        trained.delta += torch.randn(
            trained.delta.shape, generator=torch.Generator().manual_seed(2)
        )
    moved = CQCodec(trained.codebook.detach())
    x = vectors(30)
    assert torch.equal(trained.decode(trained.encode(x)), moved.decode(moved.encode(x)))


def test_a_codebook_of_one_point_can_move():
    trained = TrainedCodec(CQCodec(torch.ones(1, 1, 4, 2).half()))
    trained.delta.data.fill_(1.0)
    assert (trained.codebook > 1).all()


def test_all_layers_of_a_format_are_trained():
    model = tiny("llama")
    format, codecs = trainable(random_format(model, channels=4, bits=4))
    assert len(codecs) == 2 * len(format.layers)
    assert [format.layers[0].key, format.layers[0].value] == codecs[:2]

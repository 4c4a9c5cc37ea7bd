"""VecInfer against its equations in float64: smooth, Hadamard, nearest centroid, and back."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scheme_samples import HEADS, activations, as_batch, geometry

from cqtool.errors import RecipeError
from cqtool.schemes import SCHEMES
from cqtool.schemes.fitting import some_of
from cqtool.schemes.hadamard import hadamard
from cqtool.schemes.vecinfer import SIZES, smooth_scale


@pytest.mark.parametrize("dim", [1, 2, 16, 64, 128])
def test_hadamard_is_walsh_s_matrix(dim):
    # H[i, j] = (-1)^(bits that i and j share) / sqrt(dim).
    expected = np.array(
        [[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)]
    ) / math.sqrt(dim)
    np.testing.assert_allclose(hadamard(dim).double().numpy(), expected, atol=1e-7)


@pytest.mark.parametrize(("dim", "block"), [(80, 16), (96, 32), (112, 16), (72, 8)])
def test_hadamard_of_other_sizes_is_block_diagonal_and_its_own_inverse(dim, block):
    matrix = hadamard(dim)
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim), atol=1e-6, rtol=0)
    assert int((matrix[0] != 0).sum()) == block


@pytest.mark.parametrize("name", ["vecinfer-1", "vecinfer-2"])
def test_keys_match_float64(name, samples_of):
    dim = 32
    samples = samples_of(dim)
    codec = SCHEMES[name].make(geometry(dim), samples).key
    vectors = as_batch(activations(dim, 24, seed=8))
    decoded = codec.decode(codec.encode(vectors)).double().numpy()
    rotation = hadamard(dim).double().numpy()
    largest = np.abs(samples.load("key").double().numpy()).max(axis=0)
    table = codec.codec.codebook[:, 0].double().numpy()
    channels = table.shape[-1]
    for batch, head, token in itertools.product(*map(range, vectors.shape[:3])):
        key = vectors[batch, head, token].double().numpy()
        smoothed = (key / np.sqrt(largest[head])) @ rotation
        groups = smoothed.reshape(-1, channels)
        chosen = [table[head][((part - table[head]) ** 2).sum(1).argmin()] for part in groups]
        expected = (np.concatenate(chosen) @ rotation.T) * np.sqrt(largest[head])
        np.testing.assert_allclose(decoded[batch, head, token], expected, rtol=1e-4, atol=1e-4)


def test_queries_see_the_same_keys():
    # Equation 7: q*scale in the rotated space meets key/scale as q meets the key.
    keys = activations(32, 64)
    scale, rotation = smooth_scale(keys), hadamard(32)
    queries = torch.randn(64, HEADS, 32, generator=torch.Generator().manual_seed(1))
    turned = ((queries * scale) @ rotation) * ((keys / scale) @ rotation)
    torch.testing.assert_close(turned.sum(-1), (queries * keys).sum(-1), rtol=1e-4, atol=1e-3)


def test_a_dead_channel_stays_finite():
    keys = activations(32, 8)
    keys[..., 3] = 0.0
    assert torch.isfinite(keys / smooth_scale(keys)).all()


def test_names_say_bits_a_channel():
    for name, sizes in SIZES.items():
        assert float(name) == sum(bits / channels for channels, bits in sizes) / 2


def test_codes_hold_what_tells_tokens_apart(samples_of):
    dim = 32
    samples = samples_of(dim)
    codecs = SCHEMES["vecinfer-1"].make(geometry(dim), samples)
    keys = as_batch(samples.load("key"))
    scale = smooth_scale(samples.load("key"))[:, None]
    weighted = ((codecs.key.decode(codecs.key.encode(keys)) - keys) / scale).square().mean()
    spread = ((keys - keys.mean(dim=2, keepdim=True)) / scale).square().mean()
    assert float(weighted / spread) < 0.8


def test_samples_are_drawn_from_all_when_there_are_too_many():
    assert some_of(7, seed=1, most=8).tolist() == list(range(7))
    drawn = some_of(1000, seed=1, most=400)
    assert torch.equal(drawn, some_of(1000, seed=1, most=400)) and len(drawn) == 400
    assert not torch.equal(drawn, some_of(1000, seed=2, most=400))
    assert 0 <= int(drawn.min()) < 50 and 950 < int(drawn.max()) < 1000


def test_heads_that_do_not_divide_are_refused(samples_of):
    with pytest.raises(RecipeError, match="sub-vectors of 8 channels"):
        SCHEMES["vecinfer-1"].make(geometry(20), samples_of(20))

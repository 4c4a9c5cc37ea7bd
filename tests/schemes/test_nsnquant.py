"""NSNQuant against its steps in float64, block by block, and its cost against the paper's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scheme_samples import activations, as_batch, check_in_pieces, check_stored_bytes, geometry

from cqtool.errors import RecipeError
from cqtool.schemes.hadamard import hadamard
from cqtool.schemes.nsnquant import (
    BLOCK,
    SCHEMES,
    NSNCodec,
    four_bits,
    restored,
    universal_codebook,
)


def nibbles(numbers: np.ndarray) -> np.ndarray:
    """Rounded to 16 steps between the ends, which are kept in float16."""
    least = np.float64(np.float16(numbers.min()))
    step = np.float64(np.float16(max((numbers.max() - least) / 15, 1e-5)))
    return np.clip(np.round((numbers - least) / step), 0, 15) * step + least


def transformed(block: np.ndarray, bits: int, table: np.ndarray) -> np.ndarray:
    """What ``[64, dim]`` decodes to, one sub-vector at a time."""
    dim = block.shape[1]
    rotation = hadamard(dim).double().numpy()
    length = nibbles(np.sqrt((block**2).mean(1)))
    normal = block / length[:, None]
    size = np.gcd(dim, 32)
    mean = np.concatenate([nibbles(part) for part in normal.mean(0).reshape(-1, size)])
    normal = normal - mean
    second = np.sqrt((normal**2).mean(1))
    normal = (normal / second[:, None]) @ rotation
    out = np.empty_like(block)
    for token, row in enumerate(normal):
        chosen = []
        for part in row.reshape(-1, 8):
            if bits == 1:
                chosen.append(table[((part - table) ** 2).sum(1).argmin()])
            else:
                nearest = table[((np.abs(part) - table) ** 2).sum(1).argmin()]
                chosen.append(np.where(part < 0, -nearest, nearest))
        decoded = np.concatenate(chosen)
        stretched = np.float64(np.float16(second[token] * (row @ row) / (row @ decoded)))
        out[token] = ((decoded @ rotation) * stretched + mean) * length[token]
    return out


@pytest.mark.parametrize("dim", [32, 80])
@pytest.mark.parametrize("bits", [1, 2])
def test_blocks_match_float64(bits, dim):
    vectors = as_batch(activations(dim, 4 * BLOCK, seed=4))
    codec = NSNCodec(bits, dim)
    decoded = codec.decode(codec.encode(vectors)).double().numpy()
    table = codec.table.double().numpy()
    far = 0
    for batch, head, block in itertools.product(range(2), range(2), range(2)):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        expected = transformed(vectors[batch, head, rows].double().numpy(), bits, table)
        wrong = ~np.isclose(decoded[batch, head, rows], expected, rtol=1e-3, atol=2e-3).all(1)
        far += int(wrong.sum())
    # float32 may put a 4-bit length or mean, or a sub-vector between two centroids, elsewhere.
    assert far <= 4


@pytest.mark.parametrize(("bits", "cost"), [(1, 1.238), (2, 2.238)])
def test_128_channels_cost_what_the_method_costs(bits, cost):
    # Per token of 128 channels: 16 bits of length, 4.5 of the other, 10 of means.
    assert NSNCodec(bits, 128).bits_per_channel == pytest.approx(cost, abs=5e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dim", [32, 64, 80, 128])
def test_the_bits_reported_are_the_bytes_stored(scheme, dim, samples_of):
    check_stored_bytes(scheme, samples_of(dim, 8), dim)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_tokens_apart_change_nothing(scheme, samples_of):
    check_in_pieces(scheme, samples_of(32, 8), 32)


def test_the_codebook_is_near_the_best_for_normal_samples():
    fresh = torch.randn(20000, 8, generator=torch.Generator().manual_seed(77))
    signed = universal_codebook(signed=True)
    error = torch.cdist(fresh, signed).amin(1).square().mean() / 8
    # The rate-distortion bound at 1 bit is 1/4; scalar (Lloyd-Max) codes reach 0.363.
    assert 0.25 < float(error) < 0.34
    magnitudes = universal_codebook(signed=False)
    assert bool((magnitudes > 0).all())
    error = torch.cdist(fresh.abs(), magnitudes).amin(1).square().mean() / 8
    # 1/16 is the bound at 2 bits; scalar codes reach 0.1175.
    assert 1 / 16 < float(error) < 0.1175


def test_scale_and_mean_of_a_block_are_no_matter():
    vectors = torch.randn(1, 2, BLOCK, 64, generator=torch.Generator().manual_seed(5))
    codec = NSNCodec(2, 64)

    def relative(scale: float, shift: float) -> float:
        moved = scale * (vectors + shift)
        error = codec.decode(codec.encode(moved)) - moved
        return float((error / scale).square().mean())

    assert relative(100.0, 0.0) == pytest.approx(relative(1.0, 0.0), rel=0.02)
    assert relative(1.0, 0.0) < 0.13


def test_constant_and_zero_tokens_stay_finite():
    for vectors in (torch.zeros(1, 1, BLOCK, 64), torch.full((1, 1, BLOCK, 64), 3.0)):
        decoded = NSNCodec(1, 64)
        found = decoded.decode(decoded.encode(vectors))
        assert torch.isfinite(found).all()
        assert float((found - vectors).abs().max()) < 1e-2


def test_four_bits_keep_the_ends():
    values = torch.tensor([[0.0, 1.0, 15.0], [2.0, 2.0, 2.0]])
    codes, limits = four_bits(values)
    assert codes.tolist() == [[0, 1, 15], [0, 0, 0]]
    torch.testing.assert_close(restored(codes, limits), values)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(RecipeError, match="8 channels together"):
        SCHEMES[0].make(geometry(20), None)

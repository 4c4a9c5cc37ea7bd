"""CommVQ: distances and the closed form against brute force, and the promise that RoPE commutes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scheme_samples import HEADS, activations, as_batch, geometry

from cqtool.errors import RecipeError
from cqtool.geometry import KeyRotation
from cqtool.models.rotation import rotate
from cqtool.schemes import SCHEMES, commvq_fit
from cqtool.schemes.commvq import AdditiveCodec, codewords, stages_of
from cqtool.schemes.commvq_fit import expectation, fit_stages, maximization, nearest

DIM = 16


def complex_samples(samples: int, pairs: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, samples, pairs, dtype=torch.complex64, generator=generator)


def all_codewords(table: torch.Tensor) -> torch.Tensor:
    """complex128 ``[heads, entries, entries, pairs]``: z_a + i z_b, written out."""
    table = table.to(torch.complex128)
    return table[:, :, None] + 1j * table[:, None]


def random_codec(dim: int, stages: int = 2, seed: int = 0) -> AdditiveCodec:
    tables = torch.stack([complex_samples(64, dim // 2, seed + s) for s in range(stages)])
    order = torch.stack((torch.arange(dim // 2), torch.arange(dim // 2) + dim // 2), 1).flatten()
    return AdditiveCodec(tables / dim, order)


def test_the_nearest_of_all_codewords_is_found():
    points, table = complex_samples(200), complex_samples(8, seed=1) / 2
    words = all_codewords(table).flatten(1, 2)
    far = (points[:, :, None].to(torch.complex128) - words[:, None]).abs().square().sum(-1)
    expected = far.argmin(2)
    assert torch.equal(nearest(points, table), torch.stack((expected // 8, expected % 8), 2))


def test_chunks_change_nothing(monkeypatch):
    points, table = complex_samples(100), complex_samples(8, seed=1)
    whole = nearest(points, table), expectation(points, table, 0.1)
    monkeypatch.setattr(commvq_fit, "_CHUNK", 1000)
    parts = nearest(points, table), expectation(points, table, 0.1)
    assert torch.equal(whole[0], parts[0])
    for one, other in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.03, 0.5])
def test_a_step_of_expectation_and_maximization_is_the_least_squares_solution(temperature):
    points, table = complex_samples(300), complex_samples(4, seed=1)
    found = maximization(*expectation(points, table, temperature), table)
    words = all_codewords(table).flatten(1, 2)
    for head in range(HEADS):
        own = points[head].to(torch.complex128).numpy()
        far = np.sqrt((np.abs(own[:, None] - words[head].numpy()) ** 2).sum(-1))
        unit = np.sqrt((np.abs(own) ** 2).sum(1).mean())
        logits = -far / (temperature * unit)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        # One row for each sample and codeword: sqrt(share) * (z_a + i z_b) = sqrt(share) * x.
        rows, targets = [], []
        for sample, word in itertools.product(range(len(own)), range(16)):
            row = np.zeros(4, dtype=complex)
            row[word // 4] += 1
            row[word % 4] += 1j
            rows.append(np.sqrt(shares[sample, word]) * row)
            targets.append(np.sqrt(shares[sample, word]) * own[sample])
        expected = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
        np.testing.assert_allclose(found[head].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_entries_without_samples_stay():
    table = complex_samples(4, seed=1)
    counts = torch.zeros(HEADS, 4, 4)
    counts[:, 0, 1] = 10.0
    found = maximization(counts, torch.zeros_like(table), table)
    torch.testing.assert_close(found[:, 2:], table[:, 2:])


def test_stages_lower_the_error_and_all_entries_serve():
    points = complex_samples(1500, seed=3)
    left, errors = points, []
    for table in fit_stages(points, 3, 8, seed=0):
        codes = nearest(left, table)
        assert all(len(codes[head].unique()) == 8 for head in range(HEADS))
        left = left - codewords(codes, table)
        errors.append(float(left.abs().square().mean()))
    energy = float(points.abs().square().mean())
    # 64 codewords for 8 real channels: 6 bits, 0.75 a channel; the bound is 2^-1.5 = 0.354.
    assert 0.354 < errors[0] / energy < 0.55
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_turning_the_tables_turns_the_keys(style):
    rotation = KeyRotation(style, DIM)
    codec = random_codec(DIM)
    if style == "interleaved":
        codec = AdditiveCodec(codec.tables, torch.arange(DIM))
    vectors = as_batch(activations(DIM, 2, seed=2))
    stored = codec.encode(vectors)
    angle = torch.rand(1, 1, DIM // 2, generator=torch.Generator().manual_seed(6)) * 6
    expected = rotate(codec.decode(stored), angle.cos(), angle.sin(), rotation)
    turned = AdditiveCodec(codec.tables * torch.exp(1j * angle[0, 0]), codec.channels)
    torch.testing.assert_close(turned.decode(stored), expected, rtol=1e-4, atol=1e-4)


def test_keys_match_float64():
    codec = random_codec(DIM)
    vectors = as_batch(activations(DIM, 16, seed=8))
    decoded = codec.decode(codec.encode(vectors)).double().numpy()
    order = codec.channels.numpy()
    for batch, token in itertools.product(range(2), range(vectors.shape[2])):
        both = vectors[batch, :, token].double().numpy()
        length = np.float64(np.float16(np.sqrt((both**2).sum())))
        for head in range(HEADS):
            left = (both[head] / length)[order].reshape(-1, 2) @ np.array([1, 1j])
            total = np.zeros_like(left)
            for table in codec.tables[:, head].to(torch.complex128).numpy():
                words = (table[:, None] + 1j * table[None]).reshape(-1, DIM // 2)
                word = words[(np.abs(left - words) ** 2).sum(1).argmin()]
                left, total = left - word, total + word
            expected = np.empty(DIM)
            expected[order[0::2]], expected[order[1::2]] = total.real, total.imag
            np.testing.assert_allclose(
                decoded[batch, head, token], expected * length, rtol=1e-4, atol=1e-4
            )


def test_codewords_never_cost_more_than_the_name_says():
    # 21 codewords of 12 bits for 128 channels at 2 bits, as the authors' script has it.
    assert [stages_of(bits, 128) for bits in (1, 2)] == [10, 21]
    assert [stages_of(bits, 64) for bits in (1, 2)] == [5, 10]


def test_heads_of_odd_size_are_refused(samples_of):
    with pytest.raises(RecipeError, match="in pairs"):
        SCHEMES["commvq-1"].make(geometry(15), samples_of(15, 64))

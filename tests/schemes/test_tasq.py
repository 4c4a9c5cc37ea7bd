"""TaSQ against its definition in float64, and its groups against all possible matchings."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scheme_samples import HEADS, activations, as_batch, geometry

from cqtool.errors import RecipeError
from cqtool.geometry import NO_ROTATION, KeyRotation
from cqtool.sampling.store import SampleStore
from cqtool.schemes import SCHEMES
from cqtool.schemes.scheme import LayerSamples
from cqtool.schemes.tasq import channel_weights, matched_groups, token_scale

DIM = 16


def covariance(dim: int, seed: int = 0) -> torch.Tensor:
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed)).double()
    return mixing @ mixing.T / dim + 0.1 * torch.eye(dim).double()


def cost(matrix: np.ndarray, channels: list[int]) -> float:
    ridge = 1e-4 * matrix.diagonal().mean() * np.eye(len(channels))
    return float(np.linalg.det(matrix[np.ix_(channels, channels)] + ridge) ** (1 / len(channels)))


def perfect_matchings(units: list[int]):
    if not units:
        yield []
        return
    first, *rest = units
    for other in rest:
        left = [unit for unit in rest if unit != other]
        for matching in perfect_matchings(left):
            yield [(first, other), *matching]


@pytest.mark.parametrize("seed", range(3))
def test_a_round_of_matching_is_the_cheapest_of_all(seed):
    # 8 channels, 4 pairs of RoPE: three ways to make groups of 4.
    dim, matrix = 8, covariance(8, seed)
    found = matched_groups(matrix, 4, KeyRotation("half", dim)).view(-1, 4)
    pairs = [[pair, pair + dim // 2] for pair in range(dim // 2)]
    costs = {}
    for matching in perfect_matchings(list(range(4))):
        groups = [sorted(pairs[a] + pairs[b]) for a, b in matching]
        total = sum(cost(matrix.numpy(), group) for group in groups)
        costs[frozenset(map(tuple, groups))] = total
    assert frozenset(map(tuple, found.tolist())) == min(costs, key=costs.get)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_pairs_stay_together_through_all_rounds(style):
    dim = 32
    groups = matched_groups(covariance(dim), 8, KeyRotation(style, dim)).view(-1, 8)
    assert groups.flatten().sort().values.tolist() == list(range(dim))
    for group in groups.tolist():
        for channel in group:
            other = (channel + dim // 2) % dim if style == "half" else channel ^ 1
            assert other in group
    assert groups[:, 0].tolist() == sorted(groups[:, 0].tolist())


def test_dependent_pairs_are_found():
    # Pair p and pair p + 4 are copies of each other but for noise.
    generator = torch.Generator().manual_seed(4)
    one = torch.randn(4000, 8, generator=generator).double()
    both = torch.stack((one[:, :4], one[:, :4], one[:, 4:], one[:, 4:]), dim=1).flatten(1)
    samples = both + 0.1 * torch.randn(4000, 16, generator=generator)
    groups = matched_groups(torch.cov(samples.T), 4, KeyRotation("half", 16)).view(-1, 4)
    assert groups.tolist() == [[p, p + 4, p + 8, p + 12] for p in range(4)]


def test_weights_and_scale_match_their_definitions():
    moment = torch.rand(HEADS, DIM, generator=torch.Generator().manual_seed(1)) ** 4
    moment[0, 3] = 0.0
    weight = channel_weights(moment).double().numpy()
    raised = np.maximum(moment.double().numpy(), 1e-6 * moment.numpy().max(1, keepdims=True))
    expected = np.sqrt(raised / raised.mean(1, keepdims=True))
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    keys = activations(DIM, 5)
    rms = np.sqrt((keys.double().numpy() ** 2).mean(axis=(1, 2)))
    np.testing.assert_array_equal(token_scale(keys).numpy(), rms.astype(np.float16))


def test_keys_match_float64(samples_of):
    samples = samples_of(DIM)
    codec = SCHEMES["tasq-1"].make(geometry(DIM), samples).key
    moment = (samples.load_gradients("key").double() ** 2).mean(0)
    weight = np.sqrt(moment / moment.mean(1, keepdim=True)).numpy()
    np.testing.assert_allclose(codec.weight.numpy(), weight, rtol=1e-5)
    order = codec.codec.channels.numpy()
    table = codec.codec.codebook.double().numpy()
    vectors = as_batch(activations(DIM, 24, seed=8))
    decoded = codec.decode(codec.encode(vectors)).double().numpy()
    for batch, token in itertools.product(range(2), range(vectors.shape[2])):
        weighted = vectors[batch, :, token].double().numpy() * weight
        scale = np.float64(np.float16(np.sqrt((weighted**2).mean())))
        for head in range(HEADS):
            expected = np.empty(DIM)
            for group, part in enumerate((weighted[head] / scale)[order[head]].reshape(-1, 8)):
                own = table[head, group]
                nearest = own[((part - own) ** 2).sum(1).argmin()]
                expected[order[head][8 * group : 8 * group + 8]] = nearest
            expected = expected * scale / weight[head]
            np.testing.assert_allclose(decoded[batch, head, token], expected, rtol=1e-4, atol=1e-4)


def test_the_moment_of_queries_makes_the_weights_where_it_was_sampled(tmp_path):
    keys = activations(DIM, 512)
    meta = {"layers": 1, "sequences": 1, "sequence_length": 512, "gradients": True}
    store = SampleStore.create(tmp_path, {**meta, "moments": True, "dtype": "float32"})
    both = {"key": keys, "value": keys.clone()}
    moment = torch.stack([covariance(DIM, head).float() for head in range(HEADS)])
    store.write(0, 0, both, both, {"key": moment, "value": moment.clone()})
    codec = SCHEMES["tasq-1"].make(geometry(DIM), LayerSamples(store, 0)).key
    expected = channel_weights(moment.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(codec.weight, expected)


def test_codebooks_are_fitted_to_the_errors_of_native_keys(samples_of):
    # A stationary point of sum g_c^2 s^2 / w_c^2 |z - centroid|^2, brute force.
    samples = samples_of(DIM, 512)
    codec = SCHEMES["tasq-1"].make(geometry(DIM), samples).key
    keys, gradients = samples.load("key").double(), samples.load_gradients("key").double()
    weight, order = codec.weight.double(), codec.codec.channels
    scale = token_scale((keys * weight).float()).double()
    scaled = keys * weight / scale[:, None, None]
    heavy = (gradients * scale[:, None, None] / weight) ** 2
    channels = order[0, :8]
    points, weights = scaled[:, 0, channels], heavy[:, 0, channels].sum(1)
    table = codec.codec.codebook[0, 0].double()
    nearest = torch.cdist(points, table).argmin(1)
    # Lloyd's iterations may have ended before all of them stood still.
    close = 0
    used = nearest.unique().tolist()
    for centroid in used:
        own = nearest == centroid
        mean = (points[own] * weights[own, None]).sum(0) / weights[own].sum()
        close += bool((mean - table[centroid]).abs().max() < 5e-3)
    assert close > 0.9 * len(used)


def test_eight_heads_of_128_cost_what_the_authors_say(samples_of):
    codecs = SCHEMES["tasq-1"].make(geometry(128, 8), samples_of(128, 256, 8))
    # 1.266 bits for keys of 1.25-bit codes: 16 bits more for 1024 channels.
    assert codecs.key.bits_per_channel == 1 + 16 / 1024
    assert codecs.value.bits_per_channel == 1


def test_what_cannot_be_grouped_is_refused(samples_of):
    with pytest.raises(RecipeError, match="groups of 8 channels"):
        SCHEMES["tasq-1"].make(geometry(20), samples_of(20, 512))
    with pytest.raises(RecipeError, match="cannot match 24 channels"):
        matched_groups(covariance(24), 16, NO_ROTATION)

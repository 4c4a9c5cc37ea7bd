"""Codes against brute force, and their packing bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from cqtool.codebooks import codes
from cqtool.codebooks.codes import assign, code_bytes, lookup, pack, unpack


@pytest.mark.parametrize("chunk", [1 << 25, 1])
@pytest.mark.parametrize(("channels", "bits"), [(8, 6), (4, 8), (1, 3), (16, 2)])
def test_assign_and_lookup_match_brute_force(channels, bits, chunk, monkeypatch):
    monkeypatch.setattr(codes, "_CHUNK", chunk)
    torch.manual_seed(0)
    batch, heads, tokens, dim = 2, 3, 7, 16
    vectors = torch.randn(batch, heads, tokens, dim)
    codebook = torch.randn(heads, dim // channels, 1 << bits, channels)
    found = assign(vectors, codebook)
    decoded = lookup(found, codebook)
    for b, h, t in itertools.product(range(batch), range(heads), range(tokens)):
        for g in range(dim // channels):
            part = slice(g * channels, (g + 1) * channels)
            point = vectors[b, h, t, part].double()
            distances = (codebook[h, g].double() - point).square().sum(-1)
            assert found[b, h, t, g] == distances.argmin()
            assert torch.equal(decoded[b, h, t, part], codebook[h, g, distances.argmin()])


def test_ties_go_to_the_lower_code_and_no_tokens_are_fine():
    codebook = torch.zeros(1, 2, 4, 3)
    assert (assign(torch.randn(1, 1, 5, 6), codebook) == 0).all()
    assert assign(torch.zeros(1, 1, 0, 6), codebook).shape == (1, 1, 0, 2)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("groups", [1, 2, 5, 16])
def test_packing_is_a_little_endian_bit_stream(bits, groups):
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(0, 1 << bits, (3, 4, groups), generator=generator)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 4, code_bytes(groups, bits)) == (3, 4, -(-bits * groups // 8))
    assert torch.equal(unpack(packed, bits, groups), values)
    # The same stream as one long Python integer.
    whole = sum(int(value) << (bits * i) for i, value in enumerate(values[1, 2]))
    assert bytes(packed[1, 2].tolist()) == whole.to_bytes(code_bytes(groups, bits), "little")

"""The kernels' data layout, against loops that spell out what docs/kernels.md says."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from cqtool.geometry import KeyRotation
from cqtool.kernels.layout import (
    HEAD_DIMS,
    CodeFormat,
    key_table,
    natural_pairs,
    pack_keys,
    pack_values,
    phase_steps,
    plan_keys,
    turn_table,
    turns_slowly,
    unpack_keys,
    unpack_values,
    value_table,
)

FORMATS = [(2, 8), (4, 8), (8, 6), (8, 8), (8, 10)]
HALF = KeyRotation("half", 128)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("channels, bits", FORMATS)
def test_tiles_give_their_codes_back(dim: int, channels: int, bits: int) -> None:
    format = CodeFormat(dim, channels, bits)
    codes = torch.randint(0, 1 << bits, (2, 3, 37, format.groups))
    plan = plan_keys(format, KeyRotation("interleaved", dim), tuple(torch.randperm(dim).tolist()))
    keys, values = pack_keys(codes, plan), pack_values(codes, format)
    assert keys.shape == values.shape == (2, 3, 3, format.tile_bytes)
    assert format.tile_bytes == 16 * dim * bits // (8 * channels)  # nothing is padded
    assert torch.equal(unpack_keys(keys, plan)[:, :, :37], codes)
    assert torch.equal(unpack_values(values, format)[:, :, :37], codes)


def test_a_key_byte_lies_where_its_lane_reads_it() -> None:
    plan = plan_keys(CodeFormat(80, 8, 8), KeyRotation("half", 80))  # 5 units: a last slot of one
    codes = torch.arange(16 * 10).view(1, 1, 16, 10)
    tile = pack_keys(codes, plan)[0, 0, 0]
    for unit in range(5):
        slot, lane, lanes = unit // 4, unit % 4, 4 if unit < 4 else 1
        for hi in range(2):
            for token in range(16):
                word = 32 * slot + (token % 8) * lanes + lane
                expected = codes[0, 0, token, plan.groups[2 * unit + hi]]
                assert tile[4 * word + 2 * (token // 8) + hi] == expected


def test_a_value_byte_lies_where_its_lane_reads_it() -> None:
    format = CodeFormat(64, 4, 8)
    codes = torch.randint(0, 256, (1, 1, 16, 16))
    tile = pack_values(codes, format)[0, 0, 0]
    for group in range(16):
        for lane in range(4):
            for i, token in enumerate((2 * lane, 2 * lane + 1, 2 * lane + 8, 2 * lane + 9)):
                assert tile[4 * (4 * group + lane) + i] == codes[0, 0, token, group]


@pytest.mark.parametrize("dim", [80, 128, 192])  # no twin blocks, one pair, a pair and another
def test_four_codes_of_6_bits_lie_in_three_bytes(dim: int) -> None:
    format = CodeFormat(dim, 8, 6)
    codes = torch.randint(0, 64, (1, 1, 16, format.groups))
    tile = pack_values(codes, format)[0, 0, 0].tolist()
    words = 4 * format.groups
    for group in range(format.groups):
        for lane in range(4):
            block, place = group // 8, 4 * group + lane
            if block + 1 - block % 2 < format.groups // 8:
                place = block // 2 * 64 + 2 * (4 * (group % 8) + lane) + block % 2
            three = [tile[2 * place], tile[2 * place + 1], tile[2 * words + place]]
            for i, token in enumerate((2 * lane, 2 * lane + 1, 2 * lane + 8)):
                assert three[i] % 64 == codes[0, 0, token, group]
            fourth = sum(part // 64 * 4**i for i, part in enumerate(three))
            assert fourth == codes[0, 0, 2 * lane + 9, group]


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_table_rows_hold_one_code_of_every_group(channels: int) -> None:
    format = CodeFormat(96, channels, 8)
    book = torch.randn(2, format.groups, 256, channels).half()
    plan = plan_keys(format, KeyRotation("half", 96))
    keys, values = key_table(book, plan), value_table(book, format)
    assert keys[0, 0, 0].nbytes == 128
    for unit in range(format.groups // 2):
        for hi in range(2):
            place = unit // 4 * 8 + hi * 4 + unit % 4
            block, column = divmod(place, format.columns)
            entry = keys[1, block, 77].view(-1, channels)[column]
            group, kernel = plan.groups[2 * unit + hi], (2 * unit + hi) * channels
            slots = list(plan.slots[kernel : kernel + channels])
            assert torch.equal(entry, book[1, group, 77, slots])
    for group in range(format.groups):
        block, column = divmod(group, format.columns)
        assert torch.equal(values[1, block, 5].view(-1, channels)[column], book[1, group, 5])


def _partner(channel: int, rotation: KeyRotation) -> int:
    if channel >= rotation.dim:
        return channel
    if rotation.style == "interleaved":
        return channel ^ 1
    return (channel + rotation.dim // 2) % rotation.dim


@pytest.mark.parametrize(
    "rotation", [HALF, KeyRotation("interleaved", 128), KeyRotation("half", 32)]
)
@pytest.mark.parametrize("channels", [4, 8])
def test_kernel_pairs_are_the_models_pairs(rotation: KeyRotation, channels: int) -> None:
    plan = plan_keys(CodeFormat(128, channels, 8), rotation)
    part = channels if plan.pairing == "paired" else channels // 2
    pairs = torch.tensor(plan.channels).view(-1, 2, part)
    firsts, seconds = pairs[:, 0].flatten().tolist(), pairs[:, 1].flatten().tolist()
    assert sorted(firsts + seconds) == list(range(128))
    for first, second, frequency in zip(firsts, seconds, plan.frequency, strict=True):
        if frequency >= 0:
            assert second == _partner(first, rotation) and first < second
        else:
            assert first >= rotation.dim and second >= rotation.dim


def test_groups_that_cut_pairs_are_scattered() -> None:
    plan = plan_keys(CodeFormat(128, 8, 8), HALF, tuple(torch.randperm(128).tolist()))
    assert plan.pairing == "scatter"
    firsts, seconds = natural_pairs(plan, HALF)
    assert seconds == [first + 64 for first in firsts]


def test_permuted_groups_closed_under_pairs_need_no_scatter() -> None:
    order = torch.randperm(64)
    permutation = torch.stack((order, order + 64), dim=1).flatten().tolist()
    assert plan_keys(CodeFormat(128, 8, 8), HALF, tuple(permutation)).pairing == "closed"


def test_phases_are_exact_far_out() -> None:
    inv_freq = 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    plan = plan_keys(CodeFormat(128, 8, 8), HALF)
    steps = phase_steps(inv_freq, plan).tolist()
    position = 10_000_000
    for step, frequency in zip(steps, plan.frequency, strict=True):
        turns = Fraction(float(inv_freq[frequency])) / Fraction(2 * math.pi) * position
        phase = Fraction((position * step) % 2**64, 2**64)
        assert abs(float((turns - phase + Fraction(1, 2)) % 1 - Fraction(1, 2))) < 1e-8


def test_turn_table_rows_are_offsets() -> None:
    inv_freq = 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    plan = plan_keys(CodeFormat(128, 8, 8), HALF)
    table = turn_table(inv_freq, plan).double()
    rate = inv_freq.double()[list(plan.frequency)]
    for row, offset in [(0, 0), (7, 7), (15, 15), (16, 16), (18, 48), (22, 112)]:
        assert (table[row, 0] - (offset * rate).cos()).abs().max() < 1e-3
        assert (table[row, 1] - (offset * rate).sin()).abs().max() < 1e-3


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("base, slow", [(500_000.0, True), (10_000.0, True), (1_000.0, False)])
def test_later_pairs_turn_slowly_from_a_base_of_ten_thousand(
    style: str, base: float, slow: bool
) -> None:
    inv_freq = base ** (-torch.arange(0, 128, 2).double() / 128)
    plan = plan_keys(CodeFormat(128, 8, 8), KeyRotation(style, 128))
    assert turns_slowly(inv_freq, plan) is slow
    # What is left out must be as little as is said.
    later = inv_freq[torch.tensor(plan.frequency)][32:]
    offsets = torch.arange(-8, 8).double()[:, None]
    error = torch.hypot((offsets * later).cos() - 1, (offsets * later).sin() - (offsets * later))
    assert bool(error.square().mean(0).sum().div(64).sqrt() < 3.1e-4) is slow


def test_permuted_groups_put_fast_pairs_among_the_later() -> None:
    inv_freq = 10_000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    permutation = tuple(range(127, -1, -1))
    plan = plan_keys(CodeFormat(128, 8, 8), KeyRotation("half", 128), permutation)
    assert not turns_slowly(inv_freq, plan)

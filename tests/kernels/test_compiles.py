"""Every decode kernel compiles for every architecture, fits, and keeps to its registers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cqtool.kernels.build import compile_variant
from cqtool.kernels.decode.config import SHARED_BYTES, DecodeCase, Pairing, choose
from cqtool.kernels.decode.op import variants
from cqtool.kernels.decode.share import room_beside, share
from cqtool.kernels.variants import ARCHITECTURES, Variant

FORMATS = {"8c8b": (8, 8), "4c8b": (4, 8), "2c8b": (2, 8), "8c10b": (8, 10), "8c6b": (8, 6)}
# Spilled bytes that were measured and accepted: up to three registers, more of the addresses that
# groups of few channels need.
ALLOWED = {"2c8b": 64, "4c8b": 16, "8c8b": 12, "8c10b": 0, "8c6b": 0}


def _case(name: str, rows: int, dim: int = 128, slow: bool = True) -> DecodeCase:
    channels, bits = FORMATS[name]
    return DecodeCase(dim, dim, channels, bits, channels, bits, rows, slow=slow)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows, slow", [(1, True), (1, False), (2, True), (4, True), (8, True)])
def test_decode_compiles_without_spills(name: str, rows: int, slow: bool, arch: str) -> None:
    capability = int(arch.removeprefix("sm_"))
    launch = choose(_case(name, rows, slow=slow), capability)
    if launch is None:
        # 10-bit tables of one slot (128 KiB) exceed these GPUs' shared memory.
        assert name == "8c10b" and SHARED_BYTES[capability] < 128
        return
    for mode, variant in variants(launch):
        assert launch.shared_bytes(mode != 2, mode != 1) <= SHARED_BYTES[capability] * 1024
        (usage,) = compile_variant(variant, arch).usage.values()
        assert usage.registers * launch.warps * 32 <= 65536
        assert usage.spill_stores <= ALLOWED[name], f"{variant}: {usage}"


@pytest.mark.parametrize("pairing", ["closed", "scatter"])
@pytest.mark.parametrize("name, dim", [("8c8b", 128), ("4c8b", 80), ("8c10b", 128), ("8c6b", 192)])
def test_other_groupings_compile(name: str, dim: int, pairing: Pairing) -> None:
    launch = choose(replace(_case(name, 4, dim), pairing=pairing), 90)
    assert launch is not None
    assert launch.key_parts == (2 if name == "8c10b" else 1)
    for _, variant in variants(launch):
        (usage,) = compile_variant(variant, "sm_90").usage.values()
        assert usage.spill_stores <= 64, f"{variant}: {usage}"


def test_the_values_alone_do_not_depend_on_how_keys_are_grouped() -> None:
    plain = choose(_case("8c10b", 4), 90)
    other = choose(replace(_case("8c10b", 4, slow=False), pairing="closed"), 90)
    assert plain is not None and other is not None
    assert plain.defines(1) != other.defines(1)
    assert plain.defines(2) == other.defines(2)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dim, rows", [(64, 1), (80, 4), (128, 8), (256, 4), (256, 8)])
def test_finish_compiles_without_spills(dim: int, rows: int, arch: str) -> None:
    launch = choose(_case("8c8b", rows, dim), 90)
    assert launch is not None
    variant = Variant("decode/finish.cu", launch.finish_defines())
    (usage,) = compile_variant(variant, arch).usage.values()
    assert usage.spill_stores == 0 and usage.shared <= 48 * 1024


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_hopper_has_a_kernel_for_everything(dim: int, name: str, rows: int) -> None:
    launch = choose(_case(name, rows, dim), 90)
    assert launch is not None
    largest = max(launch.shared_bytes(mode != 2, mode != 1) for mode, _ in variants(launch))
    assert largest <= 227 * 1024


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "batch, heads, tokens", [(16, 32, 8192), (1, 8, 131072), (300, 32, 500), (1, 8, 1)]
)
def test_work_is_shared_evenly(
    batch: int, heads: int, tokens: int, rows: int, finish: bool
) -> None:
    launch = choose(_case("8c8b", rows), 90)
    assert launch is not None
    cut = share(batch, heads, tokens, launch, 132, finish)
    # The kernel has a barrier for each team, and a team's warps all take part in it.
    assert launch.warps % cut.team == 0
    workers = cut.parts * (launch.warps // cut.team)
    units = batch * cut.splits
    rounds = -(-units // workers)
    assert units / (rounds * workers) > 0.8 or tokens < 16  # of the warps are busy
    assert cut.parts * heads <= 132


def test_calls_side_by_side_divide_the_gpu_while_their_tables_are_what_takes_time() -> None:
    rooms = [room_beside(16, heads, 8192, 132, 8 - heads) for heads in (1, 3, 4)]
    assert rooms == [16, 49, 66] and sum(rooms) <= 132
    assert room_beside(16, 8, 8192, 132, 0) == 132
    assert room_beside(200, 1, 8192, 132, 7) == 132  # all of it: the next call's blocks follow
    assert room_beside(1, 1, 10, 2, 7) == 1


def test_few_rows_are_split_and_many_need_no_merging() -> None:
    launch = choose(_case("8c8b", 1), 90)
    assert launch is not None
    assert share(1, 32, 32768, launch, 132, finish=False).splits > 1
    assert share(16, 32, 8192, launch, 132, finish=False).splits == 1
    assert share(2800, 32, 400, launch, 132, finish=False).splits == 1


def test_passes_and_groups_of_rows_run_at_once() -> None:
    parts = choose(_case("8c10b", 4), 90)
    rows = choose(_case("8c8b", 32), 90)
    assert parts is not None and rows is not None
    assert (parts.key_parts, parts.value_parts) == (2, 2) and rows.case.row_groups == 4
    assert share(16, 8, 8192, parts, 132).parts * 8 * 2 == 128
    assert share(16, 8, 8192, rows, 132).parts * 8 * 4 == 128
    assert share(16, 64, 8192, rows, 132).parts == 1

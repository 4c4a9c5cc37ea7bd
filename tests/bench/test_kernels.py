"""Kernel measurements refuse wrong results and account for every byte; the clock is stubbed here.

What runs on this machine is the kernels' torch reference, so nothing here is about speed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from mixed_bench import BITS, KEYS, mixed_format
from torch.nn.functional import scaled_dot_product_attention

from cqtool.bench import encode, kernels
from cqtool.bench.encode import EncodeProblem, bench_encode
from cqtool.bench.formats import BenchFormat, parse_formats
from cqtool.bench.kernels import KernelSettings, bench_decode
from cqtool.bench.layers import LayerProblem, ModelProblem
from cqtool.bench.models import find_target
from cqtool.bench.problem import AttentionLoad, CodedProblem, DenseProblem
from cqtool.bench.tables import tables
from cqtool.bench.timing import Bandwidth, Spread, copies_beyond_cache
from cqtool.kernels.decode.config import choose
from cqtool.spec import KINDS

CPU = torch.device("cpu")
LOAD = AttentionLoad("a case", 2, 4, 2, 64, 37)
FORMATS = ("cq-8c8b", "cq-8c10b", "cq-4c8b", "cq-2c8b", "cq-8c6b", "k-cq-4c8b-v-cq-8c8b")


def spread(seconds: float = 1e-3) -> Spread:
    return Spread.of([seconds] * 3)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> KernelSettings:
    """Settings with which measuring runs on a CPU, by its clock."""

    def by_clock(calls: Sequence[Callable[[], object]], repeats: int = 2) -> Spread:
        seconds = []
        for call in calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return Spread.of(seconds, len(calls))

    monkeypatch.setattr(kernels, "time_calls", by_clock)
    monkeypatch.setattr(encode, "time_calls", by_clock)
    monkeypatch.setattr(encode, "time_eagerly", lambda call, repeats: by_clock([call, call]))
    monkeypatch.setattr(KernelSettings, "cache_bytes", property(lambda self: 1000))
    monkeypatch.setattr(CodedProblem, "load_kernels", lambda self: choose(self.case, 90))
    return KernelSettings(CPU, torch.bfloat16, 3)


BANDWIDTH = Bandwidth(1e12, 2e12, 1 << 30, spread(), spread())


@pytest.mark.parametrize("name", FORMATS)
def test_the_float64_answer_is_that_of_the_operator(name: str) -> None:
    (format,) = parse_formats([name])
    problem = CodedProblem(LOAD, format, torch.float32, CPU)
    assert problem.error() < 1e-5


def regrouped(format: BenchFormat, heads: int, dim: int) -> BenchFormat:
    """The format with random channels in its groups, other ones in each head."""
    generator = torch.Generator().manual_seed(0)
    key, value = (
        torch.stack([torch.randperm(dim, generator=generator) for _ in range(heads)]) for _ in KINDS
    )
    return replace(format, channels=((key, value),))


def test_groups_of_any_channels_are_timed_and_checked_as_they_are() -> None:
    (plain,) = parse_formats(["cq-8c8b"])
    format = regrouped(plain, LOAD.kv_heads, LOAD.head_dim)
    problem = CodedProblem(LOAD, format, torch.float32, CPU)
    assert problem.tables.pairing == "scatter"
    assert problem.error() < 1e-5
    target, settings = find_target("tiny"), KernelSettings(CPU, torch.float16)
    format = regrouped(plain, target.shape.kv_heads, target.shape.head_dim)
    for kind in KINDS:
        encoding = EncodeProblem(target, format, kind, 2, 33, 0, settings)
        assert abs(encoding.excess()) < 1e-5
        encoding.channels = None
        assert encoding.excess() > 0.1


@pytest.mark.parametrize(
    ("grouping", "pairing"),
    [
        ("contiguous", "paired"),
        ("correlation", "scatter"),
        ("pairs", "closed"),
        ("balanced-pairs", "closed"),
    ],
)
def test_random_groups_are_those_of_a_calibration(grouping: Any, pairing: str) -> None:
    (format,) = parse_formats(["cq-8c8b"], groupings=[grouping])
    problem = CodedProblem(LOAD, format, torch.float32, CPU)
    assert problem.tables.pairing == pairing
    assert problem.error() < 1e-5
    if grouping == "contiguous":
        assert problem.channels == (None, None)
        return
    places = ((0, 0), (0, 1), (1, 0))  # layer and seed
    found = [format.layer_channels(layer, 2, 64, problem.rotation, seed) for layer, seed in places]
    for keys, values in found:
        assert keys is not None and values is not None
        for order in (keys, values):
            assert (order.sort(dim=1).values == torch.arange(64)).all()
        assert not torch.equal(keys, values)
    first, *others = [keys.tolist() for keys, _ in found if keys is not None]
    assert problem.channels[0] is not None
    assert problem.channels[0].tolist() == first
    assert first not in others


def test_a_wrong_code_and_a_missing_number_are_found() -> None:
    (format,) = parse_formats(["cq-8c8b"])
    problem = CodedProblem(LOAD, format, torch.float32, CPU)
    expected = problem.expected()
    problem.coded[0].values[-1, 0, 0] ^= 1
    assert torch.linalg.norm(problem.expected() - expected) > 1e-3 * torch.linalg.norm(expected)
    found = problem.attend(0)
    found[1, 3] = torch.nan
    problem.attend = lambda copy: found  # type: ignore[method-assign]
    with pytest.raises(kernels.WrongResult, match="relative error nan"):
        kernels.require_right(problem.error(), torch.float16)


def test_a_rival_is_compared_with_float64_too() -> None:
    problem = DenseProblem(LOAD, torch.float32, CPU)
    query, keys, values = problem.queries[0], problem.keys[0], problem.values[0]
    found = scaled_dot_product_attention(query, keys, values, enable_gqa=True)[:, :, 0]
    assert problem.error(found) < 1e-6
    assert problem.error(found.roll(1, dims=1)) > 0.1


def test_bytes_are_counted_once_each() -> None:
    (format,) = parse_formats(["cq-8c8b"])
    problem = CodedProblem(AttentionLoad("", 3, 8, 2, 64, 64), format, torch.float16, CPU)
    codes = 3 * 2 * 64 * 64 * 2 // 8  # rows, heads, tokens, channels, keys and values, at one bit
    tables = 2 * 2 * 256 * 64 * 2  # keys and values, heads, entries of 64 float16 numbers
    assert problem.code_bytes == codes
    assert problem.bytes_read == codes + tables + 2 * 3 * 8 * 64 * 2
    assert problem.load.bytes_16bit == 16 * codes


def test_inputs_are_rotated_until_they_exceed_the_cache() -> None:
    assert copies_beyond_cache(200, 50) == 1
    assert copies_beyond_cache(33, 50) == 5
    assert copies_beyond_cache(1, 50) == 16


def test_the_spread_is_of_the_measurements() -> None:
    found = Spread.of([4.0, 1.0, 2.0, 3.0, 10.0], calls=7)
    assert (found.median, found.minimum, found.maximum) == (3.0, 1.0, 10.0)
    assert (found.iqr, found.repeats, found.calls) == (2.0, 5, 7)


def test_decode_rows_refer_to_the_best_rival_of_the_same_run(settings: KernelSettings) -> None:
    found = bench_decode(LOAD, parse_formats(["cq-8c8b", "cq-4c8b"]), settings, BANDWIDTH)
    json.dumps(found, allow_nan=False)
    rows = {row["format"]: row for row in found["kernels"]}
    rivals = [row for row in found["kernels"] if row["name"] != "cqtool"]
    best = found["best_16bit"]
    assert best["name"] == min(rivals, key=lambda row: row["time"]["median"])["name"]
    fastest = min(best["time"]["median"], best["again"]["median"])
    own = rows["cq-8c8b"]
    assert own["speedup"] == pytest.approx(fastest / own["time"]["median"])
    assert own["over_floor"] == pytest.approx(own["time"]["median"] / (own["bytes"] / 1e12))
    assert rows["cq-4c8b"]["cache_bytes"] == 2 * own["cache_bytes"]
    assert own["relative_error"] < 1e-2
    missing = {row["name"]: row["reason"] for row in found["unavailable"]}
    assert missing["flash-attn 2"] == "not installed"
    assert "sdpa cudnn" in missing


def test_the_row_of_a_whole_format_is_the_mean_of_its_layers(settings: KernelSettings) -> None:
    format, load = mixed_format(), AttentionLoad("a case", 2, 8, 4, 64, 37)
    found = bench_decode(load, format.of_each_code, settings, BANDWIDTH, [format])
    json.dumps(found, allow_nan=False)
    *pairs, row = [row for row in found["kernels"] if row["name"] == "cqtool"]
    assert [each["format"] for each in pairs] == [
        "cq-8c8b", "k-cq-4c8b-v-cq-8c8b", "k-cq-8c6b-v-cq-8c8b",
    ]  # fmt: skip
    assert row["format"] == "cq-8c8b-mixed, mean of 2 layers"
    assert row["kernel"] == {"layers": 2, "parts": 4}
    bits = (sum(BITS[name] for name in KEYS) + 4) / 8
    assert row["bits_per_channel"] == pytest.approx((bits + 1) / 2)
    # 37 tokens are three tiles.
    stored = 48 / 37 * load.bytes_16bit * row["bits_per_channel"] / 16
    assert row["cache_bytes"] == pytest.approx(stored)
    assert 0 < row["relative_error"] < 1e-2
    assert row["speedup"] > 0


def test_a_format_by_head_is_checked_head_by_head(monkeypatch: pytest.MonkeyPatch) -> None:
    format, load = mixed_format(), AttentionLoad("a case", 1, 8, 4, 64, 37)
    layers = [LayerProblem(load, format, index, torch.float32, CPU) for index in range(2)]
    problem = ModelProblem(layers)
    assert [len(layer.problems) for layer in problem.layers] == [3, 1]
    assert problem.error() < 1e-5
    part = problem.layers[0].problems[2]
    expected = part.expected
    monkeypatch.setattr(part, "expected", lambda *args: 1.02 * expected(*args))
    assert problem.layers[0].errors()[2] == pytest.approx(0.02, rel=0.05)
    assert problem.error() == pytest.approx(0.02 / 2, rel=0.05)  # of four parts
    monkeypatch.setattr(part, "expected", lambda *args: expected(*args) * float("nan"))
    assert problem.error() != problem.error()


def test_a_wrong_result_gets_no_time(
    settings: KernelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = CodedProblem.attend
    monkeypatch.setattr(CodedProblem, "attend", lambda self, copy: 1.02 * right(self, copy))
    found = bench_decode(LOAD, parse_formats(["cq-8c8b"]), settings, BANDWIDTH)
    assert all(row["name"] != "cqtool" for row in found["kernels"])
    (reason,) = [row["reason"] for row in found["unavailable"] if row["name"] == "cq-8c8b"]
    assert reason.startswith("wrong result: relative error 0.02")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("tokens", "past"), [(33, 0), (1, 40), (150, 17)])
def test_codes_are_the_nearest_centroids(kind: Any, name: str, tokens: int, past: int) -> None:
    (format,) = parse_formats([name])
    settings = KernelSettings(CPU, torch.float16)
    problem = EncodeProblem(find_target("tiny"), format, kind, 2, tokens, past, settings)
    assert abs(problem.excess()) < 1e-5
    problem.encoder.encode = lambda *args, **options: None  # type: ignore[method-assign]
    problem.storage.random_(generator=torch.Generator().manual_seed(1))
    assert problem.excess() > 0.1


def test_encoding_is_a_share_of_the_prefill(settings: KernelSettings) -> None:
    target = find_target("tiny")
    found = bench_encode(target, parse_formats(["cq-8c8b"]), settings, 64, (1, 2), 31)
    json.dumps(found, allow_nan=False)
    (row,) = found["prompt"]
    assert row["layer"] == pytest.approx(row["key"]["median"] + row["value"]["median"])
    assert row["all_layers"] == pytest.approx(2 * row["layer"])
    assert row["share"] == pytest.approx(row["all_layers"] / found["prefill"]["all_layers"])
    assert found["prefill"]["layers_timed"] == [1, 2]
    assert found["prefill"]["extrapolated"] is False
    assert [step["batch"] for step in found["step"]] == [1, 2]


def test_tables_say_what_is_slower_and_what_was_not_timed(settings: KernelSettings) -> None:
    found = bench_decode(LOAD, parse_formats(["cq-8c8b", "cq-4c3b"]), settings, BANDWIDTH)
    for row in found["kernels"]:
        row["speedup"] = 0.5
        row["target"] = 0.4 if row["format"] == "cq-8c8b" else None
    report = {
        "shape": {"sliding_window": 16},
        "suite": None,
        "decode": [found],
        "encode": [],
        "end_to_end": [],
        "kmeans": [],
        "settings": {"dtype": "float16"},
    }
    (table,) = tables(report)
    assert "of a layer that attends to all tokens; sliding layers see 16" in table.notes
    assert all(len(row) == len(table.columns) for row in table.rows)
    (own,) = [row for row in table.rows if row[0] == "cqtool"]
    assert own[1] == "cq-8c8b"
    assert own[-2:] == ("0.50x", "0.4x met")
    assert "cq-8c8b is slower than 16 bits here; use it for memory, not for speed." in table.notes
    assert any(note.startswith("not timed: cq-4c3b: 3-bit codes") for note in table.notes)

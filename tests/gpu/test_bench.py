"""Measurements on a GPU: times follow the work, kernels are checked, and the driver agrees."""

from __future__ import annotations

import pytest
import torch

from cqtool.bench.kernels import KernelSettings, bench_decode
from cqtool.bench.memory import growing_segments, peak_memory
from cqtool.bench.problem import AttentionLoad
from cqtool.bench.run import run
from cqtool.bench.settings import GROUPINGS, make_settings
from cqtool.bench.timing import measure_bandwidth, time_calls

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_twice_the_bytes_take_twice_the_time(device):
    def copy(size: int) -> float:
        source = torch.rand(size, device=device)
        target = torch.empty_like(source)
        return time_calls([lambda: target.copy_(source)], 10).median

    few, many = copy(1 << 27), copy(1 << 28)
    assert 1.8 < many / few < 2.2


def test_formats_and_rivals_are_right_and_get_times(device):
    from cqtool.bench.formats import parse_formats

    load = AttentionLoad("small", 2, 8, 2, 128, 777)
    names = ["cq-8c8b", "cq-8c10b", "cq-4c8b", "cq-2c8b", "cq-8c6b"]
    formats = parse_formats(names, groupings=GROUPINGS)
    settings = KernelSettings(device, torch.float16, 5)
    found = bench_decode(load, formats, settings, measure_bandwidth(device, 5))
    timed = {row["format"] for row in found["kernels"]}
    assert timed == {"float16", *(format.name for format in formats)}, found["unavailable"]
    assert all(row["time"]["median"] >= row["floor"] * 0.5 for row in found["kernels"])


def test_the_peak_is_what_was_held_at_once(device):
    # More than lies unused, which would serve without the driver.
    size = torch.cuda.memory_reserved() + (1 << 28)
    with peak_memory(device) as found:
        held = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(3)]
        del held
    assert found.torch_peak_bytes is not None
    assert found.driver_peak_bytes is not None
    assert found.driver_before_bytes is not None
    assert found.torch_peak_bytes >= 3 * size
    assert found.driver_peak_bytes - found.driver_before_bytes >= 3 * size


def test_the_allocator_grows_inside_the_block_only(device, monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)

    def expandable() -> bool:
        # Larger than anything that may lie unused, so that a segment is made for it.
        held = torch.empty(3 << 30, dtype=torch.uint8, device=device)
        segments = torch.cuda.memory_snapshot()
        (own,) = [
            s for s in segments if s["address"] <= held.data_ptr() < s["address"] + s["total_size"]
        ]
        return bool(own["is_expandable"])

    torch.cuda.empty_cache()
    with growing_segments(device) as settings:
        assert settings == "expandable_segments:True"
        assert expandable()
    torch.cuda.empty_cache()
    assert not expandable()


def test_the_largest_batch_of_a_small_model_is_generated(device):
    report = run(
        make_settings(
            target="tiny",
            parts=["end-to-end"],
            formats=["cq-8c8b"],
            prompt=32,
            new=8,
            largest=True,
            most=64,
        )
    )
    (found,) = report["end_to_end"]
    assert {row["cache"]: row["batch"] for row in found["rows"]} == {
        "dynamic": 64,
        "static": 64,
        "cq": 64,
    }


def test_a_step_of_tuning_is_recorded_and_its_memory_counted(device):
    wanted = {"target": "tiny", "parts": ["tune"], "formats": ["cq-8c8b"], "prompt": 64}
    (found,) = run(make_settings(**wanted, batches=["4"], repeats=3))["tune"]
    (row,) = found["rows"]
    assert found["dtype"] == "bfloat16"
    assert (row["micro_batch"], row["gradient_checkpointing"]) == (4, False)
    assert row["cuda_graph"]
    assert row["first_step"] > row["step"]["median"]
    assert row["memory"]["torch_peak_bytes"] > 0

"""Generation: every cache gives its own text whatever the chunks, and batches are found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cqtool.bench import caches as caches_module
from cqtool.bench import end_to_end
from cqtool.bench import runner as runner_module
from cqtool.bench.caches import CacheMaker, CQMaker, make_makers
from cqtool.bench.end_to_end import largest_batch
from cqtool.bench.formats import parse_formats
from cqtool.bench.memory import (
    growing_segments,
    is_out_of_memory,
    peak_memory,
    within_memory,
)
from cqtool.bench.models import find_target, random_model
from cqtool.bench.run import run
from cqtool.bench.runner import GenerationSettings, Runner, cache_bytes
from cqtool.bench.settings import make_settings
from cqtool.cache import CacheFormat, CQCache
from cqtool.errors import EnvironmentProblem, KernelError, RecipeError
from cqtool.progress import SILENT

SETTINGS = GenerationSettings(
    prompt=20,
    new=6,
    caches=("dynamic", "static", "cq"),
    batches=(3,),
    most=64,
    device=torch.device("cpu"),
    dtype=torch.float32,
)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = random_model(find_target("tiny").config, torch.float32, torch.device("cpu"))
    with torch.no_grad():  # so that different prompts give different texts
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return made


def makers(model: PreTrainedModel) -> Iterator[CacheMaker]:
    yield from make_makers(model, SETTINGS.caches, parse_formats(["cq-4c8b"]), 0)


def plain_text(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy text by whole passes without any cache."""
    for _ in range(new):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def test_16_bit_caches_give_the_text_of_whole_passes_in_one_chunk_and_in_several(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for maker in makers(model):
        if isinstance(maker, CQMaker):
            continue
        runner = Runner(model, maker, SETTINGS)
        ids = runner.prompts(5, SETTINGS.prompt)
        expected = plain_text(model, ids, SETTINGS.new)
        assert len({tuple(row) for row in expected[:, -3:].tolist()}) > 1
        for tokens in (1 << 20, 2 * SETTINGS.prompt, 1):
            monkeypatch.setattr(runner_module, "CHUNK_TOKENS", tokens)
            cache, longer = runner.prefill(ids)
            found = runner.decode(longer, cache, SETTINGS.new - 1)
            assert torch.equal(found, expected), (maker.cache, tokens)


def test_joined_chunks_of_codes_are_one_cache(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = list(makers(model))[-1]
    if not maker.joins:
        pytest.skip("CQCache has no join")
    runner = Runner(model, maker, SETTINGS)
    ids = runner.prompts(5, SETTINGS.prompt)
    whole, longer = runner.prefill(ids)
    expected = runner.decode(longer, whole, SETTINGS.new - 1)
    monkeypatch.setattr(runner_module, "CHUNK_TOKENS", 2 * SETTINGS.prompt)
    joined, longer = runner.prefill(ids)
    assert torch.equal(runner.decode(longer, joined, SETTINGS.new - 1), expected)


def test_a_repeated_row_goes_on_as_the_row_itself(model: PreTrainedModel) -> None:
    for maker in makers(model):
        runner = Runner(model, maker, SETTINGS)
        cache, ids = runner.prefill(runner.prompts(1, 9))
        expected = runner.decode(ids, cache, 4)
        chunk = maker.chunk(1, SETTINGS.length)
        runner._extend(ids[:, :9], chunk)
        repeated = maker.repeat(chunk, 3, SETTINGS.length)
        found = runner.decode(ids.expand(3, -1), repeated, 4)
        assert torch.equal(found, expected.expand(3, -1)), maker.cache


def test_a_cache_is_as_large_as_its_tensors(model: PreTrainedModel) -> None:
    sizes = {}
    for maker in makers(model):
        runner = Runner(model, maker, SETTINGS)
        cache, _ = runner.prefill(runner.prompts(3, SETTINGS.prompt))
        sizes[maker.cache] = cache_bytes(cache)
    numbers = 3 * 2 * 2 * 64 * 2  # rows, layers, kv heads, channels, keys and values
    assert sizes["dynamic"] == numbers * SETTINGS.prompt * 4
    assert sizes["static"] == numbers * SETTINGS.length * 4
    assert sizes["cq"] < sizes["dynamic"] / 10


class _FusedCache(CQCache):
    """As on a GPU; the kernels' work is done by plain torch."""

    def __init__(self, format: CacheFormat, model: PreTrainedModel, **options: Any) -> None:
        super().__init__(format, model, "fused", **options)


def test_the_last_steps_are_tried_with_the_room_of_a_whole_text(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches_module, "CQCache", _FusedCache)
    monkeypatch.setattr(runner_module, "CHUNK_TOKENS", 2 * SETTINGS.prompt)
    settings = replace(SETTINGS, new=14)
    maker = make_makers(model, ["cq"], parse_formats(["cq-8c8b"]), 0)[0]
    runner = Runner(model, maker, settings)
    seen: list[tuple[int, int, list[int]]] = []
    decode = runner.decode

    def tiles(cache: Any) -> list[int]:
        return [store.tiles.shape[2] for layer in cache.layers for store in layer.stores]

    def look(ids: torch.Tensor, cache: Any, new: int) -> torch.Tensor:
        before = tiles(cache)
        found = decode(ids, cache, new)
        assert tiles(cache) == before, "the storage moved"
        seen.append((len(ids), cache.nbytes, before))
        return found

    parts: list[list[int]] = []
    join = maker.join

    def look_at_parts(chunks: list[Any], rows: int, length: int) -> Any:
        parts.extend(tiles(chunk) for chunk in chunks)
        return join(chunks, rows, length)

    monkeypatch.setattr(runner, "decode", look)
    monkeypatch.setattr(maker, "join", look_at_parts)
    runner._last_steps(5)
    for rows in (5, 2):
        cache, longer = runner.prefill(runner.prompts(rows, settings.prompt))
        runner.decode(longer, cache, settings.new - 1)
    (probed, joined, alone) = seen
    # 20 + 14 tokens are three tiles; positions are those of one row or of all.
    assert probed[2] == joined[2] == alone[2] == [3] * 4
    assert probed[0] == joined[0] == 5
    assert probed[1] == joined[1]
    # The one row of 30 tokens that was repeated, and prompts of 2, 2 and 1 rows.
    assert parts == [[2] * 4] * 4


def test_a_batch_that_is_joined_needs_room_for_joining(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches_module, "CQCache", _FusedCache)
    monkeypatch.setattr(runner_module, "CHUNK_TOKENS", 2 * SETTINGS.prompt)
    asked: list[int] = []
    empty = torch.empty

    def look(*size: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") == torch.uint8 and len(size) == 1:
            asked.append(size[0])
        return empty(*size, **options)

    allocated = iter([100, 100 + 8 * model.config.num_hidden_layers])
    monkeypatch.setattr(runner_module, "allocated_bytes", lambda device: next(allocated))
    monkeypatch.setattr(runner_module.torch, "empty", look)
    maker = make_makers(model, ["cq"], parse_formats(["cq-8c8b"]), 0)[0]
    Runner(model, maker, SETTINGS)._last_steps(5)
    assert asked == [16]  # twice a layer of 8 bytes
    allocated = iter([100])
    Runner(model, maker, SETTINGS)._last_steps(2)  # fits into one pass
    assert asked == [16]


@pytest.mark.parametrize("limit", [1, 2, 7, 100, 224, 1000, 2731])
def test_the_largest_batch_is_found_to_two_percent_in_few_tries(limit: int) -> None:
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= limit

    found = largest_batch(fits, 4096)
    assert limit - max(1, limit // 50) < found <= limit
    assert len(tried) <= 2 * math.log2(limit + 1) + 2


def test_no_batch_is_larger_than_asked_for_and_none_may_fit() -> None:
    assert largest_batch(lambda rows: True, 100) in (99, 100)
    assert largest_batch(lambda rows: True, 1) == 1
    assert largest_batch(lambda rows: False, 100) == 0


def test_running_out_of_memory_takes_rows_away_and_other_errors_stay_errors(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = next(makers(model))
    runner = Runner(model, maker, SETTINGS)
    measure = runner.measure

    def short(rows: int, runs: int, found: list[dict[str, Any]]) -> None:
        if rows > 38:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        measure(rows, runs, found)

    monkeypatch.setattr(runner, "fits", lambda rows: rows <= 40)
    monkeypatch.setattr(runner, "measure", short)
    row = end_to_end._measure(runner, None, SILENT)
    assert row is not None
    assert row["batch"] == 38
    assert end_to_end._measure(runner, 39, SILENT) is None
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(KernelError("cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError, match="size"):
        within_memory(lambda: torch.zeros(2) @ torch.zeros(3), torch.device("cpu"))


def test_speedups_are_over_the_better_16_bit_cache() -> None:
    def row(cache: str, batch: int, speed: float) -> dict[str, Any]:
        return {"cache": cache, "batch": batch, "tokens_per_second": speed}

    rows = [row("dynamic", 16, 100.0), row("static", 20, 150.0), row("cq", 200, 900.0)]
    end_to_end._compare(rows, largest=True)
    assert (rows[2]["speedup"], rows[2]["batch_ratio"]) == (6.0, 10.0)
    rows = [row("dynamic", 1, 100.0), row("dynamic", 2, 50.0), row("cq", 2, 75.0)]
    end_to_end._compare(rows, largest=False)
    assert rows[2]["speedup"] == 1.5
    assert "batch_ratio" not in rows[2]


def test_a_cpu_counts_no_peak_memory() -> None:
    with peak_memory(torch.device("cpu")) as found:
        torch.zeros(1000)
    assert set(found.to_json().values()) == {None}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_told_to_grow_unless_the_environment_says_how(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr("cqtool.bench.memory.release_memory", lambda device: None)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    with growing_segments(torch.device("cpu")) as found:
        assert (found, told) == (None, [])
    with growing_segments(torch.device("cuda")) as found:
        assert (found, told) == ("expandable_segments:True", ["expandable_segments:True"])
    assert told[1:] == ["expandable_segments:False"]
    monkeypatch.setenv(name, "max_split_size_mb:64")
    with growing_segments(torch.device("cuda")) as found:
        assert (found, len(told)) == ("max_split_size_mb:64", 2)


def test_what_needs_a_gpu_says_so_on_a_cpu() -> None:
    with pytest.raises(EnvironmentProblem, match="Kernel times need a CUDA GPU"):
        run(make_settings(device="cpu"))
    with pytest.raises(RecipeError, match="give a --batch on a CPU"):
        run(make_settings(target="tiny", parts=["end-to-end"], largest=True, device="cpu"))
    with pytest.raises(RecipeError, match="compiles on a GPU only"):
        caches = ["static-compiled"]
        run(make_settings(target="tiny", parts=["end-to-end"], caches=caches, device="cpu"))
    with pytest.raises(EnvironmentProblem, match="no device 'cuda:7'"):
        run(make_settings(target="tiny", device="cuda:7"))

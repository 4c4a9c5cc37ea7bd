"""Whole models with random weights: tokens a second and peak memory, cache against cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cqtool.bench.caches import make_makers
from cqtool.bench.formats import BenchFormat
from cqtool.bench.memory import growing_segments, release_memory, within_memory
from cqtool.bench.models import Target, random_model
from cqtool.bench.runner import GenerationSettings, Runner
from cqtool.errors import RecipeError
from cqtool.progress import Progress

_RUNS = 3


def largest_batch(fits: Callable[[int], bool], most: int) -> int:
    """The largest batch that fits, to 2 %: doubled until one does not, then bisected.

    Returns:
        The batch; 0 when not even one row fits.
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    if low == 0:
        return 0
    high = min(high, most + 1)
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def bench_generation(
    target: Target,
    formats: Sequence[BenchFormat],
    settings: GenerationSettings,
    progress: Progress,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Generate with each kind of cache.

    Args:
        target: the model's shape and configuration.
        formats: of the caches of the kind ``cq``.
        settings: what to generate.
        progress: is told which cache runs.
        keep: is given what is found so far, after each cache.

    Returns:
        ``rows``, one for each cache and batch, with ``speedup`` over the better 16-bit cache, of
        the same batch or of its own largest one; ``unavailable``, names and reasons;
        ``allocator``, the settings of torch's memory allocator, the same for all caches.

    Raises:
        RecipeError: the largest batch, or compiled code, is asked for on a CPU.
        EnvironmentProblem: the weights do not fit.
    """
    if settings.batches is None and settings.device.type != "cuda":
        raise RecipeError("The largest batch is that of a GPU's memory; give a --batch on a CPU.")
    if "static-compiled" in settings.caches and settings.device.type != "cuda":
        raise RecipeError("transformers compiles on a GPU only; leave out --cache static-compiled.")
    with growing_segments(settings.device) as allocator:
        return _bench_caches(target, formats, settings, progress, keep, allocator)


def _bench_caches(
    target: Target,
    formats: Sequence[BenchFormat],
    settings: GenerationSettings,
    progress: Progress,
    keep: Callable[[dict[str, Any]], None],
    allocator: str | None,
) -> dict[str, Any]:
    progress.note(f"Making {target.shape.name} with random weights")
    model = random_model(target.config, settings.dtype, settings.device, settings.seed)
    largest = settings.batches is None
    rows: list[dict[str, Any]] = []
    unavailable: list[dict[str, str]] = []
    found = {
        "shape": target.shape.name,
        "prompt": settings.prompt,
        "new": settings.new,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "largest": largest,
        "allocator": allocator,
        "rows": rows,
        "unavailable": unavailable,
    }
    for maker in make_makers(model, settings.caches, formats, settings.seed):
        runner = Runner(model, maker, settings)
        name = maker.cache if maker.cache == maker.format else f"{maker.cache} {maker.format}"
        for batch in settings.batches or (None,):
            progress.note(
                f"{name}, " + (f"batch {batch}" if batch else "finding the largest batch")
            )
            row = _measure(runner, batch, progress)
            if row is None:
                reason = "not enough GPU memory" + (f" for batch {batch}" if batch else "")
                unavailable.append({"name": name, "reason": reason})
            else:
                rows.append(row)
        del runner, maker
        release_memory(settings.device)
        _compare(rows, largest)
        keep(found)
    return found


def _measure(runner: Runner, batch: int | None, progress: Progress) -> dict[str, Any] | None:
    """The row of a batch, or of the largest one; None when not enough memory."""
    wanted, runs = batch, _RUNS
    if wanted is None:
        wanted, runs = largest_batch(runner.fits, runner.settings.most), 1
        progress.note(f"largest batch: {wanted}")
    elif not runner.fits(wanted):
        return None
    if wanted > 0:
        within_memory(partial(runner.warm, wanted), runner.settings.device)
    rows: list[dict[str, Any]] = []
    while wanted > 0:
        measure = partial(runner.measure, wanted, runs, rows)
        if within_memory(measure, runner.settings.device):
            return rows[0]
        if batch is not None:
            return None
        # The whole text needs a little more than its last steps.
        wanted -= max(1, wanted // 33)
        progress.note(f"not enough memory for the whole text; trying {wanted}")
    return None


def _compare(rows: Sequence[dict[str, Any]], largest: bool) -> None:
    for row in rows:
        rivals = [
            each
            for each in rows
            if each["cache"] != "cq" and (largest or each["batch"] == row["batch"])
        ]
        if rivals:
            best = max(each["tokens_per_second"] for each in rivals)
            row["speedup"] = row["tokens_per_second"] / best
            if largest:
                row["batch_ratio"] = row["batch"] / max(each["batch"] for each in rivals)

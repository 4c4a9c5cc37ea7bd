"""Times a step of end-to-end tuning on a model with random weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cqtool.bench.caches import bind
from cqtool.bench.formats import BenchFormat
from cqtool.bench.memory import PeakMemory, peak_memory, release_memory
from cqtool.bench.models import Target, random_model
from cqtool.bench.settings import BenchSettings
from cqtool.bench.timing import Spread
from cqtool.cache.format import CacheFormat
from cqtool.errors import EnvironmentProblem
from cqtool.progress import Progress
from cqtool.recipe import Recipe, Tuning, load_recipe
from cqtool.tuning.trainer import Trainer

RECIPE = "cq-8c8b-tuned"
"""The shipped recipe whose length the whole time is about."""


class _TimedTrainer(Trainer):
    """A :class:`Trainer` that knows how many seconds each step took."""

    def __init__(
        self,
        model: PreTrainedModel,
        format: CacheFormat,
        settings: Tuning,
        ids: Tensor,
        held_out: Tensor,
    ) -> None:
        super().__init__(model, format, settings, ids, held_out)
        self.seconds: list[float] = []

    def _step(self) -> None:
        start = _now(self.model.device)
        super()._step()
        self.seconds.append(_now(self.model.device) - start)


def bench_tuning(
    target: Target,
    formats: Sequence[BenchFormat],
    settings: BenchSettings,
    device: torch.device,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Time steps of tuning random codebooks, or an artifact's, to a model with random weights.

    A step is that of :class:`cqtool.tuning.trainer.Trainer` with the settings of the recipe
    :data:`RECIPE`, encoding by nearest centroids. All its sequences go through the model at once
    where memory suffices for that; else fewer at a time, and at last their layers are computed
    again in the backward pass.

    Args:
        target: the model's shape and configuration.
        formats: the formats to tune.
        settings: sequences of a step, their length, steps to time, window, sinks, dtype and seed.
        device: where.
        progress: is told what runs.

    Yields:
        For each format ``rows``, one for each number of sequences: the first step, in which a graph
        is recorded; the steps after it; peak memory; and seconds that the recipe's tokens would
        take. ``unavailable``: what did not fit.

    Raises:
        EnvironmentProblem: the weights do not fit.
    """
    recipe = load_recipe(RECIPE)
    assert recipe.tuning is not None
    dtype = _dtype(settings.dtype, device)
    progress.note(f"Making {target.shape.name} with random weights")
    model = random_model(target.config, dtype, device, settings.seed)
    for format in formats:
        bound = bind(_as_tuned(format, settings, recipe), model, settings.seed)
        rows: list[dict[str, Any]] = []
        unavailable: list[dict[str, str]] = []
        for batch in settings.batches or (recipe.tuning.batch,):
            row = _fastest_that_fits(model, bound, recipe.tuning, batch, settings, progress)
            if row is None:
                reason = f"not enough GPU memory for a batch of {batch}"
                unavailable.append({"name": format.name, "reason": reason})
            else:
                rows.append(row)
        yield {
            "shape": target.shape.name,
            "format": format.name,
            "dtype": str(dtype).removeprefix("torch."),
            "window": bound.window,
            "sinks": bound.sinks,
            "sequence_length": settings.prompt,
            "recipe": {"name": recipe.name, "tokens": _tokens(recipe.tuning)},
            "rows": rows,
            "unavailable": unavailable,
        }


def ways(batch: int) -> Iterator[tuple[int, bool]]:
    """Sequences at a time, and whether layers are computed again: from the fastest way to run a
    batch on to the one that needs the least memory."""
    for again in (False, True):
        micro_batch = batch
        while micro_batch > 1:
            yield micro_batch, again
            micro_batch = -(-micro_batch // 2)
        yield 1, again


def _fastest_that_fits(
    model: PreTrainedModel,
    format: CacheFormat,
    tuning: Tuning,
    batch: int,
    settings: BenchSettings,
    progress: Progress,
) -> dict[str, Any] | None:
    for micro_batch, again in ways(batch):
        progress.note(
            f"Tuning {format.name}, {batch} sequences a step, {micro_batch} at a time"
            + (", layers computed again" if again else "")
        )
        changed = {
            "steps": settings.repeats + 1,
            "evaluate_every": settings.repeats + 1,
            "batch": batch,
            "micro_batch": micro_batch,
            "gradient_checkpointing": again,
        }
        rows: list[dict[str, Any]] = []
        with _enough_memory():
            rows.append(_measure(model, format, tuning.model_copy(update=changed), settings))
        # Not in a handler of the error, whose traceback would keep the tensors alive.
        release_memory(model.device)
        if rows:
            row = rows[0]
            row["recipe_seconds"] = _tokens(tuning) / row["tokens_per_second"]
            return row
    return None


def _measure(
    model: PreTrainedModel, format: CacheFormat, tuning: Tuning, settings: BenchSettings
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = torch.randint(vocabulary, (tuning.batch + 1, settings.prompt), generator=generator)
    with peak_memory(model.device) as memory:
        trainer = _TimedTrainer(model, format, tuning, ids[1:], ids[:1])
        while not trainer.finished:
            trainer.run_until_next_look()
    return _row(trainer, memory, settings.prompt)


def _row(trainer: _TimedTrainer, memory: PeakMemory, length: int) -> dict[str, Any]:
    tuning = trainer.settings
    first, *others = trainer.seconds
    step = Spread.of(others)
    return {
        "batch": tuning.batch,
        "micro_batch": tuning.micro_batch,
        "gradient_checkpointing": tuning.gradient_checkpointing,
        "cuda_graph": trainer.captured and trainer.model.device.type == "cuda",
        "first_step": first,
        "step": step.to_json(),
        "tokens_per_second": tuning.batch * length / step.median,
        "memory": memory.to_json(),
    }


def _as_tuned(format: BenchFormat, settings: BenchSettings, recipe: Recipe) -> BenchFormat:
    """The format with the recipe's window and sinks, where nothing else was asked for."""
    if format.source is not None:
        return format
    window = recipe.window if settings.window is None else settings.window
    sinks = recipe.sinks if settings.sinks is None else settings.sinks
    return replace(format, spec=replace(format.spec, window=window, sinks=sinks))


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    found: torch.dtype = getattr(
        torch, name or ("bfloat16" if device.type == "cuda" else "float32")
    )
    return found


def _tokens(tuning: Tuning) -> int:
    """Tokens of all steps."""
    return tuning.steps * tuning.batch * tuning.sequence_length


@contextmanager
def _enough_memory() -> Iterator[None]:
    """End the block quietly where the GPU's memory does not suffice."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        pass
    except EnvironmentProblem as error:
        if not isinstance(error.__cause__, torch.cuda.OutOfMemoryError):
            raise


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

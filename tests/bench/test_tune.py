"""Steps of tuning are timed one by one, and run in the fastest way that the memory allows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from cqtool.bench import tune
from cqtool.bench.run import run
from cqtool.bench.settings import BenchSettings, make_settings
from cqtool.bench.tables import tables
from cqtool.bench.tune import ways
from cqtool.errors import EnvironmentProblem
from cqtool.recipe import load_recipe
from cqtool.tuning.trainer import Trainer

WANTED: dict[str, Any] = {
    "target": "tiny",
    "parts": ["tune"],
    "formats": ["cq-8c2b,cq-4c2b"],
    "batches": ["4"],
    "prompt": 24,
    "repeats": 2,
    "device": "cpu",
}


def test_steps_are_timed_and_a_recipe_is_as_long_as_its_tokens() -> None:
    kept: list[int] = []
    report = run(make_settings(**WANTED), checkpoint=lambda found: kept.append(len(found["tune"])))
    json.dumps(report, allow_nan=False)
    assert kept == [1, 2]
    assert [found["format"] for found in report["tune"]] == ["cq-8c2b", "cq-4c2b"]
    recipe = load_recipe("cq-8c8b-tuned")
    assert recipe.tuning is not None
    tokens = recipe.tuning.steps * recipe.tuning.batch * recipe.tuning.sequence_length
    found = report["tune"][0]
    assert found["recipe"] == {"name": "cq-8c8b-tuned", "tokens": tokens}
    assert (found["window"], found["sinks"]) == (recipe.window, recipe.sinks)
    (row,) = found["rows"]
    assert row["step"]["repeats"] == 2, "the first step records and is not among them"
    assert row["first_step"] > 0
    assert row["tokens_per_second"] == pytest.approx(4 * 24 / row["step"]["median"])
    assert row["recipe_seconds"] == pytest.approx(tokens / row["tokens_per_second"])
    assert (row["batch"], row["micro_batch"], row["gradient_checkpointing"]) == (4, 4, False)
    assert row["cuda_graph"] is False
    shown = [table for table in tables(report) if table.title.startswith("Tuning, tiny, cq-8c2b")]
    assert [row[:4] for table in shown for row in table.rows] == [("4", "4", "no", "no")]


def test_codebooks_move_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[int, float]] = []
    timed = tune._TimedTrainer._step

    def watched(self: tune._TimedTrainer) -> None:
        before = [delta.detach().clone() for delta in self._deltas]
        timed(self)
        moved = max(
            float((delta.detach() - old).abs().max())
            for delta, old in zip(self._deltas, before, strict=True)
        )
        done.append((len(self.seconds), moved))

    monkeypatch.setattr(tune._TimedTrainer, "_step", watched)
    changed = {"formats": None, "groupings": ["pairs"], "window": 3, "sinks": 1}
    (found,) = run(make_settings(**WANTED | changed))["tune"]
    assert (found["format"], found["window"], found["sinks"]) == ("cq-8c8b pairs", 3, 1)
    assert [count for count, _ in done] == [1, 2, 3]
    assert all(moved > 0 for _, moved in done)


def test_less_is_held_at_once_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(ways(6)) == [
        (6, False), (3, False), (2, False), (1, False), (6, True), (3, True), (2, True), (1, True)
    ]  # fmt: skip
    right, tried = Trainer._divergence, []

    def within(room: int) -> Any:
        def divergence(self: Trainer, ids: torch.Tensor, share: float | None = None) -> Any:
            again = self.settings.gradient_checkpointing
            if share is not None:
                tried.append((len(ids), again))
                if len(ids) * (1 if again else 4) > room:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return right(self, ids, share)

        return divergence

    wanted = make_settings(**WANTED | {"formats": ["cq-8c2b"], "batches": ["1,4"]})
    monkeypatch.setattr(Trainer, "_divergence", within(2))
    (found,) = run(wanted)["tune"]
    assert tried[:3] == [(1, False), (1, True), (1, True)]
    assert [(row["batch"], row["micro_batch"], row["gradient_checkpointing"])
            for row in found["rows"]] == [(1, 1, True), (4, 2, True)]  # fmt: skip
    monkeypatch.setattr(Trainer, "_divergence", within(0))
    (found,) = run(wanted)["tune"]
    assert found["rows"] == []
    assert [row["reason"] for row in found["unavailable"]] == [
        "not enough GPU memory for a batch of 1",
        "not enough GPU memory for a batch of 4",
    ]


def test_other_errors_than_of_memory_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Trainer, ids: torch.Tensor, share: float | None = None) -> Any:
        raise EnvironmentProblem("the GPU fell off the bus")

    monkeypatch.setattr(Trainer, "_divergence", broken)
    with pytest.raises(EnvironmentProblem, match="fell off"):
        run(make_settings(**WANTED))


def test_tuning_is_timed_only_when_asked_for() -> None:
    assert "tune" not in BenchSettings(target="tiny").chosen_parts

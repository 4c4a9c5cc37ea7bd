"""Tuning on a GPU: a recorded step is the step itself."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from formats import random_format
from zoo import VOCABULARY, tiny

from cqtool.recipe import Tuning
from cqtool.tuning import trainer as trainer_module
from cqtool.tuning.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def make(captured: bool, window: int = 0, **changes) -> Trainer:
    model = tiny("llama").eval().requires_grad_(False)
    format = random_format(model, channels=4, bits=4, window=window, sinks=min(window, 2))
    model.cuda()
    settings = {"steps": 8, "batch": 4, "micro_batch": 2, "evaluate_every": 4, "patience": 9}
    ids = torch.randint(
        3, VOCABULARY, (12, 24), generator=torch.Generator().manual_seed(0), dtype=torch.long
    )
    trainer = Trainer(
        model,
        format.to(torch.device("cuda")),
        Tuning(**settings, learning_rate=0.05, **changes),
        ids[:8],
        ids[8:],
    )
    trainer.captured = captured
    return trainer


def run(trainer: Trainer) -> Trainer:
    while not trainer.finished:
        trainer.run_until_next_look()
    return trainer


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("cores", "tolerance"), [(False, 1e-3), (True, 2e-2)])
def test_recorded_steps_learn_what_steps_learn(
    window, checkpointing, cores, tolerance, monkeypatch
):
    # What a recording rounds otherwise to TF32 makes single codes others in held-out text.
    if not cores:
        monkeypatch.setattr(trainer_module, "tensor_cores", lambda device: nullcontext())
    plain, recorded = (
        run(make(captured, window, gradient_checkpointing=checkpointing))
        for captured in (False, True)
    )
    assert recorded.captured
    assert recorded.history.held_out[-1] < recorded.history.held_out[0]
    assert recorded.history.losses == pytest.approx(plain.history.losses, rel=1e-3)
    assert recorded.history.held_out == pytest.approx(plain.history.held_out, rel=tolerance)


def test_a_model_that_waits_for_the_gpu_is_trained_without_recording():
    trainer, plain = make(True), make(False)
    own = trainer.model.lm_head.forward
    trainer.model.lm_head.forward = lambda states: own(states * float(states.isfinite().all()))
    run(trainer)
    assert not trainer.captured
    assert trainer.history.losses == pytest.approx(run(plain).history.losses, rel=1e-3)

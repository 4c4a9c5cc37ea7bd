"""A model in bfloat16 with centroids in float32: small steps add up, and the result is stored."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from formats import random_format
from zoo import random_ids, tiny

from cqtool.quality.measure import full_logits
from cqtool.quality.simulate import teacher_forced_logits
from cqtool.recipe import Tuning
from cqtool.tuning.loss import divergence
from cqtool.tuning.precision import tensor_cores
from cqtool.tuning.trainer import Trainer

SETTINGS = Tuning(
    steps=30,
    learning_rate=0.05,
    batch=4,
    micro_batch=4,
    sequences=12,
    sequence_length=40,
    held_out=3,
    evaluate_every=10,
)


def make(dtype: torch.dtype, **settings: object) -> Trainer:
    model = tiny("llama", dtype=dtype)
    format = random_format(tiny("llama"), channels=4, bits=4)
    layers = tuple(
        replace(
            layer,
            key=layer.key.with_codebook(layer.key.codebook.half()),
            value=layer.value.with_codebook(layer.value.codebook.half()),
        )
        for layer in format.layers
    )
    ids = random_ids(SETTINGS.sequences + SETTINGS.held_out, SETTINGS.sequence_length)
    chosen = SETTINGS.model_copy(update=settings)
    parts = ids[: chosen.sequences], ids[chosen.sequences :]
    return Trainer(model, replace(format, layers=layers), chosen, *parts)


def trained(dtype: torch.dtype, **settings: object) -> Trainer:
    trainer = make(dtype, **settings)
    while not trainer.finished:
        trainer.run_until_next_look()
    return trainer


def test_a_bfloat16_model_is_tuned_about_as_well_as_a_float32_one():
    held_out = {dtype: trained(dtype).history.held_out for dtype in (torch.float32, torch.bfloat16)}
    gains = {dtype: 1 - min(found) / found[0] for dtype, found in held_out.items()}
    assert gains[torch.float32] > 0.1
    assert gains[torch.bfloat16] == pytest.approx(gains[torch.float32], rel=0.25)


def test_the_divergence_of_what_is_stored_is_the_one_that_was_measured():
    trainer = trained(torch.bfloat16)
    format = trainer.best_format()
    for layer in format.layers:
        assert layer.key.codebook.dtype == layer.value.codebook.dtype == torch.float16
    found = [
        float(
            divergence(
                full_logits(trainer.model, ids)[None],
                teacher_forced_logits(trainer.model, format, ids)[None],
            )
        )
        for ids in trainer._held_out
    ]
    assert sum(found) / len(found) == pytest.approx(min(trainer.history.held_out), rel=0.05)


def test_steps_smaller_than_bfloat16_can_tell_add_up():
    start = [codec.codebook.detach().clone() for codec in make(torch.bfloat16).codecs]
    trainer = trained(torch.bfloat16, learning_rate=1e-5)
    for codec, before in zip(trainer.codecs, start, strict=True):
        after = codec.codebook.detach()
        assert after.dtype == torch.float32
        # bfloat16 would see nearly none of all the steps together, and yet most centroids moved.
        assert (after.bfloat16() != before.bfloat16()).float().mean() < 0.1
        assert (after != before).float().mean() > 0.5


def test_tensor_cores_are_for_a_gpu_and_only_within_the_block():
    before = torch.get_float32_matmul_precision()
    with tensor_cores(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError, match="in the block"), tensor_cores(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
        raise RuntimeError("in the block")
    assert torch.get_float32_matmul_precision() == before


def test_steps_run_on_tensor_cores_and_looks_do_not(monkeypatch):
    seen = []

    @contextmanager
    def noted(device):
        seen.append(device.type)
        yield
        seen.append("end")

    monkeypatch.setattr("cqtool.tuning.trainer.tensor_cores", noted)
    trainer = make(torch.float32)
    look = trainer._look
    monkeypatch.setattr(trainer, "_look", lambda: (seen.append("look"), look()))
    trainer.run_until_next_look()
    trainer.run_until_next_look()
    assert seen == ["look", "cpu", "end", "look"]

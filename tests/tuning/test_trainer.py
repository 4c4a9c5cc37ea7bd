"""Training lowers the divergence, resumes exactly, and keeps the best codebooks it has seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from formats import random_format
from zoo import random_ids, tiny

from cqtool.cache import CQCodec
from cqtool.errors import SampleError
from cqtool.quality.measure import full_logits, quantized_logits
from cqtool.recipe import Tuning
from cqtool.tuning.loss import divergence
from cqtool.tuning.memory import recomputing_layers
from cqtool.tuning.trainer import Trainer, batch_of, step_size

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


def make(name: str = "llama", window: int = 0, sinks: int = 0, **settings: object) -> Trainer:
    model = tiny(name)
    format = replace(random_format(model, channels=4, bits=4), window=window, sinks=sinks)
    ids = random_ids(SETTINGS.sequences + SETTINGS.held_out, SETTINGS.sequence_length)
    chosen = SETTINGS.model_copy(update=settings)
    return Trainer(model, format, chosen, ids[: chosen.sequences], ids[chosen.sequences :])


def run(trainer: Trainer) -> Trainer:
    while not trainer.finished:
        trainer.run_until_next_look()
    return trainer


def codebooks(trainer: Trainer) -> list[torch.Tensor]:
    found = [codec for layer in trainer.best_format().layers for codec in (layer.key, layer.value)]
    assert all(isinstance(codec, CQCodec) for codec in found)
    return [codec.codebook for codec in found]


def test_divergence_is_the_mean_over_tokens_of_kl():
    full, found = torch.randn(2, 7, 2, 11, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(
        found.double().log_softmax(-1), full.double().softmax(-1), reduction="sum"
    )
    assert float(divergence(full, found)) == pytest.approx(float(expected) / 14, rel=1e-5)
    masked = full.clone()
    masked[..., 3] = -torch.inf
    assert float(divergence(masked, masked)) == 0


@pytest.mark.parametrize(
    ("name", "window", "sinks", "mode"),
    [
        ("llama", 0, 0, "teacher"),
        ("gemma3", 6, 2, "teacher"),
        ("gptj", 0, 1, "teacher"),
        ("llama", 5, 0, "prefill"),
        ("gemma3", 0, 2, "prefill"),
    ],
)
def test_the_held_out_divergence_falls_and_is_that_of_the_result(name, window, sinks, mode):
    trainer = run(make(name, window, sinks, mode=mode))
    history = trainer.history
    assert history.held_out[history.best] == min(history.held_out) < 0.9 * history.held_out[0]
    format = trainer.best_format()
    found = [
        float(
            divergence(
                full_logits(trainer.model, ids)[None],
                quantized_logits(trainer.model, format, ids, mode)[None],
            )
        )
        for ids in trainer._held_out
    ]
    assert sum(found) / len(found) == pytest.approx(min(history.held_out), rel=0.02)


def test_the_model_stays_as_it_was():
    trainer = make()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    run(trainer)
    assert all(torch.equal(before[name], v) for name, v in trainer.model.state_dict().items())
    assert all(p.grad is None for p in trainer.model.parameters())


@pytest.mark.parametrize("mode", ["teacher", "prefill"])
def test_smaller_batches_in_memory_and_recomputed_layers_give_the_same_gradient(mode):
    # A soft choice's temperature is that of the vectors in memory.
    shared = {"window": 5, "softness": 0.0, "mode": mode}
    plain, split = make(**shared), make(**shared, micro_batch=1, gradient_checkpointing=True)
    for trainer in (plain, split):
        trainer._step()
    for one, other in zip(plain.codecs, split.codecs, strict=True):
        torch.testing.assert_close(one.delta.grad, other.delta.grad, rtol=1e-3, atol=1e-7)
    assert "forward" not in vars(plain.model.model.layers[0])


def test_a_layer_gets_its_own_forward_back():
    model = tiny("llama")
    first, second = model.model.layers[:2]
    first.forward = own = first.forward
    with recomputing_layers(model):
        assert first.forward is not own and "forward" in vars(second)
    assert vars(first)["forward"] is own and "forward" not in vars(second)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path):
    expected = codebooks(run(make()))
    stopped = make()
    for _ in range(3):
        stopped.run_until_next_look()
    stopped.save(tmp_path / "state", "this run")
    assert 0 < stopped.history.step < SETTINGS.steps
    resumed = make()
    assert not resumed.load(tmp_path / "state", "another run")
    assert resumed.load(tmp_path / "state", "this run")
    assert all(map(torch.equal, codebooks(run(resumed)), expected))


def test_it_stops_when_looking_brings_nothing(monkeypatch):
    trainer = make(learning_rate=3.0, steps=1000, evaluate_every=2, patience=3)
    run(trainer)
    assert trainer.history.step < 1000
    assert len(trainer.history.held_out) == trainer.history.best + 4


def test_a_loss_that_is_no_number_is_an_error():
    trainer = make()
    trainer.codecs[0].delta.data.fill_(float("nan"))
    with pytest.raises(SampleError, match="--learning-rate"):
        trainer._step()


def test_the_step_size_rises_and_falls():
    sizes = [step_size(step, 100) for step in range(100)]
    assert sizes[0] == pytest.approx(0.1) and sizes[10] == 1.0
    assert sizes[:11] == sorted(sizes[:11]) and sizes[10:] == sorted(sizes[10:], reverse=True)
    assert 0.01 <= sizes[-1] < 0.02
    assert [step_size(step, 1) for step in range(1)] == [pytest.approx(0.1)]


def test_every_epoch_takes_every_sequence_once():
    taken = torch.cat([batch_of(step, 4, 10, seed=3) for step in range(5)])
    assert sorted(taken[:10].tolist()) == sorted(taken[10:].tolist()) == list(range(10))
    assert taken[:10].tolist() != taken[10:].tolist()
    assert torch.equal(batch_of(2, 4, 10, 3), batch_of(2, 4, 10, 3))

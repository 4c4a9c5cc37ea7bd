"""Samples are the model's own tensors, and their gradients those of autograd."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors import safe_open
from zoo import random_ids, tiny

from cqtool.data.windows import TokenWindows
from cqtool.errors import SampleError
from cqtool.models.load import OpenedModel
from cqtool.models.probe import read_geometry
from cqtool.sampling import SampleStore, collect


def opened(name, **kwargs) -> OpenedModel:
    return OpenedModel(
        model=tiny(name, **kwargs),
        tokenizer=None,
        name=name,
        base_id=name,
        revision=None,
    )


def windows(sequences=3, length=20, seed=0) -> TokenWindows:
    return TokenWindows(random_ids(sequences, length, seed), f"digest-{seed}", {"dataset": "zoo"})


@pytest.mark.parametrize("name", ["llama", "yarn", "glm", "gemma3", "gptj", "gpt2", "falcon"])
def test_samples_and_gradients_match_autograd_on_the_real_tensors(name, tmp_path, monkeypatch):
    source, ids = opened(name), windows()
    store = collect(source, read_geometry(source.model), ids, tmp_path / "s", gradients=True)
    model = source.model
    # Reference: gradients with respect to what the model itself rotates, and to its values.
    caught: list[torch.Tensor] = []
    module = sys.modules[type(model).__module__]
    rotated = name != "gpt2"
    if rotated:
        original = module.apply_rotary_pos_emb

        def catching(first, second, *args, **kwargs):
            key = first if name == "gptj" else second
            key.retain_grad()
            caught.append(key)
            return original(first, second, *args, **kwargs)

        monkeypatch.setattr(module, "apply_rotary_pos_emb", catching)
    for sequence in range(3):
        caught.clear()
        embeddings = model.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda m, i, out: out.requires_grad_())
        batch = ids.ids[sequence : sequence + 1]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        (loss * 19).backward()
        handle.remove()
        if not rotated:
            continue
        keys = caught[::2] if name == "gptj" else caught
        part = slice(20 * sequence, 20 * (sequence + 1))
        for layer, key in enumerate(keys):
            real, slope = key, key.grad
            if name != "gptj":
                real, slope = real.transpose(1, 2), slope.transpose(1, 2)
            width = real.shape[-1]
            ours = store.load(layer, "key")[part, :, :width]
            torch.testing.assert_close(ours, real[0], rtol=1e-4, atol=1e-5)
            gradient = store.load_gradients(layer, "key")[part, :, :width]
            # Kept in bfloat16: eight bits of precision.
            torch.testing.assert_close(
                gradient, slope[0], rtol=1e-2, atol=float(1e-3 * slope.abs().max())
            )
    assert store.tokens == 60
    assert store.load(0, "value").shape == store.load_gradients(0, "value").shape


def test_value_gradient_matches_finite_differences(tmp_path):
    source, ids = opened("llama"), windows(sequences=1)
    store = collect(source, read_geometry(source.model), ids, tmp_path / "s", gradients=True)
    gradient = store.load_gradients(1, "value")[4, 0]
    projection = source.model.model.layers[1].self_attn.v_proj
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def loss(step):
        def shift(module, args, output):
            output = output.clone()
            output[0, 4, :16] += step * direction
            return output

        handle = projection.register_forward_hook(shift)
        with torch.no_grad():
            logits = source.model.double()(input_ids=ids.ids).logits[0, :-1]
        handle.remove()
        return torch.nn.functional.cross_entropy(logits, ids.ids[0, 1:], reduction="sum")

    slope = float((loss(1e-4) - loss(-1e-4)) / 2e-4)
    assert float(gradient @ direction) == pytest.approx(slope, rel=0.02)


def test_without_gradients_there_is_no_backward_pass(tmp_path):
    source = opened("llama")
    store = collect(source, read_geometry(source.model), windows(), tmp_path / "s", gradients=False)
    assert not store.has_gradients
    with safe_open(store.file(0, 0), framework="pt") as file:
        assert set(file.keys()) == {"key", "value"}
    with pytest.raises(SampleError, match="--objective"):
        store.load_gradients(0, "key")


def test_a_collection_continues_where_it_stopped(tmp_path):
    source, ids = opened("llama"), windows()
    geometry = read_geometry(source.model)
    whole = collect(source, geometry, ids, tmp_path / "whole", gradients=True)
    collect(source, geometry, ids, tmp_path / "cut", gradients=True)
    cut = SampleStore.open(tmp_path / "cut")
    cut.file(2, 1).unlink()
    cut.file(0, 2).unlink()
    kept = cut.file(0, 0).stat().st_mtime_ns
    with pytest.raises(SampleError, match="2 of 3 sequences missing"):
        SampleStore.open(tmp_path / "cut")
    again = collect(source, geometry, ids, tmp_path / "cut", gradients=True)
    assert again.file(0, 0).stat().st_mtime_ns == kept
    for layer in range(3):
        for sequence in range(3):
            first, second = whole.file(layer, sequence), again.file(layer, sequence)
            assert first.read_bytes() == second.read_bytes()


def test_other_text_or_another_model_does_not_mix_into_a_store(tmp_path):
    source = opened("llama")
    geometry = read_geometry(source.model)
    collect(source, geometry, windows(), tmp_path / "s", gradients=False)
    with pytest.raises(SampleError, match=r"data.* differ"):
        collect(source, geometry, windows(seed=1), tmp_path / "s", gradients=False)
    other = opened("llama", seed=1)
    with pytest.raises(SampleError, match="fingerprint"):
        collect(other, geometry, windows(), tmp_path / "s", gradients=False)


def test_nan_activations_are_named(tmp_path):
    source = opened("llama")
    geometry = read_geometry(source.model)
    with torch.no_grad():
        source.model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(SampleError, match="Layer 1 produced NaN"):
        collect(source, geometry, windows(), tmp_path / "s", gradients=False)


def test_a_damaged_sample_file_is_named(tmp_path):
    source = opened("llama")
    store = collect(source, read_geometry(source.model), windows(), tmp_path / "s", gradients=False)
    store.file(1, 1).write_bytes(b"junk")
    with pytest.raises(SampleError, match="seq-00001"):
        store.load(1, "key")


def test_half_precision_samples_are_stored_in_half_the_space(tmp_path):
    for dtype, size in ((torch.bfloat16, torch.float16), (torch.float32, torch.float32)):
        source = opened("llama", dtype=dtype)
        path = tmp_path / str(dtype)
        store = collect(source, read_geometry(source.model), windows(), path, gradients=True)
        with safe_open(store.file(0, 0), framework="pt") as file:
            assert file.get_tensor("key").dtype == size
            assert file.get_tensor("key_grad").dtype == torch.bfloat16


def test_activations_beyond_float16_are_kept_in_full(tmp_path):
    source = opened("llama", dtype=torch.bfloat16)
    store = collect(source, read_geometry(source.model), windows(), tmp_path / "s", gradients=False)
    large = torch.full((20, 2, 16), -1.5e5)
    store.write(0, 1, {"key": large, "value": torch.ones(20, 2, 16)}, None)
    assert torch.equal(store.load(0, "key")[20:40], large)

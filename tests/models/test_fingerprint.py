"""A fingerprint is the same for every load of one checkpoint and differs for all others."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cqtool.models.fingerprint import compare_fingerprints, fingerprint

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def tiny(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": 6} | changes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_survives_dtype_and_a_trip_through_json(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny()
    expected = json.loads(json.dumps(fingerprint(model)))
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert compare_fingerprints(expected, fingerprint(loaded)) is None


def test_16_bit_checkpoint_loaded_in_any_dtype() -> None:
    model = tiny().to(torch.bfloat16)
    expected = fingerprint(model)
    for dtype in (torch.float32, torch.float16):
        assert compare_fingerprints(expected, fingerprint(copy.deepcopy(model).to(dtype))) is None


def test_probe_holds_weights_of_the_model() -> None:
    model = tiny()
    before = fingerprint(model)["probe"]
    assert len(before) == 64
    moved = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(1)
            probe = fingerprint(model)["probe"]
            moved[name] = {i for i in range(64) if probe[i] != before[i]}
            before = probe
    assert moved["model.embed_tokens.weight"] == set(range(16))
    matrices = [places for name, places in moved.items() if "proj" in name or "lm_head" in name]
    norms = [places for name, places in moved.items() if "norm" in name]
    assert sorted(set().union(*matrices)) == list(range(16, 48))
    assert sum(map(bool, matrices)) == 32
    assert sorted(set().union(*norms)) == list(range(48, 64)) and sum(map(bool, norms)) >= 10


def test_other_weights_of_the_same_shape_differ() -> None:
    said = compare_fingerprints(fingerprint(tiny(0)), fingerprint(tiny(1)))
    assert said is not None
    assert "weights differ" in said


def test_fine_tune_of_two_projections_only_is_noticed() -> None:
    model = tiny()
    expected = fingerprint(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "v_proj" in name:  # what LoRA changes by default
                parameter.add_(0.03 * parameter.std() * torch.randn_like(parameter))
    assert "weights differ" in str(compare_fingerprints(expected, fingerprint(model)))


ROUNDINGS = [(torch.bfloat16,), (torch.float16,), (torch.bfloat16, torch.float16)]
ROUNDINGS += [(torch.float16, torch.bfloat16), (torch.float16, torch.bfloat16, torch.float32)]


def with_norms_near_one(seed: int) -> LlamaForCausalLM:
    """Norms that bfloat16 rounds by as much as it can, 0.39 %, and all alike."""
    model = tiny(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0039)
    return model


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [tiny, with_norms_near_one])
def test_rounding_in_any_order_is_no_difference(
    seed: int, make: Callable[[int], LlamaForCausalLM]
) -> None:
    model = make(seed)
    prints = [fingerprint(model)]
    for dtypes in ROUNDINGS:
        rounded = copy.deepcopy(model)
        for dtype in dtypes:
            rounded = rounded.to(dtype)
        prints.append(fingerprint(rounded))
    for one, other in itertools.permutations(prints, 2):
        assert compare_fingerprints(one, other) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["larger", "smaller", "noise"])
@pytest.mark.parametrize("seed", range(2))
def test_all_weights_moved_by_0_3_percent(seed: int, how: str, dtype: torch.dtype) -> None:
    model = tiny(seed)
    expected = [fingerprint(model), fingerprint(copy.deepcopy(model).to(torch.bfloat16))]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 1 + 0.003 * torch.randn(parameter.shape, generator=generator)
            parameter.mul_({"larger": 1.003, "smaller": 0.997, "noise": noise}[how])
    moved = fingerprint(model.to(dtype))
    assert [compare_fingerprints(one, moved) for one in expected] == ["its weights differ"] * 2


def test_other_norms_and_nothing_else() -> None:
    model = tiny()
    expected = fingerprint(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1.02)
    assert compare_fingerprints(expected, fingerprint(model)) == "its weights differ"


def test_strides_do_not_count_and_not_even_a_nan_breaks_it() -> None:
    model = tiny()
    expected = fingerprint(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.T.contiguous().T
    assert fingerprint(model) == expected
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    json.dumps(fingerprint(model), allow_nan=False)


def test_compiled_models_and_layers_have_the_same_fingerprint() -> None:
    model = tiny()
    expected = fingerprint(model)
    assert fingerprint(torch.compile(model)) == expected
    model.model.layers = torch.nn.ModuleList(map(torch.compile, model.model.layers))
    assert any("layers.0._orig_mod." in name for name, _ in model.named_parameters())
    assert fingerprint(model) == expected


def test_other_shape_or_type_is_named() -> None:
    expected = fingerprint(tiny())
    deeper = fingerprint(tiny(num_hidden_layers=5))
    assert "names or shapes" in str(compare_fingerprints(expected, deeper))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    assert compare_fingerprints(expected, fingerprint(gpt2)) == "its type is gpt2 instead of llama"


def test_tied_embeddings_and_a_model_without_vectors() -> None:
    tied = tiny(tie_word_embeddings=True)
    assert compare_fingerprints(fingerprint(tied), fingerprint(copy.deepcopy(tied))) is None
    untied = fingerprint(tiny(tie_word_embeddings=False))
    assert "names or shapes" in str(compare_fingerprints(fingerprint(tied), untied))
    for module in tied.modules():
        if "RMSNorm" in type(module).__name__:
            del module.weight
    assert len(fingerprint(tied)["probe"]) == 64


def index_digest(model: LlamaForCausalLM) -> str:
    """What the index of a sharded checkpoint says of its weights: their names, and their bytes."""
    weights = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    return json.dumps(weights, sort_keys=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 5}, {"vocab_size": 321}, {"hidden_size": 72},
        {"attention_bias": True}, {"intermediate_size": 97}, {"num_key_value_heads": 2},
        {"mlp_bias": True}, {"head_dim": 8},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_an_index_of_weights_would_tell_is_noticed(changes: dict[str, int]) -> None:
    base, other = tiny(), tiny(**changes)
    assert index_digest(base) != index_digest(other)
    said = compare_fingerprints(fingerprint(base), fingerprint(other))
    assert "names or shapes" in str(said)


def test_an_index_of_weights_would_not_tell_other_weights() -> None:
    assert index_digest(tiny(0)) == index_digest(tiny(1))
    assert compare_fingerprints(fingerprint(tiny(0)), fingerprint(tiny(1))) is not None


def roped(model_type: str = "default", theta: float = 10000.0, **more: float) -> dict[str, Any]:
    settings = {"rope_type": model_type, "rope_theta": theta, **more}
    return fingerprint(tiny(rope_parameters=settings))


@pytest.mark.parametrize(
    "other",
    [
        {"theta": 500000.0},
        {"theta": 11000.0},
        {"model_type": "linear", "factor": 2.0},
        {"model_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "model_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=str,
)  # fmt: skip
def test_another_rope_over_the_same_weights_is_noticed(other: dict[str, Any]) -> None:
    said = compare_fingerprints(roped(), roped(**other))
    assert said == "its RoPE has another base or scaling"
    assert compare_fingerprints(roped(**other), roped(**other)) is None
    # An artifact from before there was this field says nothing of it.
    older = {name: value for name, value in roped().items() if name != "rope"}
    assert compare_fingerprints(older, roped(**other)) is None


def test_the_numbers_of_a_rope_table_are_its_own() -> None:
    """head_dim 16, so 8 frequencies 10000 ** (-i / 8); i = 0, 2, 4 and 7."""
    frequencies = torch.tensor([1.0, 10000 ** -(2 / 8), 0.01, 10000 ** -(7 / 8)])
    expected = [1.0, *frequencies.to(torch.bfloat16).tolist()]
    assert roped()["rope"] == [expected]
    assert "rope" not in fingerprint(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2)))


def test_a_table_that_one_version_of_transformers_does_without() -> None:
    one = roped()
    both = one | {"rope": [*one["rope"], [1.0, 1.0, 0.5, 0.25, 0.125]]}
    assert compare_fingerprints(one, both) is None and compare_fingerprints(both, one) is None
    longer = one | {"rope": [[*one["rope"][0], 0.5]]}
    assert compare_fingerprints(one, longer) is not None


def test_text_that_changes_the_frequencies_does_not_change_the_fingerprint() -> None:
    settings = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny(rope_parameters=settings, max_position_embeddings=8)
    before, table = fingerprint(model), model.model.rotary_emb.inv_freq.clone()
    model(torch.arange(32)[None])
    assert not torch.equal(table, model.model.rotary_emb.inv_freq)
    assert fingerprint(model) == before


@pytest.mark.parametrize("number", [float("nan"), 1e308, -1e308, 10**300, 0])
def test_damaged_probe_never_matches(number: float) -> None:
    expected = fingerprint(tiny())
    assert compare_fingerprints(expected | {"probe": []}, expected) is not None
    assert compare_fingerprints(expected | {"probe": expected["probe"][:-1]}, expected) is not None
    assert compare_fingerprints(expected | {"probe": [[number] * 4] * 64}, expected) is not None


def test_import_needs_torch_only() -> None:
    code = (
        "import sys, cqtool.models.fingerprint\n"
        "print([m for m in ('faiss', 'datasets', 'typer', 'rich', 'pydantic', 'transformers') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

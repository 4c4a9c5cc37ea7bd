"""A fingerprint is the same for every load of one checkpoint and differs for all others."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
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
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(float(number + 1))
    probe = fingerprint(model)["probe"]
    assert len(probe) == 64
    names = [name for name, _ in model.named_parameters()]
    probed = {names[int(value) - 1] for value in probe}
    assert "model.embed_tokens.weight" in probed
    assert sum("layernorm" in name for name in probed) >= 10
    assert sum("proj" in name or "lm_head" in name for name in probed) == 32


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


def test_tolerance_lies_between_rounding_and_retraining() -> None:
    expected = fingerprint(tiny())
    for factor, same in [(1.008, True), (1.03, False)]:  # bfloat16's step is at most 0.8 %
        one_moved = [*expected["probe"][:-1], expected["probe"][-1] * factor]
        assert (compare_fingerprints(expected, expected | {"probe": one_moved}) is None) == same


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


def test_damaged_probe_never_matches() -> None:
    expected = fingerprint(tiny())
    assert compare_fingerprints(expected | {"probe": []}, expected) is not None
    nan = expected | {"probe": [float("nan")] * 64}
    assert compare_fingerprints(nan, expected) is not None


def test_import_needs_torch_only() -> None:
    code = (
        "import sys, cqtool.models.fingerprint\n"
        "print([m for m in ('faiss', 'datasets', 'typer', 'rich', 'pydantic', 'transformers') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

"""Fields that decide what is computed are told and compared; others never refuse a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_artifact import config as cq_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from zoo import CONFIGS, SHARING, random_ids, tiny

from cqtool.layout.config import read_config
from cqtool.models.config_fields import (
    _FIELDS,
    _NULL_TURNS_OFF,
    config_difference,
    config_fields,
)
from cqtool.models.fingerprint import compare_fingerprints, fingerprint

ALL_KINDS = ("gemma2", "gpt-oss", "granite", "gpt2", "falcon", "qwen3-moe", "cohere2", "stablelm")
ELSEWHERE = {"dtype", "model_type", "num_hidden_layers", "vocab_size", "output_attentions"}
"""Not what the weights are used for, or told by their shapes; with output_attentions PyTorch rounds
otherwise."""


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(random_ids(1, 40)).logits


def others(value: Any, name: str) -> list[Any]:
    """Values that might take the place of a field's."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [type(value)(value * 2), type(value)(value / 2), value + 0.01]
    if isinstance(value, str):
        return ["relu"] if "act" in name else []
    if isinstance(value, list):
        return [[other] * len(value) for other in value]
    return [True, 2, 0.5] if value is None else []


def variants(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Models of the same weights whose configuration differs in the field that is named."""
    fields = model.config.to_dict()
    for name in fields.keys() - ELSEWHERE:
        for value in others(fields[name], name):
            try:
                changed = AutoConfig.for_model(**(fields | {name: value}))
                other = AutoModelForCausalLM.from_config(changed)
                other.load_state_dict(model.state_dict())
            # Not a possible value, or one for other weights.
            except Exception:
                continue
            yield name, other.eval().requires_grad_(False)


@pytest.mark.parametrize("architecture", ALL_KINDS)
def test_no_field_that_changes_the_logits_goes_unnoticed(architecture: str) -> None:
    model = tiny(architecture)
    expected, before = fingerprint(model), logits(model)
    seen = set()
    for name, other in variants(model):
        try:
            changed = not torch.allclose(logits(other), before, rtol=0, atol=1e-6)
        except Exception:  # such as more experts for a token than there are
            continue
        if changed:
            seen.add(name)
            assert compare_fingerprints(expected, fingerprint(other)) is not None, name
    assert len(seen) >= 3


@pytest.mark.parametrize("architecture", CONFIGS | SHARING)
def test_saved_and_loaded_again_nothing_differs(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    expected = json.loads(json.dumps(fingerprint(model), allow_nan=False))
    model.save_pretrained(tmp_path)
    for options in ({"dtype": torch.bfloat16}, {"attn_implementation": "eager"}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert config_fields(loaded) == expected["config"]
        assert compare_fingerprints(expected, fingerprint(loaded)) is None
    assert len(expected["config"]) >= 3


def test_the_document_lists_every_field() -> None:
    text = (Path(__file__).parents[2] / "docs" / "artifact-format.md").read_text("utf-8")
    section = text.split("#### Fields of `config`\n")[1].split("\n#### ")[0]
    table, notes = section.split("| --- | --- |\n")[1].split("\n\n", 1)
    assert re.findall(r"`(\w+)`", table) == list(_FIELDS)
    assert set(re.findall(r"`(\w+)`", notes.split(":")[0])) == _NULL_TURNS_OFF


def test_readers_take_what_is_told(calibration: Path) -> None:
    told = fingerprint(tiny("gemma2"))
    value = cq_config()
    value["base_model"]["fingerprint"] = told
    (calibration / "cq_config.json").write_text(json.dumps(value))
    assert read_config(calibration).base_model.fingerprint == told


def test_what_decides_nothing_is_not_told() -> None:
    model = tiny("qwen2")
    told = config_fields(model)
    for name, value in {
        "transformers_version": "4.0", "use_cache": False, "bos_token_id": 77, "new_field": 1,
        "attention_dropout": 0.5, "initializer_range": 3.0, "max_position_embeddings": 7,
        "_name_or_path": "elsewhere", "architectures": ["Other"], "dtype": "float64",
    }.items():  # fmt: skip
        setattr(model.config, name, value)
    assert config_fields(model) == told


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        (
            {"rms_norm_eps": 1e-5},
            {"rms_norm_eps": 1e-6},
            "its rms_norm_eps is 1e-06 instead of 1e-05",
        ),
        ({"alibi": True}, {"alibi": False}, "its alibi is false instead of true"),
        (
            {"hidden_act": "silu"},
            {"hidden_act": "relu"},
            'its hidden_act is "relu" instead of "silu"',
        ),
        (
            {"sliding_window": None},
            {"sliding_window": 8},
            "its sliding_window is 8 instead of null",
        ),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, "its a is 2 instead of 1"),
        ({"a": ["x", "y"]}, {"a": ["x", "z"]}, 'its a[1] is "z" instead of "y"'),
        ({"a": [1, 2]}, {"a": [1]}, "its a has 1 entries instead of 2"),
        ({"a": [1, 2]}, {"a": 1}, "its a is 1 instead of a list of 2"),
    ],
)
def test_the_first_difference_is_named(
    one: dict[str, Any], other: dict[str, Any], says: str
) -> None:
    assert config_difference(one, other) == says


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"b": 2}),
        ({}, {"a": 1}),
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": torch.tensor(1e-5).item()}),  # of a GGUF file
        ({"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ({"hidden_act": "swish"}, {"hidden_act": "silu"}),
        ({"logit_scale": 1}, {"logit_scale": 1.0}),
    ],
)
def test_what_versions_and_formats_write_otherwise_is_the_same(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert config_difference(one, other) is None and config_difference(other, one) is None


def test_a_window_that_no_layer_has_is_none() -> None:
    model = tiny("qwen2")
    model.config.sliding_window = 4096
    assert config_fields(model)["sliding_window"] is None
    model.config.layer_types = None
    model.config.use_sliding_window = False
    assert config_fields(model)["sliding_window"] is None
    model.config.use_sliding_window = True
    assert config_fields(model)["sliding_window"] == 4096


def test_values_that_differ_among_layers_are_a_list() -> None:
    model = tiny("gemma4")
    before = config_fields(model)
    assert before["head_dim"] == [16, 16, 32] * 2
    model.config.per_layer_config = {layer: {"head_dim": 32} for layer in (1, 2, 5)}
    assert config_difference(before, config_fields(model)) == "its head_dim[1] is 32 instead of 16"


def test_a_value_that_json_or_the_format_lacks_is_not_told() -> None:
    model = tiny("llama")
    for value in (float("inf"), {"a": 1}, [[1]], "x" * 101, "\x1b[2J", None):
        model.config.logit_scale = value
        assert "logit_scale" not in config_fields(model)
    model.config.logit_scale = (1.0, 2.0)
    assert config_fields(model)["logit_scale"] == [1.0, 2.0]

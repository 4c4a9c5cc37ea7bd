"""Named shapes are the models they are named after; other models' shapes are read off them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cqtool.bench.models import (
    config_of,
    count_parameters,
    find_target,
    random_model,
    with_layers,
)
from cqtool.bench.shapes import SHAPES
from cqtool.errors import EnvironmentProblem, ModelError, RecipeError
from cqtool.models.probe import read_geometry

# As the models' own safetensors files have them on the Hub.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-3-270m": 268_098_176,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
}
# Bytes of an fp16 cache of one token, by hand: 2 * layers * kv heads * head_dim * 2.
BYTES_A_TOKEN = {"llama-2-7b": 524_288, "llama-3.1-8b": 131_072, "qwen3-8b": 147_456}


def test_every_shape_but_tiny_is_a_model_that_exists() -> None:
    assert set(SHAPES) == {*PARAMETERS, "tiny"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_shape_has_as_many_parameters_as_the_released_model(name: str) -> None:
    assert count_parameters(config_of(SHAPES[name])) == PARAMETERS[name]


@pytest.mark.parametrize("name", BYTES_A_TOKEN)
def test_a_token_takes_as_many_bytes_as_in_the_released_model(name: str) -> None:
    shape = SHAPES[name]
    assert 2 * shape.layers * shape.kv_heads * shape.head_dim * 2 == BYTES_A_TOKEN[name]


def test_a_model_of_a_shape_has_its_geometry_and_finite_outputs() -> None:
    target = find_target("Tiny")
    model = random_model(target.config, torch.float32, torch.device("cpu"))
    geometry, shape = read_geometry(model), target.shape
    assert geometry.query_heads == shape.heads
    assert len(geometry.layers) == shape.layers
    assert {(layer.kv_heads, layer.key_dim) for layer in geometry.layers} == {(2, 64)}
    logits = model(torch.arange(7)[None]).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_gemma_slides_in_five_layers_of_six_with_a_rope_of_their_own() -> None:
    config = config_of(SHAPES["gemma-3-270m"])
    assert [kind == "full_attention" for kind in config.layer_types[:6]] == [False] * 5 + [True]
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert with_layers(config, 3).layer_types == config.layer_types[:3]
    assert config.num_hidden_layers == 18


def test_a_model_folder_gives_its_shape_but_not_its_path(tiny_model_dir: Path) -> None:
    shape = find_target(str(tiny_model_dir)).shape
    assert shape.name == tiny_model_dir.name
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (2, 4, 2, 16)
    assert (shape.hidden, shape.intermediate, shape.rope_theta) == (64, 128, 1e4)


def test_an_unknown_shape_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"no shape 'llama-9'.*llama-2-7b.*qwen3-8b"):
        find_target("llama-9")


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Cannot take the shape of .*config\.json"):
        find_target(str(tmp_path))


def test_weights_larger_than_the_memory_are_refused_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cqtool.bench.models.free_memory", lambda device: 10 << 30)
    config = config_of(SHAPES["llama-2-7b"])
    with pytest.raises(EnvironmentProblem, match=r"12\.6 GiB and 10\.0 GiB are free on cpu"):
        random_model(config, torch.float16, torch.device("cpu"))

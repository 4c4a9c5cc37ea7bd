"""Layers with codes of their own, from the recipe to the cache of an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_pseudo_text
from typer.testing import CliRunner
from zoo import tiny

from cqtool.cache import CQCache
from cqtool.cli.app import app
from cqtool.codebooks.calibrate import calibrate
from cqtool.errors import ArtifactError, RecipeError, SampleError
from cqtool.layout.config import read_config
from cqtool.models.load import OpenedModel, open_model
from cqtool.quality import CheckSettings, check
from cqtool.recipe import Recipe, load_recipe

BITS = (2.0, 1.0, 1.5)
"""Of the three layers below: 4 channels and 8 bits, 8 and 8, and one of each."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_pseudo_text(3000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tiny_tokenizer) -> OpenedModel:
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", vocabulary=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return open_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def recipe(text) -> Callable[..., Recipe]:
    def made(**changes) -> Recipe:
        settings = {
            "calibration": {"dataset": str(text), "sequences": 5, "sequence_length": 60},
            "kmeans.iterations": 2,
            "layers": {"0": "cq-4c8b", "2": {"key": "cq-8c8b", "value": "cq-4c8b"}},
            "window": 4,
            "sinks": 1,
        }
        return load_recipe("cq-8c8b", settings | changes)

    return made


@pytest.fixture(scope="module")
def calibration(opened, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "calibration"
    calibrate(opened, recipe(), out)
    return out


def test_every_layer_has_its_own_codes(opened, calibration, text):
    cache = CQCache.from_pretrained(calibration, opened.model)
    found = [
        (one.key.bits_per_channel + one.value.bits_per_channel) / 2 for one in cache.format.layers
    ]
    assert found == list(BITS)
    config = read_config(calibration)
    assert config.cache.name == "cq-8c8b-mixed"
    assert config.bits_per_channel == pytest.approx(sum(BITS) / 3)
    assert config.rate == "1.5 bits per channel"
    opened.model.generate(torch.arange(3, 27)[None], past_key_values=cache, max_new_tokens=4)
    channels = config.geometry.channels_per_token
    stored = config.code_bytes_per_token
    assert stored == channels * config.bits_per_channel / 8

    evaluation = CheckSettings(
        dataset=str(text),
        split="test",
        windows=1,
        window_length=40,
        compare=("cq-8c8b-mixed:uniform", "cq-8c8b", "cq-8c8b:paper"),
    )
    rows = check(opened, calibration, evaluation).rows
    assert [row.bits_per_channel for row in rows[1:]] == pytest.approx([1.5, 1.5, 1.0, 1.0])


def test_more_bits_in_a_layer_are_used(opened, calibration, recipe, tmp_path):
    """The layers that stay as they were have the very same codebooks."""
    calibrate(opened, recipe(layers={}), tmp_path / "plain")
    mixed, plain = (
        CQCache.from_pretrained(folder, opened.model).format.layers
        for folder in (calibration, tmp_path / "plain")
    )
    assert torch.equal(mixed[1].key.codebook, plain[1].key.codebook)
    assert torch.equal(mixed[2].key.codebook, plain[2].key.codebook)
    assert mixed[0].key.codebook.shape[1] == 2 * plain[0].key.codebook.shape[1]


def test_it_is_released_as_any_other(calibration, tmp_path):
    run = CliRunner().invoke(app, ["export", str(calibration), "--out", str(tmp_path / "artifact")])
    assert run.exit_code == 0, run.output
    card = (tmp_path / "artifact" / "README.md").read_text()
    assert "in 1.5 bits per channel" in card
    assert "| cq-4c8b | 2 | 0 | 0, 2 |" in card
    described = CliRunner().invoke(app, ["inspect", str(tmp_path / "artifact"), "--json"])
    assert json.loads(described.stdout)["bits_per_channel"] == 1.5


@pytest.mark.parametrize(
    ("layers", "raised", "says"),
    [
        ({"2-3": "cq-4c8b"}, RecipeError, "layers 2 to 3, but this model has 3 layers"),
        ({"1": "cq-5c8b"}, RecipeError, "couples 5 channels"),
        ({"1": "cq-4c10b"}, SampleError, "1024 centroids"),
    ],
)
def test_codes_that_do_not_fit_are_refused_before_sampling(
    layers, raised, says, opened, recipe, tmp_path
):
    with pytest.raises(raised, match=says):
        calibrate(opened, recipe(layers=layers), tmp_path / "out")


def test_a_file_with_layers_that_the_model_lacks_is_refused(calibration, tmp_path):
    text = (calibration / "cq_config.json").read_text()
    wrong = text.replace('"last": 2', '"last": 7')
    assert wrong != text
    (tmp_path / "cq_config.json").write_text(wrong)
    with pytest.raises(ArtifactError, match="layers 2 to 7 of a model of 3 layers"):
        read_config(tmp_path)

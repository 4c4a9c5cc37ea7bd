"""Budgets of bits over single heads, from measuring them to a calibration with the codes chosen."""

from __future__ import annotations

import json
import random
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from cqtool.cli.app import app
from cqtool.errors import ArtifactError
from cqtool.files import write_json
from cqtool.geometry import NO_ROTATION, LayerGeometry, ModelGeometry
from cqtool.quality.allocate import allocate, part_sizes, recipe_fields, usable_codes
from cqtool.quality.costs import Curve, Part, measured_costs
from cqtool.recipe import load_recipe
from cqtool.spec import KINDS, CQSpec
from tests.synthetic_artifact import KV_HEADS, LAYERS, edit_json, write_calibration

TEXT = {"evaluation": {"digest": "cd" * 32}, "model": "some-org/Tiny-Model"}
LOW, MIDDLE, HIGH = (CQSpec.parse(name) for name in ("cq-8c6b", "cq-8c8b", "cq-4c8b"))


def geometry(*heads: int, key: int = 64, value: int = 64) -> ModelGeometry:
    layers = [LayerGeometry(count, key, value, None, NO_ROTATION) for count in heads]
    return ModelGeometry(8, tuple(layers))


def random_costs(parts: list[Part], seed: int) -> dict[Part, Curve]:
    """Two measurements of each part, whose heads differ by orders of magnitude."""
    draw = random.Random(seed)
    costs = {}
    for part in parts:
        kl = 10 ** draw.uniform(-4, -1)
        costs[part] = Curve.through([(1.0, kl), (2.0, kl / draw.uniform(1.5, 7.0))])
    return costs


@pytest.mark.parametrize("seed", range(4))
def test_no_other_choice_for_the_heads_is_modelled_to_cost_less(seed: int) -> None:
    # Layers of 1 and 2 heads, and keys with twice the channels of values.
    sizes = part_sizes(geometry(1, 2, key=64, value=32), by_head=True)
    assert list(sizes) == [Part(0, "key", 0), Part(0, "value", 0)] + [
        Part(1, kind, head) for kind in KINDS for head in (0, 1)
    ]
    costs, codes = random_costs(list(sizes), seed), [LOW, MIDDLE, HIGH]
    channels = {part: 64 if part.kind == "key" else 32 for part in sizes}
    for bits in (0.75, 1.0, 1.3, 1.7):
        # All these codes take whole bytes, so that a channel costs what a code's name says.
        rates = [
            [code.bits_per_channel for code in one] for one in product(codes, repeat=len(costs))
        ]
        within = [
            sum(curve.kl(rate) for curve, rate in zip(costs.values(), one, strict=True))
            for one in rates
            if sum(rate * n for rate, n in zip(one, channels.values(), strict=True))
            <= bits * sum(channels.values()) + 1e-9
        ]
        chosen = allocate(costs, sizes, codes, bits)
        spent = sum(code.bits_per_channel * channels[part] for part, code in chosen.items())
        assert spent <= bits * sum(channels.values()) + 1e-9
        found = sum(costs[part].kl(code.bits_per_channel) for part, code in chosen.items())
        assert found == pytest.approx(min(within))


def test_heads_of_a_large_model_are_chosen_in_seconds() -> None:
    sizes = part_sizes(geometry(*[8] * 32, key=128, value=128), by_head=True)
    assert len(sizes) == 512
    costs, codes = random_costs(list(sizes), 0), usable_codes(None, {128}, "token")
    start = time.monotonic()
    chosen = allocate(costs, sizes, codes, 2.5)
    assert time.monotonic() - start < 10
    spent = sum(sizes[part].bits(code) for part, code in chosen.items()) / (512 * 128)
    # No two parts are alike in cost, so that all but the last step of the budget finds a buyer.
    assert 2.49 < spent <= 2.5


def test_a_list_names_the_codes_of_heads_that_differ_and_a_name_those_that_do_not() -> None:
    keys = [[LOW] * 3, [HIGH, LOW, MIDDLE], [LOW] * 3, [LOW] * 3, [LOW, LOW, HIGH], [LOW] * 3]
    values = [[LOW] * 3, [MIDDLE] * 3, [HIGH] * 3, [HIGH] * 3, [LOW, LOW, HIGH], [LOW] * 3]
    chosen = {
        Part(layer, kind, head): code
        for kind, codes in zip(KINDS, (keys, values), strict=True)
        for layer, row in enumerate(codes)
        for head, code in enumerate(row)
    }
    fields = recipe_fields(chosen)
    assert fields == {
        "format": "cq-8c6b",
        "layers": {
            "1": {"key": ["cq-4c8b", "cq-8c6b", "cq-8c8b"], "value": "cq-8c8b"},
            "2-3": {"key": "cq-8c6b", "value": "cq-4c8b"},
            "4": ["cq-8c6b", "cq-8c6b", "cq-4c8b"],
        },
    }
    # The order of the parts is none of its business.
    assert recipe_fields(dict(reversed(chosen.items()))) == fields
    recipe = load_recipe("cq-8c8b", fields)
    for (layer, kind, head), code in chosen.items():
        own = recipe.spec.of_head(layer, head).code(kind)
        assert own.name == code.name
    written = recipe.model_dump(mode="json")
    assert written["layers"] == fields["layers"] and written["format"] == fields["format"]


def test_layers_that_all_have_lists_leave_a_format_that_most_heads_have() -> None:
    chosen = {
        Part(layer, kind, head): HIGH if head == layer else LOW
        for layer in (0, 1)
        for kind in KINDS
        for head in (0, 1, 2)
    }
    high, low = HIGH.name, LOW.name
    assert recipe_fields(chosen) == {
        "format": low,
        "layers": {"0": [high, low, low], "1": [low, high, low]},
    }


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    """With a report in which the values of head 1 of layer 0 cost far more than all else."""
    folder = write_calibration(tmp_path / "calibration")
    edit_json(
        folder / "cq_config.json",
        lambda values: values.update(recipe=load_recipe("cq-8c8b").model_dump(mode="json")),
    )
    write_report(folder / "reports" / "quality.json")
    return folder


def write_report(path: Path, *names: str, **changes: Any) -> Path:
    figures = {"bits_per_channel": 1.0, "kl": 0.01, "kl_se": None}
    heads = [
        {"layer": layer, "kind": kind, "head": head, **figures}
        for layer in range(LAYERS)
        for kind in KINDS
        for head in range(KV_HEADS)
    ]
    heads[3]["kl"] = 0.5
    layers = [
        {"layer": layer, "kind": kind, **figures} for layer in range(LAYERS) for kind in KINDS
    ]
    lists = {"by_head": heads, "by_layer": layers}
    path.parent.mkdir(exist_ok=True)
    kept = {name: lists[name] for name in names or ("by_head",)}
    write_json(path, {**TEXT, "by_layer": [], **kept, **changes})
    return path


def said(calibration: Path, *words: str, code: int) -> str:
    done = CliRunner().invoke(app, ["allocate", str(calibration), *words])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def test_the_head_that_costs_the_most_gets_the_most(calibration: Path) -> None:
    words = ["--bits", "1.125", "--codes", "cq-8c8b,cq-4c8b", "--json"]
    done = CliRunner().invoke(app, ["allocate", str(calibration), *words])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["bits_per_channel"] == 1.125
    assert made["recipe"]["format"] == "cq-8c8b"
    assert made["recipe"]["layers"] == {"0": {"key": "cq-8c8b", "value": ["cq-8c8b", "cq-4c8b"]}}
    assert made["recipe"]["description"] == "1.125 bits per channel, by head."
    # 3.2 times less for each bit more than measured.
    assert made["kl_expected"] == pytest.approx(7 * 0.01 + 0.5 / 3.2)
    table = said(calibration, *words[:4], "--out", str(calibration.parent / "new.yaml"), code=0)
    assert "heads' keys" in table and "heads' values" in table


def test_reports_by_layer_and_by_head_do_not_mix(calibration: Path) -> None:
    folder = calibration.parent
    heads = calibration / "reports" / "quality.json"
    layers = write_report(folder / "layers.json", "by_layer")
    both = write_report(folder / "both.json", "by_layer", "by_head")
    for files in ([heads, layers], [layers, heads], [both, layers, heads]):
        words = [word for file in files for word in ("--report", str(file))]
        sentence = said(calibration, "--bits", "1", *words, code=2)
        assert f"{layers} says what single layers cost, and {heads} what single heads do" in (
            sentence
        )
        assert "give reports of --by-layer only, or of --by-head only" in sentence
    # One that knows both goes with either, and alone it is heads.
    assert [part.head for part in measured_costs([both, layers])] == [None] * 2 * LAYERS
    for files in ([both, heads], [both]):
        assert measured_costs(files).keys() == measured_costs([heads]).keys()
    assert len(measured_costs([heads])) == 2 * LAYERS * KV_HEADS


def test_a_recipe_whose_heads_share_codebooks_is_refused(calibration: Path) -> None:
    edit_json(
        calibration / "cq_config.json", lambda values: values["recipe"].update(sharing="heads")
    )
    sentence = said(calibration, "--bits", "1", code=2)
    assert "share their codebooks" in sentence
    assert "give reports of --by-layer, or calibrate with sharing: none" in sentence
    layers = write_report(calibration.parent / "layers.json", "by_layer")
    said(calibration, "--bits", "1", "--report", str(layers), code=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head": -1}, "'head' must be a whole number of at least 0"),
        ({"head": None}, "'head' must be a whole number of at least 0"),
        ({"layer": 0, "kind": "key", "head": 1}, "the key of head 1 of layer 0 stands there twice"),
        ({"kl": 1e300}, "the value of head 1 of layer 1 has figures that cannot be"),
    ],
)
def test_a_damaged_report_by_head_is_refused(
    calibration: Path, change: dict[str, Any], sentence: str
) -> None:
    report = calibration / "reports" / "quality.json"
    edit_json(report, lambda values: values["by_head"][-1].update(change))
    with pytest.raises(ArtifactError) as caught:
        measured_costs([report])
    assert sentence in str(caught.value) and "--by-head" in str(caught.value)


def test_a_report_of_other_heads_is_refused(calibration: Path) -> None:
    report = calibration / "reports" / "quality.json"
    edit_json(report, lambda values: values.update(by_head=values["by_head"][:-1]))
    sentence = said(calibration, "--bits", "1", code=2)
    assert "other layers or heads" in sentence and "with --by-head on this" in sentence
    other = write_report(calibration.parent / "whole.json")
    with pytest.raises(ArtifactError, match="other layers or heads"):
        measured_costs([report, other])
    changed = write_report(calibration.parent / "text.json", evaluation={"digest": "ab"})
    with pytest.raises(ArtifactError, match="check --by-head` on the same text"):
        measured_costs([other, changed])


def test_from_calibration_to_calibration_with_codes_by_head(
    tiny_model_dir: Path, tiny_text_file: Path, tmp_path: Path
) -> None:
    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.stdout

    recipe, mixed = tmp_path / "first.yaml", tmp_path / "mixed.yaml"
    text = (
        "name: first\nformat: CODE\nwindow: 8\nsinks: 2\nkmeans: {iterations: 5}\n"
        f"calibration: {{dataset: {tiny_text_file}, split: train, sequences: 8,"
        " sequence_length: 64}\n"
        f"evaluation: {{dataset: {tiny_text_file}, split: test, windows: 2, window_length: 64}}\n"
    )
    reports = []
    for code in ("cq-4c4b", "cq-2c4b"):
        first = tmp_path / code
        recipe.write_text(text.replace("CODE", code))
        run("calibrate", tiny_model_dir, "--recipe", recipe, "--out", first)
        printed = run("check", tiny_model_dir, first, "--by-head", "--mode", "prefill")
        assert "the 8 costliest of 8" in " ".join(printed.split())
        reports += ["--report", first / "reports" / "quality-prefill.json"]
    words = ["--bits", 1.625, "--codes", "cq-4c4b,cq-2c4b", "--out", mixed]
    run("allocate", tmp_path / "cq-4c4b", *reports, *words)
    spec = load_recipe(str(mixed)).spec
    parts = [Part(layer, kind, head) for layer in (0, 1) for kind in KINDS for head in (0, 1)]
    names = [spec.of_head(part.layer, part.head or 0).code(part.kind).name for part in parts]
    # An odd number of heads, so that those of some layer differ.
    assert names.count("cq-2c4b") == 5
    assert any(len(one.codes(kind)) > 1 for one in spec.layers for kind in KINDS)
    again = tmp_path / "again"
    run("calibrate", tiny_model_dir, "--recipe", mixed, "--out", again)
    tensors = load_file(again / "codebooks.safetensors")
    for (layer, kind, head), name in zip(parts, names, strict=True):
        own = tensors.get(f"layers.{layer}.{kind}.heads.{head}.codebook")
        table = tensors[f"layers.{layer}.{kind}.codebook"][head] if own is None else own[0]
        channels, bits = CQSpec.parse(name).channels, CQSpec.parse(name).bits
        assert table.shape == (16 // channels, 2**bits, channels)
    # What has codes by head is measured by head as well, each at its own rate.
    told = json.loads(run("check", tiny_model_dir, again, "--by-head", "--json"))
    rates = [CQSpec.parse(name).bits_per_channel for name in names]
    assert [one["bits_per_channel"] for one in told["by_head"]] == rates
    assert told["rows"][1]["bits_per_channel"] == 1.625

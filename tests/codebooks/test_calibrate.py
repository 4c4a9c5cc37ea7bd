"""A calibration is whole or not there, resumes to the same bytes, and says what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cqtool.cache import CQCache
from cqtool.codebooks import calibrate as module
from cqtool.codebooks.calibrate import calibrate, partial_folder
from cqtool.codebooks.engines import FaissEngine, make_engine
from cqtool.codebooks.grouping import choose_groups
from cqtool.errors import ArtifactError, DataError, EnvironmentProblem, RecipeError, SampleError
from cqtool.files import sha256_file
from cqtool.geometry import NO_ROTATION
from cqtool.models.load import open_model
from cqtool.models.probe import read_geometry
from cqtool.recipe import load_recipe
from cqtool.sampling import SampleStore


def small_recipe(text: Path, **overrides):
    values = {
        "calibration.dataset": str(text),
        "calibration.sequences": 4,
        "calibration.sequence_length": 64,
        "kmeans.iterations": 10,
        "format": "cq-8c4b",
        "window": 8,
        "sinks": 2,
    }
    return load_recipe("cq-8c8b", values | {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    return open_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def finished(opened, tiny_text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "cal"
    calibrate(opened, small_recipe(tiny_text_file), out)
    return out


def test_the_folder_holds_what_the_recipe_asked_for(finished, opened, tiny_text_file):
    recipe = small_recipe(tiny_text_file)
    codebooks = load_file(finished / "codebooks.safetensors")
    assert set(codebooks) == {
        f"layers.{layer}.{kind}.codebook" for layer in range(2) for kind in ("key", "value")
    }
    assert {(tuple(t.shape), t.dtype) for t in codebooks.values()} == {
        ((2, 2, 16, 8), torch.float16)
    }
    config = json.loads((finished / "cq_config.json").read_text())
    assert config["recipe"] == recipe.model_dump(mode="json")
    assert config["cache"] == recipe.spec.to_json()
    record = json.loads((finished / "calibration.json").read_text())
    assert record["engine_detail"].startswith("faiss ") and record["engine_detail"].endswith("CPU")
    assert set(record["timings"]) == {"text", "sampling", "fitting"}
    assert record["data"]["digest"] == config["calibration"]["digest"]
    assert len(record["objective_values"]) == 2
    assert SampleStore.open(finished).tokens == 256
    assert not partial_folder(finished).exists()
    assert [p.name for p in finished.parent.iterdir()] == [finished.name]


def test_generation_runs_on_it_in_two_lines(finished, opened):
    cache = CQCache.from_pretrained(finished, opened.model)
    ids = opened.tokenizer("Some words to begin with", return_tensors="pt")
    out = opened.model.generate(**ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]
    assert cache.layers[0].coded["key"]["codes"].shape[-1] == 1


def test_uniform_and_fisher_differ_and_uniform_keeps_no_gradients(
    finished, opened, tiny_text_file, tmp_path
):
    calibrate(opened, small_recipe(tiny_text_file, objective="uniform"), tmp_path / "cal")
    assert not SampleStore.open(tmp_path / "cal").has_gradients
    first, second = (
        load_file(folder / "codebooks.safetensors") for folder in (finished, tmp_path / "cal")
    )
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_the_same_recipe_gives_the_same_bytes(finished, opened, tiny_text_file, tmp_path):
    calibrate(opened, small_recipe(tiny_text_file), tmp_path / "cal", keep_samples=False)
    assert not (tmp_path / "cal" / "samples").exists()
    for name in ("codebooks.safetensors", "cq_config.json"):
        assert (tmp_path / "cal" / name).read_bytes() == (finished / name).read_bytes()


def test_a_failure_leaves_the_good_calibration_in_place(
    opened, tiny_text_file, tmp_path, monkeypatch
):
    out = tmp_path / "cal"
    calibrate(opened, small_recipe(tiny_text_file), out)
    before = {p: sha256_file(p) for p in out.rglob("*") if p.is_file()}

    def broken(*args):
        raise RuntimeError("boom")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_codebooks", broken)
        with pytest.raises(RuntimeError, match="boom"):
            calibrate(opened, small_recipe(tiny_text_file, calibration__seed=1), out, force=True)
    assert {p: sha256_file(p) for p in out.rglob("*") if p.is_file()} == before
    # What was done is not lost, and needs saying so to be thrown away.
    with pytest.raises(ArtifactError, match="interrupted"):
        calibrate(opened, small_recipe(tiny_text_file, calibration__seed=1), out)
    calibrate(opened, small_recipe(tiny_text_file, calibration__seed=1), out, resume=True)
    assert sha256_file(out / "codebooks.safetensors") != before[out / "codebooks.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cal"]


def test_a_finished_calibration_is_not_replaced_unasked(finished, opened, tiny_text_file):
    before = sha256_file(finished / "codebooks.safetensors")
    with pytest.raises(ArtifactError, match="finished calibration"):
        calibrate(opened, small_recipe(tiny_text_file, calibration__seed=3), finished)
    assert sha256_file(finished / "codebooks.safetensors") == before


def test_resuming_with_another_recipe_is_refused(opened, tiny_text_file, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(module, "fit_codebooks", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(opened, small_recipe(tiny_text_file), tmp_path / "cal")
    with pytest.raises(SampleError, match=r"data.*differ"):
        calibrate(
            opened, small_recipe(tiny_text_file, calibration__seed=9), tmp_path / "cal", resume=True
        )


def test_a_damaged_intermediate_fit_is_fitted_again(
    finished, opened, tiny_text_file, tmp_path, monkeypatch
):
    recipe = small_recipe(tiny_text_file)
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_codebooks", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(opened, recipe, tmp_path / "cal")
    (fit,) = partial_folder(tmp_path / "cal").glob("fits/*/layer-001.safetensors")
    fit.write_bytes(fit.read_bytes()[:100])
    calibrate(opened, recipe, tmp_path / "cal", resume=True)
    name = "codebooks.safetensors"
    assert (tmp_path / "cal" / name).read_bytes() == (finished / name).read_bytes()


def test_bad_input_is_refused_before_any_work(opened, tiny_text_file, tmp_path):
    out = tmp_path / "cal"
    cases = [
        (RecipeError, "couple", {"format": "cq-3c8b"}),
        (SampleError, "1024 centroids", {"format": "cq-8c10b"}),
        (DataError, "more text", {"calibration__sequences": 100_000}),
        (DataError, "nowhere.txt", {"calibration__dataset": str(tmp_path / "nowhere.txt")}),
    ]
    for error, words, overrides in cases:
        with pytest.raises(error, match=words):
            calibrate(opened, small_recipe(tiny_text_file, **overrides), out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(opened, tiny_text_file, tmp_path, monkeypatch):
    def full(tensors, path, *args):
        with Path("/dev/full").open("wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr("cqtool.sampling.store.save_file", full)
    with pytest.raises(EnvironmentProblem, match="disk is full"):
        calibrate(opened, small_recipe(tiny_text_file), tmp_path / "cal")
    assert not (tmp_path / "cal").exists()


def command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from cqtool.cli import main; main()",
        *("calibrate", str(model), "--recipe", "cq-8c8b", "--out", str(out)),
        *("--dataset", str(text), "--sequences", "6", "--sequence-length", "64"),
        *("--iterations", "20", "--device", "cpu", "--quiet", *more),
    ]


def test_two_at_once_into_one_folder(tiny_model_dir, tiny_text_file, tmp_path):
    out = tmp_path / "cal"
    processes = [
        subprocess.Popen(
            command(tiny_model_dir, tiny_text_file, out, "--force"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    ends = [(p.communicate(timeout=300)[1].decode(), p.returncode) for p in processes]
    codes = sorted(code for _, code in ends)
    # Either the second was told to wait, or it came so late that it replaced the first.
    assert codes in ([0, 2], [0, 0])
    if codes == [0, 2]:
        (message,) = [text for text, code in ends if code == 2]
        assert "Another cqtool" in message
    assert (out / "codebooks.safetensors").is_file()


def test_chosen_groups_are_written_resumed_and_loaded(
    opened, tiny_text_file, tmp_path, monkeypatch
):
    recipe = small_recipe(tiny_text_file, grouping="pairs")
    out, other, name = tmp_path / "cal", tmp_path / "other", "codebooks.safetensors"
    calibrate(opened, recipe, out)
    tensors = load_file(out / name)
    store, geometry = SampleStore.open(out), read_geometry(opened.model)
    for layer in range(2):
        rotation = geometry.layers[layer].rotation
        for kind, grouping in (("key", "pairs"), ("value", "correlation")):
            stored = tensors[f"layers.{layer}.{kind}.channels"]
            assert stored.dtype == torch.int16
            turned = rotation if kind == "key" else NO_ROTATION
            expected = choose_groups(store.load(layer, kind), grouping, 8, turned)
            assert torch.equal(stored.long(), expected)
    assert len(tensors) == 8
    cache = json.loads((out / "cq_config.json").read_text())["cache"]
    assert (cache["key"]["grouping"], cache["value"]["grouping"]) == ("pairs", "correlation")
    codec = CQCache.from_pretrained(out, opened.model).layers[1].codecs.value
    assert torch.equal(codec.channels, tensors["layers.1.value.channels"].long())

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_codebooks", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(opened, recipe, other)
    with monkeypatch.context() as patched:
        patched.setattr(module, "fit_layer", lambda *a: pytest.fail("fitted again"))
        calibrate(opened, recipe, other, resume=True)
    assert (other / name).read_bytes() == (out / name).read_bytes()


def test_fits_of_other_groups_are_not_taken_for_ones_own(opened, tiny_text_file, tmp_path):
    plain, grouped = (
        small_recipe(tiny_text_file, grouping=how) for how in ("contiguous", "correlation")
    )
    calibrate(opened, plain, tmp_path / "cal")
    store, geometry = SampleStore.open(tmp_path / "cal"), read_geometry(opened.model)
    engine, work = FaissEngine(5, "kmeans++"), tmp_path / "fits"
    fits = [
        module.fit_codebooks(store, geometry, recipe, engine, work) for recipe in (plain, grouped)
    ]
    assert fits[0][0].channels == {"key": None, "value": None}
    assert fits[1][0].channels["key"] is not None
    assert not torch.equal(fits[0][0].codebooks["key"], fits[1][0].codebooks["key"])


def test_query_feedback_and_gain_are_written_resumed_and_loaded(
    opened, tiny_text_file, tmp_path, monkeypatch
):
    recipe = small_recipe(tiny_text_file, objective="query", feedback="ldlq", gain="token")
    out, other, name = tmp_path / "cal", tmp_path / "other", "codebooks.safetensors"
    calibrate(opened, recipe, out)
    tensors = load_file(out / name)
    parts = ("codebook", "metric", "feedback", "gains")
    assert set(tensors) == {
        f"layers.{i}.{kind}.{part}" for i in range(2) for kind in ("key", "value") for part in parts
    }
    config = json.loads((out / "cq_config.json").read_text())
    assert (config["objective"], config["cache"]["key"]["encoding"]) == ("query", "ldlq")
    cache = CQCache.from_pretrained(out, opened.model)
    codec = cache.layers[1].codecs.key
    for part in parts[1:]:
        assert torch.equal(getattr(codec, part), tensors[f"layers.1.key.{part}"])
    ids = opened.tokenizer("Some words to begin with, and more", return_tensors="pt")
    opened.model.generate(**ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    # Two groups of 4 bits, and a gain.
    coded = cache.layers[0].coded["key"]
    assert (coded["codes"].shape[-1], coded["gains"].shape[-1]) == (1, 1)
    assert codec.bits_per_channel == 1.0

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_codebooks", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(opened, recipe, other)
    (fit,) = partial_folder(other).glob("fits/*/layer-000.safetensors")
    fit.unlink()
    calibrate(opened, recipe, other, resume=True)
    assert (other / name).read_bytes() == (out / name).read_bytes()


def test_fits_from_samples_without_moments_say_what_to_do(finished, opened, tiny_text_file):
    store, recipe = SampleStore.open(finished), small_recipe(tiny_text_file, objective="query")
    engine = make_engine(recipe.kmeans, "cpu")
    with pytest.raises(SampleError, match="calibrate with --objective query"):
        module.fit_codebooks(
            store, read_geometry(opened.model), recipe, engine, finished / "samples" / "fits"
        )

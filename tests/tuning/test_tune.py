"""`cqtool tune`: a calibration in, another out; stopped anywhere, it ends in the same bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from cqtool.cache import CQCache
from cqtool.cli.app import app
from cqtool.codebooks.calibrate import calibrate, partial_folder
from cqtool.files import sha256_file
from cqtool.models.load import open_model
from cqtool.recipe import load_recipe, recipe_of

OPTIONS = [
    *("--steps", "12", "--batch", "2", "--sequences", "6", "--sequence-length", "48"),
    *("--held-out", "2", "--evaluate-every", "2", "--learning-rate", "0.05"),
]


@pytest.fixture(scope="module")
def calibration(tiny_model_dir, tiny_text_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "cal"
    settings = {
        "calibration.dataset": str(tiny_text_file),
        "calibration.sequences": 4,
        "calibration.sequence_length": 64,
        "kmeans.iterations": 5,
        "format": "cq-8c4b",
        "window": 8,
        "sinks": 2,
    }
    opened = open_model(str(tiny_model_dir), device="cpu")
    calibrate(opened, load_recipe("cq-8c8b", settings), out)
    return out


def run(*args: object):
    return CliRunner().invoke(app, ["tune", *map(str, args)])


@pytest.fixture(scope="module")
def tuned(tiny_model_dir, calibration, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("tuned") / "out"
    result = run(tiny_model_dir, calibration, "--out", out, *OPTIONS, "--json")
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


def test_the_result_is_a_calibration_of_the_same_format(tuned, calibration, tiny_model_dir):
    out, report = tuned
    before, after = (load_file(f / "codebooks.safetensors") for f in (calibration, out))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    assert all(not before[name].equal(after[name]) for name in before)
    assert report["held_out_kl"] < report["held_out_kl_before"]
    record = json.loads((out / "calibration.json").read_text())["tuning"]
    assert record["settings"]["steps"] == 12
    assert record["steps"] == report["steps"] == 2 * len(record["training_kl"])
    assert record["held_out_kl"][record["kept"]] == report["held_out_kl"]
    assert recipe_of(out).tuning.learning_rate == 0.05
    assert recipe_of(out).digest != recipe_of(calibration).digest
    opened = open_model(str(tiny_model_dir), device="cpu")
    ids = opened.tokenizer("Some words to begin with", return_tensors="pt")
    cache = CQCache.from_pretrained(out, opened.model)
    made = opened.model.generate(**ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert made.shape[1] > ids["input_ids"].shape[1]
    assert not partial_folder(out).exists()


def test_it_can_be_checked_and_exported(tuned, tiny_model_dir, tiny_text_file, tmp_path):
    out, _ = tuned
    checked = CliRunner().invoke(
        app,
        [
            *("check", str(tiny_model_dir), str(out), "--dataset", str(tiny_text_file), "--json"),
            *("--windows", "2", "--window-length", "48"),
        ],
    )
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["rows"][1]["label"].endswith(", tuned")
    exported = CliRunner().invoke(app, ["export", str(out), "--out", str(tmp_path / "artifact")])
    assert exported.exit_code == 0, exported.output
    card = (tmp_path / "artifact" / "README.md").read_text()
    assert "tuned end to end" in card and "--rebuild" in card
    config = json.loads((tmp_path / "artifact" / "cq_config.json").read_text())
    assert config["recipe"]["tuning"]["learning_rate"] == 0.05


def test_a_finished_run_is_not_run_again(tuned, calibration, tiny_model_dir):
    out, report = tuned
    stamp = (out / "codebooks.safetensors").stat().st_mtime_ns
    again = run(tiny_model_dir, calibration, "--out", out, *OPTIONS, "--resume", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout) == report
    assert (out / "codebooks.safetensors").stat().st_mtime_ns == stamp
    other = run(tiny_model_dir, calibration, "--out", out, *OPTIONS, "--resume", "--seed", 3)
    assert other.exit_code != 0 and "other settings" in " ".join(other.output.split())


def test_what_would_be_lost_is_refused(tuned, calibration, tiny_model_dir, tmp_path):
    out, _ = tuned
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    for target, words in (
        (out, "--force"),
        (calibration, "calibration itself"),
        (tmp_path / "other", "new folder"),
    ):
        result = run(tiny_model_dir, calibration, "--out", target, *OPTIONS)
        assert result.exit_code != 0
        assert words in " ".join(result.output.split()), result.output
    other = tmp_path / "cal"
    subprocess.run(["cp", "-r", calibration, other], check=True)
    result = run(tiny_model_dir, calibration, "--out", other, *OPTIONS, "--force")
    assert result.exit_code != 0 and "not tuned" in " ".join(result.output.split())


def test_too_little_text_says_how_much_there_is(tiny_model_dir, calibration, tmp_path):
    result = run(
        tiny_model_dir, calibration, "--out", tmp_path / "out", *OPTIONS, "--sequences", 100000
    )
    assert result.exit_code != 0 and "sequences" in result.output
    assert not (tmp_path / "out").exists()


def test_kill_9_and_resume_gives_the_same_bytes(tuned, tiny_model_dir, calibration, tmp_path):
    expected = sha256_file(tuned[0] / "codebooks.safetensors")
    random.seed(0)
    for index in range(2):
        out = tmp_path / f"out{index}"
        start = [sys.executable, "-c", "from cqtool.cli import main; main()", "tune"]
        paths = [str(tiny_model_dir), str(calibration), "--out", str(out)]
        command = [*start, *paths, *OPTIONS, "--quiet"]
        process = subprocess.Popen(command)
        state = partial_folder(out) / "tuning.safetensors"
        while process.poll() is None and not state.exists():
            time.sleep(0.02)
        time.sleep(random.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not out.exists():
            refused = subprocess.run(command, capture_output=True, text=True, check=False)
            assert refused.returncode != 0 and "--resume" in refused.stderr
            subprocess.run([*command, "--resume"], check=True)
        assert sha256_file(out / "codebooks.safetensors") == expected
        assert not partial_folder(out).exists()


def test_tuned_for_what_follows_prompts(tuned, tiny_model_dir, calibration, tmp_path):
    out = tmp_path / "out"
    result = run(tiny_model_dir, calibration, "--out", out, *OPTIONS, "--mode", "prefill", "--json")
    assert result.exit_code == 0, result.output
    assert recipe_of(out).tuning.mode == "prefill" and recipe_of(tuned[0]).tuning.mode == "teacher"
    # The same codebooks to begin with, over which less is lost after prompts.
    assert json.loads(result.stdout)["held_out_kl_before"] < tuned[1]["held_out_kl_before"]


def test_a_wrong_setting_is_called_by_its_name(tiny_model_dir, calibration, tmp_path):
    options = ["--out", tmp_path / "out", *OPTIONS, "--learning-rate", "-1"]
    result = run(tiny_model_dir, calibration, *options)
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "'-1.0' is not possible for 'tuning.learning_rate'; give a number above 0." in said


def test_an_interrupted_run_with_other_settings_is_not_continued(
    tiny_model_dir, calibration, tmp_path, monkeypatch
):
    from cqtool.tuning.trainer import Trainer

    original, calls = Trainer.run_until_next_look, []

    def stop(self: Trainer) -> int:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return original(self)

    monkeypatch.setattr(Trainer, "run_until_next_look", stop)
    out = tmp_path / "out"
    assert run(tiny_model_dir, calibration, "--out", out, *OPTIONS).exit_code == 130
    monkeypatch.undo()
    options = [*OPTIONS, "--learning-rate", "0.01", "--resume"]
    result = run(tiny_model_dir, calibration, "--out", out, *options)
    assert result.exit_code != 0 and "--force" in result.output
    result = run(tiny_model_dir, calibration, "--out", out, *OPTIONS, "--resume")
    assert result.exit_code == 0, result.output

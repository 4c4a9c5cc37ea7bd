"""`cqtool verify --rebuild`: an artifact made once more from what it says of itself."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cqtool.manifest import write_manifest


@pytest.fixture(scope="module")
def artifact(cqtool: Any, tiny_model_dir: Path, tuned_recipe: Path, tmp_path_factory: Any) -> Path:
    """A tuned artifact of the tiny model, also on the Hub, with its text beside it."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(tuned_recipe.with_name("text.txt"), folder)
    options = ("--out", folder / "release", "--repo-id", "org/made", "--no-kernels")
    run = cqtool("release", tiny_model_dir, tuned_recipe, *options)
    assert run.code == 0, run.stderr
    return folder / "release" / "artifact"


def test_the_same_bytes_come_out_again(artifact, cqtool, tiny_model_dir):
    # A local text goes by its name alone, so this runs where the text is.
    beside = artifact.parents[1]
    card = (artifact / "README.md").read_text()
    name, *command = shlex.split(card[card.index("cqtool verify") :].split("```")[0])
    assert (name, command[-1]) == ("cqtool", "PATH/TO/MODEL") and "holds `text.txt`" in card
    run = cqtool(*command[:-1], tiny_model_dir, "--json", folder=beside)
    assert run.code == 0, run.stderr
    again = run.json["rebuild"]
    assert (again["same"], again["differences"], again["reasons"]) == (True, [], [])
    assert run.json["commit"]


def test_what_differs_is_named_and_what_the_artifact_knows_of_it(
    artifact, cqtool, tiny_model_dir, tmp_path
):
    shutil.copy(artifact.parents[1] / "text.txt", tmp_path)
    changed = tmp_path / "artifact"
    shutil.copytree(artifact, changed)
    tensors = load_file(changed / "codebooks.safetensors")
    tensors["layers.1.value.codebook"][0, 0, 0, 0] += 1
    save_file(tensors, changed / "codebooks.safetensors")
    record = json.loads((changed / "calibration.json").read_text())
    record["versions"]["torch"] = "2.0.0"
    record["data"]["digest"] = "00"
    (changed / "calibration.json").write_text(json.dumps(record))
    (changed / "manifest.json").unlink()
    write_manifest(changed)
    command = ("verify", changed, "--rebuild", "--model", tiny_model_dir)
    run = cqtool(*command, folder=tmp_path)
    assert run.code == 1
    assert "codebooks.safetensors: 1 of 4 tensors differ, by 1 at most" in run.stderr
    assert "calibration.json: data.digest" in run.stderr
    assert "instead of 2.0.0" in run.stderr and "cq_config.json" not in run.stderr


def test_another_model_and_a_missing_one_are_refused(artifact, cqtool, tmp_path, tiny_model_dir):
    run = cqtool("verify", artifact, "--rebuild")
    assert run.code == 2 and "say where it is with --model" in run.stderr
    other = tmp_path / "tiny-llama"
    shutil.copytree(tiny_model_dir, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    run = cqtool("verify", artifact, "--rebuild", "--model", other)
    assert run.code == 2 and "is not the base model of" in run.stderr
    run = cqtool("verify", artifact, "--model", tiny_model_dir)
    assert run.code == 2 and "add --rebuild" in run.stderr

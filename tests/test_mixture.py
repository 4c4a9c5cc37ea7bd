"""Several texts in one calibration, through every command that names the text."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cqtool.cli.app import app
from cqtool.codebooks import calibrate as module
from cqtool.codebooks.calibrate import partial_folder
from cqtool.data import TextSource, load_mixture, load_windows
from cqtool.files import sha256_file
from cqtool.recipe import recipe_of
from cqtool.recipe_texts import CalibrationText
from cqtool.sampling import calibration_windows

SETTINGS = ("--sequences", "6", "--sequence-length", "64", "--iterations", "5", "--sinks", "2")


def cqtool(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> list[Path]:
    """Two files, of whose names one has a comma."""
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "law, old.txt", folder / "talk.txt"]
    for index, path in enumerate(paths):
        path.write_text(tiny_text[index * 20_000 : (index + 1) * 20_000], encoding="utf-8")
    return paths


def command(model: Path, texts: list[Path], out: Path) -> list[object]:
    named = [word for text in texts for word in ("--dataset", text)]
    recipe = out.parent / "recipe.yaml"
    recipe.write_text("name: small\nformat: cq-8c4b\nobjective: uniform\nwindow: 8\n")
    return ["calibrate", model, *named, "--out", out, "--recipe", recipe, *SETTINGS]


@pytest.fixture(scope="module")
def calibration(
    tiny_model_dir: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("mixture") / "calibration"
    done = cqtool(*command(tiny_model_dir, texts, out))
    assert done.exit_code == 0, done.output
    return out


def parts_of(source: dict[str, Any]) -> list[tuple[str, int]]:
    return [(Path(part["dataset"]).name, part["sequences"]) for part in source["parts"]]


def test_a_recipes_shares_length_and_seed_decide(texts: list[Path], tiny_tokenizer) -> None:
    entries = [
        {"dataset": str(texts[0]), "split": "train", "share": "75%"},
        {"dataset": str(texts[1]), "share": "25%"},
    ]
    text = CalibrationText.model_validate(
        {"dataset": entries, "sequences": 8, "sequence_length": 32, "seed": 5}
    )
    opened: Any = SimpleNamespace(name="some/model", tokenizer=tiny_tokenizer)
    places = [TextSource(str(texts[0]), split="train"), TextSource(str(texts[1]), split="all")]
    expected = load_mixture(
        list(zip(places, (3, 1), strict=True)), tiny_tokenizer, sequences=8, length=32, seed=5
    )
    found = calibration_windows(opened, text)
    assert found.digest == expected.digest
    assert parts_of(found.source) == [("law, old.txt", 6), ("talk.txt", 2)]
    # A list of one is that text, and nothing else.
    alone = text.model_copy(update={"dataset": text.parts[:1]})
    single = load_windows(places[0], tiny_tokenizer, sequences=8, length=32, seed=5, order="random")
    assert calibration_windows(opened, alone).source == single.source
    assert calibration_windows(opened, alone).digest == single.digest


def test_what_was_calibrated_on_is_kept_part_by_part(calibration: Path) -> None:
    mixed = [("law, old.txt", 3), ("talk.txt", 3)]
    config = json.loads((calibration / "cq_config.json").read_text())
    record = json.loads((calibration / "calibration.json").read_text())
    assert parts_of(config["calibration"]["dataset"]) == parts_of(record["data"]) == mixed
    assert len(recipe_of(calibration).calibration.parts) == 2
    found = json.loads(cqtool("inspect", calibration, "--json").stdout)
    assert parts_of(found["calibration"]["dataset"]) == mixed
    shown = " ".join(cqtool("inspect", calibration).stdout.split())
    assert "law, old.txt (3)" in shown and "talk.txt (3)" in shown


def test_an_interrupted_run_resumes_to_the_same_bytes(
    calibration: Path,
    tiny_model_dir: Path,
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "calibration"
    with monkeypatch.context() as patched:
        patched.setattr(module, "fit_codebooks", lambda *a, **k: 1 / 0)
        assert cqtool(*command(tiny_model_dir, texts, out)).exit_code != 0
    assert partial_folder(out).is_dir()
    other = cqtool(*command(tiny_model_dir, texts[::-1], out), "--resume")
    assert other.exit_code == 2 and "differ" in other.output
    done = cqtool(*command(tiny_model_dir, texts, out), "--resume")
    assert done.exit_code == 0, done.output
    for name in ("codebooks.safetensors", "cq_config.json"):
        assert sha256_file(out / name) == sha256_file(calibration / name)


@pytest.mark.parametrize("seen", [0, 1, None])
def test_check_warns_of_each_part(
    calibration: Path, tiny_model_dir: Path, texts: list[Path], tiny_text: str, tmp_path: Path,
    seen: int | None,
) -> None:  # fmt: skip
    path = tmp_path / "other.txt" if seen is None else texts[seen]
    if seen is None:
        path.write_text(tiny_text[-20_000:], encoding="utf-8")
    few = ("--windows", 1, "--window-length", 64)
    done = cqtool("check", tiny_model_dir, calibration, "--dataset", path, *few)
    assert done.exit_code == 0, done.output
    assert ("was also calibrated on" in " ".join(done.stderr.split())) is (seen is not None)


def test_tuning_takes_the_same_mixture(
    calibration: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    few = ("--steps", 2, "--batch", 2, "--sequences", 8, "--sequence-length", 48)
    few = (*few, "--held-out", 2, "--evaluate-every", 2)
    done = cqtool("tune", tiny_model_dir, calibration, "--out", tmp_path / "tuned", *few)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "tuned" / "calibration.json").read_text())["tuning"]
    assert parts_of(record["data"]) == [("law, old.txt", 5), ("talk.txt", 5)]


def test_the_artifact_names_the_parts_and_no_folder(
    calibration: Path, texts: list[Path], tmp_path: Path
) -> None:
    done = cqtool("export", calibration, "--out", tmp_path / "artifact", "--repo-id", "org/name")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "artifact" / "README.md").read_text()
    assert "6 sequences of 64 tokens: 3 of `law, old.txt`, 3 of `talk.txt`, seed 0" in card
    config = json.loads((tmp_path / "artifact" / "cq_config.json").read_text())
    text = CalibrationText.model_validate(config["recipe"]["calibration"])
    assert [part.dataset for part in text.parts] == ["./law, old.txt", "./talk.txt"]
    assert [(part.split, part.share) for part in text.parts] == [(None, 1.0)] * 2
    assert "in a folder that holds `law, old.txt` and `talk.txt`:" in card
    assert "cqtool verify org/name --rebuild" in card
    folder = str(texts[0].parent).encode()
    files = [path for path in (tmp_path / "artifact").rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(folder in path.read_bytes() for path in files)


@pytest.mark.parametrize("option", ["--split", "--text-column", "--dataset-config"])
def test_options_of_one_text_are_refused_beside_several(
    tiny_model_dir: Path, texts: list[Path], tmp_path: Path, option: str
) -> None:
    done = cqtool(*command(tiny_model_dir, texts, tmp_path / "out"), option, "x")
    assert done.exit_code == 2
    assert "it belongs to one text, and there are several" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()

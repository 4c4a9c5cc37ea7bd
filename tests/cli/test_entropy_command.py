"""`cqtool analyze-entropy` on a tiny model: files, reuse of samples, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cqtool.cli.app import app

PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["analyze-entropy", *map(str, words)], catch_exceptions=False)


@pytest.fixture(scope="module")
def text_options(tiny_text_file: Path) -> list[object]:
    return ["--dataset", tiny_text_file, "--sequences", 3, "--sequence-length", 64]


@pytest.fixture(scope="module")
def sampled(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text_options: list[object]
) -> tuple[Path, dict[str, Any]]:
    """A folder with samples/ and out/, and the JSON that the first run printed."""
    folder = tmp_path_factory.mktemp("entropy")
    places = ["--samples", folder / "samples", "--out", folder / "out"]
    result = run(tiny_model_dir, *text_options, *places, "--bins", 4, "--json")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def without_files(value: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != "files"}


def test_json_on_stdout_is_what_lies_in_entropy_json(sampled: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = sampled
    assert json.loads((folder / "out" / "entropy.json").read_text()) == without_files(printed)
    assert printed["tokens"] == 3 * 64
    assert printed["bins"] == 4
    assert len(printed["entries"]) == 2 * 2 * 8  # layers, kinds, numbers of channels
    for name in ("entropy.png", "correlation.png"):
        assert Path(printed["files"][name]).read_bytes().startswith(PNG_HEAD)


def test_stored_samples_give_the_same_result_without_the_model_running(
    sampled: tuple[Path, dict[str, Any]],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, printed = sampled

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr("cqtool.models.load.open_model", refuse)
    place = ["--samples", folder / "samples", "--out", tmp_path / "out"]
    again = run(tiny_model_dir, *place, "--bins", 4, "--json")
    assert without_files(json.loads(again.stdout)) == without_files(printed)


def test_samples_of_a_calibration_folder_put_the_results_into_its_reports(
    sampled: tuple[Path, dict[str, Any]], tiny_model_dir: Path, calibration: Path
) -> None:
    shutil.rmtree(calibration / "samples")
    (calibration / "samples").symlink_to(sampled[0] / "samples")
    for path in (calibration / "reports").iterdir():
        path.unlink()
    for samples in (calibration, calibration / "samples"):
        result = run(tiny_model_dir, "--samples", samples, "--max-coupled", 2)
        assert result.exit_code == 0, result.output
        names = {path.name for path in (calibration / "reports").iterdir()}
        assert names == {"entropy.json", "entropy.png", "correlation.png", "report.html"}
        for path in (calibration / "reports").iterdir():
            path.unlink()


def test_without_samples_nothing_but_the_results_is_left(
    tiny_model_dir: Path,
    text_options: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(tiny_model_dir, *text_options, "--max-coupled", 2, "--per-layer")
    assert result.exit_code == 0, result.output
    (folder,) = tmp_path.iterdir()
    assert folder.name == "entropy-tiny-llama"
    assert {path.name for path in folder.iterdir()} == {
        "entropy.json",
        "entropy.png",
        "correlation.png",
    }
    summary = json.loads((folder / "entropy.json").read_text())["summary"]
    lines = [line.split() for line in result.stdout.splitlines()]
    (pair,) = [line for line in lines if line[:2] == ["values", "2"]]
    (expected,) = [row for row in summary if row["kind"] == "value" and row["channels"] == 2]
    assert pair[2] == f"{expected['joint']:.2f}"
    assert pair[-1] == "small"  # 192 tokens for 256 cells
    assert ["layer", "kind", "c=1", "c=2"] in lines


def test_quiet_prints_nothing(
    sampled: tuple[Path, dict[str, Any]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    place = ["--samples", sampled[0] / "samples", "--out", tmp_path]
    result = run(tiny_model_dir, *place, "--max-coupled", 1, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_samples_of_another_model_are_refused(
    sampled: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    result = run("some/other", "--samples", sampled[0] / "samples", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "not some/other" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_choice_of_text_that_would_be_ignored_is_refused(
    sampled: tuple[Path, dict[str, Any]], tiny_model_dir: Path
) -> None:
    result = run(tiny_model_dir, "--samples", sampled[0] / "samples", "--sequences", 9)
    assert result.exit_code == 2
    assert "(sequences) has no effect" in result.stderr


def test_a_folder_without_samples_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    result = run(tiny_model_dir, "--samples", tmp_path)
    assert result.exit_code == 2
    assert "holds no sample store" in result.stderr


def test_too_many_cells_end_before_anything_is_sampled(tmp_path: Path) -> None:
    result = run("no/such-model", "--out", tmp_path / "out", "--bins", 300)
    assert result.exit_code == 2
    assert "--max-coupled 7" in result.stderr
    assert not (tmp_path / "out").exists()


def test_too_little_text_leaves_no_half_filled_folder(tiny_model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    places = ["--samples", tmp_path / "samples", "--out", tmp_path / "out"]
    result = run(tiny_model_dir, "--dataset", text, *places)
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_sampling_leaves_no_half_filled_folder(
    tiny_model_dir: Path,
    text_options: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: bool,
) -> None:
    def interrupted(opened: object, geometry: object, windows: object, path: Path, **_: object):
        (path / "meta.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("cqtool.sampling.collect", interrupted)
    place = ["--samples", tmp_path / "samples"] if kept else []
    result = run(tiny_model_dir, *text_options, *place, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []

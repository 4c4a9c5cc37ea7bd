"""An export is complete, verified and reproducible, or it did not happen."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from synthetic_artifact import codebooks, write_calibration

from cqtool.artifact import export as export_module
from cqtool.artifact.export import export
from cqtool.errors import ArtifactError, EnvironmentProblem, RecipeError
from cqtool.manifest import verify_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_artifact_is_the_calibration_with_card_and_manifest(
    calibration: Path, tmp_path: Path
) -> None:
    result = export(calibration, tmp_path / "out")
    verify_folder(tmp_path / "out")
    written, source = contents(tmp_path / "out"), contents(calibration)
    own = {"README.md", "manifest.json"}
    assert written.keys() - own == {
        "codebooks.safetensors",
        "cq_config.json",
        "calibration.json",
        "reports/quality.json",
        "reports/report.html",
        "reports/entropy.png",
    }
    assert all(written[name] == source[name] for name in written.keys() - own)
    assert (result.files, result.size) == (len(written), sum(map(len, written.values())))
    assert result.quality_measured
    listed = json.loads(written["manifest.json"])["files"]
    assert listed.keys() == written.keys() - {"manifest.json"}


def test_same_calibration_same_bytes(calibration: Path, tmp_path: Path) -> None:
    export(calibration, tmp_path / "a", repo_id="org/x")
    moved = tmp_path / "elsewhere" / "calibration"
    shutil.copytree(calibration, moved)
    export(moved, tmp_path / "deeper" / "b", repo_id="org/x")
    assert contents(tmp_path / "a") == contents(tmp_path / "deeper" / "b")


def test_how_long_a_calibration_took_changes_no_byte(calibration: Path, tmp_path: Path) -> None:
    path = calibration / "calibration.json"
    fast = json.loads(path.read_text()) | {"timings": {"text": 0.5}, "tuning": {"seconds": 9.0}}
    slow = fast | {"timings": {"text": 7.5}, "tuning": {"seconds": 99.0}}
    found = []
    for name, record in (("fast", fast), ("slow", slow)):
        path.write_text(json.dumps(record))
        export(calibration, tmp_path / name, repo_id="org/x")
        found.append(contents(tmp_path / name))
    assert found[0] == found[1]
    assert json.loads(found[0]["calibration.json"])["tuning"] == {}


def test_exporting_again_replaces_and_drops_what_is_gone(calibration: Path, tmp_path: Path) -> None:
    export(calibration, tmp_path / "out")
    (calibration / "reports" / "entropy.png").unlink()
    export(calibration, tmp_path / "out")
    verify_folder(tmp_path / "out")
    assert not (tmp_path / "out" / "reports" / "entropy.png").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"calibration", "out"}


@pytest.mark.parametrize("step", ["copy", "card", "manifest", "verify"])
def test_a_failure_in_the_middle_leaves_the_old_artifact(
    calibration: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(calibration, out)
    before = contents(out)
    shutil.rmtree(calibration)
    write_calibration(calibration, with_quality=False)

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    if step == "copy":
        monkeypatch.setattr(shutil, "copyfile", fail)
    elif step == "card":
        monkeypatch.setattr(Path, "write_text", fail)
    elif step == "manifest":
        monkeypatch.setattr(export_module, "write_manifest", fail)
    else:
        monkeypatch.setattr(export_module, "verify_folder", fail)
    with pytest.raises(EnvironmentProblem, match="disk is full"):
        export(calibration, out)
    monkeypatch.undo()
    assert contents(out) == before
    verify_folder(out)
    assert {path.name for path in tmp_path.iterdir()} == {"calibration", "out"}


def test_a_damaged_calibration_is_not_exported(calibration: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tensors = codebooks()
    tensors["layers.0.key.codebook"][0, 0, 0, 0] = float("nan")
    save_file(tensors, calibration / "codebooks.safetensors")
    with pytest.raises(ArtifactError, match="NaN"):
        export(calibration, out)
    (calibration / "codebooks.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no codebooks"):
        export(calibration, out)
    with pytest.raises(ArtifactError, match="cqtool calibrate"):
        export(tmp_path / "nothing", out)
    assert not out.exists()


def test_a_calibration_that_changes_while_it_is_copied_is_noticed(
    calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        if source.name == "codebooks.safetensors":
            source.write_bytes(source.read_bytes()[:-2])
        real(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(ArtifactError, match="damaged"):
        export(calibration, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_an_artifact_are_never_replaced(
    calibration: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="will not replace"):
        export(calibration, out)
    assert contents(out) == {"thesis.tex": b"years of work"}
    (out / "thesis.tex").unlink()
    export(calibration, out)

    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        export(calibration, out)
    (out / "notes.txt").unlink()
    (out / ".git").mkdir()
    (out / ".git" / "HEAD").write_text("ref: refs/heads/main")
    with pytest.raises(ArtifactError, match=r"\.git/HEAD"):
        export(calibration, out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is not a folder"):
        export(calibration, tmp_path / "file")


def test_a_damaged_artifact_may_be_replaced(calibration: Path, artifact: Path) -> None:
    (artifact / "codebooks.safetensors").write_bytes(b"damaged")
    export(calibration, artifact)
    verify_folder(artifact)


def test_calibration_and_destination_are_kept_apart(calibration: Path, tmp_path: Path) -> None:
    before = contents(calibration)
    for out in (calibration, calibration / "artifact", tmp_path):
        with pytest.raises(ArtifactError, match="inside one another"):
            export(calibration, out)
    assert contents(calibration) == before


def test_links_in_reports_do_not_publish_other_files(calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("secret")
    (calibration / "reports" / "x.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ArtifactError, match="leads out"):
        export(calibration, tmp_path / "out")


def test_an_artifact_can_be_exported_again_but_not_a_damaged_one(
    calibration: Path, artifact: Path, tmp_path: Path
) -> None:
    export(artifact, tmp_path / "copy", repo_id="org/tiny-cq")
    assert contents(tmp_path / "copy") == contents(artifact)
    (artifact / "calibration.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"calibration\.json"):
        export(artifact, tmp_path / "copy")


@pytest.mark.parametrize("repo_id", ["a/b/c", "org/", "org/na me", "../x", "org/x.git"])
def test_an_impossible_repository_name_is_a_usage_error(
    calibration: Path, tmp_path: Path, repo_id: str
) -> None:
    with pytest.raises(RecipeError, match="ORG/NAME") as caught:
        export(calibration, tmp_path / "out", repo_id=repo_id)
    assert caught.value.exit_code == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def test_each_single_corruption_of_an_artifact_is_refused(artifact: Path, tmp_path: Path) -> None:
    names = [name for name in contents(artifact) if name != "manifest.json"]
    for name in names:
        for damage in (
            flip,
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            lambda path: path.unlink(),
            lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        ):
            copy = tmp_path / "copy"
            shutil.copytree(artifact, copy)
            damage(copy / name)
            with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
                verify_folder(copy)
            shutil.rmtree(copy)


def test_tensors_swapped_within_the_file_are_refused(artifact: Path) -> None:
    """Same names, shapes and header: only the digest can tell."""
    tensors = codebooks()
    a, b = "layers.0.key.codebook", "layers.1.key.codebook"
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, artifact / "codebooks.safetensors")
    with pytest.raises(ArtifactError, match="digest"):
        verify_folder(artifact)


def test_paths_of_this_machine_are_not_published(calibration: Path, tmp_path: Path) -> None:
    secret = "/home/somebody/private & co/notes.txt"
    for name in ("cq_config.json", "calibration.json", "reports/quality.json"):
        path = calibration / name
        value = json.loads(path.read_text())
        if name == "cq_config.json":
            value["calibration"]["dataset"]["dataset"] = secret
            value["recipe"] = {"name": "x", "calibration": {"dataset": secret}}
        elif name == "calibration.json":
            value["data"] = {"dataset": secret}
        else:
            value["evaluation"]["dataset"] = secret
        path.write_text(json.dumps(value))
    (calibration / "reports" / "report.html").write_text(f"<p>{html.escape(secret)}</p>")
    folder = export(calibration, tmp_path / "artifact").folder
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".png":
            assert b"somebody" not in path.read_bytes(), path
    config = json.loads((folder / "cq_config.json").read_text())
    assert config["calibration"]["dataset"]["dataset"] == "./notes.txt"
    assert config["recipe"]["calibration"]["dataset"] == "./notes.txt"
    # The calibration itself keeps what is needed to do it again.
    assert secret in (calibration / "cq_config.json").read_text()

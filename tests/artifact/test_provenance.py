"""A manifest says what its release was made of, and nothing that it does not know."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from synthetic_artifact import config, edit_json

import cqtool
from cqtool.artifact import provenance as provenance_module
from cqtool.artifact.describe import describe
from cqtool.artifact.export import export
from cqtool.artifact.provenance import cqtool_commit
from cqtool.errors import ArtifactError
from cqtool.manifest import read_manifest, verify_folder, write_manifest


def sha256_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    run = ["git", "-C", str(folder), *who, *command]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def test_the_manifest_says_what_the_files_say(calibration: Path, tmp_path: Path) -> None:
    versions = {"cqtool": "0.0.9", "python": "3.11.9", "torch": "2.13.0"}
    edit_json(calibration / "calibration.json", lambda value: value.update(versions=versions))
    secret = "/home/somebody/notes.txt"
    edit_json(calibration / "cq_config.json", lambda value: value["recipe"].update(dataset=secret))
    folder = export(calibration, tmp_path / "artifact").folder
    published = json.loads((folder / "cq_config.json").read_text())
    assert published["recipe"]["dataset"] == "./notes.txt"
    found = json.loads((folder / "manifest.json").read_text())["provenance"]
    assert found == {
        "tool_version": cqtool.__version__,
        "tool_commit": cqtool_commit(),
        "versions": versions,
        "recipe_digest": sha256_of(published["recipe"]),
        "data_digest": "ab" * 32,
        "base_model": "some-org/Tiny-Model",
        "base_revision": "0123abc",
        "base_fingerprint": sha256_of(config()["base_model"]["fingerprint"]),
    }
    assert describe(folder)["provenance"] == found
    assert describe(calibration)["provenance"] is None


def test_manifests_of_before_there_was_provenance_are_read(artifact: Path) -> None:
    before = read_manifest(artifact)
    write_manifest(artifact)
    assert json.loads((artifact / "manifest.json").read_text()).keys() == {
        "format_version",
        "files",
    }
    verify_folder(artifact)
    assert read_manifest(artifact) == before
    found = describe(artifact)
    assert found["verified"] and found["provenance"] is None


def test_a_later_cqtool_may_say_more_but_not_less(artifact: Path) -> None:
    edit_json(artifact / "manifest.json", lambda value: value["provenance"].update(more=[1]))
    verify_folder(artifact)
    edit_json(artifact / "manifest.json", lambda value: value["provenance"].pop("data_digest"))
    with pytest.raises(ArtifactError, match="no proper 'data_digest' in its provenance"):
        verify_folder(artifact)


@pytest.mark.parametrize("versions", ["2.13.0", {"torch": 2}, {"torch": None}])
def test_versions_that_are_no_texts_are_not_published(
    calibration: Path, tmp_path: Path, versions: Any
) -> None:
    edit_json(calibration / "calibration.json", lambda value: value.update(versions=versions))
    with pytest.raises(ArtifactError, match=r"calibration\.json.*must be"):
        export(calibration, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_a_commit_is_that_of_an_unchanged_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    package = clone / "cqtool"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1")
    assert cqtool_commit(package) is None  # no clone
    git(clone, "init", "--quiet")
    assert cqtool_commit(package) is None  # nothing committed
    git(clone, "add", ".")
    git(clone, "commit", "--quiet", "-m", "x")
    head = git(clone, "rev-parse", "HEAD")
    assert len(head) == 40 and cqtool_commit(package) == head
    (clone / "notes.txt").write_text("not of the package")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert cqtool_commit(package) == head
    monkeypatch.delenv("GIT_DIR")

    (package / "new.py").write_text("2")
    assert cqtool_commit(package) is None
    (package / "new.py").unlink()
    (package / "a.py").write_text("2")
    assert cqtool_commit(package) is None
    git(clone, "checkout", "--quiet", ".")
    assert cqtool_commit(package) == head

    # Installed somewhere below the clone of another project, it is not that project.
    inner = clone / "venv" / "site-packages" / "cqtool"
    shutil.copytree(package, inner)
    assert cqtool_commit(inner) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cqtool_commit(package) is None  # no git


@pytest.mark.parametrize(
    ("recorded", "commit"),
    [
        ({"url": "git+https://x", "vcs_info": {"vcs": "git", "commit_id": "12ab"}}, "12ab"),
        ({"url": "file:///x", "dir_info": {"editable": True}}, None),
        ({"vcs_info": {"commit_id": 5}}, None),
        (None, None),
    ],
)
def test_a_commit_is_what_pip_recorded(
    recorded: dict[str, Any] | None, commit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if recorded is None else json.dumps(recorded)

    monkeypatch.setattr(provenance_module, "distribution", lambda name: Installed())
    monkeypatch.setattr(provenance_module, "_git", lambda *command: None)
    assert cqtool_commit() == commit

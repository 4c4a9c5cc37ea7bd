"""The manifest describes a folder exactly, and the check against it fails closed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cqtool.errors import ArtifactError
from cqtool.manifest import build_manifest, read_manifest, verify_folder, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "artifact"
    (root / "reports").mkdir(parents=True)
    (root / "a.bin").write_bytes(bytes(range(256)) * 5)
    (root / "reports" / "r.json").write_text("{}")
    write_manifest(root)
    return root


def rewrite(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)


def edit(folder: Path, change: Any) -> None:
    value = json.loads((folder / "manifest.json").read_text())
    change(value)
    rewrite(folder, json.dumps(value))


def test_lists_size_and_sha256_of_every_file(folder: Path) -> None:
    content = (folder / "a.bin").read_bytes()
    assert build_manifest(folder) == {
        "format_version": 1,
        "files": {
            "a.bin": {"size": 1280, "sha256": hashlib.sha256(content).hexdigest()},
            "reports/r.json": {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
        },
    }
    assert json.loads((folder / "manifest.json").read_text()) == build_manifest(folder)
    verify_folder(folder)


@pytest.mark.parametrize("position", [0, 700, 1279])
def test_one_flipped_bit_is_refused(folder: Path, position: int) -> None:
    content = bytearray((folder / "a.bin").read_bytes())
    content[position] ^= 1
    (folder / "a.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.bin does not have the digest.*again"):
        verify_folder(folder)


def test_truncated_missing_and_extra_files_are_refused(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="5 bytes instead of 1280"):
        verify_folder(folder)
    (folder / "a.bin").unlink()
    with pytest.raises(ArtifactError, match=r"lacks a\.bin"):
        verify_folder(folder)
    write_manifest(folder)
    (folder / "reports" / "new.py").write_text("")
    with pytest.raises(ArtifactError, match=r"holds reports/new\.py.*does not list"):
        verify_folder(folder)


def test_a_folder_without_manifest_is_no_artifact(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="cqtool export"):
        verify_folder(folder)
    with pytest.raises(ArtifactError):
        verify_folder(folder / "nowhere")


@pytest.mark.parametrize(
    "path",
    ["../a.bin", "/etc/passwd", "reports/../../x", "", ".", "a//b", "a\\b", "C:x", "a\nb",
     "manifest.json", ".git/config", ".eval_results/gsm8k.yaml"],
)  # fmt: skip
def test_paths_that_lead_out_or_are_no_part_are_refused(folder: Path, path: str) -> None:
    edit(folder, lambda m: m["files"].update({path: m["files"]["a.bin"]}))
    with pytest.raises(ArtifactError, match="not a path inside the artifact"):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format_version=2), "upgrade cqtool"),
        (lambda m: m.update(format_version=True), "format version"),
        (lambda m: m.update(format_version="1"), "format version"),
        (lambda m: m.pop("format_version"), "format version"),
        (lambda m: m.update(more=1), "unknown fields"),
        (lambda m: m.update(files={}), "lists no files"),
        (lambda m: m.update(files=[1]), "lists no files"),
        (lambda m: m["files"].update({"a.bin": "x"}), "size"),
        (lambda m: m["files"]["a.bin"].update(sha256=5), "SHA-256"),
        (lambda m: m["files"]["a.bin"].update(sha256="00"), "SHA-256"),
        (lambda m: m["files"]["a.bin"].update(size="1280"), "size"),
        (lambda m: m["files"]["a.bin"].update(size=1280.0), "size"),
        (lambda m: m["files"]["a.bin"].update(size=-1), "size"),
        (lambda m: m["files"]["a.bin"].update(mode=7), "size"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(folder: Path, change: Any, says: str) -> None:
    edit(folder, change)
    with pytest.raises(ArtifactError, match=says):
        verify_folder(folder)


def test_hostile_json_is_refused(folder: Path) -> None:
    good = (folder / "manifest.json").read_text()
    double = good.replace('"a.bin": {', '"a.bin": {"size": 1, "sha256": "00"}, "a.bin": {')
    hostile = [double, good[:-5], "[]", "[" * 100_000, "NaN", '{"format_version": NaN}', "\udcff"]
    for text in hostile:
        (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            verify_folder(folder)
    (folder / "manifest.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(ArtifactError, match="larger than"):
        verify_folder(folder)


def test_links_may_not_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    (folder / "a.bin").rename(outside)
    (folder / "a.bin").symlink_to(outside)
    with pytest.raises(ArtifactError, match="leads out"):
        verify_folder(folder)
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to("missing")
    with pytest.raises(ArtifactError, match="leads nowhere"):
        verify_folder(folder)
    (folder / "a.bin").unlink()
    outside.rename(folder / "a.bin")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ArtifactError, match="leads nowhere"):
        verify_folder(folder)
    (folder / "loop").unlink()
    (folder / "sub").symlink_to("reports")
    with pytest.raises(ArtifactError, match="not a regular file"):
        verify_folder(folder)


def test_a_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    (folder / "a.bin").unlink()
    os.mkfifo(folder / "a.bin")
    with pytest.raises(ArtifactError, match="not a regular file"):
        verify_folder(folder)


def test_links_of_the_hub_cache_are_its_own(folder: Path, tmp_path: Path) -> None:
    """snapshot_download lays a snapshot out as links into blobs/ beside snapshots/."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    for name in ("a.bin", "manifest.json"):
        (snapshot / name).rename(repo / "blobs" / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    verify_folder(snapshot)
    (repo / "blobs" / "a.bin").write_bytes(b"x" * 1280)
    with pytest.raises(ArtifactError, match="digest"):
        verify_folder(snapshot)


def test_what_the_hub_client_adds_is_no_part_of_the_artifact(folder: Path) -> None:
    before = build_manifest(folder)
    (folder / ".gitattributes").write_text("*.png filter=lfs")
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "download" / "a.bin.metadata").write_text("x")
    verify_folder(folder)
    assert build_manifest(folder) == before
    (folder / ".cache" / "other").write_text("x")
    with pytest.raises(ArtifactError, match=r"\.cache/other"):
        verify_folder(folder)


def test_scores_that_others_propose_are_no_part_of_it_and_its_own_are(folder: Path) -> None:
    scores = folder / ".eval_results"
    scores.mkdir()
    (scores / "cqtool.yaml").write_text("- value: 1\n")
    write_manifest(folder)
    assert ".eval_results/cqtool.yaml" in read_manifest(folder)
    (scores / "somebody.yaml").write_text("- value: 100\n")
    verify_folder(folder)
    (scores / "cqtool.yaml").write_text("- value: 2\n")
    with pytest.raises(ArtifactError, match=r"cqtool\.yaml does not have the digest"):
        verify_folder(folder)
    (scores / "cqtool.yaml").unlink()
    with pytest.raises(ArtifactError, match=r"lacks \.eval_results/cqtool\.yaml"):
        verify_folder(folder)

"""Verifying an artifact in a folder and on the Hub."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path

import pytest
from hub.faults import applies
from hub_server import Blob, HubServer
from huggingface_hub import HfApi, snapshot_download
from synthetic_artifact import write_calibration

from cqtool.artifact.push import push
from cqtool.artifact.verify import Verified, verify
from cqtool.errors import ArtifactError, EnvironmentProblem, HubError, RecipeError
from cqtool.files import sha256_file
from cqtool.manifest import write_manifest

REPO = "org/tiny-cq"


def change(hub: HubServer, name: str, content: bytes | None) -> None:
    """Somebody changes a file of the repository by hand; None removes it."""
    repo = hub.repos[REPO]
    files = dict(repo.commits[-1].files)
    lfs = name in files and files[name].lfs
    files.pop(name, None)
    if content is not None:
        files[name] = Blob(content, lfs)
    repo.add("main", "by hand", files)


def test_a_folder_and_its_repository_are_the_same(hub: HubServer, artifact: Path) -> None:
    local = verify(str(artifact))
    paths = [path for path in artifact.rglob("*") if path.is_file()]
    assert local == Verified(
        place=str(artifact),
        commit=None,
        format="k-cq-4c3b-v-cq-8c4b",
        base_model="some-org/Tiny-Model",
        files=len(paths),
        size=sum(path.stat().st_size for path in paths),
        manifest_sha256=sha256_file(artifact / "manifest.json"),
    )
    commit = push(artifact, REPO).oid
    remote = verify(REPO)
    assert (remote.place, remote.commit) == (REPO, commit)
    assert (remote.manifest_sha256, remote.files, remote.size) == (
        local.manifest_sha256,
        local.files,
        local.size,
    )


def test_a_revision_is_what_is_checked(hub: HubServer, artifact: Path) -> None:
    first = push(artifact, REPO).oid
    change(hub, "calibration.json", b"{}")
    assert verify(REPO, revision=first).commit == first
    with pytest.raises(ArtifactError, match=r"calibration\.json"):
        verify(REPO)
    with pytest.raises(HubError, match=r"no such revision; check --revision"):
        verify(REPO, revision="v9")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("calibration.json", b"{}"),
        ("calibration.json", None),
        ("codebooks.safetensors", b"\0" * 64),
        ("model.safetensors", b"weights"),
        ("../outside", b"escaped"),
        ("manifest.json", b"{}"),
        ("manifest.json", None),
    ],
)
def test_what_was_changed_by_hand_is_found_before_it_is_downloaded(
    hub: HubServer, artifact: Path, name: str, content: bytes | None
) -> None:
    push(artifact, REPO)
    change(hub, name, content)
    hub.requests.clear()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")) as caught:
        verify(REPO)
    assert "/tmp" not in str(caught.value)
    assert not any(r.endswith("/codebooks.safetensors") for r in hub.requests)


def test_a_change_of_the_same_size_is_found_in_what_arrives(hub: HubServer, artifact: Path) -> None:
    """Of a file in git the Hub lists no SHA-256, so only its content tells."""
    push(artifact, REPO)
    text = hub.repos[REPO].commits[-1].files["calibration.json"].content
    change(hub, "calibration.json", text.replace(b"11", b"12"))
    with pytest.raises(
        ArtifactError, match=rf"^{REPO} at \w{{40}}/calibration\.json does not have"
    ):
        verify(REPO)


def test_the_hubs_listing_is_not_believed(
    hub: HubServer, artifact: Path, waits: list[float]
) -> None:
    push(artifact, REPO)
    hub.faults = lambda method, path: (
        "corrupt" if applies("corrupt", method, path) and "codebooks" in path else None
    )
    with pytest.raises(HubError, match=r"codebooks\.safetensors .* does not arrive as the Hub"):
        verify(REPO)


def test_more_than_digests_is_checked(artifact: Path) -> None:
    (artifact / "codebooks.safetensors").write_bytes(b"\0" * 64)
    write_manifest(artifact)
    with pytest.raises(ArtifactError, match=r"codebooks\.safetensors"):
        verify(str(artifact))


def test_nothing_to_verify_is_said(hub: HubServer, tmp_path: Path) -> None:
    calibration = write_calibration(tmp_path / "calibration")
    with pytest.raises(ArtifactError, match="no manifest"):
        verify(str(calibration))
    for place in ("nowhere", str(tmp_path / "nowhere"), str(calibration / "cq_config.json")):
        with pytest.raises(ArtifactError, match=r"neither a folder nor a repository"):
            verify(place)
    with pytest.raises(HubError, match="no folder org/nowhere here"):
        verify("org/nowhere")
    with pytest.raises(ArtifactError, match="drop --revision"):
        verify(str(calibration), revision="main")
    hub.create("org/empty")
    with pytest.raises(ArtifactError, match=r"no manifest\.json, so it is no cqtool artifact"):
        verify("org/empty")


def test_a_private_repository_needs_a_token_and_a_public_one_none(
    hub: HubServer, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(artifact, REPO)
    monkeypatch.delenv("HF_TOKEN")
    assert verify(REPO).place == REPO
    hub.repos[REPO].private = True
    with pytest.raises(HubError, match="hf auth login"):
        verify(REPO)


def test_what_the_local_cache_holds_is_not_asked(hub: HubServer, artifact: Path) -> None:
    push(artifact, REPO)
    cached = Path(snapshot_download(REPO)) / "README.md"
    cached.resolve().write_text("damaged on this machine")
    assert verify(REPO).place == REPO
    change(hub, "README.md", b"damaged on the Hub")
    with pytest.raises(ArtifactError, match=r"README\.md"):
        verify(REPO)


def test_a_full_temporary_folder_is_said(
    hub: HubServer, artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download, left = HfApi.hf_hub_download, [0]

    def fail(api: HfApi, *arguments: object, **options: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return download(api, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HfApi, "hf_hub_download", fail)
    with pytest.raises(EnvironmentProblem, match=r"Commit [0-9a-f]{40} of .* is not done.*TMPDIR"):
        push(artifact, REPO)
    assert len(hub.repos[REPO].commits) == 2
    for whole in (0, 1, 3):  # the manifest, then one of the others
        left[0] = whole
        with pytest.raises(EnvironmentProblem, match=r"disk is full.*TMPDIR"):
            verify(REPO)

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(EnvironmentProblem, match=r"No temporary folder.*TMPDIR"):
        verify(REPO)


def test_a_revision_that_git_knows_no_name_for_is_refused(hub: HubServer) -> None:
    with pytest.raises(RecipeError, match=r"'v 1' cannot be a branch, a tag or a commit"):
        verify(REPO, revision="v 1")
    assert hub.requests == []


def test_the_command(hub: HubServer, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cqtool.cli.app import app

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            app(["verify", *map(str, arguments)])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    push(artifact, REPO)
    code, out, _ = run(artifact)
    assert code == 0 and "every digest verified" in out and str(artifact) in out
    code, out, _ = run(REPO, "--json")
    found = json.loads(out)
    assert code == 0 and found["commit"] == hub.repos[REPO].branches["main"]
    assert found["manifest_sha256"] == sha256_file(artifact / "manifest.json")
    change(hub, "calibration.json", b"{}")
    code, out, err = run(REPO)
    assert (code, out) == (2, "") and "error: org/tiny-cq at " in err
    assert run("org/nowhere")[0] == 1
    (artifact / "README.md").write_text("other")
    assert run(artifact)[0] == 2

"""Pushing, with the real Hub client against a Hub on loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub.endpoints import Endpoints
from hub.http import Refusal
from hub_server import TOKEN, Blob, HubServer, Repo
from huggingface_hub import constants, snapshot_download
from synthetic_artifact import edit_json

from cqtool.artifact.export import export
from cqtool.artifact.plan import PushOptions
from cqtool.artifact.push import push, resolve_repo_id
from cqtool.artifact.verify import verify
from cqtool.errors import ArtifactError, HubError, RecipeError
from cqtool.layout.config import read_config
from cqtool.manifest import verify_folder

REPO = "org/tiny-cq"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.parts
    }


def test_one_commit_holds_everything_and_comes_back_identical(
    hub: HubServer, artifact: Path, tmp_path: Path
) -> None:
    result = push(artifact, REPO)
    commits = hub.repos[REPO].commits
    assert [c.message for c in commits] == [
        "initial commit",
        "k-cq-4c3b-v-cq-8c4b codebooks for some-org/Tiny-Model, by cqtool 0.1.0",
    ]
    assert result.oid == commits[-1].oid and result.changed
    assert result.commit_url == f"{hub.url}/{REPO}/commit/{result.oid}"
    assert commits[-1].files["codebooks.safetensors"].lfs

    snapshot = Path(snapshot_download(REPO))
    assert (snapshot / "codebooks.safetensors").is_symlink()
    verify_folder(snapshot)
    local = Path(snapshot_download(REPO, local_dir=tmp_path / "local"))
    verify_folder(local)
    for folder in (snapshot, local):
        fetched = contents(folder)
        assert fetched.pop(".gitattributes")
        assert fetched == contents(artifact)


def test_pushing_the_same_again_makes_no_commit(hub: HubServer, artifact: Path) -> None:
    first = push(artifact, REPO)
    again = push(artifact, REPO)
    assert not again.changed
    assert (again.oid, again.commit_url) == (first.oid, first.commit_url)
    assert len(hub.repos[REPO].commits) == 2


def test_files_that_are_no_longer_part_are_deleted_in_the_same_commit(
    hub: HubServer, calibration: Path, artifact: Path
) -> None:
    push(artifact, REPO)
    (calibration / "reports" / "entropy.png").unlink()
    export(calibration, artifact, repo_id=REPO)
    result = push(artifact, REPO)
    commits = hub.repos[REPO].commits
    assert len(commits) == 3
    assert result.plan.paths("delete") == ("reports/entropy.png",)
    assert commits[-1].files.keys() == contents(artifact).keys() | {".gitattributes"}
    verify_folder(Path(snapshot_download(REPO)))


def test_private_and_branch(hub: HubServer, artifact: Path) -> None:
    options = PushOptions(private=True, revision="v2", commit_message="Second try")
    result = push(artifact, REPO, options)
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.branches["v2"] == result.oid != repo.branches["main"]
    assert repo.commits[-1].message == "Second try"
    verify_folder(Path(snapshot_download(REPO, revision="v2")))


def test_a_damaged_artifact_is_not_sent(hub: HubServer, artifact: Path) -> None:
    (artifact / "calibration.json").write_bytes(b"{}")
    with pytest.raises(ArtifactError, match=r"calibration\.json"):
        push(artifact, REPO)
    assert hub.requests == []


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": b"weights"},
        {"manifest.json": b"{}"},
        {"manifest.json": b"{}", "cq_config.json": b"{}"},
    ],
)
def test_a_repository_of_something_else_is_left_alone(
    hub: HubServer, artifact: Path, files: dict[str, bytes]
) -> None:
    repo = hub.create(REPO)
    repo.add("main", "theirs", {name: Blob(text, False) for name, text in files.items()})
    with pytest.raises(HubError, match="another --repo-id"):
        push(artifact, REPO)
    assert len(repo.commits) == 2


def test_somebody_elses_commit_in_between_is_not_overwritten(
    hub: HubServer, artifact: Path
) -> None:
    def interfere(repo: Repo) -> None:
        hub.before_commit = None
        repo.add("main", "theirs", {"README.md": Blob(b"theirs", False)})

    hub.before_commit = interfere
    with pytest.raises(HubError, match=r"Somebody else changed.*run the same command again"):
        push(artifact, REPO)
    assert hub.repos[REPO].commits[-1].message == "theirs"
    assert push(artifact, REPO).changed


def test_without_a_token_the_sentence_says_how_to_log_in(
    hub: HubServer, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no Hub token.*hf auth login.*HF_TOKEN") as caught:
        push(artifact, REPO)
    assert caught.value.exit_code == 1
    assert hub.requests == []


@pytest.mark.parametrize("token", ["hf_wrong-secret", "hf_wröng-secret", "hf_wrong secret\n#"])
def test_a_token_that_is_not_accepted_is_not_shown(
    hub: HubServer, artifact: Path, token: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HubError, match="hf auth login") as caught:
        push(artifact, REPO, token=token)
    shown = str(caught.value) + "".join(capfd.readouterr())
    assert "secret" not in shown
    assert hub.repos == {}


def test_other_refusals_say_what_to_do(
    hub: HubServer, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match=r"may not write to strangers/x \(403\).*write access"):
        push(artifact, "strangers/x")
    with pytest.raises(RecipeError, match="ORG/NAME"):
        push(artifact, "no/such/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push(artifact, REPO)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(None, r"may not read org/x \(403\)"), ("GatedRepo", r"org/x is gated.*/org/x, or")],
)
def test_who_may_not_read_is_not_told_about_writing(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, code: str | None, sentence: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise Refusal(403, {"error": "no"}, **({"code": code} if code else {}))

    hub.create("org/x")
    monkeypatch.setattr(Endpoints, "commit_at", refuse)
    with pytest.raises(HubError, match=sentence) as caught:
        verify("org/x")
    assert "may not write" not in str(caught.value)


def test_an_unreachable_hub_is_named_soon(
    hub: HubServer, artifact: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(HubError, match=rf"Cannot reach the Hub at {endpoint} .*HF_ENDPOINT"):
        push(artifact, REPO)
    assert waits == [1.0, 2.0]


def test_a_name_without_namespace_goes_to_the_tokens_owner(
    hub: HubServer, calibration: Path
) -> None:
    config = read_config(calibration)
    assert resolve_repo_id("org/x", config) == "org/x"
    assert resolve_repo_id("x", config) == "tester/x"
    assert resolve_repo_id(None, config) == "tester/Tiny-Model-k-cq-4c3b-v-cq-8c4b"
    edit_json(
        calibration / "cq_config.json",
        lambda c: c["base_model"].update(id=f"/data/-We?ird--{'x' * 200}"),
    )
    name = resolve_repo_id(None, read_config(calibration))
    assert name.startswith("tester/We-ird-x") and len(name.split("/")[1]) <= 96


def test_a_child_process_pushes_with_the_environment_alone(
    hub: HubServer, artifact: Path, tmp_path: Path
) -> None:
    """As in CI: HF_ENDPOINT and HF_TOKEN, nothing else."""
    code = (
        "import sys; from pathlib import Path; from cqtool.artifact.push import push\n"
        f"print(push(Path(sys.argv[1]), {REPO!r}).oid)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment = clean | hub.environment() | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code, artifact],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hub.repos[REPO].branches["main"]
    assert TOKEN not in done.stdout + done.stderr
    shutil.rmtree(artifact)
    verify_folder(Path(snapshot_download(REPO)))

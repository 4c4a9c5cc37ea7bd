"""What a push can be told: who pushes, what is sent, and where it ends up."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest
from hub.faults import planned
from hub_server import TOKEN, Blob, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import _auth
from synthetic_artifact import edit_json

from cqtool.artifact.export import export
from cqtool.artifact.plan import PushOptions
from cqtool.artifact.push import preview, push
from cqtool.errors import HubError, RecipeError
from cqtool.files import sha256_file
from cqtool.manifest import read_manifest

REPO = "org/tiny-cq"


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def next_release(calibration: Path, artifact: Path) -> None:
    """Change `artifact`: its configuration, hence its card and manifest, and nothing else."""
    edit_json(calibration / "cq_config.json", lambda c: c["calibration"].update(seed=12))
    export(calibration, artifact, repo_id=REPO)


def test_only_what_changed_is_sent(hub: HubServer, calibration: Path, artifact: Path) -> None:
    push(artifact, REPO)
    next_release(calibration, artifact)
    hub.requests.clear()
    result = push(artifact, REPO)
    assert hub.repos[REPO].commits[-1].sent == ("README.md", "cq_config.json", "manifest.json")
    assert not any("/lfs" in request for request in hub.requests)
    assert result.plan.paths("change") == ("README.md", "cq_config.json", "manifest.json")
    assert set(result.plan.paths("same")) == names(artifact) - set(result.plan.paths("change"))


def test_a_dry_run_lists_digests_and_bytes_and_changes_nothing(
    hub: HubServer, calibration: Path, artifact: Path
) -> None:
    fresh = preview(artifact, REPO)
    assert (fresh.oid, fresh.commit_url, fresh.changed) == (None, None, True)
    records = read_manifest(artifact)
    listed = {change.path: (change.size, change.sha256) for change in fresh.plan.changes}
    manifest = artifact / "manifest.json"
    assert listed == {name: (r.size, r.sha256) for name, r in records.items()} | {
        "manifest.json": (manifest.stat().st_size, sha256_file(manifest))
    }
    assert {change.action for change in fresh.plan.changes} == {"add"}

    first = push(artifact, REPO)
    assert not preview(artifact, REPO).changed
    (calibration / "reports" / "entropy.png").unlink()
    next_release(calibration, artifact)
    hub.requests.clear()
    found = preview(artifact, REPO, PushOptions(revision="next", tag="v2"))
    assert found.oid == first.oid
    assert found.plan.paths("delete") == ("reports/entropy.png",)
    assert found.plan.paths("change") == ("README.md", "cq_config.json", "manifest.json")
    assert found.plan.sent_bytes == sum(
        (artifact / name).stat().st_size for name in found.plan.paths("change")
    )
    assert {request.split()[0] for request in hub.requests} <= {"GET", "HEAD"}
    assert push(artifact, REPO).plan == found.plan


def test_names_that_git_refuses_are_refused_before_anything_is_done() -> None:
    for name in ("v 1", "a..b", "", "v1.lock", "HEAD", "0" * 40):
        for options in ({"tag": name}, {"revision": name}):
            with pytest.raises(RecipeError, match=rf"'{name}' .*(tag|branch)"):
                PushOptions(**options)


def test_a_dry_run_needs_no_token(
    hub: HubServer, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(artifact, REPO)
    monkeypatch.delenv("HF_TOKEN")
    assert not preview(artifact, REPO).changed


def test_what_a_stopped_push_uploaded_is_not_sent_again(
    hub: HubServer, artifact: Path, waits: list[float]
) -> None:
    hub.faults = lambda method, path: "unavailable" if "/commit/" in path else None
    with pytest.raises(HubError, match="503"):
        push(artifact, REPO)
    assert hub.repos[REPO].branches["main"] == hub.repos[REPO].commits[0].oid
    hub.faults = None
    hub.requests.clear()
    assert push(artifact, REPO).changed
    assert not any(request.startswith("PUT") for request in hub.requests)


def test_overwriting_is_said_explicitly_and_leaves_the_artifact_alone(
    hub: HubServer, artifact: Path
) -> None:
    theirs = {"model.safetensors": Blob(b"weights", True), "manifest.json": Blob(b"{}", False)}
    hub.create(REPO).add("main", "theirs", theirs)
    with pytest.raises(HubError, match="--overwrite"):
        preview(artifact, REPO)
    result = push(artifact, REPO, PushOptions(overwrite=True))
    assert result.plan.paths("delete") == ("model.safetensors",)
    assert hub.repos[REPO].commits[-1].files.keys() == names(artifact)


@pytest.mark.parametrize(("private", "option"), [(False, "--private"), (True, "--public")])
def test_a_repository_of_another_visibility_is_refused(
    hub: HubServer, artifact: Path, private: bool, option: str
) -> None:
    hub.create(REPO, private=private)
    for act in (preview, push):
        with pytest.raises(HubError, match=rf"settings, or drop {option}"):
            act(artifact, REPO, PushOptions(private=not private))
    assert len(hub.repos[REPO].commits) == 1
    assert push(artifact, REPO, PushOptions(private=private)).changed


def test_what_is_refused_leaves_no_branch_behind(hub: HubServer, artifact: Path) -> None:
    repo = hub.create(REPO)
    repo.add("main", "theirs", {"model.bin": Blob(b"weights", False)})
    with pytest.raises(HubError, match=r"model\.bin"):
        push(artifact, REPO, PushOptions(revision="next"))
    assert repo.branches.keys() == {"main"}


def test_a_branch_begins_at_main_and_main_stays(hub: HubServer, artifact: Path) -> None:
    repo = hub.create(REPO)
    push(artifact, REPO, PushOptions(revision="next"))
    assert repo.branches["main"] == repo.commits[0].oid
    assert repo.branches["next"] == repo.commits[1].oid


def test_a_pull_request_is_opened_once_and_needs_no_write_access(
    hub: HubServer, calibration: Path, artifact: Path
) -> None:
    push(artifact, REPO)
    hub.writable.clear()
    next_release(calibration, artifact)
    options = PushOptions(create_pr=True)
    main = hub.repos[REPO].branches["main"]
    result = push(artifact, REPO, options)
    (pull,) = hub.repos[REPO].pulls
    assert result.changed and result.oid == pull.oid != main == hub.repos[REPO].branches["main"]
    assert result.pull_request == f"{hub.url}/{REPO}/discussions/1"
    again = push(artifact, REPO, options)
    assert (again.changed, again.oid, again.pull_request) == (False, pull.oid, result.pull_request)

    pull.status = "closed"
    assert push(artifact, REPO, options).changed
    assert len(hub.repos[REPO].pulls) == 2


def test_a_pull_request_whose_answer_is_lost_is_found(
    hub: HubServer, artifact: Path, waits: list[float]
) -> None:
    hub.create(REPO)
    hub.faults = planned(("POST", "/commit/", "lost"))
    result = push(artifact, REPO, PushOptions(create_pr=True))
    assert result.changed and len(hub.repos[REPO].pulls) == 1
    assert result.oid == hub.repos[REPO].pulls[0].oid


def test_a_tag_is_set_and_never_moved(hub: HubServer, calibration: Path, artifact: Path) -> None:
    first = push(artifact, REPO, PushOptions(tag="v1"))
    repo = hub.repos[REPO]
    assert repo.tags == {"v1": first.oid}
    assert not push(artifact, REPO, PushOptions(tag="v1")).changed
    next_release(calibration, artifact)
    for act in (preview, push):
        with pytest.raises(HubError, match="v1 of org/tiny-cq already names another release"):
            act(artifact, REPO, PushOptions(tag="v1"))
    assert len(repo.commits) == 2
    second = push(artifact, REPO, PushOptions(tag="v2"))
    assert repo.tags == {"v1": first.oid, "v2": second.oid}


def test_what_is_no_branch_is_not_pushed_to(hub: HubServer, artifact: Path) -> None:
    push(artifact, REPO, PushOptions(tag="v1"))
    repo = hub.repos[REPO]
    repo.add("main", "later", {})
    for act in (preview, push):
        with pytest.raises(HubError, match=f"v1 is no branch of {REPO}"):
            act(artifact, REPO, PushOptions(revision="v1"))
    assert len(repo.commits) == 3


def test_an_open_pull_request_can_be_pushed_to(
    hub: HubServer, calibration: Path, artifact: Path
) -> None:
    pull = push(artifact, REPO, PushOptions(create_pr=True))
    next_release(calibration, artifact)
    second = push(artifact, REPO, PushOptions(revision="refs/pr/1"))
    repo = hub.repos[REPO]
    assert pull.oid != second.oid == repo.pulls[0].oid
    assert set(repo.branches) == {"main"}
    with pytest.raises(HubError, match="no such revision"):
        push(artifact, REPO, PushOptions(revision="refs/pr/2"))
    assert set(repo.branches) == {"main"}


@pytest.mark.parametrize(
    "options",
    [PushOptions(create_pr=True, revision="dev"), PushOptions(revision="refs/pr/1")],
)
def test_nothing_is_created_for_what_nothing_can_be_added_to(
    hub: HubServer, artifact: Path, options: PushOptions
) -> None:
    for act in (preview, push):
        with pytest.raises(HubError, match=f"no repository {REPO}, .* {options.revision} there; "):
            act(artifact, REPO, options)
    assert hub.repos == {}
    hub.create(REPO)
    with pytest.raises(HubError, match="no such revision"):
        push(artifact, REPO, options)
    assert set(hub.repos[REPO].branches) == {"main"}
    assert push(artifact, "org/new", PushOptions(create_pr=True, revision="main")).pull_request


def test_a_preview_asks_for_branches_and_tags_once(hub: HubServer, artifact: Path) -> None:
    push(artifact, REPO, PushOptions(tag="v1"))
    for tag, tagged in (("v1", False), ("v2", True)):
        hub.requests.clear()
        assert preview(artifact, REPO, PushOptions(tag=tag, revision="main")).tagged is tagged
        assert hub.requests.count(f"GET /api/models/{REPO}/refs") == 1


def test_the_login_of_hf_auth_is_used(
    hub: HubServer, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(f"{TOKEN}\n")
    assert push(artifact, REPO).changed


def test_trusted_publishing_exchanges_the_identity_of_a_job(
    hub: HubServer, artifact: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    monkeypatch.setattr(_auth, "_OIDC_TOKEN_CACHE", None)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_OIDC_RESOURCE", REPO)
    monkeypatch.setenv("HF_OIDC_ID_TOKEN", "identity-of-the-job")
    with pytest.raises(HubError, match=r"does not exchange .*trusted publishers") as caught:
        push(artifact, REPO)
    assert "identity-of-the-job" not in str(caught.value)
    hub.publishers["identity-of-the-job", REPO] = "hf_jwt_short-lived"
    hub.tokens["hf_jwt_short-lived"] = "job"
    hub.faults = planned(("POST", "/oauth/token", "unavailable"))
    assert push(artifact, REPO).changed and waits == [1.0]


def test_neither_token_nor_upload_address_is_shown_or_kept(
    hub: HubServer, artifact: Path, waits: list[float]
) -> None:
    """The client would name the address, which is signed, with each of its own tries."""
    places = [artifact.parent, Path(os.environ["HF_HOME"])]
    notes: list[str] = []

    class Notes:
        def note(self, message: str) -> None:
            notes.append(message)

    hub.faults = planned(("PUT", "/lfs/", "unavailable"), ("POST", "/commit/", "unavailable"))
    logger, logged = logging.getLogger("huggingface_hub"), io.StringIO()
    logger.addHandler(handler := logging.StreamHandler(logged))
    try:
        push(artifact, REPO, progress=Notes())  # type: ignore[arg-type]
    finally:
        logger.removeHandler(handler)
    assert any("answers 503; trying again in 1 s" in note for note in notes)
    shown = logged.getvalue() + "".join(notes)
    assert TOKEN not in shown and "/lfs/" not in shown
    for place in places:
        for path in place.rglob("*"):
            assert path.is_dir() or TOKEN.encode() not in path.read_bytes()

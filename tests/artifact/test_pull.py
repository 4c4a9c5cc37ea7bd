"""Pulling an artifact from the Hub: what is fetched, what is kept, and what is said."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hub.faults import planned
from hub_server import Blob, HubServer, Repo
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import OIDCError
from huggingface_hub.utils import _http
from runtime_artifact import generate, tiny_model, write_tiny_calibration

from cqtool import CQCache
from cqtool.artifact.export import export
from cqtool.artifact.push import push
from cqtool.cache.loading import resolve
from cqtool.errors import ArtifactError, EnvironmentProblem, HubError
from cqtool.manifest import verify_folder

REPO = "org/tiny-cq"


@pytest.fixture
def pushed(hub: HubServer, artifact: Path) -> Repo:
    """The repository of `artifact`; no request was made yet."""
    push(artifact, REPO)
    hub.requests.clear()
    return hub.repos[REPO]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".gitattributes"
    }


def fetched(hub: HubServer) -> list[str]:
    """Names of the files that were sent since the last time."""
    asked = [one.split("/resolve/") for one in hub.requests if one.startswith("GET")]
    hub.requests.clear()
    return [parts[1].split("/", 1)[1] for parts in asked if len(parts) == 2]


def change(repo: Repo, name: str, content: bytes) -> str:
    """Somebody changes a file by hand; the new commit."""
    files = dict(repo.commits[-1].files)
    lfs = name in files and files[name].lfs
    return repo.add("main", "by hand", files | {name: Blob(content, lfs)}).oid


def test_a_second_load_asks_for_no_file(hub: HubServer, pushed: Repo, artifact: Path) -> None:
    folder = resolve(REPO, None)
    assert contents(folder) == contents(artifact)
    assert sorted(fetched(hub)) == sorted(contents(artifact))
    assert resolve(REPO, None) == folder
    assert len(hub.requests) == 1 and "/resolve/" not in hub.requests[0]
    hub.requests.clear()
    # A commit can be nothing else than what it was: the Hub is not asked at all.
    assert resolve(REPO, pushed.branches["main"]) == folder
    assert hub.requests == []


def test_a_revision_is_what_is_loaded(hub: HubServer, pushed: Repo, artifact: Path) -> None:
    first = pushed.branches["main"]
    pushed.tags["v1.0"] = first
    change(pushed, "README.md", b"damaged by hand")
    for revision in (first, "v1.0"):
        folder = resolve(REPO, revision)
        assert folder.name == first and contents(folder) == contents(artifact)
    with pytest.raises(ArtifactError, match=r"README\.md has 15 bytes instead of"):
        resolve(REPO, None)
    with pytest.raises(HubError, match=r"^org/tiny-cq at v2 does not exist .*; check the revision"):
        resolve(REPO, "v2")


def test_what_the_manifest_does_not_list_is_not_fetched(
    hub: HubServer, pushed: Repo, artifact: Path
) -> None:
    """Scores that somebody proposed were taken, and gigabytes lie beside the artifact."""
    change(pushed, ".eval_results/gsm8k.yaml", b"- value: 1")
    change(pushed, "model.safetensors", b"weights")
    assert contents(resolve(REPO, None)) == contents(artifact)
    assert sorted(fetched(hub)) == sorted(contents(artifact))
    # The Hub's own client fetches all of it to the same place.
    folder = Path(snapshot_download(REPO, ignore_patterns=["*.safetensors"]))
    assert (folder / ".eval_results" / "gsm8k.yaml").is_file()
    assert resolve(REPO, None) == folder


def test_a_name_with_the_signs_of_a_pattern_is_that_name(
    hub: HubServer, calibration: Path, tmp_path: Path
) -> None:
    for name in ("a[1].png", "?*.png"):
        (calibration / "reports" / name).write_bytes(b"\x89PNG")
    artifact = export(calibration, tmp_path / "artifact").folder
    push(artifact, REPO)
    change(hub.repos[REPO], "reports/a1.png", b"another")
    hub.requests.clear()
    assert contents(resolve(REPO, None)) == contents(artifact)
    assert "reports/a1.png" not in fetched(hub)


def test_a_branch_that_moves_meanwhile_is_not_mixed(
    hub: HubServer, pushed: Repo, artifact: Path
) -> None:
    first = pushed.branches["main"]

    def move(method: str, path: str) -> None:
        if path.endswith("/manifest.json") and len(pushed.commits) == 2:
            change(pushed, "README.md", b"the next release")

    hub.faults = move
    folder = resolve(REPO, None)
    assert len(pushed.commits) == 3, "the branch did not move"
    assert folder.name == first and contents(folder) == contents(artifact)


@pytest.mark.parametrize("name", ["manifest.json", "codebooks.safetensors", "README.md"])
@pytest.mark.parametrize("how", ["flipped", "cut off", "gone"])
def test_a_file_damaged_in_the_cache_is_fetched_once_more(
    hub: HubServer, pushed: Repo, artifact: Path, name: str, how: str
) -> None:
    folder = resolve(REPO, None)
    blob = (folder / name).resolve()
    data = blob.read_bytes()
    middle = len(data) // 2
    if how == "gone":
        blob.unlink()
    else:
        rest = data[middle + 1 :] if how == "flipped" else b""
        blob.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + rest)
    hub.requests.clear()
    assert resolve(REPO, None) == folder
    assert set(fetched(hub)) <= {name, "manifest.json"}
    verify_folder(folder)
    assert contents(folder) == contents(artifact)


@pytest.mark.parametrize("name", ["manifest.json", "codebooks.safetensors"])
def test_a_file_damaged_on_its_way_is_fetched_once_more(
    hub: HubServer, pushed: Repo, artifact: Path, name: str
) -> None:
    hub.faults = planned(("GET", f"/{name}", "corrupt"))
    assert contents(resolve(REPO, None)) == contents(artifact)
    assert fetched(hub).count(name) == 2


def test_what_is_damaged_on_the_hub_is_refused_each_time(hub: HubServer, pushed: Repo) -> None:
    """Of the same size, so that nothing but a digest tells."""
    good = pushed.commits[-1].files["calibration.json"].content
    change(pushed, "calibration.json", good.replace(b"11", b"12"))
    for _ in range(2):
        hub.requests.clear()
        with pytest.raises(
            ArtifactError, match=r"calibration\.json .*fetched twice here.*push it again"
        ):
            resolve(REPO, None)
        assert fetched(hub).count("README.md") <= 1
    change(pushed, "calibration.json", good)
    resolve(REPO, None)


def test_a_file_that_the_manifest_lists_and_the_hub_lacks(hub: HubServer, pushed: Repo) -> None:
    files = dict(pushed.commits[-1].files)
    del files["calibration.json"]
    pushed.add("main", "by hand", files)
    with pytest.raises(ArtifactError, match=r"lacks calibration\.json.* fetched twice here"):
        resolve(REPO, None)


def test_what_is_no_artifact_is_not_fetched(hub: HubServer) -> None:
    files = {"config.json": Blob(b"{}", False), "model.safetensors": Blob(b"weights", True)}
    hub.create("org/base").add("main", "a base model", files)
    with pytest.raises(ArtifactError, match=r"org/base has no manifest\.json, so it is no cqtool"):
        resolve("org/base", None)
    assert fetched(hub) == []


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turns the client's offline mode on, as HF_HUB_OFFLINE=1 does when it is imported."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", on)
        _http.close_session()  # the next one asks whether it may connect

    yield switch
    monkeypatch.undo()
    _http.close_session()


def test_offline_what_is_in_the_cache_is_used(
    hub: HubServer, pushed: Repo, artifact: Path, offline: Any
) -> None:
    folder = resolve(REPO, None)
    hub.requests.clear()
    offline(True)
    for revision in (None, "main", folder.name):
        assert resolve(REPO, revision) == folder
    assert hub.requests == []
    (folder / "README.md").resolve().write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"README\.md has 7 bytes instead of .*again"):
        resolve(REPO, None)
    offline(False)
    assert contents(resolve(REPO, None)) == contents(artifact)


def test_offline_what_is_missing_is_said(hub: HubServer, pushed: Repo, offline: Any) -> None:
    offline(True)
    remedy = "the Hub client is in offline mode; load it once with HF_HUB_OFFLINE=0"
    with pytest.raises(HubError, match=rf"^{REPO} is not in the Hub client's cache, and {remedy}"):
        resolve(REPO, None)
    offline(False)
    folder = resolve(REPO, None)
    offline(True)
    with pytest.raises(HubError, match=rf"^{REPO} at v9 is not in the Hub client's cache, and"):
        resolve(REPO, "v9")
    for name in ("README.md", "codebooks.safetensors"):
        (folder / name).unlink()
    lacking = r"as a whole \(it lacks README\.md, codebooks\.safetensors\)"
    with pytest.raises(HubError, match=rf"^{REPO} is not in the .* cache {lacking}, and {remedy}"):
        resolve(REPO, None)
    (folder / "manifest.json").unlink()
    with pytest.raises(HubError, match=rf"^{REPO} is not in the Hub client's cache, and"):
        resolve(REPO, None)


def test_a_hub_that_is_not_there(
    hub: HubServer, pushed: Repo, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve(REPO, None)
    hub.stop()
    _http.close_session()  # a connection that is open is served on
    # The client itself falls back to what it has.
    assert resolve(REPO, None) == folder
    with pytest.raises(
        HubError, match=r"^There is no folder org/other here, and the Hub at http://12"
    ):
        resolve("org/other", None)
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("unavailable", r"^The Hub has a problem of its own \(503\); wait a few minutes"),
        ("rate-limit", r"^The Hub asks to slow down \(429\); wait a few minutes"),
        ("lost", r"does not answer \(RemoteProtocolError\); check the network"),
    ],
)
def test_a_hub_that_stays_down_is_given_up_with_a_sentence(
    hub: HubServer, waits: list[float], kind: str, said: str
) -> None:
    hub.faults = lambda method, path: kind
    with pytest.raises(HubError, match=said):
        resolve(REPO, None)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_dropped_connections_are_overcome(hub: HubServer, pushed: Repo, waits: list[float]) -> None:
    hub.faults = planned(("GET", "/revision/", "lost"), ("GET", "/revision/", "drop"))
    resolve(REPO, None)
    assert waits == [1.0, 2.0]


def test_who_may_not_see_it_is_told_to_log_in(
    hub: HubServer, pushed: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_not-the-right-token")
    with pytest.raises(
        HubError, match=r"not accept this token \(401\); .*hf auth login"
    ) as refused:
        resolve(REPO, None)
    assert "not-the-right" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="check the name, and log in with `hf auth login`"):
        resolve(REPO, None)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OIDCError("x"))
    )
    with pytest.raises(HubError, match="id-token: write"):
        resolve(REPO, None)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "make it writable")]
)
def test_a_cache_that_cannot_be_written_is_said(
    hub: HubServer, pushed: Repo, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", fail)
    with pytest.raises(EnvironmentProblem, match=rf"{remedy}, or set HF_HUB_CACHE"):
        resolve(REPO, None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model and the artifact of it."""
    folder, model = tmp_path_factory.mktemp("pull"), tiny_model()
    calibration = write_tiny_calibration(folder / "calibration", model)
    return model, export(calibration, folder / "artifact").folder


def test_a_fine_tune_is_refused_unless_it_is_asked_for(
    hub: HubServer,
    tiny: tuple[Any, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_tokenizer: Any,
) -> None:
    from cqtool.cli.app import app

    model, artifact = tiny
    push(artifact, REPO)
    cache = CQCache.from_pretrained(REPO, model)
    assert generate(model, cache) == generate(model, CQCache.from_pretrained(artifact, model))

    other = tiny_model()
    for weights in other.parameters():
        weights.data *= 1.25
    with pytest.raises(ArtifactError, match=r"^org/tiny-cq was made .* give --allow-other-base"):
        CQCache.from_pretrained(REPO, other)
    blurred = tiny_model()
    blurred.config.rms_norm_eps = 0.5
    said = r"this model \(its rms_norm_eps is 0.5 instead of 1e-06\).* give --allow-other-base"
    with pytest.raises(ArtifactError, match=said):
        CQCache.from_pretrained(REPO, blurred)
    assert CQCache.from_pretrained(REPO, blurred, allow_other_base=True).nbytes == 0
    other.resize_token_embeddings(len(tiny_tokenizer))
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")

    def run(*more: str) -> tuple[int, str, str]:
        words = ["generate", str(tmp_path / "other"), REPO, "--prompt", "a b", "--json"]
        with pytest.raises(SystemExit) as ended:
            app([*words, "--max-new-tokens", "8", "--device", "cpu", *more])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    code, out, err = run()
    assert (code, out) == (2, "") and "--allow-other-base" in err
    code, out, _ = run("--allow-other-base")
    assert code == 0 and json.loads(out)["cache"]["bytes"] > 0

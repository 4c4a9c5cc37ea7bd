"""Large files over Xet, with the client that the Hub client uses for it, and what fails there.

A push over a failing storage ends in one sentence and leaves the repository as it was.
"""

from __future__ import annotations

import itertools
import random
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub.endpoints import Endpoints
from hub.faults import SILENT
from hub.http import Refusal
from hub.xet import TOKENS
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import _xet
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from cqtool.artifact.export import export
from cqtool.artifact.plan import PushOptions
from cqtool.artifact.push import push
from cqtool.artifact.verify import verify
from cqtool.cache.loading import resolve
from cqtool.errors import CqtoolError, EnvironmentProblem, HubError
from cqtool.manifest import verify_folder
from cqtool.retry import passing_trouble
from cqtool.xet import xet_failure

REPO = "org/tiny-cq"
WAY_OUT = "or set HF_HUB_DISABLE_XET=1 to do without Xet"
Act = Callable[[], object]


@pytest.fixture
def pushed(xet_hub: HubServer, artifact: Path) -> HubServer:
    """The Hub with `artifact` on it; no request was made yet."""
    push(artifact, REPO)
    xet_hub.requests.clear()
    return xet_hub


def refuse(statuses: dict[str, str]) -> Callable[[str, str], str | None]:
    """A fault for each request whose path holds one of those parts."""
    return lambda method, path: next((statuses[part] for part in statuses if part in path), None)


def check_wording(error: CqtoolError) -> None:
    text = str(error)
    assert text.endswith(".") and "\n" not in text
    assert not any(secret in text for secret in (TOKEN, *TOKENS.values()))


def test_large_files_go_there_and_come_back(xet_hub: HubServer, artifact: Path) -> None:
    result = push(artifact, REPO, PushOptions(tag="v1"))
    sent = [one for one in xet_hub.requests if one.startswith("POST /xet/v1/")]
    assert any("/xorbs/" in one for one in sent) and "POST /xet/v1/shards" in sent
    large = [blob for blob in xet_hub.repos[REPO].commits[-1].files.values() if blob.lfs]
    assert large and all(blob.sha256 in xet_hub.xet.hashes for blob in large)
    assert not push(artifact, REPO).changed

    for fetch in (lambda: resolve(REPO, result.oid), lambda: verify(REPO, revision="v1")):
        xet_hub.requests.clear()
        fetch()
        asked = " ".join(xet_hub.requests)
        assert asked.count("/xet/v1/reconstructions/") == len(large)
        assert not any(one.startswith("GET") and ".safetensors" in one for one in xet_hub.requests)
    verify_folder(resolve(REPO, result.oid))


@pytest.mark.parametrize("bars", [True, False])
def test_off_a_terminal_no_bars_are_drawn(
    xet_hub: HubServer, artifact: Path, capfd: pytest.CaptureFixture[str], bars: bool
) -> None:
    """What the program has chosen for the client stays as it was."""
    (enable_progress_bars if bars else disable_progress_bars)()
    try:
        push(artifact, REPO)
        assert any("/xorbs/" in one for one in xet_hub.requests)
        assert capfd.readouterr().err == ""
        assert are_progress_bars_disabled() is not bars
    finally:
        enable_progress_bars()


# What the storage does, and what is said in the end.
TROUBLES = {
    "unavailable": r"^The Hub's Xet storage answers 503; wait a few minutes, then ",
    "rate-limit": r"^The Hub's Xet storage answers 429; wait a few minutes, then ",
    "lost": r"^The Hub's Xet storage does not answer, or hangs up; check the network and the proxy",
    "drop": r"^The Hub's Xet storage does not answer, or hangs up; check the network and the proxy",
}
DOWN = ("/reconstructions/", "/data/")
UP = ("/xorbs/", "/v1/shards")


def unused_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("kind", TROUBLES)
@pytest.mark.parametrize("part", UP)
def test_a_push_over_a_storage_that_fails_leaves_all_as_it_was(
    xet_hub: HubServer, artifact: Path, waits: list[float], kind: str, part: str
) -> None:
    repo = xet_hub.create(REPO)
    before = list(repo.commits)
    xet_hub.faults = refuse({part: kind})
    with pytest.raises(HubError, match=TROUBLES[kind]) as caught:
        push(artifact, REPO, PushOptions(tag="v1"))
    check_wording(caught.value)
    assert str(caught.value).endswith(f"then run the same command again, {WAY_OUT}.")
    assert waits == [1.0, 2.0]
    assert repo.commits == before and repo.tags == {}

    xet_hub.faults = None
    assert push(artifact, REPO, PushOptions(tag="v1")).changed
    assert len(repo.commits) == 2


@pytest.mark.parametrize("kind", TROUBLES)
@pytest.mark.parametrize("part", DOWN)
def test_a_pull_and_a_check_over_a_storage_that_fails_say_so(
    pushed: HubServer, waits: list[float], kind: str, part: str
) -> None:
    pushed.faults = refuse({part: kind})
    for fetch, again in ((resolve_it, "try again"), (verify_it, "run the same command again")):
        waits.clear()
        with pytest.raises(HubError, match=TROUBLES[kind]) as caught:
            fetch()
        check_wording(caught.value)
        assert str(caught.value).endswith(f"then {again}, {WAY_OUT}.")
        # Several files are fetched at once.
        assert {1.0, 2.0} == set(waits)
    pushed.faults = None
    verify_folder(resolve(REPO, None))


def resolve_it() -> object:
    return resolve(REPO, None)


def verify_it() -> object:
    return verify(REPO)


@pytest.mark.parametrize("kind", [*TROUBLES, "truncate"])
@pytest.mark.parametrize("part", [*UP, *DOWN])
def test_trouble_that_passes_is_overcome(
    xet_hub: HubServer, artifact: Path, waits: list[float], kind: str, part: str
) -> None:
    # Xet's client tries once more by itself; the trouble passes while cqtool waits.
    xet_hub.faults = lambda method, path: kind if part in path and not waits else None
    result = push(artifact, REPO)
    assert len(xet_hub.repos[REPO].commits) == 2
    verify_folder(resolve(REPO, result.oid))
    assert waits and set(waits) == {1.0}


def test_a_storage_that_is_not_there_is_said(
    pushed: HubServer, calibration: Path, artifact: Path, waits: list[float]
) -> None:
    pushed.cas_url = unused_address()
    for act in (resolve_it, verify_it, lambda: push(artifact, "org/other")):
        with pytest.raises(HubError, match=TROUBLES["lost"]) as caught:
            act()
        check_wording(caught.value)
    assert len(pushed.repos["org/other"].commits) == 1


@pytest.mark.parametrize("act", ["push", "pull"])
def test_a_storage_that_is_silent_counts_as_one_that_does_not_answer(
    pushed: HubServer,
    artifact: Path,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    act: str,
) -> None:
    """How long it may be silent is up to Xet's client."""
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "300ms")
    # Its cache says what was sent before, which it does not send again.
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    part = "/xorbs/" if act == "push" else "/data/"
    pushed.faults = lambda method, path: SILENT if part in path else None
    acts: dict[str, Act] = {"push": lambda: push(artifact, "org/other"), "pull": resolve_it}
    with pytest.raises(HubError, match=TROUBLES["lost"]):
        acts[act]()
    assert waits == [1.0, 2.0] and any(part in one for one in pushed.requests)


@pytest.mark.parametrize(("kind", "sent"), [(SILENT, 2), ("unavailable", 6)])
def test_a_silence_that_lasted_is_not_waited_for_once_more(
    xet_hub: HubServer,
    artifact: Path,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    sent: int,
) -> None:
    """Xet's client sends twice here and six times by default, and cqtool three times that."""
    monkeypatch.setenv("HF_XET_CLIENT_READ_TIMEOUT", "300ms")
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    monkeypatch.setattr("cqtool.retry.monotonic", itertools.count(step=331.0).__next__)
    xet_hub.faults = refuse({"/xorbs/": kind})
    with pytest.raises(HubError, match=TROUBLES["lost" if kind == SILENT else kind]):
        push(artifact, REPO)
    assert sum("/xorbs/" in one for one in xet_hub.requests) == sent
    assert len(waits) == sent // 2 - 1


@pytest.mark.parametrize("status", [404, 403])
def test_a_hub_that_gives_no_token_for_xet_is_named_at_once(
    pushed: HubServer,
    artifact: Path,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    def token(*arguments: object, **options: object) -> None:
        raise Refusal(status)

    monkeypatch.setattr(Endpoints, "token", token)
    said = "has no Xet storage; set HF_HUB" if status == 404 else r"storage answers 403; set HF_HUB"
    acts: list[Act] = [lambda: push(artifact, "org/other")]
    if status == 404:
        acts += [resolve_it, verify_it]
    for act in acts:
        with pytest.raises(HubError, match=said) as caught:
            act()
        check_wording(caught.value)
    assert waits == []


@pytest.mark.parametrize("act", ["push", "pull", "verify"])
def test_a_cache_of_xet_that_cannot_be_written_is_said(
    pushed: HubServer,
    artifact: Path,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    act: str,
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "xet"
    monkeypatch.setenv("HF_XET_CACHE", str(place))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(place))
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    acts = {"push": lambda: push(artifact, "org/other"), "pull": resolve_it, "verify": verify_it}
    said = rf"^Cannot write {place}: a file stands .*; set HF_XET_CACHE to another folder\.$"
    with pytest.raises(EnvironmentProblem, match=said):
        acts[act]()
    assert waits == []


@pytest.fixture
def no_large_files() -> Iterator[None]:
    """As on a full disk the system refuses to write, here beyond a size that the large file has."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_is_said(
    xet_hub: HubServer,
    calibration: Path,
    tmp_path: Path,
    waits: list[float],
    request: pytest.FixtureRequest,
) -> None:
    """What Xet fetches it also writes."""
    (calibration / "reports" / "large.png").write_bytes(random.Random(1).randbytes(1 << 20))
    push(export(calibration, tmp_path / "large").folder, REPO)
    request.getfixturevalue("no_large_files")
    with pytest.raises(
        EnvironmentProblem, match=r"^The Hub client cannot write to its cache .*HF_"
    ):
        resolve(REPO, None)
    with pytest.raises(EnvironmentProblem, match=r"^Cannot write .*ulimit -f.* TMPDIR"):
        verify(REPO)
    assert waits == []


def test_an_error_of_another_origin_is_none_of_xet(xet_hub: HubServer) -> None:
    """Though its text may be the same."""
    error = RuntimeError("Task error: HTTP status server error (503 Service Unavailable)")
    try:
        raise error
    except RuntimeError as caught:
        assert xet_failure(caught) is None and passing_trouble(caught) is None


@pytest.mark.parametrize(
    ("number", "said"), [("28", "No space left"), ("9" * 30, "cannot transfer files over Xet")]
)
def test_an_error_number_that_no_system_has_is_none(number: str, said: str) -> None:
    names = {"__name__": "huggingface_hub.file_download"}
    exec("def xet_get(text): raise RuntimeError(text)", names)
    with pytest.raises(RuntimeError) as caught:
        names["xet_get"](f"I/O error: write (os error {number})")
    failure = xet_failure(caught.value)
    assert failure is not None and said in failure.sentence("https://hub", "run it again")

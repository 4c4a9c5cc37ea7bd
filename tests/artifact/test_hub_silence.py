"""A Hub that accepts requests and never answers: push, pull and verify end all the same."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub.faults import SILENT, planned
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from cqtool.artifact.plan import PushOptions
from cqtool.artifact.push import push
from cqtool.artifact.verify import verify
from cqtool.cache.loading import resolve
from cqtool.errors import HubError
from cqtool.retry import Retry

REPO = "org/tiny-cq"
SILENCE = 0.2
SECONDS = 15
"""All are over in 1 to 5; a client without a limit would wait for ever."""


def always(method: str, path: str) -> str:
    return SILENT


def only(method: str, part: str) -> Callable[[str, str], str | None]:
    return lambda asked, path: SILENT if asked == method and part in path else None


@pytest.fixture
def retry(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Retry:
    """Little patience, also where nobody can choose it; the client's own limits are as short."""
    monkeypatch.setattr("cqtool.cache.pull.Retry", functools.partial(Retry, silence=SILENCE))
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, SILENCE)
    return Retry(silence=SILENCE)


def refused(act: Callable[[], object]) -> str:
    """What it says, in the end."""
    begin = time.monotonic()
    with pytest.raises(HubError) as raised:
        act()
    assert time.monotonic() - begin < SECONDS
    text = str(raised.value)
    assert "(ReadTimeout)" in text and "check the network" in text and TOKEN not in text
    return text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/models/org/tiny-cq"),
        ("POST", "/api/repos/create"),
        ("POST", "/api/validate-yaml"),
        ("POST", "/preupload/"),
        ("POST", "/lfs/objects/batch"),
        ("POST", "/commit/"),
        ("GET", "/refs"),
        ("GET", "/tree/"),
        ("POST", "/tag/"),
    ],
)
def test_a_push_ends_wherever_the_hub_falls_silent(
    hub: HubServer, artifact: Path, retry: Retry, method: str, path: str
) -> None:
    hub.faults = only(method, path)
    refused(lambda: push(artifact, REPO, PushOptions(tag="v1"), retry=retry))
    hub.faults = None
    push(artifact, REPO, PushOptions(tag="v1"), retry=retry)
    assert len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize(("method", "path"), [("PUT", "/lfs/"), ("POST", "/commit/")])
def test_what_was_done_without_an_answer_is_found(
    hub: HubServer, artifact: Path, retry: Retry, method: str, path: str
) -> None:
    files = 2  # in large file storage
    hub.faults = planned(*[(method, path, SILENT)] * (files if method == "PUT" else 1))
    assert push(artifact, REPO, retry=retry).changed
    assert len(hub.repos[REPO].commits) == 2


def test_a_pull_ends(hub: HubServer, artifact: Path, retry: Retry) -> None:
    push(artifact, REPO)
    for faults in (always, only("GET", "/tree/")):
        hub.faults = faults
        assert hub.url in refused(lambda: resolve(REPO, None))
    hub.faults = planned(("GET", "/revision/main", SILENT), ("GET", "/tree/", SILENT))
    folder = resolve(REPO, None)
    assert folder.name == hub.repos[REPO].branches["main"]
    # What is here serves where the Hub is silent.
    hub.faults = always
    assert resolve(REPO, None) == folder


def test_a_verification_ends(hub: HubServer, artifact: Path, retry: Retry) -> None:
    push(artifact, REPO)
    for faults in (always, only("GET", "/tree/")):
        hub.faults = faults
        refused(lambda: verify(REPO, retry=retry))


def test_the_client_of_a_program_stays_as_it_was(hub: HubServer) -> None:
    client = get_session()
    before = dict(client.event_hooks)

    def limits(**options: object) -> dict[str, float | None]:
        seen: list[dict[str, float | None]] = []

        def look(request: object) -> None:
            seen.append(request.extensions["timeout"])  # type: ignore[attr-defined]

        def ask() -> None:
            hooks = client.event_hooks
            client.event_hooks = {**hooks, "request": [*hooks["request"], look]}
            client.get(hub.url, **options)  # type: ignore[arg-type]
            client.event_hooks = hooks

        Retry(silence=7.0).call(ask)
        return seen[0]

    assert limits() == limits(timeout=None)
    assert limits() == {"connect": 7.0, "read": 7.0, "write": 7.0, "pool": None}
    assert limits(timeout=3.0) == dict.fromkeys(("connect", "read", "write", "pool"), 3.0)
    assert get_session() is client and client.event_hooks == before
    with pytest.raises(KeyError):
        Retry().call(lambda: {}["absent"])
    assert client.event_hooks == before

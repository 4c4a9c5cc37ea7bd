"""Which failures may pass, how long they are waited for, and what is said of the others."""

from __future__ import annotations

import json

import pytest
from hub.faults import KINDS, Schedule
from huggingface_hub.errors import HfHubHTTPError

from cqtool.errors import ArtifactError
from cqtool.retry import DamagedDownload, Retry, passing_trouble

http = pytest.importorskip(HfHubHTTPError.__bases__[0].__module__.split(".")[0])


def answered(status: int, **headers: str) -> HfHubHTTPError:
    request = http.Request("GET", "https://hub.example/api")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = http.Response(status, request=request, headers=named)
    return HfHubHTTPError(f"{status}", response=response)


def wrapped(error: Exception) -> Exception:
    outer = RuntimeError("Error while uploading 'x' to the Hub.")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_answers_that_pass(status: int) -> None:
    for error in (answered(status), wrapped(answered(status))):
        trouble = passing_trouble(error)
        assert trouble is not None and str(status) in trouble.what and trouble.wait is None


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 413, 501])
def test_answers_that_do_not(status: int) -> None:
    assert passing_trouble(answered(status)) is None


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"Retry_After": "17"}, 17.0),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"RateLimit": '"api";r=4;t=55'}, None),
        ({"Retry_After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"Retry_After": "9" * 40}, None),
    ],
)
def test_the_hub_says_how_long(headers: dict[str, str], wait: float | None) -> None:
    trouble = passing_trouble(answered(429, **headers))
    assert trouble is not None and trouble.wait == wait


def test_other_failures() -> None:
    for error in (http.ReadError("x"), http.RemoteProtocolError("x"), http.WriteError("x")):
        trouble = passing_trouble(error)
        assert trouble is not None and not trouble.doubtful
    for error in (http.ConnectError("x"), http.ReadTimeout("x"), json.JSONDecodeError("x", "", 0)):
        trouble = passing_trouble(error)
        assert trouble is not None and trouble.doubtful
    assert passing_trouble(DamagedDownload("x")) is not None
    for error in (http.UnsupportedProtocol("x"), ArtifactError("x"), OSError(28, "x"), KeyError()):
        assert passing_trouble(error) is None


def attempts(retry: Retry, error: Exception) -> int:
    tries = 0

    def fail() -> None:
        nonlocal tries
        tries += 1
        raise error

    with pytest.raises(type(error)):
        retry.call(fail)
    return tries


def test_patience_ends(waits: list[float]) -> None:
    retry = Retry(attempts=5, doubtful_attempts=2, first=2.0, longest=10.0, patience=60.0)
    assert attempts(retry, answered(503)) == 5
    assert waits == [2.0, 4.0, 8.0, 10.0]
    waits.clear()
    assert attempts(retry, http.ConnectError("x")) == 2
    assert attempts(retry, answered(404)) == 1
    assert waits == [2.0]
    waits.clear()
    assert attempts(retry, answered(429, Retry_After="59")) == 5
    assert waits == [59.0] * 4
    assert attempts(retry, answered(429, Retry_After="61")) == 1


def test_a_schedule_is_its_seeds_and_reaches_every_kind() -> None:
    requests = [("POST", "/api/models/a/b/commit/main"), ("GET", "/a/b/resolve/main/x")]

    def drawn(seed: int, order: list[tuple[str, str]]) -> dict[tuple[str, str], list[str | None]]:
        schedule = Schedule(seed, 0.5)
        found: dict[tuple[str, str], list[str | None]] = {request: [] for request in order}
        for _ in range(60):
            for request in order:
                found[request].append(schedule(*request))
        assert schedule.met
        return found

    assert drawn(1, requests) == drawn(1, requests[::-1]) != drawn(2, requests)
    kinds = {kind for faults in drawn(1, requests).values() for kind in faults}
    assert kinds == {*KINDS, None}

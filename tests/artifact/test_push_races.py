"""Pushes that meet each other, and pushes that are killed."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from pathlib import Path

import pytest
from hub.faults import Faults, planned
from hub_server import Blob, HubServer, Repo

from cqtool.artifact.export import export
from cqtool.artifact.plan import PushOptions
from cqtool.artifact.push import push
from cqtool.errors import HubError

REPO = "org/tiny-cq"


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_of_two_releases_at_once_one_wins_and_the_other_says_so(
    hub: HubServer, calibration: Path, artifact: Path, tmp_path: Path
) -> None:
    other = export(calibration, tmp_path / "other", repo_id="org/other").folder
    hub.create(REPO)
    both = threading.Barrier(2)

    def meet(method: str, path: str) -> None:
        if "/commit/" in path:
            both.wait(30)

    hub.faults = meet
    ends: dict[Path, object] = {}

    def run(folder: Path) -> None:
        try:
            ends[folder] = push(folder, REPO).oid
        except HubError as error:
            ends[folder] = error

    threads = [threading.Thread(target=run, args=(folder,)) for folder in (artifact, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lost,) = [end for end in ends.values() if isinstance(end, HubError)]
    assert "Somebody else changed org/tiny-cq at the same moment" in str(lost)
    (won,) = [folder for folder, end in ends.items() if isinstance(end, str)]
    repo = hub.repos[REPO]
    assert repo.branches["main"] == ends[won] and len(repo.commits) == 2
    held = {name: blob.content for name, blob in repo.commits[-1].files.items()}
    del held[".gitattributes"]
    assert held == {name: (won / name).read_bytes() for name in names(won)}


def test_a_push_that_is_killed_at_any_request_is_completed_by_the_next(
    hub: HubServer, artifact: Path
) -> None:
    """kill -9 before and after each request of a push takes effect."""
    push(artifact, "org/whole", PushOptions(tag="v1"))
    whole = hub.repos["org/whole"].commits[-1].files
    for number, fault in ((n, f) for n in range(len(hub.requests)) for f in (None, "drop")):
        repo_id = f"org/killed-{number}-{fault}"
        hub.objects.clear()
        ready, go = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.read(ready, 1)
                push(artifact, repo_id, PushOptions(tag="v1"))
            finally:
                os._exit(0)
        hub.faults = killer(child, number, fault)
        os.write(go, b"!")
        status = os.waitpid(child, 0)[1]
        os.close(ready), os.close(go)
        hub.faults = None
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        result = push(artifact, repo_id, PushOptions(tag="v1"))
        repo = hub.repos[repo_id]
        assert len(repo.commits) == 2 and repo.commits[-1].files == whole
        assert repo.tags == {"v1": result.oid}


def killer(child: int, number: int, fault: str | None) -> Faults:
    """Kill the process `child` when its request `number` arrives, and let that meet `fault`."""
    arriving = itertools.count()

    def choose(method: str, path: str) -> str | None:
        if next(arriving) < number:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return fault

    return choose


def test_a_commit_of_others_after_a_lost_answer_is_not_overwritten(
    hub: HubServer, artifact: Path, waits: list[float]
) -> None:
    """Nobody can tell then whose turn it is."""

    def interfere(repo: Repo) -> None:
        hub.before_commit = None
        repo.add("main", "theirs", {"README.md": Blob(b"theirs", False)})

    hub.before_commit = interfere
    hub.faults = planned(("POST", "/commit/", "lost"))
    with pytest.raises(HubError, match="Somebody else changed"):
        push(artifact, REPO)
    assert hub.repos[REPO].commits[-1].message == "theirs"

"""Pulling while the network, the Hub and the cache fail, on schedules that seeds decide.

A pull ends with a folder that holds a release, every byte of it, or with one sentence. What it
leaves in the Hub client's cache hinders no later one.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hub.faults import KINDS, Schedule
from hub_server import TOKEN, Blob, HubServer
from huggingface_hub import constants
from synthetic_artifact import edit_json, write_calibration

from cqtool.artifact.export import export
from cqtool.cache.loading import resolve
from cqtool.errors import ArtifactError, CqtoolError, HubError

SCHEDULES = 120
RATES = (0.03, 0.1, 0.2, 0.4, 0.8)
REPO = "org/tiny-cq"

Files = dict[str, bytes]


def read(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".gitattributes"
    }


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Files]:
    """Two releases of one repository, of which some files are the same."""
    folder = tmp_path_factory.mktemp("releases")
    calibration = write_calibration(folder / "calibration")
    old = export(calibration, folder / "old").folder
    edit_json(calibration / "cq_config.json", lambda c: c["calibration"].update(seed=12))
    return read(old), read(export(calibration, folder / "new").folder)


def stock(hub: HubServer, releases: tuple[Files, Files]) -> tuple[str, str]:
    """Put both on the Hub, one commit each."""
    repo = hub.create(REPO)
    first = repo.commits[0].files
    old, new = (
        repo.add(
            "main",
            message,
            first | {name: Blob(data, "codebooks" in name) for name, data in files.items()},
        ).oid
        for message, files in zip(("old", "new"), releases, strict=True)
    )
    return old, new


def damage(folder: Path, case: random.Random) -> None:
    """What a full disk, a broken one or an interrupted copy leaves of some cached files."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if case.random() < 0.4:
            blob, data = path.resolve(), path.read_bytes()
            place = case.randrange(len(data))
            how = case.choice(("flip", "cut", "unlink"))
            if how == "unlink":
                path.unlink()
            else:
                rest = bytes([data[place] ^ 1]) + data[place + 1 :] if how == "flip" else b""
                blob.write_bytes(data[:place] + rest)


def test_whatever_happens_what_is_loaded_is_a_release(
    hub: HubServer,
    releases: tuple[Files, Files],
    waits: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commits = stock(hub, releases)
    release = dict(zip(commits, releases, strict=True))
    outcomes: Counter[str] = Counter()
    met: set[str] = set()
    for seed in range(SCHEDULES):
        case = random.Random(seed)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / str(seed)))
        known = case.choice(("nothing", "old", "new", "damaged"))
        hub.faults = None
        if known != "nothing":
            # As when the branch was pulled before its second release.
            hub.repos[REPO].branches["main"] = commits[known != "old"]
            kept = resolve(REPO, None)
            hub.repos[REPO].branches["main"] = commits[1]
            if known == "damaged":
                damage(kept, case)
        revision = case.choice((None, *commits))
        allowed = {revision or commits[1]}
        if revision is None and known == "old":
            allowed.add(commits[0])  # the client falls back to what it knows of the branch

        faults = hub.faults = Schedule(seed, case.choice(RATES))
        try:
            folder = resolve(REPO, revision)
            assert folder.name in allowed and read(folder) == release[folder.name], seed
            outcomes["loaded"] += 1
        except (HubError, ArtifactError) as error:
            check_wording(error)
            outcomes[type(error).__name__] += 1
        met.update(faults.met)

        hub.faults = None
        folder = resolve(REPO, revision)
        assert folder.name == (revision or commits[1])
        assert read(folder) == release[folder.name], f"a later pull is hindered, seed {seed}"
    with capsys.disabled():
        print(f"\n{outcomes.total()} schedules of faults in pulls: {dict(outcomes)}")
    assert outcomes.total() == SCHEDULES >= 100
    assert {"loaded", "HubError"} <= outcomes.keys(), outcomes
    assert met == {*KINDS} - {"conflict"}


def check_wording(error: CqtoolError) -> None:
    text = str(error)
    assert text.endswith(".") and TOKEN not in text and "\n" not in text
    assert any(word in text for word in ("again", "check", "wait", "log in"))

"""kill -9 at random moments: what stands there is whole, and the same command again gives the same
bytes.

With those of tests/release/test_kill.py they are fifty, of each of calibrate, export, push and
release eight or more. A moment after the end of a command kills nothing and does not count.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Ended, run
from hub_server import TOKEN, HubServer
from synthetic_artifact import edit_json, write_calibration

from cqtool.manifest import verify_folder

KILLS = {"calibrate": 14, "export": 14, "push": 12}
SEED = 0
REPO = "org/tiny-cq"

Files = dict[str, bytes]
Command = Callable[..., Ended]


@pytest.fixture
def cqtool(hub: HubServer, tmp_path: Path) -> Command:
    home = tmp_path / "home"
    home.mkdir()
    return functools.partial(run, hub_url=hub.url, token=TOKEN, home=home)


def read(folder: Path) -> Files:
    """Its files; how long a calibration took is left out."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if "manifest.json" not in files:
        record = json.loads(files["calibration.json"])
        del record["timings"]
        files["calibration.json"] = json.dumps(record).encode()
    return files


class Kills:
    """Moments to kill a command at, and where it was.

    Args:
        command: what is killed, a key of :data:`KILLS`.
        seconds: how long it takes.
    """

    def __init__(self, command: str, seconds: float) -> None:
        self._command, self._seconds = command, seconds
        self._places: Counter[str] = Counter()

    def moments(self) -> Iterator[float]:
        """Seconds from its beginning, until it was killed often enough."""
        wanted = KILLS[self._command]
        rng = random.Random(f"{SEED} {self._command}")
        for _ in range(4 * wanted):
            if self._places.total() < wanted:
                yield rng.random() * self._seconds
        assert self._places.total() == wanted, self._places

    def note(self, ended: Ended, place: str) -> None:
        """How a run ended, and where, if it was killed."""
        assert ended.code in (0, -signal.SIGKILL), ended.output
        if ended.code:
            self._places[place] += 1
        else:
            self._seconds = min(self._seconds, ended.seconds)

    def show(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Print where it was killed, and how often."""
        with capsys.disabled():
            places = ", ".join(f"{place} {count}" for place, count in self._places.most_common())
            print(f"\nkill -9 of {self._command}: {places}")


def test_a_calibration_that_was_killed_resumes_to_the_same_bytes(
    cqtool: Command,
    tiny_model_dir: Path,
    tiny_text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text[:20_000], encoding="utf-8")

    def calibrate(out: Path, *more: str, kill_after: float | None = None) -> Ended:
        return cqtool(
            *("calibrate", tiny_model_dir, "--recipe", "cq-8c8b", "--dataset", text),
            *("--sequences", 6, "--sequence-length", 64, "--iterations", 10, "--device", "cpu"),
            *("--out", out, *more),
            kill_after=kill_after,
        )

    def place(out: Path) -> str:
        partial = out.with_name(f"{out.name}.partial")
        if out.exists():
            return "complete"
        if (partial / "fits").exists():
            return "later layers"
        return "sampling or first layer" if partial.exists() else "opening the model"

    calibrate(tmp_path / "first")  # what only a first time needs is not to decide the moments
    whole = calibrate(tmp_path / "whole")
    assert whole.code == 0, whole.output
    reference = read(tmp_path / "whole")
    assert reference == read(tmp_path / "first")
    kills = Kills("calibrate", whole.seconds)
    for number, moment in enumerate(kills.moments()):
        out = tmp_path / f"cut-{number}"
        ended = calibrate(out, kill_after=moment)
        kills.note(ended, place(out))
        assert not out.exists() or read(out) == reference, f"half a calibration, moment {number}"
        again = calibrate(out, "--resume")
        assert again.code == 0, again.output
        assert read(out) == reference, f"other bytes, moment {number}"
    # As after a kill just before the last step of all.
    (tmp_path / "cut-0.partial").mkdir()
    assert calibrate(tmp_path / "cut-0", "--resume").code == 0
    left = {path.name for path in tmp_path.iterdir()} - {"home", "text.txt", "first", "whole"}
    assert left == {f"cut-{cut}" for cut in range(number + 1)}
    kills.show(capsys)


@pytest.fixture
def versions(tmp_path: Path) -> tuple[Path, Path]:
    """Two calibrations to release one after the other."""
    old, new = (write_calibration(tmp_path / name) for name in ("v1", "v2"))
    edit_json(new / "cq_config.json", lambda c: c["calibration"].update(seed=12))
    (new / "reports" / "entropy.png").write_bytes(b"\x89PNG\r\n" + bytes(range(255, -1, -1)))
    values = (new / "codebooks.safetensors").read_bytes()
    (new / "codebooks.safetensors").write_bytes(values[:-2] + values[-4:-2])
    return old, new


def test_an_export_that_was_killed_leaves_a_whole_artifact_and_can_be_repeated(
    cqtool: Command,
    versions: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (old, new), out = versions, tmp_path / "artifact"

    def export(calibration: Path, kill_after: float | None = None) -> Ended:
        return cqtool("export", calibration, "--out", out, "--no-kernels", kill_after=kill_after)

    def place() -> str:
        if read(out) == after:
            return "complete"
        return "writing" if list(tmp_path.glob(".artifact.*")) else "reading"

    assert export(old).code == 0
    shutil.copytree(out, tmp_path / "standing")
    before = read(out)
    whole = export(new)
    assert whole.code == 0, whole.output
    after = read(out)
    assert before.keys() == after.keys() and before != after

    kills = Kills("export", whole.seconds)
    for number, moment in enumerate(kills.moments()):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "standing", out)
        ended = export(new, kill_after=moment)
        kills.note(ended, place())
        verify_folder(out)
        assert read(out) in (before, after), f"half an artifact, moment {number}"
        again = export(new)
        assert again.code == 0, again.output
        assert read(out) == after, f"other bytes, moment {number}"
        assert not list(tmp_path.glob(".artifact.*")), f"something is left, moment {number}"
    kills.show(capsys)


def test_a_push_that_was_killed_leaves_whole_releases_and_can_be_repeated(
    cqtool: Command,
    hub: HubServer,
    versions: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (old, new), out = versions, tmp_path / "artifact"

    def export(calibration: Path, kill_after: float | None = None) -> Ended:
        hub.requests.clear()
        return cqtool(
            *("export", calibration, "--out", out, "--no-kernels"),
            *("--push-to-hub", "--repo-id", REPO, "--tag", calibration.name),
            kill_after=kill_after,
            since=lambda: bool(hub.requests),
        )

    def published() -> Files:
        commit = hub.repos[REPO].find("main")
        assert commit is not None
        files = {name: blob.content for name, blob in commit.files.items()}
        return {name: data for name, data in files.items() if name != ".gitattributes"}

    def place() -> str:
        if hub.repos[REPO].tags:
            return "tagged"
        if published() == after:
            return "committed"
        return "content sent" if hub.objects else "nothing sent"

    assert export(old).code == 0
    before, stock = read(out), dict(hub.repos[REPO].commits[-1].files)
    whole = export(new)
    assert whole.code == 0, whole.output
    after = read(out)
    assert before != after == published()

    kills = Kills("push", whole.seconds)
    for number, moment in enumerate(kills.moments()):
        repo = hub.create(REPO)
        repo.add("main", "v1", stock)
        hub.objects.clear()
        ended = export(new, kill_after=moment)
        kills.note(ended, place())
        assert published() in (before, after), f"half a release, moment {number}"
        assert repo.tags in ({}, {"v2": repo.branches["main"]})
        assert not repo.tags or published() == after
        again = export(new)
        assert again.code == 0, again.output
        assert read(out) == published() == after, f"other bytes, moment {number}"
        assert len(repo.commits) == 3, f"the release was committed twice, moment {number}"
        assert repo.tags == {"v2": repo.branches["main"]}
    kills.show(capsys)

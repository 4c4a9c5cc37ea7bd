"""kill -9 at random moments: what stands there is whole, and the same command again gives the same
bytes.

MOMENTS, of each command, are few for CI. With 50 each, run by hand, all hundred passed in 68 s.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Ended, run
from hub_server import TOKEN, HubServer
from synthetic_artifact import edit_json, write_calibration

from cqtool.manifest import verify_folder

MOMENTS = 10
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


def test_a_calibration_that_was_killed_resumes_to_the_same_bytes(
    cqtool: Command, tiny_model_dir: Path, tiny_text: str, tmp_path: Path
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

    calibrate(tmp_path / "first")  # what only a first time needs is not to decide the moments
    whole = calibrate(tmp_path / "whole")
    assert whole.code == 0, whole.output
    reference = read(tmp_path / "whole")
    assert reference == read(tmp_path / "first")
    killed = 0
    for moment in range(MOMENTS):
        out = tmp_path / f"cut-{moment}"
        cut = random.Random(moment).random() * whole.seconds
        ended = calibrate(out, kill_after=cut)
        assert ended.code in (0, -signal.SIGKILL), ended.output
        killed += ended.code != 0
        assert not out.exists() or read(out) == reference, f"half a calibration, moment {moment}"
        again = calibrate(out, "--resume")
        assert again.code == 0, again.output
        assert read(out) == reference, f"other bytes, moment {moment}"
    # As after a kill just before the last step of all.
    (tmp_path / "cut-0.partial").mkdir()
    assert calibrate(tmp_path / "cut-0", "--resume").code == 0
    left = {path.name for path in tmp_path.iterdir()} - {"home", "text.txt", "first", "whole"}
    assert left == {f"cut-{moment}" for moment in range(MOMENTS)}
    assert killed > MOMENTS // 2


def test_an_export_that_was_killed_leaves_whole_releases_and_can_be_repeated(
    cqtool: Command, hub: HubServer, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"

    def export(calibration: Path, kill_after: float | None = None) -> Ended:
        return cqtool(
            *("export", calibration, "--out", out, "--no-kernels"),
            *("--push-to-hub", "--repo-id", REPO, "--tag", calibration.name),
            kill_after=kill_after,
        )

    def published() -> Files:
        commit = hub.repos[REPO].find("main")
        assert commit is not None
        files = {name: blob.content for name, blob in commit.files.items()}
        return {name: data for name, data in files.items() if name != ".gitattributes"}

    old, new = (write_calibration(tmp_path / name) for name in ("v1", "v2"))
    edit_json(new / "cq_config.json", lambda c: c["calibration"].update(seed=12))
    (new / "reports" / "entropy.png").write_bytes(b"\x89PNG\r\n" + bytes(range(255, -1, -1)))
    values = (new / "codebooks.safetensors").read_bytes()
    (new / "codebooks.safetensors").write_bytes(values[:-2] + values[-4:-2])
    assert export(old).code == 0
    shutil.copytree(out, tmp_path / "standing")
    before, stock = read(out), dict(hub.repos[REPO].commits[-1].files)
    whole = export(new)
    assert whole.code == 0, whole.output
    after = read(out)
    assert before.keys() == after.keys() and before != after == published()

    killed = 0
    for moment in range(MOMENTS):
        repo = hub.create(REPO)
        repo.add("main", "v1", stock)
        hub.objects.clear()
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "standing", out)
        cut = random.Random(moment).random() * whole.seconds
        ended = export(new, kill_after=cut)
        assert ended.code in (0, -signal.SIGKILL), ended.output
        killed += ended.code != 0
        verify_folder(out)
        assert read(out) in (before, after), f"half an artifact, moment {moment}"
        assert published() in (before, after), f"half a release, moment {moment}"
        assert repo.tags in ({}, {"v2": repo.branches["main"]})
        assert not repo.tags or published() == after
        again = export(new)
        assert again.code == 0, again.output
        assert read(out) == published() == after, f"other bytes, moment {moment}"
        assert len(repo.commits) == 3, f"the release was committed twice, moment {moment}"
        assert repo.tags == {"v2": repo.branches["main"]}
    assert killed > MOMENTS // 2

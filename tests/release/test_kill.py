"""kill -9 at any moment of a release: the same command ends with the same bytes."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cqtool.files import sha256_file

REPO = "org/killed"
STEPS = {
    # Places in the midst of a step, between its beginning and its end.
    "calibrate": ["cqtool.codebooks.calibrate:fit_codebooks", "cqtool.release.local:_settle"],
    "tune": ["cqtool.tuning.tune:_write"],
    "analyze-entropy": ["cqtool.report.files:plot_entropy"],
    "check": ["cqtool.quality.finished:FinishedRows.clear", "cqtool.release.local:draw_quality"],
    "export": ["cqtool.artifact.export:verify_folder"],
}
MOMENTS = [
    moment
    for step, calls in STEPS.items()
    for moment in (
        {"call": "cqtool.release.journal:Journal.begin", "argument": step, "after": True},
        *({"call": call} for call in calls),
        {"call": "cqtool.release.journal:Journal.finish", "argument": step},
    )
] + [
    {"call": "cqtool.artifact.push:send"},
    {"call": "cqtool.artifact.push:send", "after": True},
    {"call": "cqtool.release.chain:push", "after": True},
    {"call": "cqtool.release.chain:verify"},
]
CHAIN = (*STEPS, "push", "verify")
KILLS = 10
"""At random moments; tests/test_kill.py says of the others."""
SEED = 0


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


@pytest.fixture(scope="module")
def whole(
    cqtool: Any, server: Any, tiny_model_dir: Path, tuned_recipe: Path, tmp_path_factory: Any
) -> Any:
    """The content of an artifact that nobody killed, seconds it took, and a way to make it."""

    def command(out: Path) -> list[object]:
        options = ("--repo-id", REPO, "--no-kernels", "--json", "--out", out)
        return ["release", tiny_model_dir, tuned_recipe, *options]

    out = tmp_path_factory.mktemp("whole") / "release"
    run = cqtool(*command(out))
    assert run.code == 0, run.stderr
    del server.repos[REPO]
    return content(out / "artifact"), run.seconds, command


def test_killed_in_every_step_it_continues_to_the_same_bytes(whole, cqtool, server, tmp_path):
    expected, _, command = whole
    out = tmp_path / "release"
    out.mkdir()
    (out / ".release.json.abc.tmp").touch()  # killed while the first journal was written
    for moment in MOMENTS:
        run = cqtool(*command(out), kill=moment)
        assert run.code == -9, (moment, run.stderr)
    run = cqtool(*command(out))
    assert run.code == 0 and run.statuses == dict.fromkeys(run.statuses, "same") | {
        "verify": "done"
    }
    compare(expected, out, server)


def test_killed_at_random_moments_it_continues_to_the_same_bytes(
    whole, cqtool, server, tmp_path, capsys
):
    """Releases one after the other, each killed until it is complete."""
    expected, seconds, command = whole
    rng, places, number = random.Random(SEED), Counter(), 0
    while places.total() < KILLS:
        number += 1
        assert number <= 4 * KILLS
        out = tmp_path / f"release-{number}"
        code = -9
        while code and places.total() < KILLS:
            run = cqtool(*command(out), kill={"seconds": rng.uniform(0, seconds)})
            code = run.code
            assert code in (0, -9), run.stderr
            if code:
                places[place(run.stderr)] += 1
        run = cqtool(*command(out))
        assert run.code == 0, run.stderr
        compare(expected, out, server)
    with capsys.disabled():
        said = ", ".join(f"{step} {count}" for step, count in places.most_common())
        print(f"\nkill -9 of release: {said}")


def place(stderr: str) -> str:
    """The step that a release was in, by its log; opening the model belongs to the first."""
    ended = re.findall(rf"^({'|'.join(CHAIN)}): (?:done|same),", stderr, re.MULTILINE)
    return (*CHAIN, "complete")[len(ended)]


def compare(expected: dict[str, str], out: Path, server: Any) -> None:
    assert content(out / "artifact") == expected
    left = {path.name for path in out.iterdir()}
    assert left == {"release.json", "calibration", "tuned", "artifact"}
    repo = server.repos.pop(REPO)
    held = {n: b.content for n, b in repo.commits[-1].files.items() if n != ".gitattributes"}
    assert held == {name: (out / "artifact" / name).read_bytes() for name in expected}
    assert len(repo.commits) == 2  # the Hub's own first one, and the release

"""`cqtool export --push-to-hub` and its options, as far as they are the command's own work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from synthetic_artifact import edit_json

from cqtool.files import sha256_file

REPO = "org/tiny-cq"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Export the calibration and push it; exit code, stdout and stderr."""
    from cqtool.cli.app import app

    def command(*arguments: str) -> tuple[int, str, str]:
        line = ["export", str(calibration), "--out", str(tmp_path / "out"), "--no-kernels"]
        with pytest.raises(SystemExit) as ended:
            app([*line, *arguments])
        shown = capsys.readouterr()
        assert TOKEN not in shown.out + shown.err
        return int(ended.value.code or 0), shown.out, shown.err

    return command


def test_a_dry_run_prints_what_would_change(
    hub: HubServer, run: Run, calibration: Path, tmp_path: Path
) -> None:
    push = ("--push-to-hub", "--repo-id", REPO)
    code, out, _ = run(*push, "--dry-run")
    assert code == 0 and hub.repos == {}
    config = tmp_path / "out" / "cq_config.json"
    (line,) = [line.split() for line in out.splitlines() if "cq_config.json" in line]
    assert line == ["add", "cq_config.json", f"{config.stat().st_size:,}", sha256_file(config)]
    assert "Nothing was pushed" in out and "which is new" in out

    assert run(*push)[0] == 0
    edit_json(calibration / "cq_config.json", lambda c: c["calibration"].update(seed=12))
    (calibration / "reports" / "entropy.png").unlink()
    code, out, _ = run(*push, "--dry-run", "--json")
    hub_part = json.loads(out)["hub"]
    assert hub_part["dry_run"] and hub_part["changed"]
    assert hub_part["oid"] == hub.repos[REPO].branches["main"]
    actions = {file["path"]: file["action"] for file in hub_part["files"]}
    assert actions["codebooks.safetensors"] == "same"
    assert actions["reports/entropy.png"] == "delete"
    assert hub_part["files"] == sorted(hub_part["files"], key=lambda file: file["path"])
    assert {*hub_part["files"][0]} == {"path", "action", "size", "sha256"}
    sent = [f["size"] for f in hub_part["files"] if f["action"] in ("add", "change")]
    assert hub_part["sent_bytes"] == sum(sent)

    assert run(*push)[0] == 0
    code, out, _ = run(*push, "--dry-run")
    assert code == 0 and "Nothing to push" in out
    assert len(hub.repos[REPO].commits) == 3


def test_options_arrive(hub: HubServer, run: Run) -> None:
    push = ("--push-to-hub", "--repo-id", REPO, "--json")
    code, out, _ = run(*push, "--private", "--revision", "next", "--tag", "v1")
    found, repo = json.loads(out)["hub"], hub.repos[REPO]
    assert code == 0 and repo.private
    assert repo.tags == {"v1": repo.branches["next"]} == {found["tag"]: found["oid"]}

    code, out, _ = run(*push, "--create-pr", "--commit-message", "Please take this")
    assert code == 0 and repo.pulls[0].title == "Please take this"
    assert json.loads(out)["hub"]["pull_request"] == f"{hub.url}/{REPO}/discussions/1"

    code, _, err = run(*push, "--public")
    assert code == 1 and f"{REPO} is private" in err

    code, _, err = run(*push, "--tag", "v1", "--commit-message", "again")
    assert code == 0 and repo.tags["v1"] == repo.branches["next"]


def test_what_cqtool_did_not_write_goes_only_when_told(hub: HubServer, run: Run) -> None:
    repo = hub.create(REPO)
    repo.add(
        "main", "theirs", dict.fromkeys(["model.bin"], repo.commits[0].files[".gitattributes"])
    )
    code, _, err = run("--push-to-hub", "--repo-id", REPO)
    assert code == 1 and "model.bin" in err and "--overwrite" in err
    assert run("--push-to-hub", "--repo-id", REPO, "--overwrite")[0] == 0
    assert "model.bin" not in repo.commits[-1].files


@pytest.mark.parametrize(
    "options",
    [["--public"], ["--create-pr"], ["--tag", "v1"], ["--overwrite"], ["--dry-run"],
     ["--push-to-hub", "--create-pr", "--tag", "v1"]],
)  # fmt: skip
def test_options_without_a_meaning_are_wrong_usage(
    hub: HubServer, run: Run, tmp_path: Path, options: list[str]
) -> None:
    code, _, err = run(*options)
    assert code == 2 and options[-1 if len(options) == 1 else -2] in err
    assert hub.requests == [] and not (tmp_path / "out").exists()

"""`cqtool release`: the chain in one command, which can be run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_server import Blob

from cqtool.files import sha256_file
from cqtool.release.summary import render_summary

STEPS = ["calibrate", "tune", "analyze-entropy", "check", "export", "push", "verify"]
LOCAL = STEPS[:5]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def words(tiny_model_dir: Path) -> Any:
    """The words of a release command."""

    def words(recipe: Path, out: Path, repo_id: str, *more: object) -> list[object]:
        options = ("--out", out, "--repo-id", repo_id, "--no-kernels", "--json")
        return ["release", tiny_model_dir, recipe, *options, *more]

    return words


@pytest.fixture(scope="module")
def released(cqtool: Any, words: Any, tuned_recipe: Path, tmp_path_factory: Any) -> Any:
    """A finished release with tuning: its folder, command and first run."""
    folder = tmp_path_factory.mktemp("released")
    out = folder / "release"
    more = ("--summary", folder / "page.md", "--tag", "v1")
    command = words(tuned_recipe, out, "org/whole", *more)
    run = cqtool(*command)
    assert run.code == 0, run.stderr
    return out, command, run


def test_one_command_goes_from_the_model_to_a_verified_repository(released, server):
    out, _, run = released
    assert run.statuses == dict.fromkeys(STEPS, "done")
    result = run.json
    assert (result["changed"], result["passed"], result["failed"]) == (True, True, False)
    assert run.json["steps"][5]["result"]["tag"] == "v1"
    assert server.repos["org/whole"].tags["v1"] == result["commit"]
    held = {
        name: blob.content
        for name, blob in server.repos["org/whole"].commits[-1].files.items()
        if name != ".gitattributes"
    }
    assert held == {name: (out / "artifact" / name).read_bytes() for name in held}
    assert {"reports/entropy.json", "reports/quality.json", "README.md"} <= held.keys()
    assert json.loads(held["cq_config.json"])["tuned"] is True
    assert result["commit"] == server.repos["org/whole"].branches["main"]
    assert all(step["seconds"] >= 0 for step in result["steps"])
    page = (out.parent / "page.md").read_text()
    assert "Released: [org/whole]" in page and f"`{result['commit']}`" in page
    assert result["steps"][-1]["result"]["manifest_sha256"] in page


def test_run_twice_the_second_changes_nothing_and_says_so(released, cqtool, server):
    out, command, _ = released
    before, commits = digests(out), len(server.repos["org/whole"].commits)
    again = cqtool(*command)
    assert again.statuses == dict.fromkeys(STEPS, "same") | {"verify": "done"}
    assert again.json["changed"] is False and again.code == 0
    assert digests(out) == before and len(server.repos["org/whole"].commits) == commits
    assert "Nothing changed: [org/whole]" in (out.parent / "page.md").read_text()
    told = cqtool(*(word for word in command if word != "--json"))
    assert "Nothing changed" in told.stdout


def test_a_new_tag_alone_is_a_change(released, cqtool, words, tuned_recipe, server):
    out, command, _ = released
    commits = len(server.repos["org/whole"].commits)
    tagged = [*command[: command.index("--tag")], "--tag", "v2"]
    dry = cqtool(*tagged, "--dry-run")
    assert dry.statuses["push"] == "preview" and "v2" not in server.repos["org/whole"].tags
    assert "The tag `v2` would be made." in (out.parent / "page.md").read_text()
    run = cqtool(*tagged)
    assert run.statuses["push"] == "done" and run.json["changed"] is True
    result = run.json["steps"][5]["result"]
    assert (result["changed"], result["tagged"]) == (False, True)
    assert server.repos["org/whole"].tags["v2"] == run.json["commit"]
    assert len(server.repos["org/whole"].commits) == commits
    assert "Released: [org/whole]" in (out.parent / "page.md").read_text()
    again = cqtool(*tagged)
    assert again.statuses["push"] == "same" and again.json["changed"] is False


def test_only_what_a_change_concerns_is_done_again(released, cqtool, words, tuned_recipe, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(released[0], before)
    # The cache of a CI job may leave out the samples, which are large.
    shutil.rmtree(before / "calibration" / "samples")
    judged = tmp_path / "judged.yaml"
    judged.write_text(tuned_recipe.read_text() + "description: other\ngates: {max_kl: 50}\n")
    run = cqtool(*words(judged, before, "org/judged"))
    assert [run.statuses[step] for step in LOCAL] == ["same", "same", "same", "done", "done"]
    assert "with another gates" in run.stderr
    config = json.loads((before / "artifact" / "cq_config.json").read_text())
    assert config["recipe"]["gates"]["max_kl"] == 50
    assert config["recipe"]["description"] == "other"
    (gate,) = run.json["steps"][3]["result"]["gates"]
    assert gate["passed"] and gate["limit"] == 50

    codebooks = before / "calibration" / "codebooks.safetensors"
    whole = codebooks.read_bytes()
    codebooks.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    run = cqtool(*words(judged, before, "org/judged"))
    assert "its files are not as it left them" in run.stderr
    assert [run.statuses[step] for step in LOCAL] == ["done", "same", "done", "same", "same"]
    assert codebooks.read_bytes() == whole

    # Without its report the analysis needs samples, and without samples they are taken again.
    shutil.rmtree(before / "calibration" / "samples")
    (before / "calibration" / "reports" / "entropy.json").unlink()
    run = cqtool(*words(judged, before, "org/judged"))
    assert [run.statuses[step] for step in LOCAL] == ["done", "same", "done", "same", "same"]
    assert run.statuses["push"] == "same"


def test_a_speed_that_is_measured_later_goes_onto_the_card_alone(
    released, cqtool, words, tuned_recipe, tiny_model_dir, tmp_path
):
    out = tmp_path / "release"
    shutil.copytree(released[0], out)
    command = words(tuned_recipe, out, "org/timed")
    assert cqtool(*command).statuses["push"] == "done"
    texts = ("--part", "end-to-end", "--batch", 1, "--prompt-tokens", 8, "--new-tokens", 2)
    bench = cqtool("bench", tiny_model_dir, out / "tuned", *texts, "--device", "cpu", "--keep")
    assert bench.code == 0, bench.stderr
    run = cqtool(*command)
    statuses = dict.fromkeys(STEPS[:4], "same") | dict.fromkeys(STEPS[4:], "done")
    assert run.statuses == statuses, run.stderr
    card = (out / "artifact" / "README.md").read_text()
    assert "## Speed" in card and "a local model's shape" in card
    # Other codebooks have another speed.
    run = cqtool(*command, "--dtype", "bfloat16")
    assert run.code == 0 and "of the codebooks before, and goes" in run.stderr
    assert "## Speed" not in (out / "artifact" / "README.md").read_text()


@pytest.mark.parametrize("begun", [True, False])
def test_a_tuning_by_other_processes_is_taken_over_once_its_own_has_begun(
    cqtool, words, tuned_recipe, tiny_model_dir, tmp_path, begun
):
    """As docs/ci.md says: stopped in its tuning steps, which several GPUs then take."""
    out = tmp_path / "release"
    call = "tuning.trainer:Trainer.save" if begun else "release.inputs:tuning_windows"
    command = words(tuned_recipe, out, "org/shared", "--dry-run")
    assert cqtool(*command, kill={"call": f"cqtool.{call}", "after": True}).code == -9
    assert (out / "tuned.partial").is_dir() is begun
    tuned = out / "tuned"
    tune = ["tune", tiny_model_dir, out / "calibration", "--out", tuned, "--resume"]
    assert cqtool(*tune).code == 0
    codebooks = tuned / "codebooks.safetensors"
    written = codebooks.stat().st_mtime_ns
    for status in ("done", "same"):
        run = cqtool(*command)
        assert run.code == 0 and run.statuses["tune"] == status, run.stderr
        assert (codebooks.stat().st_mtime_ns == written) is begun


def test_a_tuning_by_other_processes_with_other_settings_is_refused_and_kept(
    cqtool, words, tuned_recipe, tiny_model_dir, tmp_path
):
    """The release would state its own recipe of it."""
    out = tmp_path / "release"
    command = words(tuned_recipe, out, "org/seeded", "--dry-run")
    begun = {"call": "cqtool.release.journal:Journal.begin", "argument": "tune", "after": True}
    assert cqtool(*command, kill=begun).code == -9
    tuned = out / "tuned"
    tune = ["tune", tiny_model_dir, out / "calibration", "--out", tuned, "--seed", "1"]
    assert cqtool(*tune).code == 0
    kept = digests(tuned)
    for _ in range(2):
        run = cqtool(*command)
        assert run.code == 2 and run.statuses["tune"] == "failed"
        assert f"{tuned} was made meanwhile with another tuning than the release" in run.stderr
        assert digests(tuned) == kept
    tuned.rename(tmp_path / "away")
    run = cqtool(*command)
    assert run.code == 0, run.stderr
    stated = json.loads((out / "artifact" / "cq_config.json").read_text())["recipe"]
    assert stated["tuning"]["seed"] == 0
    assert digests(tuned)["codebooks.safetensors"] != kept["codebooks.safetensors"]


def test_a_missed_gate_ends_it_before_anything_is_published(
    cqtool, words, recipe, server, tmp_path
):
    strict = tmp_path / "strict.yaml"
    strict.write_text(recipe.read_text() + "gates: {max_kl: 0.000001, min_top1: 1%}\n")
    command = words(strict, tmp_path / "out", "org/never", "--summary", tmp_path / "page.md")
    first = cqtool(*command)
    assert first.code == 3 and "gate missed: nothing was released" in first.stderr
    assert "max_kl" in first.stderr
    states = ["done", "done", "missed", "not run", "not run", "not run"]
    assert list(first.statuses.values()) == states
    assert not first.json["passed"] and not (tmp_path / "out" / "artifact").exists()
    assert "org/never" not in server.repos
    page = (tmp_path / "page.md").read_text()
    assert "**Not released:**" in page and "at most 1e-06: **missed**" in page
    assert "at least 0.01: passed" in page
    again = cqtool(*command)
    assert again.code == 3 and "cq-8c4b uniform (2)" not in again.stderr  # not measured again
    assert list(again.statuses.values()) == ["same", "same", *states[2:]]

    # A dry run of a recipe that passes does all but the push, and needs no token.
    command = words(recipe, tmp_path / "out", "org/never", "--dry-run")
    dry = cqtool(*command)
    assert dry.code == 0 and dry.statuses["push"] == "preview"
    assert dry.statuses["calibrate"] == "same" and dry.statuses["verify"] == "done"
    assert "org/never" not in server.repos and dry.json["dry_run"]
    assert "Dry run: nothing was pushed." in render_summary(dry.json)
    nameless = ["release", "model", recipe, "--out", tmp_path / "x", "--dry-run"]
    refused = cqtool(*nameless)
    assert refused.code == 2 and "--repo-id ORG/NAME" in refused.stderr
    assert not (tmp_path / "x").exists()


def test_a_failed_step_is_told_on_the_page_and_in_the_json(cqtool, words, recipe, server, tmp_path):
    server.create("org/theirs").add("main", "theirs", {"theirs.txt": Blob(b"precious", False)})
    foreign = words(recipe, tmp_path / "out", "org/theirs")
    refused = cqtool(*foreign)
    assert refused.code == 1 and "with --overwrite" in refused.stderr
    assert cqtool(*foreign, "--overwrite").code == 0

    command = words(recipe, tmp_path / "out", "stranger/name", "--summary", tmp_path / "page.md")
    run = cqtool(*command)
    assert run.code == 1 and run.statuses["push"] == "failed"
    assert run.statuses["verify"] == "not run" and run.json["failed"]
    assert run.json["error"] in run.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.count("**Not released.**") == 1 and "| push | **failed** |" in page


def test_a_folder_of_something_else_is_left_alone(cqtool, words, recipe, tmp_path):
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "mine").write_text("precious")
    run = cqtool(*words(recipe, tmp_path, "org/other"))
    assert run.code == 2 and "choose another one with --out" in run.stderr
    assert (tmp_path / "calibration" / "mine").read_text() == "precious"
    (tmp_path / "release.json").write_text('{"format_version": 9, "steps": {}}')
    run = cqtool(*words(recipe, tmp_path, "org/other"))
    assert run.code == 2 and "another version of cqtool" in run.stderr


def test_of_two_releases_at_once_one_wins_and_the_other_says_so(
    released, cqtool, words, tuned_recipe, server, tmp_path
):
    import threading

    outs = [tmp_path / name for name in ("one", "two")]
    descriptions = []
    for out in outs:
        shutil.copytree(released[0], out)
        path = tmp_path / f"{out.name}.yaml"
        path.write_text(tuned_recipe.read_text() + f"description: {out.name}\n")
        descriptions.append(path)
    server.create("org/both")
    meeting = threading.Barrier(2)

    def meet(method: str, path: str) -> None:
        if "org/both/commit/" in path:
            meeting.wait(30)

    server.faults = meet
    commands = [words(*pair, "org/both") for pair in zip(descriptions, outs, strict=True)]
    runs = cqtool.at_once(*commands)
    server.faults = None
    (won,), (lost,) = ([run for run in runs if (run.code == 0) is fine] for fine in (True, False))
    assert lost.code == 1 and "Somebody else changed org/both" in lost.stderr
    repo = server.repos["org/both"]
    assert repo.branches["main"] == won.json["commit"] and len(repo.commits) == 2

    # In one folder the second does not even begin.
    runs = cqtool.at_once(commands[0], commands[0])
    assert sorted(run.code for run in runs) == [0, 2]
    assert any("Another cqtool" in run.stderr for run in runs)

"""A release that cannot write, is cancelled, or has nothing to be held to: what is said of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from cqtool.recipe import load_recipe
from cqtool.release.summary import render_summary


@pytest.fixture(scope="module")
def words(tiny_model_dir: Path) -> Any:
    def words(recipe: Path, out: Path, repo_id: str, *more: object) -> list[object]:
        return [
            *("release", tiny_model_dir, recipe, "--out", out),
            *("--repo-id", repo_id, "--no-kernels", *more),
        ]

    return words


@pytest.mark.parametrize("kilobytes", [1, 4, 20, 100, 300])
def test_no_file_may_be_that_large(kilobytes, words, recipe, cqtool, server, tmp_path):
    command = words(recipe, tmp_path / "out", "org/large", "--quiet")
    run = cqtool(*command, kill={"file_bytes": 1024 * kilobytes})
    assert run.code in (0, 1), run.stderr
    if kilobytes < 300:
        assert run.code == 1 and "`ulimit -f`" in run.stderr
        assert "org/large" not in server.repos
    server.repos.pop("org/large", None)


def test_a_page_that_cannot_be_written_changes_nothing_else(
    words, recipe, cqtool, server, tmp_path
):
    command = words(recipe, tmp_path / "out", "org/page", "--json", "--summary")
    run = cqtool(*command, recipe / "page.md")  # below a file
    assert run.code == 0 and run.json["commit"] == server.repos["org/page"].branches["main"]
    assert run.json["error"] is None and "page.md was not written (Not a directory)" in run.stderr
    server.create("org/page", private=True)
    refused = cqtool(*command, recipe / "page.md", "--public")
    assert refused.code == 1 and "org/page is private" in refused.stderr
    assert refused.json["failed"] and refused.json["error"] in refused.stderr


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_job_that_is_cancelled_says_how_far_it_came(name, code, words, recipe, cqtool, tmp_path):
    page = tmp_path / "page.md"
    command = words(recipe, tmp_path / "out", "org/cancelled", "--json", "--summary", page)
    call = {"call": "cqtool.release.local:quality.check", "signal": getattr(signal, name)}
    run = cqtool(*command, kill=call)
    assert run.code == code, run.stderr
    assert run.statuses["analyze-entropy"] == "done" and run.statuses["check"] == "failed"
    assert "same command again to continue" in run.json["error"]
    assert "same command again to continue" in run.stderr
    assert "**Not released.** It was interrupted." in page.read_text()
    again = cqtool(*command)
    assert again.code == 0 and again.statuses["calibrate"] == "same"


def test_without_gates_there_is_a_warning_and_a_line_on_the_page(words, recipe, cqtool, tmp_path):
    page = tmp_path / "page.md"
    more = ("--json", "--quiet", "--summary", page)
    run = cqtool(*words(recipe, tmp_path / "out", "org/free", *more))
    assert run.code == 0 and run.json["gated"] is False
    assert run.stderr.startswith("warning: No gates: ") and "**No gates:**" in page.read_text()
    gated = tmp_path / "gated.yaml"
    gated.write_text(recipe.read_text() + "gates: {min_top1: 0%}\n")
    run = cqtool(*words(gated, tmp_path / "out", "org/free", *more))
    assert run.code == 0 and run.json["gated"] is True and run.json["passed"]
    assert run.stderr == "" and "No gates" not in page.read_text()


def test_a_dry_run_does_not_take_a_private_repository_for_new(
    words, recipe, cqtool, server, tmp_path, monkeypatch
):
    command = words(recipe, tmp_path / "out", "org/hidden", "--json", "--dry-run")
    dry = cqtool(*command)
    push = {step["name"]: step for step in dry.json["steps"]}["push"]
    told = "which is new, or private and not shown without a token"
    assert push["status"] == "preview" and told in push["sentence"]
    assert told in render_summary(dry.json) and dry.json["commit"] is None
    server.create("org/hidden")
    seen = cqtool(*command).json
    assert told not in render_summary(seen) and seen["commit"]


def test_a_tag_that_cannot_be_is_refused_before_the_model_is_opened(
    words, recipe, cqtool, tmp_path
):
    for option in ("--tag", "--branch"):
        run = cqtool(*words(recipe, tmp_path / "out", "org/x", option, "v 1"))
        assert run.code == 2 and "'v 1' cannot name a" in run.stderr
    assert not (tmp_path / "out").exists()


def test_the_gates_of_the_demo_leave_room_for_what_was_measured():
    root = Path(__file__).parents[2]
    (bare,) = (
        line for line in (root / "Makefile").read_text().splitlines() if line.startswith("BARE_")
    )
    words = bare.split(" := ")[1].split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    overrides: dict[str, Any] = {
        "gates.max_ppl_increase": given["--max-ppl-increase"],
        "gates.max_kl": float(given["--max-kl"]),
        "gates.min_top1": given["--min-top1"],
    }
    for recipe, report in (
        (load_recipe("demo"), "quality.json"),
        (load_recipe("demo", overrides), "quality-window0-sinks0.json"),
    ):
        measured = json.loads((root / "docs/results/demo" / report).read_text())["rows"][1]
        for figure, limit, sign in (
            ("perplexity_increase", recipe.gates.max_ppl_increase, 1),
            ("kl", recipe.gates.max_kl, 1),
            ("top1", recipe.gates.min_top1, -1),
        ):
            assert limit is not None
            room = sign * (limit - measured[figure]) / measured[f"{figure}_se"]
            # Another engine's k-means ends elsewhere; a limit that allows anything is none.
            assert 3 < room < 10, (report, figure)

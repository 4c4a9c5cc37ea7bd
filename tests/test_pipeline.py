"""The whole pipeline as commands, on the real demo model and with a Hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Blob


def cqtool(*words: object, folder: Path, hub=None, code: int = 0, stdin: str | None = None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(hub.environment() if hub else {})}
    process = subprocess.run(
        [sys.executable, "-c", "from cqtool.cli import main; main()", *map(str, words)],
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    return process


@pytest.mark.model
def test_from_model_to_hub_and_back(demo_available, hub, tmp_path):
    small = ("--sequences", 2, "--sequence-length", 192, "--iterations", 10)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "name: small\nformat: cq-8c6b\nwindow: 16\nsinks: 4\n"
        "evaluation: {dataset: demo, windows: 2, window_length: 128}\n"
    )
    run = {"folder": tmp_path}
    cqtool("calibrate", "demo", "--recipe", recipe, "--out", "cal", *small, **run)
    entropy = cqtool("analyze-entropy", "demo", "--samples", "cal", "--json", **run)
    summary = json.loads(entropy.stdout)["summary"]
    joint = {(row["kind"], row["channels"]): row for row in summary}
    assert joint["key", 2]["joint"] < joint["key", 2]["marginal_sum"]

    checked = cqtool("check", "demo", "cal", "--compare", "fp16,cq-8c6b:uniform", "--json", **run)
    rows = {row["label"]: row for row in json.loads(checked.stdout)["rows"]}
    # A real language model: perplexity in the tens, not in the thousands.
    assert 5 < rows["fp32 (full)"]["perplexity"] < 40
    assert rows["fp16"]["kl"] < 1e-3 < rows["cq-8c6b fisher"]["kl"] < 3
    assert rows["cq-8c6b fisher"]["cache_bytes_per_token"] < 0.25 * 46080
    missed = cqtool("check", "demo", "cal", "--max-kl", "0.000001", code=3, **run)
    assert "gate missed" in missed.stderr

    pushed = cqtool(
        # The kernels' own tests compile them.
        *("export", "cal", "--out", "art", "--no-kernels", "--json"),
        *("--push-to-hub", "--repo-id", "org/demo-cq"),
        hub=hub,
        **run,
    )
    assert "org/demo-cq" in pushed.stdout
    assert not (tmp_path / "art" / "samples").exists()
    inspected = json.loads(cqtool("inspect", "art", "--json", **run).stdout)
    assert inspected["verified"] is True

    prompt = "The capital of France is Paris. The capital of Italy is Rome. " * 4
    say = ("--prompt", "-", "--no-chat", "--max-new-tokens", 6, "--json")
    local = cqtool("generate", "demo", "art", *say, stdin=prompt, **run)
    pulled = cqtool("generate", "demo", "org/demo-cq", *say, stdin=prompt, hub=hub, **run)
    texts = [json.loads(process.stdout) for process in (local, pulled)]
    assert texts[0]["text"] == texts[1]["text"] != ""
    assert texts[0]["cache"]["bytes"] < 0.6 * texts[0]["cache"]["bytes_full"]


def test_a_model_can_come_from_the_hub_at_a_revision(hub, tiny_model_dir, tiny_text_file, tmp_path):
    repo = hub.create("org/tiny")
    files = {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()}
    files["README.md"] = b"---\nlicense: mit\n---\nA tiny model.\n"
    blobs = {name: Blob(content, lfs=len(content) > 100_000) for name, content in files.items()}
    first = repo.add("main", "first", blobs)
    repo.add("main", "emptied", {})
    options = (
        *("--recipe", "cq-8c8b", "--dataset", tiny_text_file, "--sequences", 5),
        *("--sequence-length", 64, "--iterations", 3),
    )
    cqtool(
        *("calibrate", "org/tiny", "--revision", first.oid, "--out", "cal", *options),
        hub=hub,
        folder=tmp_path,
    )
    base = json.loads((tmp_path / "cal" / "cq_config.json").read_text())["base_model"]
    assert (base["id"], base["revision"], base["license"]) == ("org/tiny", first.oid, "mit")
    missing = cqtool(
        *("calibrate", "org/none", "--out", "other", *options), hub=hub, folder=tmp_path, code=2
    )
    assert "org/none" in missing.stderr and missing.stderr.startswith("error: ")

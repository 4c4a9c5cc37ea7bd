"""A Hub for all tests of this folder, and cqtool in forks that talk to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

FORKS = Path(__file__).with_name("forks.py")
RECIPE = """\
name: tiny
format: cq-8c4b
window: 8
sinks: 2
objective: uniform
kmeans: {{iterations: 5}}
calibration: {{dataset: "{text}", split: train, sequences: 3, sequence_length: 64}}
evaluation: {{dataset: "{text}", split: test, windows: 2, window_length: 48}}
"""
TUNING = """\
tuning:
  {steps: 4, batch: 1, micro_batch: 1, sequences: 4, sequence_length: 32, held_out: 1,
   evaluate_every: 2, learning_rate: 0.05}
"""


@dataclass(frozen=True)
class Run:
    """One finished command."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout)

    @property
    def statuses(self) -> dict[str, str]:
        return {step["name"]: step["status"] for step in self.json["steps"]}


class Cqtool:
    """cqtool's command line, without the seconds that its imports take."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(FORKS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            text=True,
        )

    def __call__(
        self, *words: object, kill: dict[str, Any] | None = None, folder: Path = Path()
    ) -> Run:
        """Run one command in `folder`, killed or limited as `kill` says (see forks.py)."""
        return self.at_once(words, kill=kill, folder=folder)[0]

    def at_once(
        self, *commands: Sequence[object], kill: Any = None, folder: Path = Path()
    ) -> list[Run]:
        """Run several commands at the same time."""
        return self._ask(
            [
                {"words": [*map(str, words)], "kill": kill, "folder": str(folder)}
                for words in commands
            ]
        )

    def _ask(self, asked: list[dict[str, Any]]) -> list[Run]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        runs = [Run(**answer) for answer in json.loads(self._process.stdout.readline())]
        assert all("Traceback" not in run.stderr for run in runs), runs
        return runs

    def close(self) -> None:
        self._process.communicate("")


@pytest.fixture(scope="session")
def server() -> Iterator[HubServer]:
    """A Hub; tests differ in their repositories."""
    server = HubServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def cqtool(server: HubServer, tmp_path_factory: Any) -> Iterator[Cqtool]:
    home = str(tmp_path_factory.mktemp("hf-home"))
    command = Cqtool(
        {
            **server.environment(),
            "HF_HOME": home,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "GITHUB_STEP_SUMMARY": "",
        }
    )
    yield command
    command.close()


@pytest.fixture(scope="session")
def recipe(tiny_text: str, tmp_path_factory: Any) -> Path:
    """A recipe that takes a second, without tuning."""
    folder = tmp_path_factory.mktemp("recipe")
    text = folder / "text.txt"
    text.write_text(tiny_text[:40_000], encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(text=text))
    return path


@pytest.fixture(scope="session")
def tuned_recipe(recipe: Path) -> Path:
    """The same with tuning."""
    path = recipe.with_name("tuned.yaml")
    path.write_text(recipe.read_text() + TUNING)
    return path

"""`python -m hub`: the Hub on loopback beside a command, as `make demo` uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
ASK = """
import os, sys, urllib.request
url = os.environ["HF_ENDPOINT"] + "/api/whoami-v2"
token = {"Authorization": "Bearer " + os.environ["HF_TOKEN"]}
with urllib.request.urlopen(urllib.request.Request(url, headers=token)) as answer:
    print(answer.read().decode(), os.environ.get("PYTHONPATH"))
sys.exit(7)
"""


def test_a_command_finds_a_hub_and_its_exit_code_comes_back():
    done = subprocess.run(
        [sys.executable, "-m", "hub", sys.executable, "-c", ASK],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7, done.stderr
    assert '"tester"' in done.stdout and done.stdout.rstrip().endswith("None")

"""The one sink: streams, --json, --quiet, terminals, NO_COLOR and closed pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cqtool.cli.output import Output

REPORT = {"rows": [{"a": float("nan"), "b": [float("inf"), 1.5], "c": "ü"}]}


def shown(flags: dict[str, bool], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    out = Output(**flags)
    out.text("for a [reader]")
    out.table(["name", "value"], [["a", "1"], ["[b]", "10"]])
    out.note("note")
    out.warn("careful")
    with out.progress().task("sampling", total=2) as task:
        task.advance(2)
    out.result(REPORT)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_text_goes_to_stdout_and_the_rest_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown({}, capsys)
    assert out == "for a [reader]\nname  value\n----  -----\na         1\n[b]      10\n"
    assert err.splitlines()[:3] == ["note", "warning: careful", "sampling (2)"]
    assert err.splitlines()[3].startswith("sampling: done in ")


def test_json_is_exactly_one_valid_document(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = shown({"json": True}, capsys)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    value = json.loads(out, parse_constant=refuse)
    assert value == {"rows": [{"a": None, "b": [None, 1.5], "c": "ü"}]}
    assert "note" in err


def test_quiet_leaves_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown({"quiet": True}, capsys) == ("", "warning: careful\n")


def test_progress_of_a_resumed_task_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    with Output().progress().task("fitting", total=30, done=12):
        pass
    assert capsys.readouterr().err.startswith("fitting (30, 12 done before)\n")


def run_until_closed(code: str, lines: int) -> tuple[int, str]:
    """Run Python code, close its stdout after some lines; the exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    return process.wait(timeout=60), process.stderr.read()


def test_work_goes_on_and_keeps_its_exit_code_when_the_reader_leaves() -> None:
    program = (
        "import sys\n"
        "from cqtool.cli.output import Output\n"
        "for i in range(20000): Output().text('line %d' % i)\n"
        "sys.exit(3)\n"
    )
    assert run_until_closed(program, 1) == (3, "")


def test_a_full_disk_is_one_sentence() -> None:
    code = (
        "import sys\n"
        "from cqtool.cli.output import Output, write_stderr\n"
        "from cqtool.errors import CqtoolError\n"
        "try: Output(json=True).result({'a': 1})\n"
        "except CqtoolError as error: write_stderr(str(error)); sys.exit(error.exit_code)\n"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.stderr.startswith("Cannot write standard output: the disk is full")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def on_a_terminal(code: str, **variables: str) -> str:
    """What Python code writes when stdout and stderr are a terminal."""
    import pty

    parent, child = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=child,
        stderr=child,
        env=environment | {"TERM": "xterm-256color", "COLUMNS": "100"} | variables,
    ):
        os.close(child)
        written = b""
        try:
            while chunk := os.read(parent, 4096):
                written += chunk
        except OSError:
            pass  # Linux reports the closed terminal so.
    os.close(parent)
    return written.decode()


BARS = (
    "from cqtool.cli.output import Output\n"
    "out = Output()\n"
    "with out.progress().task('sampling', total=4) as task:\n"
    "    task.advance(3); out.warn('hot'); task.advance(1)\n"
    "out.table(['name', 'n'], [['x', '1']])\n"
)


def test_a_terminal_gets_bars_with_remaining_time_and_colours() -> None:
    text = on_a_terminal(BARS)
    assert "4/4" in text
    assert "left" in text
    assert "warning: " in text
    assert "\x1b[33m" in text


def test_no_color_holds_on_a_terminal() -> None:
    text = on_a_terminal(BARS, NO_COLOR="1")
    assert "4/4" in text
    assert not any(f"\x1b[{colour}m" in text for colour in range(30, 38))
    assert "38;5" not in text

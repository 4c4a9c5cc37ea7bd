"""The command line as a process: start, help, streams, errors and exit codes."""

from __future__ import annotations

import importlib
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from cqtool.cli import docs
from cqtool.cli.app import CqtoolGroup, app
from cqtool.cli.check_tables import table_rows
from cqtool.errors import EnvironmentProblem, RecipeError

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
RUN = "import sys; from cqtool.cli import main; main()"
HEAVY = ("torch", "transformers", "pydantic", "numpy", "datasets", "matplotlib", "faiss")


def cqtool(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line off a terminal."""
    environment = {k: v for k, v in os.environ.items() if k not in {"FORCE_COLOR", "NO_COLOR"}}
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        env=environment | {"COLUMNS": "100"} | variables,
        timeout=60,
        check=False,
    )


def test_help_starts_in_half_a_second_and_imports_nothing_heavy() -> None:
    def start() -> float:
        """Seconds of processor time; those of the clock would count the neighbours' work."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert cqtool("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(start() for _ in range(3)) < 0.5
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules]))\n" + RUN
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_commands_of_the_documentation_exist() -> None:
    assert {"calibrate", "analyze-entropy", "check", "export", "inspect", "doctor", "generate"} <= {
        *COMMANDS
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_ends_with_an_example_and_offers_json(command: str) -> None:
    text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"}).stdout
    example = text[text.rindex("Example") :]
    assert f"$ cqtool {command} " in example
    assert "╭" not in example, "something stands below the example"
    assert "--json" in text
    assert "--quiet" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_no_word_of_the_help_is_lost_as_markup(command: str) -> None:
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    for text in [found.help, *(parameter.help for parameter in found.params)]:
        assert Text.from_markup(text or "").plain == (text or "")


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_parse(command: str) -> None:
    import shlex

    group: Any = get_command(app)
    shown = set()
    for line in docs.command_examples(command):
        # What comes before and after may be shown as well.
        tool, name, *words = shlex.split(line.split(" < ")[0].split(" | ")[0])
        assert tool == "cqtool"
        group.commands[name].make_context(name, words)
        shown.add(name)
    assert command in shown


def test_version_is_the_packages() -> None:
    import cqtool as package

    assert cqtool("--version").stdout == f"cqtool {package.__version__}\n"


def test_without_arguments_there_is_help() -> None:
    assert "Usage: cqtool" in cqtool().stdout


def test_colours_are_for_terminals_and_never_against_no_color() -> None:
    assert "\x1b" not in cqtool("--help").stdout
    forced = cqtool("--help", FORCE_COLOR="1").stdout
    plain = cqtool("--help", FORCE_COLOR="1", NO_COLOR="1").stdout
    assert "\x1b[1;36m" in forced
    assert "\x1b[1;36m" not in plain
    assert "\x1b[36m" not in plain


def test_bash_completion_is_generated_and_completes_commands_and_choices() -> None:
    script = cqtool(_CQTOOL_COMPLETE="source_bash").stdout
    assert "complete -o default -F _cqtool_completion cqtool" in script

    def complete(line: str) -> set[str]:
        return set(
            cqtool(
                _CQTOOL_COMPLETE="complete_bash",
                COMP_WORDS=line,
                COMP_CWORD=str(len(line.split(" ")) - 1),
            ).stdout.split()
        )

    assert complete("cqtool cal") == {"calibrate"}
    objectives = {"uniform", "fisher", "query"}
    assert complete("cqtool calibrate demo --objective ") == objectives


def test_wrong_usage_exits_2_without_traceback() -> None:
    for arguments in (["calibrate"], ["no-such-command"], ["calibrate", "demo", "--seed", "x"]):
        done = cqtool(*arguments)
        assert done.returncode == 2, arguments
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_a_known_error_is_one_sentence_on_stderr(tmp_path: Path) -> None:
    done = cqtool("calibrate", "demo", "--recipe", "cq-8c8", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: There is no recipe 'cq-8c8'. Did you mean cq-8c8b?")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--json", "--quiet"])
def test_errors_stay_on_stderr_with_json_and_quiet(flag: str, tmp_path: Path) -> None:
    done = cqtool("check", "demo", str(tmp_path), flag)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path} has no cq_config.json")


def toy(body: Any) -> typer.Typer:
    """An application with the frame of cqtool and one command."""
    other = typer.Typer(cls=CqtoolGroup, pretty_exceptions_enable=False)

    @other.callback()
    def _root() -> None:
        pass

    other.command("run")(body)
    return other


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("No; do this."), 2, "error: No; do this.\n"),
        (EnvironmentProblem("Disk full; free some."), 1, "error: Disk full; free some.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (KeyboardInterrupt("Use --resume."), 130, "Interrupted. Use --resume.\n"),
    ],
)
def test_each_error_has_its_exit_code(error: BaseException, code: int, said: str) -> None:
    def run() -> None:
        raise error

    done = CliRunner().invoke(toy(run), ["run"])
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", said)


def test_a_bug_keeps_its_traceback() -> None:
    def run() -> None:
        raise ZeroDivisionError

    assert isinstance(CliRunner().invoke(toy(run), ["run"]).exception, ZeroDivisionError)


def test_interrupting_calibrate_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting = importlib.import_module("cqtool.codebooks.calibrate")
    loading = importlib.import_module("cqtool.models.load")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "open_model", lambda *_, **__: None)
    monkeypatch.setattr(fitting, "calibrate", interrupted)
    arguments = ["calibrate", "demo", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 130
    assert "--resume" in done.stderr
    assert "Traceback" not in done.stderr


def test_calibrate_does_not_overwrite(tmp_path: Path) -> None:
    def refused(*flags: str) -> str:
        done = CliRunner().invoke(app, ["calibrate", "demo", "--out", str(tmp_path), *flags])
        assert done.exit_code == 2
        return done.stderr

    (tmp_path / "thesis.tex").write_text("years of work")
    for flags in ([], ["--force"], ["--resume"]):
        assert "holds other files" in refused(*flags)
    for name in ("cq_config.json", "calibration.json", "codebooks.safetensors"):
        (tmp_path / name).write_text("{}")
    assert "holds a finished calibration; add --force" in refused()
    assert "one of them" in refused("--resume", "--force")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_closed_pipe_ends_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, "check", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) in {0, 1}
    process.stderr.close()


def test_check_prints_every_figure_with_its_error() -> None:
    rows = [
        {"name": "fp32", "perplexity": 30.0, "perplexity_se": 0.5, "kl": 0.0, "top1": 1.0},
        {
            "name": "cq-8c8b",
            "label": "cq-8c8b fisher",
            "bits_per_channel": 1.0,
            "effective_bits": 2.9,
            "perplexity": 33.0,
            "perplexity_se": 0.5,
            "perplexity_increase": 0.1,
            "perplexity_increase_se": 0.01,
            "kl": 0.05,
            "kl_se": 0.002,
            "top1": 0.9,
            "top1_se": 0.003,
            "cache_bytes_per_token": 1440.0,
            "cache_bytes_per_token_full": 46080,
        },
    ]
    full, quantized = table_rows(rows)
    assert full == ["fp32", "-", "-", "30.000 ± 0.500", "-", "0.0000", "100.00%", "-", "-"]
    assert quantized == [
        "cq-8c8b fisher",
        "1.00",
        "2.90",
        "33.000 ± 0.500",
        "10.00% ± 1.00%",
        "0.0500 ± 0.0020",
        "90.00% ± 0.30%",
        "1440",
        "32.0x",
    ]


def test_the_command_reference_is_current() -> None:
    assert docs.stale(docs.FOLDER) == [], "run `make docs`"


def test_a_stale_reference_is_noticed(tmp_path: Path) -> None:
    docs.write(tmp_path)
    assert docs.stale(tmp_path) == []
    (tmp_path / "check.md").write_text("old")
    (tmp_path / "removed.md").write_text("old")
    (tmp_path / "export.md").unlink(missing_ok=True)
    assert set(docs.stale(tmp_path)) >= {"check.md", "removed.md"}
    docs.write(tmp_path)
    assert docs.stale(tmp_path) == []

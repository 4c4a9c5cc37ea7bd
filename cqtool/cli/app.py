"""The typer application: which commands there are, and how their errors end.

A command is a module with one typer function, whose docstring is its help, and `EXAMPLES`, the
command lines that end the help. Importing it must stay cheap: what is heavy is imported inside the
function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from cqtool import __version__
from cqtool.cli import (
    allocate,
    bench,
    calibrate,
    check,
    doctor,
    entropy,
    export,
    generate,
    inspect,
    release,
    tune,
    verify,
)
from cqtool.cli.output import write_stderr, write_stdout
from cqtool.errors import CqtoolError

EXAMPLES = (
    "cqtool calibrate demo --recipe demo --out calibration",
    "cqtool check demo calibration --max-ppl-increase 3%",
    "cqtool export calibration --out artifact",
)


def _epilog(examples: Sequence[str]) -> str:
    """The Example section that ends a command's help."""
    return "\n".join(("[bold]Example[/bold]", *(f"$ {escape(line)}" for line in examples)))


class CqtoolGroup(TyperGroup):
    """Ends every command's known errors in one sentence on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command line; see :class:`typer.core.TyperGroup`."""
        try:
            return super().invoke(ctx)
        except CqtoolError as error:
            write_stderr(str(error), label="error", style="bold red")
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            write_stderr(" ".join(("Interrupted.", *map(str, interrupt.args))))
            raise typer.Exit(130) from interrupt


app = typer.Typer(
    name="cqtool",
    cls=CqtoolGroup,
    help="""Release LLM KV caches at 1 to 4 bits per channel: calibrate, measure, check, publish.

    Exit codes: 0 done; 1 failed; 2 wrong usage or input; 3 a quality gate was missed.""",
    epilog=_epilog(EXAMPLES),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        write_stdout(f"cqtool {__version__}\n")
        raise typer.Exit


@app.callback()
def _cqtool(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


_COMMANDS: dict[str, tuple[Callable[..., None], Sequence[str]]] = {
    "calibrate": (calibrate.calibrate, calibrate.EXAMPLES),
    "tune": (tune.tune, tune.EXAMPLES),
    "analyze-entropy": (entropy.analyze_entropy, entropy.EXAMPLES),
    "check": (check.check, check.EXAMPLES),
    "allocate": (allocate.allocate, allocate.EXAMPLES),
    "export": (export.export, export.EXAMPLES),
    "inspect": (inspect.inspect, inspect.EXAMPLES),
    "verify": (verify.verify, verify.EXAMPLES),
    "generate": (generate.generate, generate.EXAMPLES),
    "bench": (bench.bench, bench.EXAMPLES),
    "release": (release.release, release.EXAMPLES),
    "doctor": (doctor.doctor, doctor.EXAMPLES),
}
for _name, (_function, _examples) in _COMMANDS.items():
    app.command(_name, epilog=_epilog(_examples))(_function)


def command_examples(name: str) -> Sequence[str]:
    """The example command lines of a command."""
    return _COMMANDS[name][1]

"""The `cqtool` command: one thin module per command, one place for output, one for errors."""

from __future__ import annotations


def main() -> None:
    """Run the command line in `sys.argv` and leave the process with its exit code."""
    from cqtool.cli.app import app

    app(prog_name="cqtool")

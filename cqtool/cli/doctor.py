"""`cqtool doctor`: what this machine has, what it lacks, and the fix for each."""

from __future__ import annotations

import typer

from cqtool.cli import options
from cqtool.cli.output import Output

EXAMPLES = ("cqtool doctor", "cqtool doctor --json")


def doctor(json: options.JsonFlag = False, quiet: options.QuietFlag = False) -> None:
    """Check this machine: Python, torch, GPU, faiss, the Hub, the demo and the cache.

    Each row is ok, warn (slower, or something optional is missing) or fail (cqtool will not work);
    the fixes follow. Exit code 1 when a row fails.
    """
    from cqtool.doctor import run_checks

    out = Output(json=json, quiet=quiet)
    checks = run_checks()
    failed = [check.name for check in checks if check.status == "fail"]
    out.table(["status", "check", "found"], [[c.status, c.name, c.detail] for c in checks])
    fixes = [check for check in checks if check.fix is not None]
    if fixes:
        out.text()
    for check in fixes:
        out.text(f"{check.status}: {check.name}: {check.fix}")
    out.result({"checks": [check.to_json() for check in checks], "failed": failed})
    if failed:
        raise typer.Exit(1)

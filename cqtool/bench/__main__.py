"""`python -m cqtool.bench`: the benchmark where only torch and transformers are installed.

The same measurements as `cqtool bench`, which is the command for everybody else; `--json` takes a
path here, and is written after each case.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cqtool.bench.settings import (
    CACHES,
    DTYPES,
    GROUPINGS,
    PARTS,
    SUITES,
    BenchSettings,
    make_settings,
)
from cqtool.cli.output import Output, write_stderr
from cqtool.errors import CqtoolError
from cqtool.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    path: Path | None = options.json
    sink = Output()

    def keep(report: dict[str, Any]) -> None:
        if path is not None:
            write_json(path, report)

    try:
        settings = _settings(options)
        from cqtool.bench.run import run
        from cqtool.bench.show import draw, show

        report = run(settings, sink.progress(), keep)
        keep(report)
        show(report, sink)
        if options.plot is not None:
            draw(report, options.plot, sink)
    except CqtoolError as error:
        write_stderr(str(error), label="error")
        return error.exit_code
    return 0


def _settings(options: argparse.Namespace) -> BenchSettings:
    outputs = ("json", "plot")
    return make_settings(**{k: v for k, v in vars(options).items() if k not in outputs})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cqtool.bench", description=__doc__)
    add = parser.add_argument
    add("target", nargs="?", metavar="SHAPE_OR_MODEL")
    add("artifact", nargs="?", metavar="ARTIFACT")
    add("--suite", choices=tuple(SUITES))
    add("--part", dest="parts", action="append", help=", ".join(PARTS))
    add("--format", dest="formats", action="append")
    add("--grouping", dest="groupings", action="append", help=", ".join(GROUPINGS))
    add("--batch", dest="batches", action="append")
    add("--tokens", action="append")
    add("--prompt-tokens", dest="prompt", type=int)
    add("--new-tokens", dest="new", type=int)
    add("--cache", dest="caches", action="append", help=", ".join(CACHES))
    add("--largest-batch", dest="largest", action="store_true", default=None)
    add("--most", type=int)
    add("--window", type=int)
    add("--sinks", type=int)
    add("--dtype", choices=DTYPES)
    add("--device")
    add("--repeats", type=int)
    add("--seed", type=int)
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="PNG")
    return parser


if __name__ == "__main__":
    sys.exit(main())

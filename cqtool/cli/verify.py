"""`cqtool verify`: whether an artifact is whole, in a folder or on the Hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cqtool.cli import options
from cqtool.cli.output import Output

EXAMPLES = (
    "cqtool verify artifact",
    "cqtool verify ORG/NAME --revision v1.0",
)


def verify(
    place: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            help="An artifact folder, or the Hub id of an artifact.",
            show_default=False,
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision",
            metavar="REV",
            help="Branch, tag or commit on the Hub; the main branch by default.",
            show_default=False,
        ),
    ] = None,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Compare every file of an artifact with its manifest, and check configuration and codebooks.

    What lies on the Hub is downloaded for it, past any cache. Exit code 2 when something is
    damaged, 1 when the Hub cannot be read.
    """
    sink = Output(json=json, quiet=quiet)
    from cqtool.artifact.verify import verify as verify_artifact

    found = verify_artifact(place, revision=revision, progress=sink.progress())
    at = f" at {found.commit}" if found.commit else ""
    sink.text(
        f"{found.place}{at}: {found.format} for {found.base_model}, {found.files} files, "
        f"{found.size:,} bytes, every digest verified."
    )
    sink.text(f"sha256 of manifest.json: {found.manifest_sha256}")
    sink.result(asdict(found))

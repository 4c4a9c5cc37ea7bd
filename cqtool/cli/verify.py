"""`cqtool verify`: whether an artifact is whole, in a folder or on the Hub."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cqtool.cli import options
from cqtool.cli.output import Output, write_stderr

if TYPE_CHECKING:
    from cqtool.artifact.verify import Verified

EXAMPLES = (
    "cqtool verify artifact",
    "cqtool verify ORG/NAME --revision v1.0",
    "cqtool verify ORG/NAME --rebuild",
)
DIFFERS = 1
"""Exit code: the artifact is whole, and could not be made again."""


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
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Also calibrate again from the artifact's own recipe, model, text and seed, and "
            "compare the bytes.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="With --rebuild: where the base model lies (a folder, a .gguf file, `demo`); by "
            "default its id and commit on the Hub.",
            show_default=False,
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    trust_remote_code: options.TrustRemoteCodeFlag = False,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Compare every file of an artifact with its manifest, and check configuration and codebooks.

    What lies on the Hub is downloaded for it, past any cache. Exit code 2 when something is
    damaged, 1 when the Hub cannot be read, or when --rebuild ends in other bytes.
    """
    if not rebuild and (model is not None or device != "auto" or trust_remote_code):
        raise typer.BadParameter(
            "--model, --device and --trust-remote-code are about a model: add --rebuild."
        )
    sink = Output(json=json, quiet=quiet)
    from cqtool.artifact.verify import whole_artifact

    with whole_artifact(place, revision=revision, progress=sink.progress()) as (folder, found):
        _report(sink, found)
        if not rebuild:
            sink.result(asdict(found))
            return
        from cqtool.release.rebuild import rebuild as make_again

        again = make_again(
            folder,
            model=model,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=sink.progress(),
        )
    sink.result(asdict(found) | {"rebuild": asdict(again)})
    if again.same:
        sink.text(f"Rebuilt in {again.seconds:.0f} s: the same bytes.")
        return
    for difference in again.differences:
        write_stderr(difference, label="differs", style="bold red")
    reasons = "; ".join(again.reasons) or "nothing that the artifact records"
    sink.note(f"What was different this time: {reasons}.")
    raise typer.Exit(DIFFERS)


def _report(sink: Output, found: Verified) -> None:
    at = f" at {found.commit}" if found.commit else ""
    sink.text(
        f"{found.place}{at}: {found.format} for {found.base_model}, {found.files} files, "
        f"{found.size:,} bytes, every digest verified."
    )
    sink.text(f"sha256 of manifest.json: {found.manifest_sha256}")

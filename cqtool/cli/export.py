"""`cqtool export`: a calibration as an artifact, on disk and on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cqtool.cli import options
from cqtool.cli.output import Output

if TYPE_CHECKING:
    from cqtool.artifact.export import ExportResult

EXAMPLES = (
    "cqtool export calibration --out artifact",
    "cqtool export calibration --out artifact --arch sm_90,sm_100",
    "cqtool export calibration --out artifact --push-to-hub --repo-id ORG/NAME --private",
)


def export(
    calibration: options.CalibrationArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Artifact folder to write.")
    ] = Path("artifact"),
    kernels: Annotated[
        bool | None,
        typer.Option(
            "--kernels/--no-kernels",
            help="Ship the runtime with compiled CUDA kernels, or an artifact without any code. By "
            "default kernels are compiled where NVRTC is installed; no GPU is needed.",
            show_default=False,
        ),
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            "--arch",
            metavar="SM[,SM]",
            help="GPU architectures to compile for; by default sm_80, sm_86, sm_89, sm_90, sm_100 "
            "and sm_120.",
            show_default=False,
        ),
    ] = None,
    push_to_hub: Annotated[
        bool, typer.Option("--push-to-hub", help="Also push the artifact, in one commit.")
    ] = False,
    repo_id: Annotated[
        str | None,
        typer.Option(
            "--repo-id",
            metavar="ORG/NAME",
            help="Repository to push to and to name in the model card; by default one named after "
            "base model and format, in your own namespace.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository private.")
    ] = False,
    branch: Annotated[
        str | None,
        typer.Option(
            "--revision",
            metavar="BRANCH",
            help="Branch to push to, created when it does not exist.",
            show_default=False,
        ),
    ] = None,
    commit_message: Annotated[
        str | None,
        typer.Option(
            "--commit-message", metavar="TEXT", help="First line of the commit.", show_default=False
        ),
    ] = None,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Write codebooks, configuration, reports, runtime, model card and manifest as one folder.

    An artifact that stands at --out is replaced; any other folder is not. The token for a push is
    HF_TOKEN or the one of `hf auth login`.
    """
    if not push_to_hub and (private or branch or commit_message):
        raise typer.BadParameter(
            "--private, --revision and --commit-message are about a push: add --push-to-hub."
        )
    if arch and kernels is False:
        raise typer.BadParameter("--arch says what kernels are compiled for: drop --no-kernels.")
    sink = Output(json=json, quiet=quiet)
    from cqtool.artifact.export import export as export_artifact
    from cqtool.artifact.runtime import choose_runtime

    names = [name for item in arch or () for name in item.split(",") if name]
    runtime = choose_runtime(kernels, names or None)
    if push_to_hub:
        from cqtool.artifact.push import push, resolve_repo_id
        from cqtool.layout.config import read_config

        # Before the export, because the model card names the repository.
        repo_id = resolve_repo_id(repo_id, read_config(calibration))
    written = export_artifact(
        calibration, out, repo_id=repo_id, runtime=runtime, progress=sink.progress()
    )
    result: dict[str, Any] = {
        "artifact": str(written.folder),
        "format": written.config.cache.name,
        "base_model": written.config.base_model.id,
        "files": written.files,
        "bytes": written.size,
        "quality_measured": written.quality_measured,
        "kernels": written.kernels
        and {
            "architectures": list(written.kernels.architectures),
            "cubins": written.kernels.cubins,
            "note": written.kernels.note,
        },
    }
    _report(sink, written)
    if push_to_hub and repo_id is not None:
        pushed = push(
            out,
            repo_id,
            private=private,
            revision=branch,
            commit_message=commit_message,
            progress=sink.progress(),
        )
        result["hub"] = {
            "repo_id": pushed.repo_id,
            "url": pushed.url,
            "commit_url": pushed.commit_url,
            "oid": pushed.oid,
            "changed": pushed.changed,
            "deleted": list(pushed.deleted),
        }
        verb = "Pushed to" if pushed.changed else "Unchanged on the Hub:"
        sink.text(f"{verb} {pushed.commit_url}")
    sink.result(result)


def _report(sink: Output, written: ExportResult) -> None:
    sink.text(
        f"Artifact {written.folder}: {written.config.cache.name} for "
        f"{written.config.base_model.id}, {written.files} files, {written.size:,} bytes, verified."
    )
    kernels = written.kernels
    if kernels is not None and kernels.cubins:
        sink.text(f"CUDA kernels: {kernels.cubins} for {', '.join(kernels.architectures)}.")
    elif kernels is not None and kernels.note:
        sink.note(f"No CUDA kernels were compiled: {kernels.note}")
    if not written.quality_measured:
        sink.warn(
            "The quality of this calibration has not been measured, and its model card says so; "
            "run `cqtool check` and export again."
        )

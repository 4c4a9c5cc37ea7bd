"""`cqtool release`: the whole way from a model to a verified repository, in one command."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from cqtool.cli import options
from cqtool.cli.check import GATE_MISSED
from cqtool.cli.output import Output, write_stderr
from cqtool.errors import CqtoolError, EnvironmentProblem
from cqtool.files import write_text

if TYPE_CHECKING:
    from cqtool.models.load import OpenedModel
    from cqtool.release.chain import Release

EXAMPLES = (
    "cqtool release Qwen/Qwen3-0.6B cq-4c8b --repo-id ORG/NAME",
    "cqtool release Qwen/Qwen3-0.6B ./mine.yaml --repo-id ORG/NAME --private --tag v1.0",
    "cqtool release Qwen/Qwen3-0.6B ./mine.yaml --repo-id ORG/NAME --dry-run --summary page.md",
)
JOB_PAGE = "GITHUB_STEP_SUMMARY"
"""Environment variable that names the file behind the page of a GitHub job."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code, as a shell has it."""


def release(
    model: options.ModelArgument,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="Name of a shipped recipe, or path of a YAML file.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Release folder: calibration, reports and artifact."
        ),
    ] = Path("release"),
    repo_id: Annotated[
        str | None,
        typer.Option(
            "--repo-id",
            metavar="ORG/NAME",
            help="Repository to push to; by default one named after base model and format, in your "
            "own namespace.",
            show_default=False,
        ),
    ] = None,
    private: options.PrivateOption = None,
    branch: Annotated[
        str | None,
        typer.Option(
            "--branch",
            metavar="BRANCH",
            help="Branch to push to, created when it does not exist.",
            show_default=False,
        ),
    ] = None,
    create_pr: options.CreatePrFlag = False,
    tag: options.TagOption = None,
    overwrite: options.OverwriteFlag = False,
    kernels: options.KernelsOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Do all but the push, and say what that would change; needs no token.",
        ),
    ] = False,
    summary: Annotated[
        Path | None,
        typer.Option(
            "--summary",
            metavar="FILE",
            help=f"Markdown page to write, also when a step fails. Without it one is added to the "
            f"file that {JOB_PAGE} names.",
            show_default=False,
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustRemoteCodeFlag = False,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Calibrate, tune, analyze, check, export, push and verify, as the recipe says.

    A step whose outputs are those of the same recipe, model, text and versions is skipped, so the
    same command continues a release that was stopped, and changes nothing once it is complete. It
    tunes where the recipe has `tuning`. When a gate of the recipe is missed it ends there with exit
    code 3, and nothing is exported or pushed.
    """
    if create_pr and tag:
        raise typer.BadParameter("A pull request is no release yet: drop --tag or --create-pr.")
    sink = Output(json=json, quiet=quiet)
    from cqtool.recipe import load_recipe

    chosen = load_recipe(recipe)

    from cqtool.artifact.plan import PushOptions
    from cqtool.artifact.runtime import choose_runtime
    from cqtool.release.chain import Release, ReleaseOptions

    def open_it() -> OpenedModel:
        from cqtool.models.load import open_model

        return open_model(
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=sink.progress(),
        )

    wanted = ReleaseOptions(
        repo_id=repo_id,
        push=PushOptions(
            private=private, revision=branch, create_pr=create_pr, tag=tag, overwrite=overwrite
        ),
        runtime=choose_runtime(kernels, None),
        dry_run=dry_run,
    )
    one = Release(open_it, chosen, out, wanted, sink.progress())
    if not one.gated:
        from cqtool.release.summary import NO_GATES

        sink.warn(f"No gates: {NO_GATES}")
    with _interrupted_by_sigterm():
        _run(one, sink, summary)
    if not one.passed:
        (missed,) = (step.sentence for step in one.steps if step.status == "missed")
        write_stderr(f"nothing was released: {missed}", label="gate missed", style="bold red")
        raise typer.Exit(GATE_MISSED)


def _run(one: Release, sink: Output, summary: Path | None) -> None:
    try:
        one.run()
    except CqtoolError as error:
        # What a job shows is needed most when a step failed.
        _report(sink, one, summary, str(error))
        raise
    except KeyboardInterrupt as interrupt:
        remedy = "What is finished stays; run the same command again to continue."
        _report(sink, one, summary, f"It was interrupted. {remedy}")
        if isinstance(interrupt, _Terminated):
            write_stderr(f"Terminated. {remedy}")
            raise typer.Exit(TERMINATED) from None
        raise KeyboardInterrupt(remedy) from None
    _report(sink, one, summary)


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """A CI job that is cancelled gets SIGTERM, and a while later SIGKILL: time for a report."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(sink: Output, one: Release, summary: Path | None, error: str | None = None) -> None:
    try:
        _print(sink, one, error)
    finally:
        # Last, because what was done is done, whether or not there is a page about it.
        _write_summary(sink, one, summary, error)


def _print(sink: Output, one: Release, error: str | None) -> None:
    sink.result(one.to_json() | {"error": error})
    sink.table(
        ["step", "", "seconds", "what came out"],
        [[step.name, step.status, f"{step.seconds:.1f}", step.sentence] for step in one.steps],
    )
    if error is not None or not one.passed:
        return
    if one.options.dry_run:
        sink.text("Dry run: nothing was pushed.")
    elif one.changed:
        sink.text("Released and verified.")
    else:
        sink.text("Nothing changed: the release was complete, and is verified.")


def _write_summary(sink: Output, one: Release, path: Path | None, error: str | None) -> None:
    from cqtool.release.summary import render_summary

    page, shared = render_summary(one.to_json(), error), os.environ.get(JOB_PAGE)
    try:
        if path is not None:
            write_text(path, page)
        elif shared:
            # Other steps of the job write to it too.
            with Path(shared).open("a", encoding="utf-8") as file:
                file.write(page)
    except (OSError, EnvironmentProblem) as problem:
        cause = problem.__cause__ or problem
        reason = cause.strerror if isinstance(cause, OSError) else cause
        sink.warn(
            f"The summary {path or shared} was not written ({reason}), which changes nothing else; "
            "give another file with --summary."
        )

"""`cqtool calibrate`: sample a model's activations and fit its codebooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cqtool.cli import options
from cqtool.cli.output import Output
from cqtool.errors import ArtifactError
from cqtool.layout.config import (
    CALIBRATION_NAME,
    CODEBOOKS_NAME,
    CONFIG_NAME,
    MAX_JSON_BYTES,
    REMEDY,
    read_config,
)
from cqtool.strictjson import read_object

if TYPE_CHECKING:
    from cqtool.models.load import OpenedModel
    from cqtool.recipe import Recipe

EXAMPLES = (
    "cqtool calibrate Qwen/Qwen3-0.6B --recipe cq-8c8b --out calibration",
    "cqtool calibrate demo --recipe demo --out calibration --resume",
)
FILES = (CONFIG_NAME, CALIBRATION_NAME, CODEBOOKS_NAME)
"""What a finished calibration folder holds."""


def calibrate(
    model: options.ModelArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Calibration folder to write.")
    ] = Path("calibration"),
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="Name of a shipped recipe, path of a YAML file, or folder of a calibration or "
            "artifact to take it from.",
        ),
    ] = "cq-8c8b",
    dataset: options.DatasetsOption = None,
    dataset_config: options.DatasetConfigOption = None,
    split: options.SplitOption = None,
    text_column: options.TextColumnOption = None,
    sequences: Annotated[
        int | None,
        typer.Option("--sequences", min=1, help="Calibration sequences.", show_default=False),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", min=2, help="Tokens in each.", show_default=False),
    ] = None,
    objective: Annotated[
        Literal["uniform", "fisher", "query"] | None,
        typer.Option(
            "--objective",
            help="Plain k-means; weighted with squared gradients of the loss; or that in the "
            "metric by which queries and output projections read the cache.",
            show_default=False,
        ),
    ] = None,
    grouping: Annotated[
        Literal["contiguous", "correlation", "pairs", "balanced", "balanced-pairs"] | None,
        typer.Option(
            "--grouping",
            help="Which channels are coded together: neighbours, correlated ones, or those "
            "with the least error by theory; with regard to RoPE's pairs, keys decode faster.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        Literal["auto", "faiss", "batched"] | None,
        typer.Option(
            "--engine",
            help="What runs the k-means: faiss, or all codebooks of a layer at once in torch; "
            "auto takes the second on a GPU.",
            show_default=False,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", min=1, help="Iterations of k-means.", show_default=False),
    ] = None,
    window: options.WindowOption = None,
    sinks: options.SinksOption = None,
    seed: options.SeedOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustRemoteCodeFlag = False,
    resume: options.ResumeFlag = False,
    force: options.ForceFlag = False,
    keep_samples: Annotated[
        bool,
        typer.Option(
            "--keep-samples/--discard-samples",
            help="Keep the sampled activations, for analyze-entropy and further fits.",
        ),
    ] = True,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Sample a model's keys and values and fit codebooks to them.

    The recipe says how; every option that is given replaces the recipe's own value. A run that was
    stopped continues with --resume and ends in the same bytes.
    """
    sink = Output(json=json, quiet=quiet)
    if resume and force:
        raise typer.BadParameter("--resume continues and --force replaces: give one of them.")
    from cqtool.recipe import load_recipe, text_overrides

    overrides = text_overrides("calibration", dataset, dataset_config, split, text_column) | {
        "calibration.sequences": sequences,
        "calibration.sequence_length": sequence_length,
        "calibration.seed": seed,
        "objective": objective,
        "grouping": grouping,
        "kmeans.engine": engine,
        "kmeans.iterations": iterations,
        "window": window,
        "sinks": sinks,
    }
    chosen = load_recipe(recipe, {key: v for key, v in overrides.items() if v is not None})
    finished = _finished(out)
    _refuse_overwriting(out, finished=finished, resume=resume, force=force)

    from cqtool.models.load import open_model

    opened = open_model(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=sink.progress(),
    )
    if finished and resume:
        from cqtool.codebooks.calibrate import discard_work

        _refuse_other_settings(out, opened, chosen)
        discard_work(out)
        sink.note(f"The calibration in {out} is complete; nothing to do.")
    else:
        from cqtool.codebooks.calibrate import calibrate as fit

        try:
            fit(
                opened,
                chosen,
                out,
                resume=resume,
                force=force,
                keep_samples=keep_samples,
                progress=sink.progress(),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "What is finished stays; run the same command with --resume to continue."
            ) from None
    _report(sink, out, chosen)


def _finished(out: Path) -> bool:
    return all((out / name).is_file() for name in FILES)


def _refuse_overwriting(out: Path, *, finished: bool, resume: bool, force: bool) -> None:
    """Refuse before the work what would lose something after it."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; choose another folder with --out.")
    if finished:
        if not (resume or force):
            raise ArtifactError(
                f"{out} holds a finished calibration; add --force to replace it, or choose "
                "another folder with --out."
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ArtifactError(
            f"{out} holds other files, which a calibration would replace; choose a new folder "
            "with --out."
        )


def _refuse_other_settings(out: Path, opened: OpenedModel, chosen: Recipe) -> None:
    from cqtool.models.fingerprint import compare_fingerprints, fingerprint
    from cqtool.recipe import recipe_of

    made_with = recipe_of(out)
    expected = dict(read_config(out).base_model.fingerprint)
    difference = compare_fingerprints(expected, fingerprint(opened.model))
    if difference is None and made_with.digest != chosen.digest:
        difference = "its recipe differs in " + ", ".join(made_with.differences(chosen))
    if difference is not None:
        raise ArtifactError(
            f"{out} holds a calibration of another kind ({difference}); choose another folder "
            "with --out, or add --force without --resume to replace it."
        )


def _report(sink: Output, out: Path, chosen: Recipe) -> None:
    calibration = read_object(out / CALIBRATION_NAME, REMEDY, limit=MAX_JSON_BYTES)
    config = read_config(out)
    timings = {name: float(seconds) for name, seconds in calibration["timings"].items()}
    places = {path.name: str(path) for path in (out / name for name in (*FILES, "samples"))}
    places = {name: place for name, place in places.items() if Path(place).exists()}
    sink.result(
        {
            "calibration": str(out),
            "format": chosen.spec.name,
            "bits_per_channel": config.bits_per_channel,
            "files": places,
            "timings": timings,
        }
    )
    sink.text(f"{chosen.spec.name}: {config.rate}\n")
    sink.table(["what", "where"], [[name, place] for name, place in places.items()])
    sink.text()
    sink.table(["step", "seconds"], [[name, f"{took:.1f}"] for name, took in timings.items()])

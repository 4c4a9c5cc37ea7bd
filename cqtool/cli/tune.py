"""`cqtool tune`: train a calibration's codebooks end to end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cqtool.cli import options
from cqtool.cli.output import Output, write_stderr
from cqtool.errors import ArtifactError, CqtoolError
from cqtool.layout.config import CALIBRATION_NAME, MAX_JSON_BYTES, REMEDY
from cqtool.strictjson import read_object

if TYPE_CHECKING:
    from cqtool.recipe import Recipe
    from cqtool.tuning.ranks import Ranks

EXAMPLES = (
    "cqtool tune Qwen/Qwen3-0.6B calibration --out tuned",
    "cqtool tune demo calibration --out tuned --steps 100 --sequence-length 512 --resume",
)


def tune(
    model: options.ModelArgument,
    calibration: options.CalibrationArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Calibration folder to write.")
    ] = Path("tuned"),
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", min=1, help="Training steps, at most.", show_default=False
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="X",
            help="Largest step of a centroid, relative to the error of its codebook.",
            show_default=False,
        ),
    ] = None,
    softness: Annotated[
        float | None,
        typer.Option(
            "--softness",
            min=0.0,
            metavar="X",
            help="How far gradients see beyond the centroid that was taken (a temperature); 0: not "
            "at all.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="N", min=1, help="Sequences a step.", show_default=False),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            "--micro-batch",
            metavar="N",
            min=1,
            help="Sequences of the batch that are in memory at once.",
            show_default=False,
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            "--sequences", metavar="N", min=1, help="Training sequences.", show_default=False
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length", metavar="N", min=2, help="Tokens in each.", show_default=False
        ),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(
            "--held-out",
            metavar="N",
            min=1,
            help="Further sequences, whose KL says when to stop and which codebooks to keep.",
            show_default=False,
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            "--evaluate-every",
            metavar="N",
            min=1,
            help="Steps between looks at the held-out text.",
            show_default=False,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Keep less for the backward pass and compute it again: less memory, more time.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        Literal["teacher", "prefill"] | None,
        typer.Option(
            "--mode",
            help="teacher: each position follows decoding token by token; prefill: each follows a "
            "prompt, whose keys and values were computed in full precision and coded then.",
            show_default=False,
        ),
    ] = None,
    seed: options.SeedOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustRemoteCodeFlag = False,
    resume: options.ResumeFlag = False,
    force: options.ForceFlag = False,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Train the codebooks so that the model's predictions over the cache change least.

    Starts from a calibration and writes another one, of the same format and size. The model itself
    stays as it is. Settings come from the recipe's `tuning`, where an option does not replace them;
    the text is the calibration's.

    On several GPUs: `torchrun --nproc-per-node 8 -m cqtool tune ...` with the same options. The
    sequences of each step are shared by the processes, so their number has to divide `--batch`.
    """
    sink = Output(json=json, quiet=quiet)
    if resume and force:
        raise typer.BadParameter("--resume continues and --force replaces: give one of them.")
    from cqtool.recipe import Tuning, recipe_of

    settings: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "softness": softness,
        "batch": batch,
        "micro_batch": micro_batch,
        "sequences": sequences,
        "sequence_length": sequence_length,
        "held_out": held_out,
        "evaluate_every": evaluate_every,
        "gradient_checkpointing": gradient_checkpointing,
        "mode": mode,
        "seed": seed,
    }
    from cqtool.tuning.ranks import joined, own_device

    with joined(device) as ranks, _one_voice(ranks):
        if not ranks.first:
            sink = Output(quiet=True)
        with ranks.together():
            made_with = recipe_of(calibration)
            defaults = (made_with.tuning or Tuning()).model_dump(mode="json")
            given = {name: value for name, value in settings.items() if value is not None}
            overrides = {f"tuning.{name}": value for name, value in (defaults | given).items()}
            recipe = recipe_of(calibration, overrides)
        if ranks.from_first(
            lambda: _is_finished(out, calibration, recipe, resume=resume, force=force)
        ):
            sink.note(f"The tuning in {out} is complete; nothing to do.")
        else:
            from cqtool.models.load import open_model
            from cqtool.tuning import tune as train

            with ranks.together():
                opened = open_model(
                    model,
                    revision=revision,
                    device=own_device(device, ranks),
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    progress=sink.progress(),
                )
            train(
                opened,
                calibration,
                recipe,
                out,
                resume=resume,
                force=force,
                ranks=ranks,
                progress=sink.progress(),
            )
    if ranks.first:
        _report(sink, out, recipe)


@contextmanager
def _one_voice(ranks: Ranks) -> Iterator[None]:
    """Of several processes the first alone says what ends them all."""
    try:
        yield
    except CqtoolError as error:
        if not ranks.agreed:
            raise
        if ranks.first:
            write_stderr(str(error), label="error", style="bold red")
        # torchrun stops the others as soon as one has ended, the one that speaks among them.
        ranks.wait()
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        if not ranks.first:
            raise typer.Exit(130) from None
        raise KeyboardInterrupt(
            "What is finished stays; run the same command with --resume to continue."
        ) from None


def _report(sink: Output, out: Path, recipe: Recipe) -> None:
    record = _record(out)
    before, after = record["held_out_kl"][0], record["held_out_kl"][record["kept"]]
    sink.result(
        {
            "calibration": str(out),
            "format": recipe.spec.name,
            "steps": record["steps"],
            "held_out_kl_before": before,
            "held_out_kl": after,
        }
    )
    sink.text(
        f"{recipe.spec.name}: held-out KL {before:.4f} before, {after:.4f} after "
        f"{record['steps']} steps\n{out}"
    )


def _record(folder: Path) -> dict[str, Any]:
    """What a tuned calibration says of its tuning; empty for any other."""
    record = read_object(folder / CALIBRATION_NAME, REMEDY, limit=MAX_JSON_BYTES).get("tuning")
    return record if isinstance(record, dict) else {}


def _is_finished(
    out: Path, calibration: Path, recipe: Recipe, *, resume: bool, force: bool
) -> bool:
    """Whether there is nothing left to do; refuses what would lose something."""
    from cqtool.recipe import recipe_of

    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; choose another folder with --out.")
    if out.resolve() == calibration.resolve():
        raise ArtifactError("--out is the calibration itself; choose another folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if not (out / CALIBRATION_NAME).is_file():
        raise ArtifactError(f"{out} holds other files; choose a new folder with --out.")
    if not _record(out):
        raise ArtifactError(
            f"{out} holds a calibration that was not tuned; choose another folder with --out."
        )
    if resume and recipe_of(out).digest != recipe.digest:
        raise ArtifactError(
            f"{out} holds a tuning with other settings; choose another folder with --out, or add "
            "--force without --resume to replace it."
        )
    if not (resume or force):
        raise ArtifactError(
            f"{out} holds a finished tuning; add --force to replace it, or choose another folder "
            "with --out."
        )
    return resume

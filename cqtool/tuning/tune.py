"""The whole of a tuning run: load a calibration, train its codebooks, write another calibration.

As in :mod:`cqtool.codebooks.calibrate`, work in progress lies in ``<out>.partial``, and `out` only
ever holds a complete calibration.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from cqtool.cache.codec import CQCodec, HeadsCodec
from cqtool.cache.format import CacheFormat
from cqtool.cache.loading import load_format
from cqtool.codebooks.calibrate import exclusive, library_versions, partial_folder
from cqtool.errors import ArtifactError
from cqtool.files import atomic_dir, atomic_file, digest_json, sha256_file, write_json
from cqtool.layout.config import (
    CALIBRATION_NAME,
    CODEBOOKS_NAME,
    CONFIG_NAME,
    MAX_JSON_BYTES,
    REMEDY,
    codebook_name,
    owner_name,
)
from cqtool.models.load import OpenedModel
from cqtool.progress import SILENT, Progress
from cqtool.quality.simulate import require_simulation
from cqtool.recipe import Recipe
from cqtool.spec import KINDS
from cqtool.strictjson import read_object
from cqtool.tuning.ranks import ALONE, Ranks
from cqtool.tuning.text import tuning_windows
from cqtool.tuning.trainer import History, Trainer

_STATE_NAME = "tuning.safetensors"
# Of what the numbers in it mean.
_STATE_VERSION = 2


@dataclass(frozen=True)
class TuningResult:
    """What a tuning run left behind.

    Attributes:
        path: the calibration folder.
        history: losses and held-out figures.
    """

    path: Path
    history: History


def tune(
    opened: OpenedModel,
    calibration: Path,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    ranks: Ranks = ALONE,
    progress: Progress = SILENT,
) -> TuningResult:
    """Tune the codebooks of `calibration` end to end into the calibration folder `out`.

    Only text of the recipe's calibration data is read, never its evaluation text.

    Args:
        opened: the model and its tokenizer.
        calibration: what `cqtool calibrate` wrote.
        recipe: the calibration's, with its `tuning` set.
        out: the folder to write; replaced only when the new one is complete.
        resume: continue an interrupted run.
        force: throw an interrupted run away, and replace a finished one.
        ranks: the processes that call this together; the first one writes and reports.
        progress: where to report.

    Raises:
        ArtifactError: the calibration is damaged or of another model, or something is in the way.
        DataError: the text is missing or too short.
        ModelError: the model cannot be simulated in one pass.
        RecipeError: the batch cannot be shared by the processes.
        SampleError: the loss is not finite.
        EnvironmentProblem: out of memory or disk.
    """
    settings = recipe.tuning
    assert settings is not None
    started = time.perf_counter()
    partial = partial_folder(out)
    with ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                stack.enter_context(exclusive(out))
                if partial.exists() and not (resume or force):
                    raise ArtifactError(
                        f"{partial} holds a tuning that was interrupted; continue it with "
                        "--resume, or start over with --force."
                    )
            format = load_format(calibration, opened.model).to(opened.model.device)
        windows = ranks.from_first(lambda: tuning_windows(opened, recipe))
        with ranks.together():
            require_simulation(opened.model, format, windows.ids[0])
            trainer = Trainer(
                opened.model,
                format,
                settings,
                windows.ids[: settings.sequences],
                windows.ids[settings.sequences :],
                ranks,
            )
        # Not the number of processes: a run may be continued on another number of GPUs.
        identity = digest_json(
            {
                "state": _STATE_VERSION,
                "codebooks": sha256_file(calibration / CODEBOOKS_NAME),
                "recipe": recipe.digest,
                "text": windows.digest,
                "dtype": str(opened.model.dtype),
            }
        )
        state = partial / _STATE_NAME
        interrupted = ranks.from_first(lambda: resume and state.is_file())
        if interrupted and not trainer.load(state, identity):
            with ranks.together():
                raise ArtifactError(
                    f"{partial} holds an interrupted tuning of another calibration or with other "
                    "settings; start over with --force."
                )
        history = _train(trainer, state, identity, ranks, progress)
        record = {
            "settings": settings.model_dump(mode="json"),
            "data": {**windows.source, "digest": windows.digest},
            "held_out_kl": history.held_out,
            "training_kl": history.losses,
            "kept": history.best,
            "steps": history.step,
            "seconds": round(time.perf_counter() - started, 1),
            "device": str(opened.model.device),
            "processes": ranks.count,
            "cuda_graph": trainer.captured and opened.model.device.type == "cuda",
            "dtype": str(opened.model.dtype).removeprefix("torch."),
            "versions": library_versions(),
        }
        ranks.from_first(lambda: _write(calibration, out, trainer.best_format(), recipe, record))
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
    return TuningResult(out, history)


def _train(
    trainer: Trainer, state: Path, identity: str, ranks: Ranks, progress: Progress
) -> History:
    history, steps = trainer.history, trainer.settings.steps
    with progress.task("tuning steps", total=steps, done=history.step) as task:
        while not trainer.finished:
            task.advance(trainer.run_until_next_look())
            history = trainer.history
            ranks.from_first(lambda: trainer.save(state, identity))
            progress.note(f"step {history.step}: held-out KL {history.held_out[-1]:.4f}")
    return history


def _write(
    calibration: Path, out: Path, tuned: CacheFormat, recipe: Recipe, record: dict[str, Any]
) -> None:
    tensors = load_file(calibration / CODEBOOKS_NAME)
    for index, layer in enumerate(tuned.layers):
        for kind in KINDS:
            codec = layer.key if kind == "key" else layer.value
            parts = codec.parts if isinstance(codec, HeadsCodec) else (codec,)
            owners = recipe.spec.owners(index, kind)
            for (owner, _, _), part in zip(owners, parts, strict=True):
                assert isinstance(part, CQCodec)
                name = codebook_name(owner_name(index, owner))
                tensors[name] = part.stored_codebook.contiguous().cpu()
    config = read_object(calibration / CONFIG_NAME, REMEDY, limit=MAX_JSON_BYTES)
    fitted = read_object(calibration / CALIBRATION_NAME, REMEDY, limit=MAX_JSON_BYTES)
    with atomic_dir(out) as folder:
        with atomic_file(folder / CODEBOOKS_NAME) as temporary:
            save_file(tensors, temporary)
        config |= {"recipe": recipe.model_dump(mode="json"), "tuned": True}
        write_json(folder / CONFIG_NAME, config)
        write_json(folder / CALIBRATION_NAME, {**fitted, "tuning": record})

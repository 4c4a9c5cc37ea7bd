"""The whole of a calibration: sample, fit, write; interrupted anywhere, it can be resumed.

Work happens in ``<out>.partial`` beside the destination and replaces it in one step at the end, so
`out` only ever holds a complete calibration. Each file of the work in progress is written in one
step too: what exists is finished, and a resumed run does only the rest.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cqtool import __version__
from cqtool.codebooks.engines import make_engine
from cqtool.codebooks.files import read_fit, write_codebooks, write_fit
from cqtool.codebooks.fit import (
    LayerFit,
    check_enough_samples,
    check_fits_geometry,
    count_codebooks,
    fit_layer,
)
from cqtool.codebooks.groups_file import read_groups
from cqtool.codebooks.kmeans import Engine
from cqtool.data.windows import TokenWindows
from cqtool.errors import ArtifactError
from cqtool.files import atomic_dir, digest_json, remove_leftovers, write_json
from cqtool.geometry import ModelGeometry
from cqtool.layout.config import (
    CALIBRATION_NAME,
    CODEBOOKS_NAME,
    CONFIG_NAME,
    FORMAT_VERSION,
)
from cqtool.models.fingerprint import fingerprint
from cqtool.models.load import OpenedModel
from cqtool.models.probe import read_geometry
from cqtool.progress import SILENT, Progress
from cqtool.recipe import Recipe
from cqtool.sampling import SampleStore, calibration_windows, collect
from cqtool.spec import KINDS, CacheSpec

SAMPLES_NAME = "samples"
_FITS_NAME = "fits"


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration left behind.

    Attributes:
        path: the calibration folder.
        timings: seconds per step, of this run only.
    """

    path: Path
    timings: dict[str, float]


def calibrate(
    opened: OpenedModel,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    keep_samples: bool = True,
    progress: Progress = SILENT,
) -> CalibrationResult:
    """Sample a model and fit the codebooks of `recipe` into the folder `out`.

    Args:
        opened: the model and its tokenizer.
        recipe: what to fit, on which text.
        out: the calibration folder; replaced only when the new one is complete.
        resume: continue an interrupted run of the same recipe.
        force: throw an interrupted run away, and replace a finished calibration.
        keep_samples: leave the sample store in the calibration folder.
        progress: where to report.

    Raises:
        RecipeError: the format does not fit the model's heads, or the groups of a file do not.
        SampleError: more centroids than samples, NaN activations, or a resumed run differs.
        ArtifactError: a finished or interrupted run is in the way, or another process writes to
            `out`.
        DataError: the text is missing or too short.
        EnvironmentProblem: out of disk or memory.
        ModelError: the objective needs queries and output projections, which cannot be found.
    """
    partial = partial_folder(out)
    if (out / CONFIG_NAME).exists() and not (resume or force or partial.exists()):
        raise ArtifactError(
            f"{out} holds a finished calibration; choose another folder with --out, or replace it "
            "with --force."
        )
    spec = recipe.spec
    geometry = read_geometry(opened.model)
    check_fits_geometry(spec, geometry)
    read_groups(recipe.grouping.file, spec, geometry)
    text = recipe.calibration
    check_enough_samples(spec, text.sequences * text.sequence_length)
    engine = make_engine(recipe.kmeans, opened.model.device.type)
    timings: dict[str, float] = {}
    with exclusive(out):
        if partial.exists() and not resume:
            if not force:
                raise ArtifactError(
                    f"{partial} holds a calibration that was interrupted; continue it with "
                    "--resume, or start over with --force."
                )
            shutil.rmtree(partial)
        # Of a run that was killed; in the samples they would become a part of the calibration.
        remove_leftovers(out, partial)
        with _timed(timings, "text"):
            windows = calibration_windows(opened, text)
        with _timed(timings, "sampling"):
            store = collect(
                opened,
                geometry,
                windows,
                partial / SAMPLES_NAME,
                gradients=recipe.objective != "uniform",
                moments=recipe.objective == "query",
                progress=progress,
            )
        with _timed(timings, "fitting"):
            fits = fit_codebooks(
                store, geometry, recipe, engine, partial / _FITS_NAME, progress=progress
            )
        with atomic_dir(out) as folder:
            write_codebooks(folder / CODEBOOKS_NAME, fits)
            write_json(folder / CONFIG_NAME, _config(opened, recipe, geometry, windows))
            record = _record(opened, recipe, windows, engine, timings, fits)
            write_json(folder / CALIBRATION_NAME, record)
            if keep_samples:
                store.path.rename(folder / SAMPLES_NAME)
        shutil.rmtree(partial, ignore_errors=True)
    return CalibrationResult(out, timings)


def partial_folder(out: Path) -> Path:
    """Where the work for `out` goes on until it is complete."""
    return out.with_name(f"{out.name}.partial")


def discard_work(out: Path) -> None:
    """Remove the work for a calibration that is complete: of a run killed just after that.

    Raises:
        ArtifactError: another process writes to `out`.
    """
    with exclusive(out):
        remove_leftovers(out, partial_folder(out))
        shutil.rmtree(partial_folder(out), ignore_errors=True)


def fit_codebooks(
    store: SampleStore,
    geometry: ModelGeometry,
    recipe: Recipe,
    engine: Engine,
    work: Path,
    *,
    progress: Progress = SILENT,
) -> list[LayerFit]:
    """Fit every layer, one after the other; layers that `work` already holds are read back.

    Args:
        store: the samples.
        geometry: the model's cache geometry.
        recipe: format, objective and k-means settings.
        engine: the k-means engine.
        work: where finished layers go, told apart by the settings that made them.
        progress: where to report, in codebooks.

    Raises:
        RecipeError: groups are to be those of a file, which does not list them.
        SampleError: k-means cannot work with the samples, or they lack what the objective needs.
    """
    spec = recipe.spec
    given = read_groups(recipe.grouping.file, spec, geometry)
    identity: dict[str, Any] = {
        "samples": store.meta,
        "cache": {kind: asdict(spec.code(kind)) for kind in KINDS}
        | ({"layers": [asdict(codes) for codes in spec.layers]} if spec.layers else {}),
        "objective": recipe.objective,
        "kmeans": recipe.kmeans.model_dump(mode="json"),
        "seed": recipe.calibration.seed,
        "engine": engine.detail,
    }
    if given:
        # Not the file's name: its content may have changed since.
        orders = (order for kinds in given.values() for order in kinds.values())
        identity["groups"] = [order.tolist() for order in orders]
    work = work / digest_json(identity)[:16]
    counts = [count_codebooks(spec, index, one) for index, one in enumerate(geometry.layers)]
    files = [work / f"layer-{layer:03d}.safetensors" for layer in range(len(counts))]
    found = [read_fit(file) for file in files]
    done = sum(count for count, fit in zip(counts, found, strict=True) if fit is not None)
    fits = []
    label = f"k-means ({spec.name} {recipe.objective}, {engine.detail})"
    with progress.task(label, total=sum(counts), done=done) as task:
        for layer, fit in enumerate(found):
            if fit is None:
                fit = fit_layer(
                    store,
                    layer,
                    spec,
                    recipe.objective,
                    engine,
                    recipe.calibration.seed,
                    task,
                    geometry.layers[layer].rotation,
                    given.get(layer),
                )
                write_fit(files[layer], fit)
            fits.append(fit)
    return fits


def library_versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    versions = {"cqtool": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "safetensors", "datasets"):
        # Local text needs no datasets.
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _config(
    opened: OpenedModel, recipe: Recipe, geometry: ModelGeometry, windows: TokenWindows
) -> dict[str, Any]:
    spec: CacheSpec = recipe.spec
    return {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "cqtool", "version": __version__},
        "base_model": {
            "id": opened.base_id,
            "revision": opened.revision,
            "license": opened.license.id,
            **opened.license.more,
            "fingerprint": fingerprint(opened.model),
        },
        "cache": spec.to_json(),
        "geometry": geometry.to_json(),
        "objective": recipe.objective,
        "recipe": recipe.model_dump(mode="json"),
        "calibration": {
            "dataset": windows.source,
            "digest": windows.digest,
            "sequences": windows.ids.shape[0],
            "sequence_length": windows.ids.shape[1],
            "seed": recipe.calibration.seed,
        },
    }


def _record(
    opened: OpenedModel,
    recipe: Recipe,
    windows: TokenWindows,
    engine: Engine,
    timings: dict[str, float],
    fits: list[LayerFit],
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "data": {**windows.source, "digest": windows.digest},
        "objective": recipe.objective,
        "engine": engine.name,
        "engine_detail": engine.detail,
        "seed": recipe.calibration.seed,
        "device": str(opened.model.device),
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "timings": {step: round(seconds, 3) for step, seconds in timings.items()},
        "versions": library_versions(),
        "objective_values": [fit.errors for fit in fits],
    }


@contextmanager
def _timed(timings: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[step] = time.perf_counter() - start


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Keep a second process out of the same work; the lock goes with the process."""
    # Not beside `out`, where it would stay behind: removing a lock file is a race of its own.
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"cqtool-{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ArtifactError(
            f"Another cqtool is at work in {out}; wait for it, or choose another --out."
        ) from error
    try:
        yield
    finally:
        lock.release()

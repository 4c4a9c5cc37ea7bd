"""An artifact's codebooks made once more, from its own recipe, model, text and seed.

The same inputs on the same kind of machine give the same bytes. Where they do not, the record that
the artifact carries says what was different when it was made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from cqtool.artifact.private import hide_local_paths
from cqtool.artifact.remote import scratch_folder
from cqtool.codebooks.calibrate import calibrate
from cqtool.errors import ArtifactError
from cqtool.files import sha256_file
from cqtool.layout.config import (
    CALIBRATION_NAME,
    CODEBOOKS_NAME,
    CONFIG_NAME,
    MAX_JSON_BYTES,
    REMEDY,
    read_config,
)
from cqtool.models.fingerprint import compare_fingerprints, fingerprint
from cqtool.models.load import open_model
from cqtool.progress import SILENT, Progress
from cqtool.recipe import recipe_of
from cqtool.strictjson import read_object
from cqtool.tuning import tune

_CIRCUMSTANCES = {"timings", "versions", "device", "seconds", "processes", "cuda_graph"}
"""Fields of calibration.json that tell how it was made, and not what."""


@dataclass(frozen=True)
class Rebuilt:
    """How a second making compares.

    Attributes:
        same: whether the codebooks are the same bytes, and all that is said of them the same.
        differences: what is not, for people.
        reasons: what was different this time, for people; empty where nothing is known.
        seconds: how long it took.
    """

    same: bool
    differences: tuple[str, ...]
    reasons: tuple[str, ...]
    seconds: float


def rebuild(
    artifact: Path,
    *,
    model: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Rebuilt:
    """Calibrate again as `artifact` was, tune where it was tuned, and compare.

    Args:
        artifact: the folder, verified.
        model: where the base model lies; by default its id and commit on the Hub, as recorded.
        device: as in :func:`cqtool.models.load.open_model`; the dtype is the recorded one.
        trust_remote_code: whether to run code that comes with the model.
        progress: where to report.

    Raises:
        ArtifactError: the model is another one.
        As :func:`cqtool.codebooks.calibrate.calibrate` and :func:`cqtool.tuning.tune`.
    """
    started = time.perf_counter()
    config, recipe = read_config(artifact), recipe_of(artifact)
    base, record = config.base_model, _record(artifact)
    if model is None and base.id.startswith("./"):
        raise ArtifactError(
            f"The base model of {artifact} is a folder of somebody's, {base.id}; say where it is "
            "with --model."
        )
    opened = open_model(
        model or base.id,
        revision=base.revision if model is None else None,
        device=device,
        dtype=str(record.get("dtype", "auto")),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    other = compare_fingerprints(dict(base.fingerprint), fingerprint(opened.model))
    if other is not None:
        raise ArtifactError(
            f"{opened.name} is not the base model of {artifact}: {other}; give {base.id} with "
            "--model."
        )
    with scratch_folder() as temporary:
        folder = temporary / "calibration"
        calibrate(opened, recipe, folder, keep_samples=False, progress=progress)
        if config.tuned:
            tuned = temporary / "tuned"
            tune(opened, folder, recipe, tuned, progress=progress)
            folder = tuned
        hide_local_paths([folder / name for name in (CONFIG_NAME, CALIBRATION_NAME)])
        differences = tuple(_differences(artifact, folder))
        reasons = tuple(_reasons(record, _record(folder))) if differences else ()
    seconds = round(time.perf_counter() - started, 1)
    return Rebuilt(not differences, differences, reasons, seconds)


def _record(folder: Path) -> dict[str, Any]:
    return read_object(folder / CALIBRATION_NAME, REMEDY, limit=MAX_JSON_BYTES)


def _differences(before: Path, now: Path) -> Iterator[str]:
    if sha256_file(before / CODEBOOKS_NAME) != sha256_file(now / CODEBOOKS_NAME):
        yield f"{CODEBOOKS_NAME}: {_tensors(before, now)}"
    for name, ignored in ((CONFIG_NAME, {"tool"}), (CALIBRATION_NAME, _CIRCUMSTANCES)):
        old, new = (read_object(f / name, REMEDY, limit=MAX_JSON_BYTES) for f in (before, now))
        if fields := sorted(_fields(old, new, ignored)):
            yield f"{name}: {', '.join(fields)}"


def _tensors(before: Path, now: Path) -> str:
    """How far two codebook files lie apart."""
    old, new = (load_file(folder / CODEBOOKS_NAME) for folder in (before, now))
    if old.keys() != new.keys() or any(old[name].shape != new[name].shape for name in old):
        return "other tensors"
    other = [name for name in old if not old[name].equal(new[name])]
    if not other:
        return "the same tensors, stored in another way"
    far = max(float((old[name].double() - new[name].double()).abs().max()) for name in other)
    return f"{len(other)} of {len(old)} tensors differ, by {far:.2g} at most"


def _fields(before: Any, now: Any, ignored: set[str], path: str = "") -> Iterator[str]:
    """Paths of the fields in which two JSON values differ, such as ``data.digest``."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        if before != now:
            yield path
        return
    for key in (before.keys() | now.keys()) - ignored:
        yield from _fields(before.get(key), now.get(key), ignored, f"{path}.{key}".lstrip("."))


def _reasons(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    old, new = before.get("versions", {}), now["versions"]
    for package in sorted(old.keys() | new.keys()):
        if old.get(package) != new.get(package):
            yield f"{package} {new.get(package, 'missing')} instead of {old.get(package, 'none')}"
    for field in ("device", "engine_detail"):
        if before.get(field) != now.get(field):
            yield f"{field.replace('_', ' ')} {now.get(field)} instead of {before.get(field)}"
    if str(now["device"]).startswith("cuda") and "tuning" in now:
        yield "tuning on a GPU, where attention's own backward pass adds up in any order"

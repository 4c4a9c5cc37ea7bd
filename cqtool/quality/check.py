"""`check`: a calibration, and whatever it is compared with, against full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from cqtool.codebooks.calibrate import library_versions
from cqtool.data import TokenWindows, overlap
from cqtool.errors import CqtoolError, RecipeError
from cqtool.files import digest_json, write_json
from cqtool.layout.config import QUALITY_NAME, REPORTS_NAME, read_config
from cqtool.manifest import MANIFEST_NAME
from cqtool.models.fingerprint import fingerprint
from cqtool.models.load import OpenedModel
from cqtool.progress import SILENT, Progress
from cqtool.quality.candidates import Candidates, distinct
from cqtool.quality.finished import FinishedRows, Measured
from cqtool.quality.harness import Harness
from cqtool.quality.items import Item
from cqtool.quality.memory import OutOfMemory
from cqtool.quality.report import QualityReport, Skipped, judge, paired_with
from cqtool.quality.run import Run
from cqtool.quality.settings import CheckSettings
from cqtool.quality.tasks import TaskRun, task_items
from cqtool.quality.text import evaluation_windows


def check(
    opened: OpenedModel,
    calibration: Path,
    settings: CheckSettings,
    progress: Progress = SILENT,
) -> QualityReport:
    """Measure `calibration` and keep the figures where :func:`report_path` says.

    Formats are made, measured and let go one after the other, so that memory does not grow with
    their number. Each row is kept until there is a report, see :mod:`cqtool.quality.finished`.

    Raises:
        ArtifactError: the calibration is damaged or of another model.
        RecipeError: a format to compare or a task does not exist or does not fit.
        SampleError: a format to compare needs samples that are gone.
        ModelError: the model cannot be measured in this mode.
        DataError: the text, or that of a task, is missing or too short.
        EnvironmentProblem: a package that a format or a task needs is not installed.
    """
    items = task_items(opened, settings.generation, settings.items or 20, settings.context)
    harness = Harness.of(opened, settings)
    known = Candidates(opened, calibration, settings, progress)
    if known.window >= settings.window_length:
        raise RecipeError(
            f"A window of {known.window} tokens keeps all of {settings.window_length} evaluated "
            "tokens in full precision, so nothing would be measured; use a longer --window-length."
        )
    against = known.against()
    compared, skipped = known.compared()
    windows = evaluation_windows(opened, settings)
    warning = overlap(read_config(calibration).calibration.dataset, windows.source)
    if warning is not None:
        progress.note(warning)
    tasks = TaskRun(opened, items) if items else None
    finished = FinishedRows(
        calibration, _decisive(opened, settings, known, windows, items, harness), progress
    )
    run = Run(opened, settings, windows, tasks, harness, finished, progress)
    found: list[Measured] = []
    for number, candidate in enumerate(distinct([known.checked, *against, *compared])):
        before = finished.find(candidate)
        if before is not None:
            found.append(before)
            continue
        try:
            found.append(run.measure(candidate))
        except CqtoolError as error:
            # What was named is wanted; but where only memory lacks, the other formats still are.
            spare = isinstance(error, OutOfMemory) and number > len(against)
            if not (candidate.optional or spare):
                raise
            skipped.append(Skipped(candidate.label, str(error)))
        else:
            finished.keep(candidate, found[-1])
    rows = [one.row for one in found]
    by_layer = run.by_layer(known.checked) if settings.by_layer else ()
    by_head = run.by_head(known.checked) if settings.by_head else ()
    for one in skipped:
        progress.note(f"{one.name} is left out: {one.reason}")
    parts = zip(run.full_scores, *((one.generation, one.tasks) for one in found), strict=True)
    generated, of_tasks = (list(chain(*part)) for part in parts)
    report = QualityReport(
        model=opened.base_id,
        evaluation={
            **windows.source,
            "digest": windows.digest,
            "windows": settings.windows,
            "window_length": settings.window_length,
        },
        mode=settings.mode,
        device=str(opened.model.device),
        dtype=str(opened.model.dtype).removeprefix("torch."),
        versions=library_versions(),
        rows=(run.full_row(rows[0]), *rows),
        gates=judge(rows[0], settings.gates),
        generation=None if tasks is None else tasks.result(generated),
        tasks=None if harness is None else harness.result(of_tasks),
        context=settings.context or settings.window_length,
        against=tuple(row.label for row in rows[1 : 1 + len(against)]),
        paired=paired_with(rows[0], rows[1:], [*generated, *of_tasks]),
        skipped=tuple(skipped),
        by_layer=by_layer,
        by_head=by_head,
    )
    path = report_path(calibration, report)
    if path is not None:
        write_json(path, report.to_json())
    finished.clear()
    return report


def report_path(calibration: Path, report: QualityReport) -> Path | None:
    """Where a report belongs, None inside an artifact, which its manifest seals.

    quality.json is about the calibration as it will be released, with what decoding loses; with
    another window or other sinks, or after prompts alone, the report has a name of its own.
    """
    if (calibration / MANIFEST_NAME).exists():
        return None
    own, checked = read_config(calibration).cache, report.rows[1]
    special = ""
    if (checked.window, checked.sinks) != (own.window, own.sinks):
        special += f"-window{checked.window}-sinks{checked.sinks}"
    if report.mode == "prefill":
        special += "-prefill"
    name = Path(QUALITY_NAME)
    return calibration / REPORTS_NAME / f"{name.stem}{special}{name.suffix}"


def _decisive(
    opened: OpenedModel,
    settings: CheckSettings,
    known: Candidates,
    windows: TokenWindows,
    items: Sequence[Item],
    harness: Harness | None,
) -> dict[str, Any]:
    """What decides every row of a check, JSON-ready."""
    device = opened.model.device
    return {
        "model": fingerprint(opened.model),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(opened.model.dtype),
        "versions": library_versions(),
        "text": windows.digest,
        "mode": settings.mode,
        "context": settings.context,
        "window": known.window,
        "sinks": known.sinks,
        "items": digest_json([asdict(item) for item in items]),
        "tasks": None if harness is None else harness.identity,
    }

"""The steps of a release on this machine: calibrate, tune, analyze-entropy, check, export.

Each does nothing where its outputs are those of the same inputs, see :mod:`cqtool.release.journal`.
What a step writes holds no times, so that a release is the same bytes however often it was stopped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cqtool import quality
from cqtool.artifact.export import export, without_times
from cqtool.artifact.measured import read_quality
from cqtool.artifact.runtime import RuntimeChoice
from cqtool.artifact.speed import SPEED_NAME
from cqtool.codebooks.calibrate import SAMPLES_NAME, partial_folder
from cqtool.codebooks.calibrate import calibrate as fit
from cqtool.entropy import analyze
from cqtool.errors import ArtifactError
from cqtool.files import atomic_file, write_json
from cqtool.layout.codebook_file import check_codebooks
from cqtool.layout.config import (
    CALIBRATION_NAME,
    CODEBOOKS_NAME,
    CONFIG_NAME,
    MAX_JSON_BYTES,
    QUALITY_NAME,
    REMEDY,
    REPORTS_NAME,
    read_config,
)
from cqtool.manifest import MANIFEST_NAME, verify_folder
from cqtool.models.load import OpenedModel
from cqtool.progress import Progress
from cqtool.recipe import Recipe, recipe_of
from cqtool.release.inputs import Inputs, export_inputs
from cqtool.release.journal import Journal
from cqtool.report.files import draw_quality, write_entropy
from cqtool.report.html import write_report
from cqtool.sampling import SampleStore
from cqtool.strictjson import read_object
from cqtool.tuning import tune as train

Status = Literal["done", "same", "preview", "missed", "failed", "not run"]
"""``same``: nothing to do; ``preview``: only said what would be done; ``missed``: a gate was."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: its status, a sentence for people, and figures, JSON-ready."""

    status: Status
    sentence: str
    result: dict[str, Any] = field(default_factory=dict)


class Local:
    """The local steps in the release folder `out`.

    Args:
        open: opens the model, on first use.
        recipe: what to make, and how to judge it.
        out: the release folder.
        progress: where to report.

    Raises:
        ArtifactError: `out` holds something else.
    """

    def __init__(
        self, open: Callable[[], OpenedModel], recipe: Recipe, out: Path, progress: Progress
    ) -> None:
        self.recipe, self.progress = recipe, progress
        self.calibration, self.tuned = out / "calibration", out / "tuned"
        self.artifact = out / "artifact"
        self.released = self.tuned if recipe.tuning else self.calibration
        self._open, self._journal = open, Journal(out)
        for name in (*(p.name for p in (self.calibration, self.tuned, self.artifact)), "release*"):
            # What a killed process had not renamed yet.
            for leftover in out.glob(f".{name}.*.tmp"):
                _remove(leftover)

    @cached_property
    def _inputs(self) -> Inputs:
        return Inputs(self._open(), self.recipe)

    def calibrate(self) -> Outcome:
        """Sample the model and fit the codebooks; raises as
        :func:`cqtool.codebooks.calibrate.calibrate`."""
        inputs, folder = self._inputs.calibrate, self.calibration
        # The analysis is all that needs the samples later; a cache between CI jobs may lack them.
        enough = (folder / SAMPLES_NAME).is_dir() or self._journal.is_done(
            "analyze-entropy", self._inputs.entropy
        )

        def make() -> None:
            fit(self._inputs.opened, self.recipe, folder, resume=True, progress=self.progress)

        return self._folder_step("calibrate", inputs, folder, make, valid=enough)

    def tune(self) -> Outcome:
        """Tune the codebooks end to end; raises as :func:`cqtool.tuning.tune`."""
        folder = self.tuned

        def make() -> None:
            train(
                self._inputs.opened,
                self.calibration,
                self.recipe,
                folder,
                resume=True,
                progress=self.progress,
            )

        return self._folder_step("tune", self._inputs.tune(self.calibration), folder, make)

    def analyze_entropy(self) -> Outcome:
        """Write the entropy report; raises as :func:`cqtool.entropy.analyze`."""
        reports, inputs = self.calibration / REPORTS_NAME, self._inputs.entropy
        same = self._journal.is_done("analyze-entropy", inputs)
        if not same:
            self._begin("analyze-entropy", inputs)
            report = analyze(SampleStore.open(self.calibration), progress=self.progress)
            files = write_entropy(report, reports)
            self._journal.finish("analyze-entropy", files.values())
        summary = read_object(reports / "entropy.json", REMEDY, limit=MAX_JSON_BYTES)["summary"]
        widest = max(entry["channels"] for entry in summary)
        shown = [
            f"{entry['kind']}s {entry['joint']:.1f} of {entry['marginal_sum']:.1f} bits"
            for entry in summary
            if entry["channels"] == widest
        ]
        said = f"{widest} channels together: {', '.join(shown)}"
        return Outcome("same" if same else "done", said, {"summary": summary})

    def check(self) -> Outcome:
        """Measure the quality and hold it to the recipe's gates; raises as
        :func:`cqtool.quality.check`."""
        folder, inputs = self.released, self._inputs.check(self.released)
        same = self._journal.is_done("check", inputs)
        if not same:
            self._begin("check", inputs)
            settings = quality.CheckSettings.of_recipe(self.recipe)
            measured = quality.check(self._inputs.opened, folder, settings, self.progress)
            draw_quality(folder, measured)
            report = folder / REPORTS_NAME / QUALITY_NAME
            self._journal.finish("check", [report, report.with_suffix(".png")])
        found = read_quality(folder)
        assert found is not None
        row = found.rows[1]
        passed = all(gate.passed for gate in found.gates)
        missed = (
            f"; {gate.name} is {gate.value:.4g}, limit {gate.limit:.4g}"
            for gate in found.gates
            if not gate.passed
        )
        said = (
            f"perplexity {row.perplexity_increase:+.2%}, KL {row.kl:.4f}, same top token "
            f"{row.top1:.1%}{''.join(missed)}"
        )
        result = {"passed": passed, "row": asdict(row), "gates": [asdict(g) for g in found.gates]}
        status: Status = "missed" if not passed else "same" if same else "done"
        return Outcome(status, said, result)

    def export(self, repo_id: str | None, runtime: RuntimeChoice) -> Outcome:
        """Write the artifact; raises as :func:`cqtool.artifact.export.export`."""
        if self.released != self.calibration:
            _copy_entropy(self.calibration / REPORTS_NAME, self.released / REPORTS_NAME)
        write_report(self.released)
        inputs = export_inputs(self.released, repo_id, runtime)
        same = self._journal.is_done("export", inputs) and _is_whole(self.artifact)
        if not same:
            self._begin("export", inputs)
            export(
                self.released,
                self.artifact,
                repo_id=repo_id,
                runtime=runtime,
                progress=self.progress,
            )
            self._journal.finish("export", [self.artifact / MANIFEST_NAME])
        files = [path for path in self.artifact.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        return Outcome(
            "same" if same else "done",
            f"{self.artifact}: {len(files)} files, {size:,} bytes",
            {"artifact": str(self.artifact), "files": len(files), "bytes": size},
        )

    def _folder_step(
        self,
        step: str,
        inputs: dict[str, Any],
        folder: Path,
        make: Callable[[], None],
        *,
        valid: bool = True,
    ) -> Outcome:
        """A step that ends in a calibration folder, in one step, and can be continued.

        Raises:
            ArtifactError: others finished it meanwhile, with other settings.
        """
        same = valid and self._journal.is_done(step, inputs)
        if not same:
            if not self._journal.has_begun(step, inputs):
                if (folder / REPORTS_NAME / SPEED_NAME).exists():
                    self.progress.note(
                        f"{step}: the speed that was kept in {folder} is of the codebooks before, "
                        "and goes; run `cqtool bench` with --keep again."
                    )
                _remove(folder, partial_folder(folder))
                self._begin(step, inputs)
            if not folder.exists():
                make()
            elif others := self._others_settings(step, folder):
                # Not replaced: it may have taken several GPUs hours.
                raise ArtifactError(
                    f"{folder} was made meanwhile with another {', '.join(others)} than the "
                    "release has; move it away, then run the same command again."
                )
        _settle(folder, self.recipe)
        if not same:
            self._journal.finish(step, [folder / CODEBOOKS_NAME, folder / CALIBRATION_NAME])
        config = read_config(folder)
        size = check_codebooks(folder, config)
        said = f"{config.cache.name}, codebooks of {size:,} bytes"
        result = {"folder": str(folder), "format": config.cache.name, "codebook_bytes": size}
        return Outcome("same" if same else "done", said, result)

    def _others_settings(self, step: str, folder: Path) -> list[str]:
        """Fields in which the recipe that decided the codebooks in `folder` is not this one."""
        differences = recipe_of(folder).differences(self.recipe)
        return [name for name in differences if step == "tune" or name != "tuning"]

    def _begin(self, step: str, inputs: dict[str, Any]) -> None:
        changed = self._journal.changes(step, inputs)
        if changed:
            self.progress.note(f"{step}: once more, with another {', '.join(changed)}")
        elif changed == [] and not self._journal.has_begun(step, inputs):
            self.progress.note(f"{step}: once more, because its files are not as it left them")
        self._journal.begin(step, inputs)


def _settle(folder: Path, recipe: Recipe) -> None:
    """State the whole recipe, of which a part decides no codebooks, and leave times out."""
    config = read_object(folder / CONFIG_NAME, REMEDY, limit=MAX_JSON_BYTES)
    if config.get("recipe") != (stated := recipe.model_dump(mode="json")):
        write_json(folder / CONFIG_NAME, config | {"recipe": stated})
    record = read_object(folder / CALIBRATION_NAME, REMEDY, limit=MAX_JSON_BYTES)
    if record != (settled := without_times(record)):
        write_json(folder / CALIBRATION_NAME, settled)


def _copy_entropy(source: Path, target: Path) -> None:
    for name in ("entropy.json", "entropy.png", "correlation.png"):
        with atomic_file(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


def _is_whole(artifact: Path) -> bool:
    try:
        verify_folder(artifact)
    except ArtifactError:
        return False
    return True


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

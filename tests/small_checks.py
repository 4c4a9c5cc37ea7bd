"""Calibrations of a tiny model, and checks of them that take a second."""

from __future__ import annotations

from pathlib import Path

from cqtool.codebooks.calibrate import calibrate
from cqtool.models.load import OpenedModel
from cqtool.quality import CheckSettings
from cqtool.recipe import load_recipe


def calibrated(opened: OpenedModel, text: Path, out: Path, **changes: object) -> Path:
    """A calibration at `out` on the first split of `text`; `changes` are fields of the recipe."""
    overrides = {
        "calibration.dataset": str(text),
        "calibration.split": "train",
        "calibration.sequences": 8,
        "calibration.sequence_length": 64,
        "kmeans.iterations": 5,
        "format": "cq-4c6b",
        "window": 8,
        "sinks": 2,
    }
    calibrate(opened, load_recipe("cq-8c8b", overrides | changes), out)
    return out


def settings(text: Path, **changes: object) -> CheckSettings:
    """Three windows of the held-out split of `text`."""
    values = {"dataset": str(text), "split": "test", "windows": 3, "window_length": 96}
    return CheckSettings(**{**values, **changes})

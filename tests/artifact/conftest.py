"""Fixtures of the artifact tests: a calibration folder, its artifact, and a Hub on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import hub
from synthetic_artifact import write_calibration

__all__ = ["hub"]


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    return write_calibration(tmp_path / "calibration")


@pytest.fixture
def artifact(calibration: Path, tmp_path: Path) -> Path:
    from cqtool.artifact.export import export

    return export(calibration, tmp_path / "artifact", repo_id="org/tiny-cq").folder

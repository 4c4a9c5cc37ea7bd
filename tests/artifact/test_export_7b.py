"""The export of an artifact for a model of 7 billion parameters stays small and quick."""

from __future__ import annotations

from pathlib import Path

import pytest

from cqtool.bench.export import MIB, measure_export, write_random_calibration
from cqtool.bench.formats import parse_formats
from cqtool.bench.shapes import SHAPES


def test_a_7b_model_is_exported_in_20_seconds_and_1_gib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration, out = tmp_path / "calibration", tmp_path / "artifact"
    format = parse_formats(["cq-8c8b"])[0]
    codebooks = write_random_calibration(SHAPES["llama-2-7b"], format, calibration)
    found = measure_export(calibration, out, ())
    file = (out / "codebooks.safetensors").stat().st_size
    with capsys.disabled():
        print(
            f"\n7B shape, cq-8c8b, without compiled kernels: {found['seconds']:.1f} s, peak "
            f"{found['peak_bytes'] / MIB:.0f} MiB, codebooks {codebooks / MIB:g} MiB in a file of "
            f"{file:,} bytes, artifact {found['artifact_bytes'] / MIB:.1f} MiB"
        )
    assert codebooks <= 128 * MIB and file - codebooks < MIB // 8
    assert found["cubins"] == 0
    assert found["peak_bytes"] <= 1024 * MIB
    assert found["seconds"] <= 20

"""What an export costs, measured on a small shape."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from cqtool.bench import export
from cqtool.manifest import verify_folder

MOST = 1.2
"""Seconds of a core that a kernel may take to compile: twice what each of the 198 for Llama-2-7B
has where two cores are to compile them in a minute. On a busy machine they take half of it."""

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None, reason="needs the package cuda-bindings"
)


@needs_nvrtc
def test_every_kernel_is_compiled_anew_and_the_report_says_at_what_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "ARCHITECTURES", ("sm_90",))
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "export.json"
    assert export.main(["tiny", "--format", "cq-8c8b", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    plain, compiled = report["rows"]
    # 2 layers, keys and values of 2 heads of 8 groups, with 256 centroids of 8 float16 channels.
    assert report["codebook_bytes"] == 2 * 2 * 2 * 8 * 256 * 8 * 2
    assert (plain["architectures"], plain["cubins"]) == ([], 0)
    assert compiled["architectures"] == ["sm_90"] and compiled["cubins"] > 8
    assert compiled["cpu_seconds"] > compiled["cubins"] * 0.02
    assert compiled["cpu_seconds"] - plain["cpu_seconds"] < compiled["cubins"] * MOST
    assert 0 < plain["artifact_bytes"] - report["codebook_bytes"] < compiled["artifact_bytes"]
    assert compiled["peak_bytes"] > export.MIB * 50
    assert not (tmp_path / "cache").exists()
    shown = capsys.readouterr().out
    assert "Export of tiny, cq-8c8b" in shown and f"{compiled['seconds']:.1f}" in shown


@needs_nvrtc
def test_what_is_exported_is_an_artifact(tmp_path: Path) -> None:
    format = export.parse_formats(["cq-4c8b"])[0]
    export.write_random_calibration(export.named_shape("tiny"), format, tmp_path / "calibration")
    export.measure_export(tmp_path / "calibration", tmp_path / "artifact", ())
    verify_folder(tmp_path / "artifact")
    assert export.main(["tiny", "--format", "cq-48c8b"]) == 2

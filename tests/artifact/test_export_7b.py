"""The export of an artifact for a model of 7 billion parameters stays small and quick."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic_artifact import config, write_calibration

from cqtool.layout.config import read_config

LAYERS, HEADS, DIM = 32, 32, 128
"""Of Llama-2-7B."""
MIB = 1 << 20

EXPORT = """
import json, sys, time
from pathlib import Path
from cqtool.artifact.export import export
from cqtool.artifact.runtime import RuntimeChoice

start = time.perf_counter()
result = export(Path(sys.argv[1]), Path(sys.argv[2]), runtime=RuntimeChoice(architectures=()))
seconds = time.perf_counter() - start
# Not ru_maxrss, which begins with the peak of the process that started this one.
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "size": result.size}))
"""


def write_7b(folder: Path) -> Path:
    """A calibration of that shape with random codebooks of cq-8c8b."""
    write_calibration(folder, with_quality=False)
    value = copy.deepcopy(config())
    code = {"channels": 8, "bits": 8}
    value["cache"] |= {"key": code, "value": code}
    layer = value["geometry"]["layers"][0] | {"kv_heads": HEADS, "key_dim": DIM, "value_dim": DIM}
    layer["rotation"] = layer["rotation"] | {"dim": DIM}
    value["geometry"] = {"query_heads": HEADS, "layers": [layer] * LAYERS}
    (folder / "cq_config.json").write_text(json.dumps(value))
    rng = np.random.default_rng(0)
    shapes = read_config(folder).codebook_shapes
    save_file(
        {name: rng.random(shape, np.float32).astype(np.float16) for name, shape in shapes.items()},
        folder / "codebooks.safetensors",
    )
    return folder


def test_a_7b_model_is_exported_in_20_seconds_and_1_gib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration, out = write_7b(tmp_path / "calibration"), tmp_path / "artifact"
    codebooks = sum(prod(shape) for shape in read_config(calibration).codebook_shapes.values()) * 2
    command = [sys.executable, "-c", EXPORT, str(calibration), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    file = (out / "codebooks.safetensors").stat().st_size
    with capsys.disabled():
        print(
            f"\n7B shape, cq-8c8b, without compiled kernels: {found['seconds']:.1f} s, peak "
            f"{found['peak'] / MIB:.0f} MiB, codebooks {codebooks / MIB:g} MiB in a file of "
            f"{file:,} bytes, artifact {found['size'] / MIB:.1f} MiB"
        )
    assert codebooks <= 128 * MIB and file - codebooks < MIB // 8
    assert found["peak"] <= 1024 * MIB
    assert found["seconds"] <= 20

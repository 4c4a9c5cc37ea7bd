"""Times the export of an artifact, without compiled kernels and with those for every GPU.

    python -m cqtool.bench.export [SHAPE] [--format NAME] [--json FILE]

Codebooks are random: an export copies them. Each export is a process of its own with an empty
kernel cache, so that nothing is taken from an earlier one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cqtool import __version__
from cqtool.bench.device import describe_device, describe_software
from cqtool.bench.formats import BenchFormat, parse_formats, require_divisible
from cqtool.bench.shapes import Shape, named_shape
from cqtool.cli.output import Output, write_stderr
from cqtool.errors import CqtoolError
from cqtool.files import write_json
from cqtool.geometry import LayerGeometry, ModelGeometry
from cqtool.kernels.build import toolchain
from cqtool.kernels.variants import ARCHITECTURES
from cqtool.layout.config import (
    CALIBRATION_NAME,
    CODEBOOKS_NAME,
    CONFIG_NAME,
    FORMAT_VERSION,
    codebook_name,
    owner_name,
)
from cqtool.spec import KINDS

MIB = 1 << 20

_CHILD = """
import json, os, sys, time
from pathlib import Path
from cqtool.artifact.export import export
from cqtool.artifact.runtime import RuntimeChoice

start = time.perf_counter()
chosen = RuntimeChoice(architectures=tuple(sys.argv[3:]))
result = export(Path(sys.argv[1]), Path(sys.argv[2]), runtime=chosen)
seconds = time.perf_counter() - start
# Not ru_maxrss, which begins with the peak of the process that started this one.
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({
    "cubins": result.kernels.cubins, "seconds": seconds, "cpu_seconds": sum(os.times()[:2]),
    "peak_bytes": peak, "artifact_bytes": result.size,
}))
"""


def write_random_calibration(shape: Shape, format: BenchFormat, folder: Path, seed: int = 0) -> int:
    """Write a calibration folder of a model's shape with random codebooks, and no reports.

    Returns:
        Bytes of the codebooks.

    Raises:
        RecipeError: the format's groups do not fill the shape's heads.
    """
    require_divisible(format, shape)
    dim = shape.head_dim
    rotation = format.rotation(0, dim)
    layer = LayerGeometry(shape.kv_heads, dim, dim, None, rotation)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for index in range(shape.layers):
        tables = format.layer_codebooks(index, shape.kv_heads, dim, generator)
        tensors |= {
            codebook_name(owner_name(index, k)): t for k, t in zip(KINDS, tables, strict=True)
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / CODEBOOKS_NAME)
    fingerprint = {
        "model_type": shape.architecture,
        "shapes_sha256": "0" * 64,
        "probe": [[0.0] * 4],
    }
    config = {
        "format_version": FORMAT_VERSION,
        "tool": {"name": "cqtool", "version": __version__},
        "base_model": {
            "id": f"random/{shape.name}",
            "revision": None,
            "license": None,
            "fingerprint": fingerprint,
        },
        "cache": format.spec.to_json(),
        "geometry": ModelGeometry(shape.heads, (layer,) * shape.layers).to_json(),
        "objective": "uniform",
        "recipe": {"name": "random"},
        "calibration": {
            "dataset": {"dataset": "random"},
            "digest": "0" * 64,
            "sequences": 1,
            "sequence_length": 1,
            "seed": seed,
        },
    }
    write_json(folder / CONFIG_NAME, config)
    write_json(folder / CALIBRATION_NAME, {"format_version": FORMAT_VERSION})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def measure_export(calibration: Path, out: Path, architectures: Sequence[str]) -> dict[str, Any]:
    """Export `calibration` in a process of its own.

    Args:
        calibration: what to export.
        out: the artifact folder.
        architectures: to compile kernels for, such as ``sm_90``; none for none.

    Returns:
        ``cubins``; ``seconds`` of the export, without the process's imports; ``cpu_seconds`` of the
        process on all its cores, imports included; ``peak_bytes`` of its memory, and
        ``artifact_bytes``.

    Raises:
        KernelError: there is no compiler.
    """
    if architectures:
        toolchain()
    with tempfile.TemporaryDirectory(prefix="cqtool-") as cache:
        command = [sys.executable, "-c", _CHILD, str(calibration), str(out), *architectures]
        environment = {**os.environ, "CQTOOL_CACHE": cache}
        output = subprocess.check_output(command, text=True, env=environment)
    found: dict[str, Any] = json.loads(output)
    return {"architectures": list(architectures), **found}


def bench_export(shape: Shape, format: BenchFormat) -> dict[str, Any]:
    """Export a format of a model's shape without compiled kernels, then with those of
    :data:`cqtool.kernels.variants.ARCHITECTURES`.

    Raises:
        KernelError: there is no compiler.
        RecipeError: the format's groups do not fill the shape's heads.
    """
    with tempfile.TemporaryDirectory(prefix="cqtool-") as place:
        calibration, out = Path(place) / "calibration", Path(place) / "artifact"
        codebooks = write_random_calibration(shape, format, calibration)
        rows = [measure_export(calibration, out, names) for names in ((), ARCHITECTURES)]
    return {
        "shape": shape.name,
        "format": format.spec.name,
        "codebook_bytes": codebooks,
        "cores": len(os.sched_getaffinity(0)),
        "device": describe_device(torch.device("cpu")),
        "nvrtc": toolchain().nvrtc,
        "versions": describe_software(),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cqtool.bench.export", description=__doc__)
    parser.add_argument("shape", nargs="?", default="llama-2-7b", metavar="SHAPE")
    parser.add_argument("--format", default="cq-8c8b", metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        report = bench_export(named_shape(options.shape), parse_formats([options.format])[0])
        if options.json is not None:
            write_json(options.json, report)
    except CqtoolError as error:
        write_stderr(str(error), label="error")
        return error.exit_code
    sink = Output()
    title = f"Export of {report['shape']}, {report['format']}, on {report['cores']} cores"
    columns = ("architectures", "cubins", "seconds", "CPU seconds", "peak MiB", "artifact MiB")
    sink.table(columns, [_cells(row) for row in report["rows"]], title)
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        ", ".join(row["architectures"]) or "none",
        str(row["cubins"]),
        f"{row['seconds']:.1f}",
        f"{row['cpu_seconds']:.1f}",
        f"{row['peak_bytes'] / MIB:.0f}",
        f"{row['artifact_bytes'] / MIB:.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())

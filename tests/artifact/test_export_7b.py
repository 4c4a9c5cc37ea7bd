"""The export of an artifact for a model of 7 billion parameters stays small and quick."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from synthetic_artifact import config

from cqtool.artifact.runtime_kernels import artifact_variants
from cqtool.bench.export import MIB, measure_export, write_random_calibration
from cqtool.bench.formats import parse_formats
from cqtool.bench.shapes import SHAPES
from cqtool.kernels.variants import ARCHITECTURES
from cqtool.layout.config import CQConfig, read_config
from cqtool.recipe import load_recipe
from cqtool.spec import CacheSpec, CQSpec

DOCS = Path(__file__).parents[2] / "docs"
FORMAT = DOCS / "artifact-format.md"
MINUTE = 60
"""Seconds that an export may take on two cores, with the kernels for every architecture."""


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


def of_7b(cache: CacheSpec, folder: Path) -> CQConfig:
    """A configuration of the 7B shape."""
    value, shape = config(), SHAPES["llama-2-7b"]
    layer = dict(value["geometry"]["layers"][0])
    layer |= {"kv_heads": shape.kv_heads, "key_dim": shape.head_dim, "value_dim": shape.head_dim}
    value["geometry"] = {"query_heads": shape.heads, "layers": [layer] * shape.layers}
    (folder / "cq_config.json").write_text(json.dumps(value | {"cache": cache.to_json()}))
    return read_config(folder)


def test_with_kernels_for_every_architecture_it_took_a_minute_at_most(tmp_path: Path) -> None:
    """Those of today are as many; tests/bench/test_export.py times some of them."""
    report = json.loads((DOCS / "results" / "export.json").read_text(encoding="utf-8"))
    assert (report["shape"], report["format"], report["cores"]) == ("llama-2-7b", "cq-8c8b", 2)
    plain, compiled = report["rows"]
    found = of_7b(load_recipe("cq-8c8b").spec, tmp_path)
    assert compiled["architectures"] == list(ARCHITECTURES)
    assert compiled["cubins"] == sum(len(artifact_variants(found, a)) for a in ARCHITECTURES)
    assert compiled["seconds"] <= MINUTE
    guide = " ".join((DOCS / "guide.md").read_text(encoding="utf-8").split())
    seconds, cubins = compiled["seconds"], compiled["cubins"]
    assert f"the {cubins} kernels of Llama-2-7B's shape take {seconds:.0f} s" in guide
    assert f"takes a second and {plain['peak_bytes'] / MIB:.0f} MiB" in guide


def mebibytes(found: CQConfig) -> dict[str, float]:
    """MiB of the tensors of each name: 2 bytes a number in codebooks and channels, 4 in others."""
    sizes: dict[str, float] = {}
    for width, shapes in (
        (2, found.codebook_shapes), (2, found.channels_shapes), (4, found.extra_shapes)
    ):  # fmt: skip
        for name, shape in shapes.items():
            part = name.rsplit(".", 1)[-1]
            sizes[part] = sizes.get(part, 0) + math.prod(shape) * width / MIB
    return sizes


def test_the_sizes_in_the_documentation_are_those_of_the_format(tmp_path: Path) -> None:
    text = " ".join(FORMAT.read_text(encoding="utf-8").split())
    rows = re.findall(r"\| `(codebook|channels|metric|feedback|gains)`([^|]*)\| ([\d.]+) \|", text)
    stated = {(name, said.strip()): float(size) for name, said, size in rows}
    full = CQSpec(8, 8, "correlation", "ldlq", "token")
    sizes = mebibytes(of_7b(CacheSpec(full, full), tmp_path))
    shared = CQSpec(8, 8, sharing="heads")
    assert {name: size for (name, said), size in stated.items() if "share" not in said} == sizes
    assert stated["codebook", "where heads share"] == sum(
        mebibytes(of_7b(CacheSpec(shared, shared), tmp_path)).values()
    )
    for channels in (2, 4):
        other = CQSpec(channels, 8)
        assert mebibytes(of_7b(CacheSpec(other, other), tmp_path)) == {"codebook": 128}
    ldlq = CQSpec(8, 8, encoding="ldlq")
    for name, cache in (
        ("`cq-8c8b` takes", load_recipe("cq-8c8b").spec),
        ("`cq-8c8b-tuned`", load_recipe("cq-8c8b-tuned").spec),
        ("`ldlq` in contiguous groups", CacheSpec(ldlq, ldlq)),
    ):
        assert f"{name} {sum(mebibytes(of_7b(cache, tmp_path)).values()):g} MiB" in text

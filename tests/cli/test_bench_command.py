"""`cqtool bench` on a CPU: the report, its tables and figure, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from cqtool.bench import __main__ as module
from cqtool.bench.plot import can_plot, plot_bench
from cqtool.cli.app import app

TINY = ("tiny", "--part", "end-to-end", "--prompt-tokens", 16, "--new-tokens", 4, "--device", "cpu")

NUMBER = {"type": "number", "exclusiveMinimum": 0}
SPREAD = {
    "type": "object",
    "properties": {
        **dict.fromkeys(("median", "minimum", "maximum", "repeats", "calls"), NUMBER),
        "iqr": {"type": "number", "minimum": 0},
    },
    "required": ["median", "minimum", "maximum", "iqr", "repeats", "calls"],
    "additionalProperties": False,
}
TEXT_OR_NULL = {"type": ["string", "null"]}
ROW = {
    "type": "object",
    "properties": {
        "cache": {"enum": ["dynamic", "static", "static-compiled", "cq"]},
        "format": {"type": "string"},
        "implementation": TEXT_OR_NULL,
        "batch": {"type": "integer", "minimum": 1},
        **dict.fromkeys(
            (
                "tokens_per_second",
                "decode_tokens_per_second",
                "prefill_seconds",
                "cache_bytes",
                "prefill_chunks",
            ),
            NUMBER,
        ),
        **dict.fromkeys(("total", "prefill", "decode"), SPREAD),
        "memory": {"type": "object", "additionalProperties": {"type": ["integer", "null"]}},
        "speedup": {"type": ["number", "null"]},
        "batch_ratio": {"type": ["number", "null"]},
    },
    "additionalProperties": False,
}
ROW["required"] = list(ROW["properties"])  # type: ignore[arg-type]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "format_version": {"const": 1},
        "suite": TEXT_OR_NULL,
        "shape": {"type": ["object", "null"]},
        "artifact": TEXT_OR_NULL,
        "device": {"type": "object", "required": ["type", "name"]},
        "versions": {"type": "object", "required": ["torch", "transformers", "kernels_sha256"]},
        "settings": {"type": "object", "required": ["seed", "dtype", "window", "sinks"]},
        "bandwidth": {"type": ["object", "null"]},
        "decode": {"type": "array"},
        "encode": {"type": "array"},
        "end_to_end": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"rows": {"type": "array", "items": ROW}},
                "required": ["shape", "prompt", "new", "dtype", "largest", "rows", "unavailable"],
            },
        },
        "kmeans": {"type": "array"},
        "tune": {"type": "array"},
        "skipped": {"type": "array"},
    },
    "additionalProperties": False,
}
SCHEMA["required"] = list(SCHEMA["properties"])


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)], catch_exceptions=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plot = tmp_path_factory.mktemp("bench") / "bench.png"
    result = invoke(*TINY, "--batch", "1,2", "--format", "cq-8c8b", "--json", "--plot", plot)
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_json_has_its_schema_and_finite_numbers(report: dict[str, Any]) -> None:
    jsonschema.validate(report, SCHEMA)
    (found,) = report["end_to_end"]
    assert [(row["cache"], row["batch"]) for row in found["rows"]] == [
        (cache, batch) for cache in ("dynamic", "static", "cq") for batch in (1, 2)
    ]
    for row in found["rows"]:
        assert math.isfinite(row["tokens_per_second"])
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 4 / row["total"]["median"])
        assert row["total"]["repeats"] == 3
    assert report["suite"] is None
    assert report["shape"]["name"] == "tiny"


def test_the_table_has_a_line_for_each_cache_and_names_the_device() -> None:
    result = invoke(*TINY, "--batch", 1, "--format", "cq-8c8b")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("CPU (")
    assert "Generating, tiny, prompt 16 and 4 new tokens, float32" in lines
    assert [
        line.split()[:3] for line in lines if line.startswith(("dynamic", "static", "cq "))
    ] == [
        ["dynamic", "float32", "1"],
        ["static", "float32", "1"],
        ["cq", "cq-8c8b", "1"],
    ]


def test_all_parts_of_a_shape_on_a_cpu_are_those_that_can_run_and_a_warning() -> None:
    words = [word for word in TINY if word not in ("--part", "end-to-end")]
    result = invoke(*words, "--batch", 1, "--format", "cq-8c8b", "--quiet")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr.count("Kernel times need a CUDA GPU") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama-9"], "There is no shape 'llama-9'; use one of llama-2-7b"),
        ([*TINY, "--batch", 0], "--batch 0 is too small"),
        ([*TINY, "--cache", "paged"], "--cache paged is not known"),
        (["tiny", "--suite", "targets"], "give either a shape or --suite"),
        ([*TINY, "--largest-batch"], "give a --batch on a CPU"),
        (["--device", "cpu"], "Kernel times need a CUDA GPU"),
    ],
)
def test_errors_say_what_to_do(words: list[object], message: str) -> None:
    result = invoke(*words)
    assert result.exit_code in (1, 2)
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert message in result.stderr
    assert result.stdout == ""


def test_an_artifact_of_another_geometry_is_refused(artifact: Path) -> None:
    result = invoke("tiny", artifact, "--part", "end-to-end", "--device", "cpu")
    assert result.exit_code == 2
    assert "give the shape of the artifact's base model" in result.stderr
    assert str(artifact) in result.stderr


def test_an_artifact_is_measured_with_its_own_format_and_no_path_is_told(
    tiny_model_dir: Path, artifact: Path
) -> None:
    words = [tiny_model_dir, artifact, *TINY[1:], "--batch", 1, "--sinks", 1, "--json"]
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    row = found["end_to_end"][0]["rows"][-1]
    assert (row["cache"], row["format"]) == ("cq", "k-cq-4c3b-v-cq-8c4b")
    assert (found["artifact"], found["shape"]["name"]) == (artifact.name, tiny_model_dir.name)
    assert str(artifact.parent) not in result.stdout
    assert str(tiny_model_dir.parent) not in result.stdout


def test_the_module_writes_the_same_report_without_typer_rich_and_pydantic(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'pydantic', 'datasets', 'faiss'):\n"
        "    sys.modules[name] = None\n"
        "from cqtool.bench.__main__ import main\n"
        "raise SystemExit(main(sys.argv[1:]))"
    )
    words = [*map(str, TINY), "--batch", "1", "--format", "cq-8c8b", "--json", tmp_path / "b.json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    jsonschema.validate(json.loads((tmp_path / "b.json").read_text()), SCHEMA)
    assert "Generating, tiny" in done.stdout


def test_the_module_ends_known_errors_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main(["llama-9"]) == 2
    assert capsys.readouterr().err.startswith("error: There is no shape 'llama-9'")


def test_the_figure_has_a_panel_for_each_decode_step(report: dict[str, Any], tmp_path) -> None:
    spread = {"median": 2e-4, "minimum": 1.9e-4, "maximum": 2.5e-4}
    rival = {"name": "sdpa cudnn", "format": "float16", "time": spread, "floor": 1e-4}
    own = rival | {"name": "cqtool", "format": "cq-8c8b", "speedup": 5.0}
    case = {"case": {"name": "some case"}, "kernels": [rival | {"speedup": 1.0}, own]}
    drawn = report | {"decode": [case, case | {"kernels": []}]}
    plot_bench(drawn, tmp_path / "a.png")
    plot_bench(drawn, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not can_plot(report | {"end_to_end": []})

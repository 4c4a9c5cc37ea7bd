"""A bench of a calibration's codebooks is kept with them, and ends on their model card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cqtool.artifact.markdown import number
from cqtool.artifact.speed import read_speed
from cqtool.bench.export import write_random_calibration
from cqtool.bench.formats import parse_formats
from cqtool.bench.kept import Keeper
from cqtool.bench.settings import BenchSettings
from cqtool.bench.shapes import named_shape
from cqtool.cli.app import app
from cqtool.errors import ArtifactError, EnvironmentProblem, RecipeError

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "gpu"
SMALL = ("--prompt-tokens", 16, "--new-tokens", 4, "--batch", "1,2", "--device", "cpu")


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A calibration of the shape tiny, with a window of its own."""
    format = parse_formats(["cq-8c8b"], window=3, sinks=1)[0]
    write_random_calibration(named_shape("tiny"), format, tmp_path / "calibration")
    return tmp_path / "calibration"


def keeper(folder: Path, **settings: Any) -> Keeper:
    return Keeper.of(BenchSettings(**{"target": "tiny", "artifact": str(folder)} | settings))


def gpu_report() -> dict[str, Any]:
    """What a GPU measured of four formats, as if they were codes of one artifact."""
    report: dict[str, Any] = json.loads((RESULTS / "targets.json").read_text())
    return report


def test_a_bench_on_a_cpu_ends_on_the_card(tiny: Path, tmp_path: Path) -> None:
    bench = invoke("bench", "tiny", tiny, "--part", "end-to-end", *SMALL, "--keep", "--json")
    assert bench.exit_code == 0, bench.output
    (measured,) = json.loads(bench.stdout)["end_to_end"]
    found = read_speed(tiny)
    assert found is not None and found.generation is not None and not found.decode
    assert (found.device_type, found.dtype, found.target) == ("cpu", "float32", "tiny")
    texts = found.generation
    assert (texts.window, texts.sinks, texts.prompt, texts.new) == (3, 1, 16, 4)
    assert len(texts.rows) == 6
    for row, kept in zip(measured["rows"], texts.rows, strict=True):
        assert (row["cache"], row["batch"]) == (kept.cache, kept.batch)
        assert texts.tokens_per_second(kept) == pytest.approx(row["tokens_per_second"])
        assert texts.speedup(kept) == pytest.approx(row["speedup"])
    out = tmp_path / "artifact"
    assert invoke("export", tiny, "--out", out, "--no-kernels").exit_code == 0
    card = (out / "README.md").read_text()
    assert "\n## Speed\n\nMeasured on the CPU (" in card
    shown = number(texts.tokens_per_second(texts.rows[-1]))
    assert f"| **cq-8c8b**, in plain torch | 2 | {shown} (" in card
    assert invoke("verify", out).exit_code == 0


def test_more_rows_than_a_card_has_room_for_are_refused_before_anything_runs(tiny: Path) -> None:
    many = ",".join(map(str, range(1, 24)))
    words = ("bench", "tiny", tiny, "--part", "end-to-end", "--device", "cpu", "--keep")
    result = invoke(*words, "--batch", many)
    assert result.exit_code == 2 and "room for 64 rows" in result.output
    with pytest.raises(RecipeError, match="room for 64 rows"):
        keeper(tiny, parts=("decode",), batches=tuple(range(1, 34)), tokens=(64, 128))
    keeper(tiny, parts=("decode",), batches=tuple(range(1, 33)), tokens=(64, 128))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tiny: Path) -> None:
    (tiny / "reports").write_text("not a folder")
    with pytest.raises(EnvironmentProblem, match="no folder that can be written"):
        keeper(tiny)


def test_what_was_measured_is_there_though_it_cannot_be_drawn(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke(
        *("bench", "tiny", tiny, "--part", "end-to-end", *SMALL, "--cache", "cq", "--json"),
        *("--keep", "--plot", tmp_path / "file" / "plot.png"),
    )
    assert result.exit_code == 1
    assert json.loads(result.stdout)["end_to_end"]
    assert read_speed(tiny) is not None


def test_without_keep_nothing_is_kept(tiny: Path) -> None:
    result = invoke("bench", "tiny", tiny, "--part", "end-to-end", *SMALL, "--cache", "cq")
    assert result.exit_code == 0, result.output
    assert not (tiny / "reports").exists()


def test_other_formats_stand_beside_the_artifact_s_but_not_on_its_card(tiny: Path) -> None:
    words = ("bench", "tiny", tiny, "--part", "end-to-end", *SMALL, "--cache", "cq")
    more = ("--format", "cq-4c8b,cq-8c8b", "--grouping", "pairs", "--json")
    result = invoke(*words, *more)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["end_to_end"]
    assert [row["format"] for row in found["rows"][::2]] == [
        "cq-8c8b", "cq-4c8b pairs, random codebooks", "cq-8c8b pairs, random codebooks",
    ]  # fmt: skip
    # As many exact tokens as the artifact's cache keeps.
    sizes = {row["format"]: row["cache_bytes"] for row in found["rows"] if row["batch"] == 1}
    own, wider, same = sizes.values()
    assert own == same < wider
    refused = invoke(*words, *more, "--keep")
    assert refused.exit_code == 2 and "leave out --format" in refused.output


def test_the_kernels_times_are_those_of_the_bench(tiny: Path) -> None:
    report = gpu_report()
    path = keeper(tiny).keep(report)
    assert path is not None and path == tiny / "reports" / "speed.json"
    found = read_speed(tiny)
    assert found is not None and found.generation is None
    assert (found.device_name, found.driver) == (
        report["device"]["name"],
        report["device"]["driver"],
    )
    assert found.versions["torch"] == report["versions"]["torch"]
    # In a CI job, that of somebody's own repository.
    assert report["versions"]["commit"] not in path.read_text()
    own = [
        (case, row)
        for case in report["decode"]
        for row in case["kernels"]
        if row["name"] == "cqtool"
    ]
    assert len(own) == len(found.decode) > 4
    for (case, row), kept in zip(own, found.decode, strict=True):
        assert (kept.batch, kept.tokens) == (case["case"]["batch"], case["case"]["tokens"])
        assert (kept.format, kept.cache_bytes) == (row["format"], row["cache_bytes"])
        assert kept.time.median == row["time"]["median"]
        # The bench's own, over the better of the rival's two times.
        assert kept.speedup == pytest.approx(row["speedup"])


def test_a_load_without_a_rival_has_no_speedup(tiny: Path) -> None:
    report = gpu_report()
    for case in report["decode"]:
        case["best_16bit"] = None
    keeper(tiny).keep(report)
    found = read_speed(tiny)
    assert found is not None and {row.speedup for row in found.decode} == {None}


@pytest.mark.parametrize("other", [False, True], ids=["nothing", "no codes"])
def test_where_nothing_was_measured_an_earlier_file_stays(tiny: Path, other: bool) -> None:
    report = gpu_report()
    keeper(tiny).keep(report)
    before = (tiny / "reports" / "speed.json").read_bytes()
    for case in report["decode"]:
        case["kernels"] = [row for row in case["kernels"] if other and row["name"] != "cqtool"]
    assert keeper(tiny).keep(report) is None
    assert (tiny / "reports" / "speed.json").read_bytes() == before


def test_what_the_export_would_refuse_is_not_written(tiny: Path) -> None:
    made, report = keeper(tiny), gpu_report()
    with pytest.raises(ArtifactError, match="other codebooks than those"):
        replace(made, codebooks_sha256="0" * 64).keep(report)
    with pytest.raises(ArtifactError, match="a list of at most 64"):
        made.keep(report | {"decode": report["decode"] * 65})
    assert not (tiny / "reports").exists()


def test_a_local_folder_is_not_named(tiny_model_dir: Path, calibration: Path) -> None:
    """Nobody else has it; the card names the base model instead."""
    assert keeper(calibration, target=str(tiny_model_dir)).target is None
    assert keeper(calibration, target="org/model").target == "org/model"


def test_options_win_over_the_window_of_the_calibration(tiny: Path) -> None:
    made = keeper(tiny, window=0)
    assert (made.window, made.sinks) == (0, 1)


def test_what_cannot_be_kept_is_said_before_anything_runs(
    tiny: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr("cqtool.bench.run.run", never)
    for words, message in (
        (["tiny"], "--keep keeps a bench with the codebooks it measured; drop --keep, or give"),
        (["tiny", "org/name"], "org/name is no folder here"),
        (["tiny", artifact], "is an artifact, whose digests cover every file"),
        (["tiny", tiny, "--part", "encode,kmeans"], "--keep is about the parts decode and"),
    ):
        result = invoke("bench", *words, "--keep")
        assert result.exit_code == 2, result.output
        assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_damaged_calibration_is_refused(tiny: Path) -> None:
    (tiny / "codebooks.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError):
        keeper(tiny)

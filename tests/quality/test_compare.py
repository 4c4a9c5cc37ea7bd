"""`check` with many formats: what `all` means, memory, paired figures, another calibration."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import re
import weakref

import numpy as np
import pytest
from small_checks import calibrated, settings
from typer.testing import CliRunner

from cqtool.artifact.card_commands import _compare_name
from cqtool.artifact.export import export
from cqtool.artifact.measured import read_quality
from cqtool.cli.app import app
from cqtool.errors import ArtifactError, EnvironmentProblem, RecipeError, SampleError
from cqtool.models.load import open_model
from cqtool.quality import candidates, check, reference
from cqtool.quality.measure import full_logits
from cqtool.quality.reference import Reference
from cqtool.recipe import recipe_of
from cqtool.schemes import SCHEMES
from cqtool.schemes.scalar import IntCodec
from cqtool.schemes.scheme import uncalibrated

PLAIN = {name: SCHEMES[name] for name in ("fp16", "int2", "int4")}


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    return open_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def folder(opened, tiny_text_file, tmp_path_factory):
    return calibrated(opened, tiny_text_file, tmp_path_factory.mktemp("compare") / "cal")


@pytest.fixture
def few(monkeypatch):
    """Few schemes, so that the tests do not depend on which there are."""
    schemes = dict(PLAIN)
    monkeypatch.setattr(candidates, "SCHEMES", schemes)
    monkeypatch.setattr("cqtool.schemes.registry.SCHEMES", schemes)
    return schemes


def test_all_is_every_scheme_and_the_paper_and_names_what_is_missing(
    folder, opened, tiny_text_file, few
):
    def missing(dim):
        raise EnvironmentProblem("The package nowhere is not installed; pip install nowhere.")

    few["absent"] = uncalibrated("absent", "nowhere", missing)
    report = check(opened, folder, settings(tiny_text_file, compare=("cq-8c4b", "all", "int4")))
    assert [row.label for row in report.rows[1:]] == [
        *("cq-4c6b fisher", "cq-8c4b fisher", "fp16", "int2", "int4"),
        *("cq-4c8b paper", "cq-8c8b paper"),
    ]
    skipped = {one.name: one.reason for one in report.skipped}
    assert skipped.keys() == {"absent", "cq-8c10b:paper"}
    assert "pip install nowhere" in skipped["absent"]
    assert "1024 centroids" in skipped["cq-8c10b:paper"]
    with pytest.raises(EnvironmentProblem, match="pip install nowhere"):
        check(opened, folder, settings(tiny_text_file, compare=("all", "absent")))


def test_folders_are_looked_up_only_for_names_that_were_given(
    folder, opened, tiny_text_file, few, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "int4").mkdir()
    report = check(opened, folder, settings(tiny_text_file, compare=("all",)))
    assert "int4" in [row.label for row in report.rows]
    assert "int4" not in {one.name for one in report.skipped}
    with pytest.raises(ArtifactError, match="int4 has no"):
        check(opened, folder, settings(tiny_text_file, compare=("int4",)))


def test_what_samples_lack_is_said_before_anything_is_measured(
    folder, opened, tiny_text_file, monkeypatch
):
    monkeypatch.setattr(candidates.Candidates, "_loaded", lambda *_: pytest.fail("measured"))
    with pytest.raises(SampleError, match="calibrate with --objective query"):
        check(opened, folder, settings(tiny_text_file, compare=("cq-4c6b:query",)))
    with pytest.raises(RecipeError, match="one of uniform, fisher, query; or paper"):
        check(opened, folder, settings(tiny_text_file, compare=("cq-4c6b:fischer",)))


def test_a_scheme_that_breaks_while_it_is_measured_is_named_too(
    folder, opened, tiny_text_file, few
):
    class Broken(IntCodec):
        def decode(self, stored):
            return super().decode(stored) * math.nan

    few["broken"] = uncalibrated("broken", "nowhere", lambda dim: Broken(4, dim))
    report = check(opened, folder, settings(tiny_text_file, compare=("all",)))
    assert "broken" not in [row.label for row in report.rows]
    assert "NaN or infinite" in {one.name: one.reason for one in report.skipped}["broken"]


def test_the_papers_method_stands_beside_a_calibration_that_is_not_its(
    opened, tiny_text_file, tmp_path, few
):
    out = calibrated(
        opened, tiny_text_file, tmp_path / "cal", grouping="pairs", objective="uniform"
    )
    report = check(opened, out, settings(tiny_text_file, compare=("all", "cq-4c6b:uniform")))
    labels = [row.label for row in report.rows]
    # The samples have no gradients, without which there is no Fisher information.
    assert [label for label in labels if "paper" in label] == []
    assert {one.name for one in report.skipped} == {
        *("cq-4c8b:paper", "cq-8c8b:paper", "cq-8c10b:paper", "cq-4c6b:paper")
    }
    assert all("gradients" in one.reason for one in report.skipped[:2])
    own, same = (report.rows[labels.index(f"cq-4c6b uniform{end}")] for end in ("", " (2)"))
    assert own.kl == same.kl


def test_the_paper_in_a_name_is_contiguous_groups_and_fisher(opened, tiny_text_file, tmp_path):
    pairs = calibrated(opened, tiny_text_file, tmp_path / "pairs", grouping="pairs")
    plain = calibrated(opened, tiny_text_file, tmp_path / "plain")
    paper = check(opened, pairs, settings(tiny_text_file, compare=("cq-4c6b:paper",))).rows
    assert paper[2].label == "cq-4c6b paper" and paper[2].objective == "fisher"
    assert paper[2].kl == check(opened, plain, settings(tiny_text_file)).rows[1].kl
    assert paper[2].kl != paper[1].kl
    assert [_compare_name(row) for row in read_quality(pairs).rows[2:]] == ["cq-4c6b:paper"]


def test_feedback_is_left_out_with_objectives_that_have_no_metric(opened, tiny_text_file, tmp_path):
    fed = calibrated(opened, tiny_text_file, tmp_path / "fed", objective="query", feedback="ldlq")
    plain = calibrated(opened, tiny_text_file, tmp_path / "plain")
    named = ("cq-4c6b:fisher", "cq-4c6b:query")
    rows = check(opened, fed, settings(tiny_text_file, compare=named)).rows
    assert [row.objective for row in rows[1:]] == ["query", "fisher", "query"]
    assert rows[2].kl == check(opened, plain, settings(tiny_text_file)).rows[1].kl
    # With the objective of the calibration it stays.
    assert rows[3].kl == rows[1].kl != rows[2].kl


def test_formats_are_made_one_at_a_time(folder, opened, tiny_text_file, monkeypatch):
    alive: list[weakref.ref] = []
    most = []
    finished = candidates.Candidates._finished

    def keep(self, format):
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        format = finished(self, format)
        alive.append(weakref.ref(format))
        return format

    monkeypatch.setattr(candidates.Candidates, "_finished", keep)
    names = ("int4", "cq-8c4b", "fp16", str(folder))
    check(opened, folder, settings(tiny_text_file, compare=names))
    assert most == [0] * 5


def test_logits_are_computed_once_or_again_and_stay_the_same(
    folder, opened, tiny_text_file, monkeypatch
):
    passes = []

    def counted(model, ids):
        passes.append(ids)
        return full_logits(model, ids)

    monkeypatch.setattr(reference, "full_logits", counted)
    asked = settings(tiny_text_file, compare=("int4", "fp16"))
    kept = check(opened, folder, asked).to_json()
    assert len(passes) == 3
    passes.clear()
    one_window = 96 * len(opened.tokenizer) * 4
    monkeypatch.setattr(reference, "KEPT_BYTES", one_window)
    again = check(opened, folder, asked).to_json()
    assert len(passes) == 1 + 3 * 2
    assert json.dumps(again) == json.dumps(kept)


def test_kept_logits_are_those_of_their_own_window(opened):
    import torch

    ids = torch.arange(3, 3 + 3 * 20).view(3, 20)
    held = Reference(opened.model, ids)
    for window in (0, 1, 2, 1, 0):
        assert torch.equal(held.logits(window), full_logits(opened.model, ids[window]))


def test_per_window_figures_and_positions_add_up(folder, opened, tiny_text_file):
    report = check(opened, folder, settings(tiny_text_file, compare=("int2",)))
    for row in report.rows:
        assert {len(values) for values in row.per_window.values()} == {3}
        assert row.kl == pytest.approx(np.mean(row.per_window["kl"]))
        assert row.top1 == pytest.approx(np.mean(row.per_window["top1"]))
        assert row.perplexity == pytest.approx(math.exp(np.mean(row.per_window["nll"])))
        assert [(part.start, part.stop) for part in row.positions] == [(0, 64), (64, 96)]
        assert row.kl == pytest.approx((64 * row.positions[0].kl + 32 * row.positions[1].kl) / 96)
    checked, other = report.rows[1:]
    found = {one.measure: one for one in report.paired}
    assert found.keys() == {"kl", "nll", "top1"}
    assert {one.other for one in report.paired} == {"int2"}
    difference = np.array(checked.per_window["kl"]) - np.array(other.per_window["kl"])
    assert found["kl"].difference == pytest.approx(difference.mean())
    assert found["kl"].better == (difference < 0).sum()
    difference = np.array(checked.per_window["top1"]) - np.array(other.per_window["top1"])
    assert found["top1"].better == (difference > 0).sum()


def test_another_calibration_is_compared_window_by_window(folder, opened, tiny_text_file, tmp_path):
    other = calibrated(opened, tiny_text_file, tmp_path / "fewer", format="cq-8c4b")
    artifact = export(other, tmp_path / "artifact").folder
    asked = settings(tiny_text_file, against=(str(artifact),), compare=("int4",), context=4096)
    report = check(opened, folder, asked)
    assert [row.label for row in report.rows[1:]] == [
        *("cq-4c6b fisher", "cq-8c4b fisher (artifact)", "int4")
    ]
    assert report.against == ("cq-8c4b fisher (artifact)",)
    assert report.rows[2].window == report.rows[1].window == 8
    assert "lower KL by" in report.paired[0].sentence
    assert report.context == 4096
    assert report.rows[1].context_bits < report.rows[1].effective_bits
    with pytest.raises(ArtifactError, match="not a folder"):
        check(opened, folder, settings(tiny_text_file, against=("./nowhere",)))


def test_each_row_says_what_it_was_made_from(folder, opened, tiny_text_file, tmp_path):
    seed = {"calibration.seed": 7}
    other = calibrated(opened, tiny_text_file, tmp_path / "other", format="cq-8c4b", **seed)
    names = (str(other), "cq-8c4b", "vecinfer-1", "int4")
    report = check(opened, folder, settings(tiny_text_file, compare=names)).to_json()
    full, own, another, fitted, learned, plain = [row["origin"] for row in report["rows"]]

    def files(path, seed):
        digests = {
            name: hashlib.sha256((path / name).read_bytes()).hexdigest()
            for name in ("cq_config.json", "codebooks.safetensors")
        }
        return {"recipe": recipe_of(path).digest, "seed": seed, **digests}

    assert own == files(folder, 0) and another == files(other, 7)
    assert own["recipe"] != another["recipe"]
    recipe = recipe_of(folder, {"format": "cq-8c4b"}).digest
    assert fitted == {"recipe": recipe, "seed": 0, "samples": learned["samples"]}
    assert learned == {"scheme": "vecinfer-1", "samples": learned["samples"]}
    assert re.fullmatch(r"[0-9a-f]{64}", learned["samples"])
    assert (full, plain) == ({}, {"scheme": "int4"})


def test_the_command_prints_what_fits_and_draws_what_it_should(
    folder, tiny_model_dir, opened, tiny_text_file, tmp_path, few
):
    out = calibrated(opened, tiny_text_file, tmp_path / "cal")
    command = ["check", str(tiny_model_dir), str(out), "--dataset", str(tiny_text_file)]
    command += ["--split", "test", "--windows", "2", "--window-length", "96", "--device", "cpu"]

    def invoke(*more):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output
        return result

    result = invoke("--compare", "all", "--against", str(folder), "--context", "8192")
    lines = result.stdout.splitlines()
    head = lines[0].split()
    assert head[:6] == ["format", "bits", "eff.", "bits", "at", "8192"]
    # The name of the folder behind --against is what makes it wider than 100.
    assert max(map(len, lines[:6])) <= 110
    assert "cq-4c6b fisher against cq-4c6b fisher (cal): the same KL on average" in result.stdout
    assert "cq-8c10b:paper is left out" in result.stderr
    assert "Bits at 8192 tokens are computed" in result.stdout
    pareto = out / "reports" / "quality-pareto.png"
    assert pareto.is_file() and str(pareto) in result.stdout
    page = (out / "reports" / "report.html").read_text()
    assert "Better in" in page and page.count("data:image/png") == 2
    invoke()
    assert not pareto.exists()
    assert (out / "reports" / "report.html").read_text().count("data:image/png") == 1

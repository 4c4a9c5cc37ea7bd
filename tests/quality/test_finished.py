"""A check that does not come to its end loses no row, and a format too large ends no comparison."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from small_checks import calibrated, settings
from typer.testing import CliRunner

from cqtool.artifact.export import export
from cqtool.cli.app import app
from cqtool.models.load import open_model
from cqtool.quality import Gates, candidates, check, run, tasks
from cqtool.quality.finished import FinishedRows
from cqtool.quality.items import Prose, plain
from cqtool.quality.memory import OutOfMemory
from cqtool.schemes import SCHEMES
from cqtool.schemes.scheme import Scheme

FITTED = "vecinfer-1"
WORD = """
task: tiny_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    return open_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def folder(opened, tiny_text_file, tmp_path_factory):
    return calibrated(opened, tiny_text_file, tmp_path_factory.mktemp("finished") / "cal")


@pytest.fixture
def made(monkeypatch):
    """Names of all formats, as they are made to be measured."""
    labels = []
    original = run.Run.measure

    def measure(self, candidate):
        labels.append(candidate.label)
        return original(self, candidate)

    monkeypatch.setattr(run.Run, "measure", measure)
    return labels


def break_once(monkeypatch, label, error, *words):
    """Let the first measurement of a format raise `error`; none may outlive its turn."""
    left, formats = [error], []
    original = run.Run._row

    def row(self, candidate, format):
        assert all(earlier() is None for earlier in formats)
        formats.append(weakref.ref(format))
        if candidate.label == label and left:
            raise left.pop()(*words)
        return original(self, candidate, format)

    monkeypatch.setattr(run.Run, "_row", row)


def work_of(folder):
    return folder.with_name(f"{folder.name}.check.partial")


@pytest.fixture
def prose(tiny_text, monkeypatch):
    blocks = tiny_text.split("\n\n")
    articles = tuple("\n\n".join(blocks[at : at + 60]) for at in (0, 60))
    found = Prose(tuple(plain(" ".join(blocks))), articles)
    monkeypatch.setattr(tasks, "demo_prose", lambda: found)


def test_an_interrupted_check_goes_on_and_ends_in_the_same_bytes(
    folder, opened, tiny_text_file, made, prose, monkeypatch
):
    asked = settings(
        tiny_text_file,
        compare=("int4", FITTED, "cq-8c4b", "int2"),
        generation=("divergence", "copy"),
        items=2,
    )
    whole = check(opened, folder, asked).to_json()
    labels = [row["label"] for row in whole["rows"][1:]]
    assert made == labels and not work_of(folder).exists()
    made.clear()
    break_once(monkeypatch, "cq-8c4b fisher", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        check(opened, folder, asked)
    assert len(list(work_of(folder).iterdir())) == 4  # full precision, and three formats
    made.clear()
    again = check(opened, folder, asked)
    assert made == labels[3:] == ["cq-8c4b fisher", "int2"]
    assert json.dumps(again.to_json()) == json.dumps(whole)
    kept = json.loads((folder / "reports" / "quality.json").read_text())
    assert kept == json.loads(json.dumps(whole))
    assert not work_of(folder).exists()


def test_finished_formats_and_full_precision_answer_no_item_twice(
    folder, opened, tiny_text, tiny_text_file, prose, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval", reason="needs: pip install 'cqtool[tasks]'")
    data = tmp_path / "data.jsonl"
    question = " ".join(tiny_text.split()[:30])
    data.write_text(json.dumps({"question": question, "answer": " the"}))
    (tmp_path / "word.yaml").write_text(WORD.format(data=data))
    asked = settings(
        tiny_text_file,
        compare=("int4", "int2"),
        generation=("divergence", "copy"),
        tasks=("tiny_word",),
        task_folder=tmp_path,
        items=2,
    )
    whole = check(opened, folder, asked).to_json()
    assert all(score["difference"] for score in whole["tasks"]["scores"][1:])
    answered, generated = [], tasks.continuations

    def continuations(model, items, format):
        answered.append("full" if format is None else format.name)
        return generated(model, items, format)

    monkeypatch.setattr(tasks, "continuations", continuations)
    for label in (whole["rows"][1]["label"], "int2"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            break_once(patch, label, KeyboardInterrupt)
            check(opened, folder, asked)
    again = check(opened, folder, asked).to_json()
    # Each format's batches follow each other; in the first run only full precision came so far.
    assert [name for name, _ in groupby(answered)] == ["full", "cq-4c6b", "int4", "int2"]
    assert len(set(Counter(answered).values())) == 1
    assert json.dumps(again) == json.dumps(whole)


def test_where_all_rows_are_there_only_full_precision_is_measured(
    folder, opened, tiny_text_file, made, monkeypatch
):
    asked = settings(tiny_text_file, compare=("int4",), by_layer=True)
    whole = check(opened, folder, asked).to_json()
    made.clear()
    by_layer = run.Run.by_layer

    def interrupted(self, candidate):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "by_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(opened, folder, asked)
    made.clear()
    monkeypatch.setattr(run.Run, "by_layer", by_layer)
    # Without another pass over a quantized cache, full precision's own row is complete.
    again = check(opened, folder, replace(asked, by_layer=False)).to_json()
    assert made == []
    assert again == {**whole, "by_layer": ()}


def test_a_row_is_measured_again_when_anything_that_decides_it_changed(
    folder, opened, tiny_text_file, made, prose, tmp_path, monkeypatch
):
    other = calibrated(opened, tiny_text_file, tmp_path / "a" / "other", format="cq-8c4b")
    changes = {"format": "cq-8c4b", "calibration.sequences": 6}
    another = calibrated(opened, tiny_text_file, tmp_path / "b" / "other", **changes)
    asked = settings(tiny_text_file, against=(str(other),), compare=("int4", FITTED))
    # As though every check were interrupted after its last row.
    monkeypatch.setattr(FinishedRows, "clear", lambda self: None)

    def measured(**changes):
        made.clear()
        check(opened, folder, replace(asked, **changes))
        return list(made)

    labels = ["cq-4c6b fisher", "cq-8c4b fisher (other)", "int4", FITTED]
    assert measured() == labels
    assert measured() == measured(gates=Gates(max_kl=1.0), by_layer=True) == []
    assert measured(against=(), compare=("int4", "int2")) == ["int2"]
    for changes in (
        {"windows": 2},
        {"window_length": 64},
        {"window": 9},
        {"sinks": 3},
        {"context": 4096},
        {"mode": "decode"},
        {"generation": ("copy",), "items": 1},
    ):
        assert measured(**changes) == labels
    assert measured(samples=another) == [FITTED]
    assert measured(against=(str(another),)) == labels[1:2]
    shutil.rmtree(work_of(folder))


@pytest.mark.parametrize(
    "error",
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        (MemoryError,),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_a_format_too_large_is_left_out_and_named(
    error, folder, opened, tiny_text_file, prose, monkeypatch
):
    break_once(monkeypatch, "int2", *error)
    asked = settings(tiny_text_file, compare=("int2", "int4"), generation=("copy",), items=1)
    report = check(opened, folder, asked)
    assert [row.label for row in report.rows[2:]] == ["int4"]
    assert [one.name for one in report.skipped] == ["int2"]
    assert "--window-length" in report.skipped[0].reason
    assert {one.format for one in report.generation.scores} == {row.label for row in report.rows}


def test_what_is_checked_must_fit_and_other_errors_are_not_taken_for_memory(
    folder, opened, tiny_text_file, monkeypatch
):
    break_once(monkeypatch, "cq-4c6b fisher", torch.OutOfMemoryError, "CUDA out of memory.")
    with pytest.raises(OutOfMemory, match="while cq-4c6b fisher was measured"):
        check(opened, folder, settings(tiny_text_file))
    break_once(monkeypatch, "int4", RuntimeError, "shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        check(opened, folder, settings(tiny_text_file, compare=("all", "int4")))


def test_a_named_format_is_fitted_once_a_layer(folder, opened, tiny_text_file, monkeypatch):
    fitted = []
    scheme = SCHEMES[FITTED]

    def make(layer, samples):
        fitted.append(samples.layer)
        return scheme.make(layer, samples)

    counted = {**SCHEMES, FITTED: Scheme(FITTED, scheme.source, make, calibrated=True)}
    monkeypatch.setattr(candidates, "SCHEMES", counted)
    monkeypatch.setattr("cqtool.schemes.registry.SCHEMES", counted)
    check(opened, folder, settings(tiny_text_file, compare=(FITTED,)))
    assert fitted == [0, 1]


def test_an_artifact_where_nobody_writes_is_checked_all_the_same(
    folder, opened, tiny_text_file, tmp_path, monkeypatch
):
    artifact = export(folder, tmp_path / "sealed" / "artifact").folder
    if os.geteuid() == 0:
        # Root may write anywhere: a file in the folder's place has the same effect.
        work_of(artifact).write_text("")
    else:
        artifact.parent.chmod(0o555)
    try:
        report = check(opened, artifact, settings(tiny_text_file, compare=("int4",)))
    finally:
        artifact.parent.chmod(0o755)
    assert [row.label for row in report.rows[1:]] == ["cq-4c6b fisher", "int4"]


def test_the_command_says_how_to_go_on(folder, tiny_model_dir, tiny_text_file, monkeypatch):
    command = ["check", str(tiny_model_dir), str(folder), "--dataset", str(tiny_text_file)]
    command += ["--split", "test", "--windows", "2", "--window-length", "96", "--device", "cpu"]
    command += ["--compare", "int4"]
    break_once(monkeypatch, "int4", KeyboardInterrupt)
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 130
    assert "run the same command again to continue" in stopped.stderr
    # It holds the exception, and that what was being measured.
    del stopped
    finished = CliRunner().invoke(app, command)
    assert finished.exit_code == 0
    assert "cq-4c6b fisher: measured before" in finished.stderr

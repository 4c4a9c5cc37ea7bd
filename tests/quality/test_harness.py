"""lm-evaluation-harness over the cache: a local task, a tiny model, nothing downloaded."""

from __future__ import annotations

import builtins
import json
import math

import pytest
import torch
from formats import RecordingCache, exact_format, random_format
from typer.testing import CliRunner

from cqtool.artifact.export import export
from cqtool.artifact.measured import read_quality
from cqtool.cli.app import app
from cqtool.codebooks.calibrate import calibrate
from cqtool.errors import DataError, EnvironmentProblem, RecipeError
from cqtool.models.load import open_model
from cqtool.quality import CheckSettings
from cqtool.quality.harness import Harness
from cqtool.quality.measure import full_logits, quantized_logits
from cqtool.recipe import load_recipe

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    pytest.importorskip("lm_eval", reason="needs: pip install 'cqtool[tasks]'")
    return open_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def docs(tiny_text):
    words = tiny_text.split()
    return [
        {
            "question": " ".join(words[40 * at : 40 * at + 30]),
            "choices": [" " + words[40 * at + 30], " " + words[40 * at + 35] + " it"],
            "answer": at % 2,
        }
        for at in range(12)
    ]


@pytest.fixture(scope="module")
def tasks(docs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


def of(opened, tasks, *names, items=None):
    asked = CheckSettings(tasks=names, task_folder=tasks, items=items)
    return Harness.of(opened, asked)


def likelihood(opened, format, question, choice):
    """Log-likelihood of `choice` after `question`, by hand."""
    ids = torch.tensor(opened.tokenizer(question + choice)["input_ids"])
    begin = len(opened.tokenizer(question)["input_ids"])
    if format is None:
        logits = full_logits(opened.model, ids[:-1])
    else:
        logits = quantized_logits(opened.model, format, ids[:-1], "decode")
    logs = logits.float().log_softmax(-1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(begin, len(ids)))


def test_choices_are_scored_over_the_cache(opened, tasks, docs):
    harness = of(opened, tasks, "tiny_choice")
    formats = [("full", None), ("codes", random_format(opened.model, bits=2, window=4, sinks=1))]
    scores = [one for label, format in formats for one in harness.measure(label, format)]
    found = {score.format: score for score in harness.result(scores).scores}
    for label, format in formats:
        expected = []
        for doc in docs:
            said = [likelihood(opened, format, doc["question"], one) for one in doc["choices"]]
            expected.append(float(max((0, 1), key=said.__getitem__) == doc["answer"]))
        assert list(found[label].per_item) == expected
    full, codes = found["full"], found["codes"]
    assert (full.task, full.measure, full.items, full.higher_is_better) == (
        *("tiny_choice", "acc", 12, True),
    )
    assert full.difference == 0 and full.per_item != codes.per_item
    assert codes.difference == pytest.approx(codes.score - full.score)


def test_text_is_generated_over_the_cache(opened, tasks, docs, monkeypatch):
    """What the model writes in full precision becomes the right answer."""
    said = []
    for doc in docs:
        ids = opened.tokenizer(doc["question"], return_tensors="pt")["input_ids"]
        new = opened.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        said.append(opened.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    data = tasks / "own.jsonl"
    own = [{**doc, "choices": [text]} for doc, text in zip(docs, said, strict=True)]
    data.write_text("\n".join(map(json.dumps, own)))
    (tasks / "own.yaml").write_text(WRITE.replace("tiny_write", "tiny_own").format(data=data))
    harness = of(opened, tasks, "tiny_own", items=4)
    coarse = random_format(opened.model, bits=1)
    formats = ("full", None), ("window", coarse_window(coarse)), ("codes", coarse)
    measured = [one for label, format in formats for one in harness.measure(label, format)]
    scores = {score.format: score for score in measured}
    assert scores["full"].items == 4 and scores["full"].score == 1
    assert scores["window"].per_item == scores["full"].per_item
    assert scores["codes"].score < 1 and scores["codes"].difference == scores["codes"].score - 1


def coarse_window(format):
    from dataclasses import replace

    return replace(format, window=500)


def test_the_tokenizer_and_the_streams_are_left_alone(opened, tasks, capsys):
    padding, opened.tokenizer.pad_token = opened.tokenizer.pad_token, None
    try:
        of(opened, tasks, "tiny_choice", items=1).measure("full", None)
        assert opened.tokenizer.pad_token is None
    finally:
        opened.tokenizer.pad_token = padding
    assert capsys.readouterr() == ("", "")


def test_what_cannot_run_is_said_in_a_sentence(opened, tasks, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="no task 'tiny_poetry'; list its tasks"):
        of(opened, tasks, "tiny_poetry")
    with pytest.raises(RecipeError, match="is not a folder"):
        of(opened, tmp_path / "nowhere", "tiny_choice")
    with pytest.raises(RecipeError, match="name those to run in --tasks"):
        of(opened, tasks)
    assert of(opened, None) is None
    lost = CHOICE.replace("tiny_choice", "tiny_lost").format(data=tmp_path / "gone.jsonl")
    (tmp_path / "lost.yaml").write_text(lost)
    with pytest.raises(DataError, match=r"tiny_lost cannot be loaded .*download it beforehand"):
        of(opened, tmp_path, "tiny_lost")
    lacking = CHOICE.replace("tiny_choice", "tiny_lacking").format(data=tmp_path / "gone.jsonl")
    (tmp_path / "lacking.yaml").write_text(lacking + "process_docs: !function needs.it\n")
    (tmp_path / "needs.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(EnvironmentProblem, match=r"tiny_lacking .*nowhere_to_be_found.*install it"):
        of(opened, tmp_path, "tiny_lacking")
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'cqtool\[tasks\]'"):
        of(opened, tasks, "tiny_choice")


def test_the_command_prints_tasks_and_the_card_repeats_them(
    opened, tasks, tiny_model_dir, tiny_text_file, tmp_path
):
    overrides = {
        "calibration.dataset": str(tiny_text_file),
        "calibration.split": "train",
        "calibration.sequences": 4,
        "calibration.sequence_length": 64,
        "kmeans.iterations": 2,
        "format": "cq-8c4b",
        "window": 8,
    }
    calibrate(opened, load_recipe("cq-8c8b", overrides), tmp_path / "cal")
    command = ["check", str(tiny_model_dir), str(tmp_path / "cal"), "--windows", "2", "--device"]
    command += ["cpu", "--dataset", str(tiny_text_file), "--split", "test", "--window-length", "64"]
    command += ["--tasks", "tiny_choice,tiny_write", "--task-folder", str(tasks), "--items", "5"]
    result = CliRunner().invoke(app, [*command, "--compare", "int4", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = report["tasks"]
    assert found["tasks"] == ["tiny_choice", "tiny_write"] and found["items"] == 5
    assert [(one["format"], one["task"]) for one in found["scores"]] == [
        (label, task)
        for label in ("fp32 (full)", "cq-8c4b fisher", "int4")
        for task in ("tiny_choice", "tiny_write")
    ]
    paired = [one for one in report["paired"] if one["unit"] == "items"]
    assert [(one["task"], one["measure"], one["pairs"]) for one in paired] == [
        *(("tiny_choice", "acc", 5), ("tiny_write", "exact_match", 5))
    ]
    assert read_quality(tmp_path / "cal").tasks.tasks == ("tiny_choice", "tiny_write")
    card = (export(tmp_path / "cal", tmp_path / "out").folder / "README.md").read_text()
    assert "at most 5 items of each" in card and "--tasks tiny_choice,tiny_write" in card
    assert "other tasks were not" in card


def test_likelihoods_of_an_exact_codebook_are_those_of_full_precision(opened, tasks, docs):
    recorded = RecordingCache(opened.model)
    doc = docs[0]
    ids = opened.tokenizer(doc["question"] + doc["choices"][0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        opened.model(input_ids=ids, past_key_values=recorded)
    format = exact_format(recorded)
    full, coded = (
        likelihood(opened, one, doc["question"], doc["choices"][0]) for one in (None, format)
    )
    assert math.isclose(full, coded, rel_tol=1e-4)

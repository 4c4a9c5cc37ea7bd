"""RULER, LongBench, and tasks that make their own prompts: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from formats import random_format
from transformers import AutoTokenizer

from cqtool.models.load import open_model
from cqtool.quality import CheckSettings
from cqtool.quality.harness import Harness
from cqtool.quality.prompts import PROMPT_TOKENS, prompt_length, tokenizer_folder

MADE = """
task: tiny_made
dataset_path: ""
dataset_name: ""
test_split: test
custom_dataset: !function made.items
output_type: generate_until
doc_to_text: "{{input}}"
doc_to_target: "{{outputs}}"
process_results: !function made.results
generation_kwargs: {until: [], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: "4096", aggregation: mean, higher_is_better: true}
"""
MAKER = """
import random

import datasets
from transformers import AutoTokenizer


def items(tokenizer, max_seq_lengths=(4096,), **about):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    (length,) = max_seq_lengths
    made = []
    for _ in range(6):
        words = [str(random.randrange(10, 100))]
        while len(tokenizer(" ".join(words))["input_ids"]) < length - 8:
            words.append(str(random.randrange(10, 100)))
        made.append({"input": " ".join(words[:-1]), "outputs": words[-1], "length": length})
    return {"test": datasets.Dataset.from_list(made)}


def results(doc, said):
    return {"4096": -1.0, str(doc["length"]): float(len(said[0]) % 3)}
"""


@pytest.fixture
def opened(tiny_model_dir, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs: pip install 'cqtool[tasks]'")

    def refused(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    return open_model(str(tiny_model_dir), device="cpu")


def of_harness(name: str) -> Path:
    """A folder of tasks that the harness comes with."""
    (found,) = importlib.util.find_spec("lm_eval").submodule_search_locations
    return Path(found) / "tasks" / name


def measured(opened, folder, task, **asked):
    harness = Harness.of(opened, CheckSettings(tasks=(task,), task_folder=folder, **asked))
    coarse = random_format(opened.model, bits=1)
    found = {}
    for label, format in (("full", None), ("window", replace(coarse, window=5000)), ("c", coarse)):
        found[label] = {score.measure: score for score in harness.measure(label, format)}
    return harness, found


def test_tasks_that_make_prompts_know_the_tokenizer_and_the_length(opened, tmp_path):
    (tmp_path / "made.yaml").write_text(MADE)
    (tmp_path / "made.py").write_text(MAKER)
    harness, found = measured(opened, tmp_path, "tiny_made", context=200)
    (task,) = harness._tasks
    docs = task.dataset["test"]
    assert {doc["length"] for doc in docs} == {200}
    sizes = [len(opened.tokenizer(doc["input"])["input_ids"]) for doc in docs]
    assert all(180 < size <= 192 for size in sizes)
    # The -1 under 4096 is no score, and a cache that loses nothing says the same.
    assert all(list(scores) == ["200"] for scores in found.values())
    assert found["full"]["200"].items == 6
    assert found["window"]["200"].per_item == found["full"]["200"].per_item
    again, _ = measured(opened, tmp_path, "tiny_made", context=200)
    assert again._tasks[0].dataset["test"].to_list() == docs.to_list()


def test_prompts_are_as_long_as_asked_and_as_the_model_takes(opened):
    limit = opened.model.config.max_position_embeddings
    assert limit == 2048 < PROMPT_TOKENS
    # Of a shorter model, room is left for what RULER does not count.
    assert prompt_length(opened, None) == {"max_seq_lengths": [limit - 64]}
    assert prompt_length(opened, 1000) == {"max_seq_lengths": [1000]}
    assert prompt_length(opened, 9000) == {"max_seq_lengths": [limit - 64]}
    opened.model.config.max_position_embeddings = 9000
    assert prompt_length(opened, None) == {}
    assert prompt_length(opened, 8192) == {"max_seq_lengths": [8192]}


def test_the_harness_is_handed_no_code_of_a_tokenizer(opened):
    text = "It was the best of times."
    opened.tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["somebody/code--t.T", None]}
    with tokenizer_folder(opened) as folder:
        assert "auto_map" not in (Path(folder) / "tokenizer_config.json").read_text()
        read = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert read(text)["input_ids"] == opened.tokenizer(text)["input_ids"]
    assert not Path(folder).exists() and "auto_map" in opened.tokenizer.init_kwargs


def test_ruler_hides_a_needle_in_a_prompt_of_the_length(opened, monkeypatch):
    pytest.importorskip("wonderwords", reason="needs: pip install 'lm-eval[ruler]'")
    nltk = pytest.importorskip("nltk", reason="needs: pip install 'lm-eval[ruler]'")
    # It downloads what splits sentences, which this task never does.
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    harness, found = measured(opened, of_harness("ruler"), "niah_single_1", context=600, items=2)
    (task,) = harness._tasks
    doc = task.dataset["test"][0]
    assert doc["max_length"] == 600 and doc["outputs"][0] in doc["input"]
    assert len(opened.tokenizer(doc["input"])["input_ids"]) + 128 <= 600
    assert all(list(scores) == ["600"] for scores in found.values())
    assert found["full"]["600"].items == 2


def test_longbench_runs_with_its_own_metrics(opened, tiny_text, tmp_path):
    for name in ("jieba", "fuzzywuzzy", "rouge"):
        pytest.importorskip(name, reason="needs: pip install 'lm-eval[longbench]'")
    words = tiny_text.split()
    data = tmp_path / "data.jsonl"
    docs = [
        {
            "context": " ".join(words[50 * at : 50 * at + 40]),
            "question": "What comes next?",
            "answers": [words[50 * at + 40]],
        }
        for at in range(3)
    ]
    data.write_text("\n".join(map(json.dumps, docs)))
    source = of_harness("longbench")
    (tmp_path / "metrics.py").write_text((source / "metrics.py").read_text())
    text = (source / "qasper.yaml").read_text().replace("dataset_name: qasper\n", "")
    here = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    text = text.replace("dataset_path: Xnhyacinth/LongBench\n", here)
    text = text.replace("max_gen_toks: 128", "max_gen_toks: 4")
    (tmp_path / "qasper.yaml").write_text(text)
    _, found = measured(opened, tmp_path, "longbench_qasper")
    for scores in found.values():
        assert set(scores) == {"score", "qa_f1_score"}
        assert all(score.items == 3 for score in scores.values())
    assert found["window"]["score"].per_item == found["full"]["score"].per_item

"""Generation tasks: the items are what they say, answers are scored right, and pairs by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from synthetic_artifact import edit_json
from transformers import DynamicCache
from typer.main import get_command
from typer.testing import CliRunner
from zoo import random_ids, tiny

from cqtool.artifact.export import export
from cqtool.artifact.measured import read_quality
from cqtool.cache import CacheFormat, LayerCodecs
from cqtool.cli.app import app
from cqtool.cli.check_tables import generation_rows
from cqtool.codebooks.calibrate import calibrate
from cqtool.data.demo import demo_articles
from cqtool.errors import DataError, RecipeError
from cqtool.models.load import open_model
from cqtool.models.probe import read_geometry
from cqtool.quality import tasks
from cqtool.quality.items import (
    DIVERGENCE_TOKENS,
    PASSKEY_TOKENS,
    TASKS,
    Item,
    Prose,
    demo_prose,
    make_items,
    plain,
)
from cqtool.quality.scores import Score
from cqtool.quality.tasks import (
    TOGETHER,
    TaskRun,
    batches,
    continuations,
    may_pad,
    outcome,
    summarise_items,
    task_items,
)
from cqtool.recipe import load_recipe
from cqtool.schemes import make_format

RECALL = ("passkey", "multi-key", "copy")


@pytest.fixture(scope="module")
def prose(tiny_text):
    blocks = tiny_text.split("\n\n")
    articles = tuple("\n\n".join(blocks[at : at + 60]) for at in (0, 60, 120))
    return Prose(tuple(plain(" ".join(blocks))), articles)


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    return open_model(str(tiny_model_dir), device="cpu")


@pytest.mark.parametrize("task", TASKS)
def test_items_are_the_same_every_time_and_more_of_them_leave_the_first(
    task, tiny_tokenizer, prose
):
    few = make_items(task, tiny_tokenizer, prose, count=3)
    many = make_items(task, tiny_tokenizer, prose, count=8)
    assert many[:3] == few
    assert len({(item.context, item.question) for item in many}) == 8
    assert make_items(task, tiny_tokenizer, prose, count=3, seed=1) != few
    assert {item.task for item in many} == {task}


@pytest.mark.parametrize("task", RECALL)
def test_the_answer_is_in_the_context_once_and_not_in_the_question(task, tiny_tokenizer, prose):
    for item in make_items(task, tiny_tokenizer, prose, count=20):
        context = tiny_tokenizer.decode(item.context)
        assert context.count(item.answer) == 1
        assert item.answer not in tiny_tokenizer.decode(item.question)
        if task != "copy":
            numbers = re.findall(r"\d+", context)
            assert len(numbers) == len(set(numbers)) == (1 if task == "passkey" else 8)


def test_multi_key_asks_for_the_number_that_stands_beside_the_name(tiny_tokenizer, prose):
    for item in make_items("multi-key", tiny_tokenizer, prose, count=8):
        asked = tiny_tokenizer.decode(item.question)
        assert f"{asked} {item.answer}." in tiny_tokenizer.decode(item.context)


def test_copying_continues_the_line_after_its_first_word(tiny_tokenizer, prose):
    for item in make_items("copy", tiny_tokenizer, prose, count=8):
        label, _, cue = tiny_tokenizer.decode(item.question).partition(" again: ")
        context = tiny_tokenizer.decode(item.context)
        assert f"{label}: {cue} {item.answer}\n" in context
        # Elsewhere its words would be another answer to the cue.
        assert all(context.count(f" {word}") == 1 for word in [cue, *item.answer.split()])


def test_sums_are_right_and_the_asked_one_is_not_among_the_worked(tiny_tokenizer, prose):
    for item in make_items("arithmetic", tiny_tokenizer, prose, count=20):
        text = tiny_tokenizer.decode(item.context)
        worked = [tuple(map(int, sums)) for sums in re.findall(r"(\d+) \+ (\d+) = (\d+)\n", text)]
        assert len(worked) == 32 and all(a + b == c for a, b, c in worked)
        a, b = map(int, re.findall(r"\d+", tiny_tokenizer.decode(item.question)))
        assert int(item.answer) == a + b and (a, b, a + b) not in worked


def test_pass_keys_lie_at_every_depth_of_every_length(tiny_tokenizer, prose):
    items = make_items("passkey", tiny_tokenizer, prose, count=20, limit=4096)
    longest = max(len(tiny_tokenizer(f" {one}")["input_ids"]) for one in prose.filler)
    found = {}
    for item in items:
        length = int(item.group.split()[0])
        size = len(item.context) + len(item.question)
        assert length - longest - 16 <= size <= length
        context = tiny_tokenizer.decode(item.context)
        found.setdefault(length, []).append(context.index(item.answer) / len(context))
    assert tuple(found) == PASSKEY_TOKENS
    for depth, places in zip((0.1, 0.3, 0.5, 0.7, 0.9), zip(*found.values(), strict=True)):  # noqa: B905
        assert places[-1] == pytest.approx(depth, abs=0.05)
    for places in found.values():
        assert places == sorted(places)


def test_pass_keys_grow_with_the_context_that_is_asked_for(tiny_tokenizer, prose):
    usual = make_items("passkey", tiny_tokenizer, prose, count=6)
    assert make_items("passkey", tiny_tokenizer, prose, count=6, context=2048) == usual
    assert make_items("passkey", tiny_tokenizer, prose, count=6, context=300) == usual

    def lengths(**given):
        items = make_items("passkey", tiny_tokenizer, prose, count=6, **given)
        found = [int(item.group.split()[0]) for item in items]
        longest = max(len(item.context) + len(item.question) for item in items)
        assert 0.9 * max(found) < longest <= max(found)
        for item in items:
            assert tiny_tokenizer.decode(item.context).count(item.answer) == 1
        return found

    assert lengths(context=9000) == [256, 512, 1024, 2048, 4096, 8192]
    assert lengths(context=9000, limit=5000) == [256, 512, 1024, 2048, 4096, 256]
    assert lengths(context=9000, limit=200) == [184] * 6


def test_pass_keys_stay_within_the_models_context(tiny_tokenizer, prose):
    for limit, groups in ((700, {"256 tokens", "512 tokens"}), (240, {"224 tokens"})):
        items = make_items("passkey", tiny_tokenizer, prose, count=6, limit=limit)
        assert {item.group for item in items} == groups
        lengths = [len(item.context) + len(item.question) + item.new_tokens for item in items]
        assert max(lengths) <= limit


def test_a_context_too_short_for_a_task_is_refused(tiny_tokenizer, prose):
    with pytest.raises(DataError, match="'divergence' needs 320 tokens and the model takes 300"):
        make_items("divergence", tiny_tokenizer, prose, count=1, limit=300)


def test_filler_holds_no_numbers_and_no_fragments():
    text = "It was founded in 1890 by a man. " + "A plain sentence of more than forty characters. "
    assert plain(text + "Short one.") == ["A plain sentence of more than forty characters."]


def test_the_demo_text_has_filler_for_every_length_and_prose_to_continue():
    pytest.importorskip("gensim")
    prose = demo_prose()
    words = sum(len(sentence.split()) for sentence in prose.filler)
    assert words > 10 * max(PASSKEY_TOKENS)
    assert not any(re.search(r"\d", sentence) for sentence in prose.filler)
    train, test = (list(demo_articles(split)) for split in ("train", "test"))
    assert all(any(sentence in article for article in train) for sentence in prose.filler[::50])
    assert list(prose.articles) == test


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        (" 48213", 1),
        ("48213. Remember it.", 1),
        (" 48213\n", 1),
        (" 48214", 0),
        (" 4821", 0),
        (" 482139", 0),
        (" the key 48213", 0),
        ("", 0),
    ],
)
def test_only_the_whole_number_at_the_start_is_right(text, exact):
    item = Item("passkey", (1,), (2,), "48213", 7)
    assert outcome(item, text, [], []) == {"exact": exact}


@pytest.mark.parametrize(
    ("text", "exact", "words"),
    [
        (" red green blue gold\nLine", 1, 1),
        (" red green blue golden", 0, 0.75),
        (" red blue green gold", 0, 0.5),
        (" red green", 0, 0.5),
        (" green blue gold", 0, 0),
    ],
)
def test_copies_are_scored_word_by_word(text, exact, words):
    item = Item("copy", (1,), (2,), "red green blue gold", 7)
    assert outcome(item, text, [], []) == {"exact": exact, "words": words}


def test_divergence_counts_tokens_before_the_first_other_one():
    item = Item("divergence", (1,), (2,), "", 4)
    assert outcome(item, "", [5, 6, 7, 8], [5, 6, 7, 8]) == {"tokens": 4, "equal": 1}
    assert outcome(item, "", [5, 6, 9, 8], [5, 6, 7, 8]) == {"tokens": 2, "equal": 0}
    assert outcome(item, "", [9, 6, 7, 8], [5, 6, 7, 8]) == {"tokens": 0, "equal": 0}


def test_differences_are_paired_by_item_and_by_group():
    items = [Item("passkey", (), (), "1", 1, group) for group in ("a", "a", "b", "b")]
    full = [{"exact": value} for value in (1.0, 1.0, 0.0, 1.0)]
    found = [{"exact": value} for value in (1.0, 0.0, 0.0, 1.0)]
    whole, first, second = summarise_items("int4", items, full, found)
    assert (whole.group, first.group, second.group) == (None, "a", "b")
    assert (whole.items, first.items, second.items) == (4, 2, 2)
    # Means 0.75 and 0.5; differences 0, -1, 0, 0 have a standard deviation of one half.
    assert (whole.score, whole.difference) == (0.5, -0.25)
    assert whole.score_se == pytest.approx(math.sqrt(1 / 3) / 2)
    assert whole.difference_se == pytest.approx(0.25)
    assert (first.difference, first.difference_se) == (-0.5, 0.5)
    assert (second.difference, second.difference_se) == (0, 0)


def test_a_lossless_cache_scores_as_full_precision(tiny_model_dir, prose, monkeypatch):
    monkeypatch.setattr(tasks, "demo_prose", lambda: prose)
    opened = open_model(str(tiny_model_dir), device="cpu", dtype="bfloat16")
    geometry = read_geometry(opened.model)
    formats = [
        ("full", None),
        ("window", make_format("int2", geometry, 4096, 0)),
        ("copy", make_format("bf16", geometry, 0, 0)),
        ("int2", make_format("int2", geometry, 0, 0)),
    ]
    items = task_items(opened, ("divergence", "copy"), 2)
    run = TaskRun(opened, items)
    found = run.result([one for label, format in formats for one in run.measure(label, format)])
    by_format = {
        label: {
            (s.task, s.measure): (s.score, s.difference) for s in found.scores if s.format == label
        }
        for label, _ in formats
    }
    assert by_format["full"]["divergence", "tokens"] == (DIVERGENCE_TOKENS, 0)
    assert by_format["full"]["divergence", "equal"] == (1, 0)
    assert by_format["window"] == by_format["full"] == by_format["copy"]
    assert by_format["int2"]["divergence", "tokens"][0] < DIVERGENCE_TOKENS


class Nothing:
    """A codec that keeps nothing: what is decoded is zero."""

    before_rope = False
    block = 1
    bits_per_channel = 0.0

    def encode(self, vectors):
        return {"vectors": torch.zeros_like(vectors)}

    def decode(self, stored):
        return stored["vectors"].float()

    def to(self, device):
        return self


def test_the_first_token_of_an_answer_already_sees_codes(opened, prose):
    model = opened.model
    geometry = read_geometry(model)
    layers = tuple(LayerCodecs(Nothing(), Nothing()) for _ in geometry.layers)
    blank = CacheFormat("blank", geometry, layers, 0, 0)
    items = make_items("multi-key", opened.tokenizer, prose, count=6)
    found, full = [], []
    for item in items:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.tensor([item.context]), past_key_values=cache)
            for layer in cache.layers:
                layer.keys.zero_()
                layer.values.zero_()
            logits = model(input_ids=torch.tensor([item.question]), past_key_values=cache).logits
        found.append(continuations(model, [item], blank)[0][0])
        full.append(continuations(model, [item], None)[0][0])
        assert found[-1] == int(logits[0, -1].argmax())
    assert found != full


def test_full_precision_answers_as_generate_does(opened, prose):
    item = make_items("divergence", opened.tokenizer, prose, count=1)[0]
    prompt = torch.tensor([item.context + item.question])
    opened.model.generation_config.eos_token_id = None
    ids = opened.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False
    )
    assert continuations(opened.model, [item], None) == ids[:, prompt.shape[1] :].tolist()


def test_items_of_one_length_are_answered_together_as_they_are_alone(opened, prose):
    divergence = make_items("divergence", opened.tokenizer, prose, count=TOGETHER + 1)
    items = [*divergence[:3], *make_items("copy", opened.tokenizer, prose, count=2)]
    items += divergence[3:]
    together = batches(items, padded=False)
    # All prose is of one length; copies may happen to be.
    assert together[0] == [0, 1, 2, *range(5, TOGETHER + 2)]
    assert [TOGETHER + 2] in together
    assert sorted(number for numbers in together for number in numbers) == [*range(len(items))]
    for format in formats(opened):
        alone = [continuations(opened.model, [item], format)[0] for item in divergence[:4]]
        assert continuations(opened.model, divergence[:4], format) == alone
        assert len({tuple(one) for one in alone}) == 4


def formats(opened):
    geometry = read_geometry(opened.model)
    blocks = make_format("kivi-2", geometry, 8, 0)
    return None, make_format("int2", geometry, 4, 2), make_format("int2", geometry, 0, 0), blocks


def test_items_of_other_lengths_are_padded_where_no_blocks_would_move(opened, prose):
    *padded, blocks = formats(opened)
    assert [may_pad(opened.model, format) for format in (*padded, blocks)] == [True] * 3 + [False]
    found = [make_items("divergence", opened.tokenizer, prose, count=6)[at] for at in range(6)]
    items = [replace(item, context=item.context[20 * at :]) for at, item in enumerate(found)]
    assert batches(items, padded=True) == [[5, 4, 3, 2, 1, 0]]
    assert batches(items, padded=False) == [[at] for at in range(6)]
    for format in padded:
        alone = [continuations(opened.model, [item], format)[0] for item in items]
        assert continuations(opened.model, items, format) == alone
        assert len({tuple(one) for one in alone}) == 6


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        *(("gemma3", True), ("mistral", True), ("gpt2", True)),
        *(("bloom", False), ("dynamic", False), ("longrope", False)),
    ],
)
def test_padding_changes_no_answer_in_any_kind_of_model(name, padded):
    model = tiny(name)
    format = make_format("int2", read_geometry(model), 4, 2)
    rows = random_ids(4, 40).tolist()
    items = [Item("t", tuple(row[9 * at :]), (5, 6, 7), "x", 8) for at, row in enumerate(rows)]
    for one in (None, format):
        assert may_pad(model, one) == padded
        if padded:
            alone = [continuations(model, [item], one)[0] for item in items]
            assert continuations(model, items, one) == alone


def test_long_contexts_are_answered_few_at_a_time():
    def item(tokens):
        return Item("passkey", (1,) * tokens, (2,), "1", 1)

    items = [item(tokens) for tokens in (9000, 2048, 100, 2000, 2048, 2048, 2048)]
    together = batches(items, padded=True)
    assert together == [[2, 3, 1, 4], [5, 6], [0]]


def test_scores_stand_in_the_items_order_whatever_was_answered_together(opened, prose):
    by_task = [
        make_items(task, opened.tokenizer, prose, count=3) for task in ("divergence", "copy")
    ]
    items = [item for pair in zip(*by_task, strict=True) for item in pair]
    format = make_format("int2", read_geometry(opened.model), 0, 0)
    run = TaskRun(opened, items)
    run.measure("full", None)
    found = {(one.task, one.measure): one.per_item for one in run.measure("int2", format)}
    expected = {}
    for item in items:
        new, reference = (continuations(opened.model, [item], cache)[0] for cache in (format, None))
        for name, value in outcome(item, opened.tokenizer.decode(new), new, reference).items():
            expected[item.task, name] = (*expected.get((item.task, name), ()), value)
    assert found == expected
    assert len(set(found["divergence", "tokens"])) > 1


def test_tasks_are_named_once_and_unknown_ones_refused(opened, prose, monkeypatch):
    monkeypatch.setattr(tasks, "demo_prose", lambda: prose)

    def named(*names):
        return [item.task for item in task_items(opened, names, 2)]

    assert named("copy", "passkey", "copy") == ["copy", "copy", "passkey", "passkey"]
    assert list(dict.fromkeys(named("copy", "all"))) == list(TASKS)
    assert named() == []
    with pytest.raises(RecipeError, match="no task 'poetry'; choose among passkey"):
        named("poetry")


def test_the_command_prints_one_table_and_keeps_the_scores(
    tiny_model_dir, opened, tiny_text_file, tmp_path, prose, monkeypatch
):
    monkeypatch.setattr(tasks, "demo_prose", lambda: prose)
    text = ["--dataset", str(tiny_text_file), "--split", "test"]
    recipe = load_recipe(
        "cq-8c8b",
        {
            "calibration.dataset": str(tiny_text_file),
            "calibration.split": "train",
            "calibration.sequences": 4,
            "calibration.sequence_length": 64,
            "kmeans.iterations": 2,
            "format": "cq-8c4b",
            "window": 8,
            "sinks": 2,
        },
    )
    calibrate(opened, recipe, tmp_path / "cal")
    command = ["check", str(tiny_model_dir), str(tmp_path / "cal"), *text, "--windows", "1"]
    command += ["--window-length", "64", "--device", "cpu", "--compare", "int4"]
    asked = ["--generation", "copy,divergence", "--items", "2"]

    def invoke(*more):
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(invoke(*asked, "--json"))["generation"]
    assert found.keys() == {"tasks", "items", "seed", "scores"}
    assert (found["tasks"], found["items"]) == (["copy", "divergence"], 2)
    labels = ["fp32 (full)", "cq-8c4b fisher", "int4"]
    expected = [
        (label, task, measure)
        for label in labels
        for task, measure in (
            *(("copy", "exact"), ("copy", "words")),
            *(("divergence", "tokens"), ("divergence", "equal")),
        )
    ]
    assert [(s["format"], s["task"], s["measure"]) for s in found["scores"]] == expected
    assert found["scores"][0].keys() == {
        *("format", "task", "measure", "group", "items"),
        *("score", "score_se", "difference", "difference_se"),
        *("higher_is_better", "per_item"),
    }
    kept = json.loads((tmp_path / "cal" / "reports" / "quality.json").read_text())
    assert kept["generation"] == found
    printed = invoke(*asked)
    for row in generation_rows([Score(**one) for one in found["scores"]]):
        assert any(all(cell in line for cell in row) for line in printed.splitlines())


def score(format, measure="exact", group=None, **changes):
    values = {"score": 0.95, "score_se": 0.0487, "difference": 0.0, "difference_se": 0.0}
    fixed = {"format": format, "task": "passkey", "measure": measure, "group": group, "items": 20}
    return {**fixed, **values, **changes}


def test_the_card_shows_generation_where_it_was_measured(calibration):
    quality = calibration / "reports" / "quality.json"
    assert read_quality(calibration).generation is None
    scores = [
        score("full precision (fp32)"),
        score("full precision (fp32)", group="256 tokens", score_se=None),
        score("K 4c3b, V 8c4b", score=0.85, difference=-0.1, difference_se=0.0688),
        score("K 4c3b, V 8c4b", group="256 tokens", score=0.8, difference=-0.15),
    ]
    section = {"tasks": ["passkey"], "items": 20, "seed": 0, "scores": scores}
    edit_json(quality, lambda q: q.update(generation=section))
    text = (export(calibration, calibration.parent / "out").folder / "README.md").read_text()
    lines = text.replace("\u00a0", " ").splitlines()
    assert "| Task, measure | full precision (fp32) | K 4c3b, V 8c4b |" in lines
    assert "| passkey, exact | 0.95 ± 0.0487 | 0.85 ± 0.0487 (-0.1 ± 0.0688) |" in lines
    assert "| passkey, exact, 256 tokens | 0.95 | 0.8 ± 0.0487 (-0.15 ± 0) |" in lines
    assert "and downstream tasks were not" not in text
    options = re.search(r"cqtool check .*?```", text, re.DOTALL)[0].replace("\\\n", "").split()
    at = options.index("--generation")
    assert options[at : at + 4] == ["--generation", "passkey", "--items", "20"]
    flags = {flag for one in get_command(app).commands["check"].params for flag in one.opts}
    assert {"--generation", "--items"} <= flags

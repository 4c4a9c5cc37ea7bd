"""Recipes: what is accepted, what a mistake says, and what the shipped files promise."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_artifact import edit_json

from cqtool.errors import ArtifactError, RecipeError
from cqtool.files import digest_json
from cqtool.recipe import (
    Recipe,
    load_recipe,
    recipe_folder,
    recipe_from,
    recipe_names,
    text_overrides,
)
from cqtool.spec import CacheSpec, CQSpec

MINIMAL = "name: mine\nformat: cq-4c8b\n"


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text))
    return str(caught.value)


def test_the_recipe_of_a_calibration_or_artifact(
    calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"name": "mine", "format": "cq-4c8b", "sinks": 2, "grouping": "pairs"}
    edit_json(calibration / "cq_config.json", lambda c: c.update(recipe=recipe))
    monkeypatch.chdir(calibration.parent)
    for place in (calibration.name, str(calibration)):
        found = load_recipe(place, {"calibration.seed": 3})
        assert (found.name, found.sinks, found.calibration.seed) == ("mine", 2, 3)
    with pytest.raises(ArtifactError, match="neither a calibration folder nor an artifact"):
        load_recipe(str(calibration.parent))


@pytest.mark.parametrize(
    ("name", "bits"), [("cq-2c8b", 4), ("cq-4c8b", 2), ("cq-8c10b", 1.25), ("cq-8c8b", 1)]
)
def test_shipped_recipe_has_the_bits_of_its_name(name: str, bits: float) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.spec.name == name
    assert recipe.spec.bits_per_channel == bits
    assert (recipe.calibration.sequences, recipe.calibration.sequence_length) == (16, 2048)
    assert (recipe.window, recipe.sinks) == (128, 4)


def test_every_file_in_the_folder_is_a_valid_recipe_named_like_its_file() -> None:
    assert set(recipe_names()) >= {"cq-2c8b", "cq-4c8b", "cq-8c10b", "cq-8c8b", "demo"}
    for name in recipe_names():
        assert load_recipe(name).name == name
        assert load_recipe(str(recipe_folder() / f"{name}.yaml")) == load_recipe(name)


def test_each_objective_is_one_field_away() -> None:
    for objective in ("uniform", "fisher"):
        assert load_recipe("cq-8c8b", {"objective": objective}).objective == objective


def test_keys_and_values_may_differ(tmp_path: Path) -> None:
    text = "name: mine\nformat: {key: cq-4c8b, value: cq-8c8b}\nwindow: 0\nsinks: 0\n"
    assert load_recipe(write(tmp_path, text)).spec == CacheSpec(CQSpec(4, 8), CQSpec(8, 8))


def test_what_is_written_to_json_reads_back() -> None:
    recipe = load_recipe("demo", {"gates.max_ppl_increase": "3%"})
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(("written", "value"), [('"3%"', 0.03), ("3%", 0.03), ("0.03", 0.03)])
def test_percent_and_fraction_mean_the_same(tmp_path: Path, written: str, value: float) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL + f"gates: {{max_ppl_increase: {written}}}\n"))
    assert recipe.gates.max_ppl_increase == value


def test_a_wrong_key_names_line_key_guess_and_what_is_allowed(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "kmeans:\n  iteratons: 5\n")
    assert message == (
        f"{tmp_path}/mine.yaml:4: unknown key 'kmeans.iteratons'. Did you mean 'iterations'? "
        "Allowed here: engine, iterations, init."
    )


def test_a_wrong_value_names_line_key_guess_and_what_is_allowed(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "\n# why\nobjective: fischer\n")
    assert message == (
        f"{tmp_path}/mine.yaml:5: 'fischer' is not possible for 'objective'. Did you mean "
        "'fisher'? Allowed: uniform, fisher, query."
    )


@pytest.mark.parametrize(
    ("line", "key", "allowed"),
    [
        ("window: -1", "'window'", "at least 0"),
        ("window: 12.5", "'window'", "a whole number"),
        ("window: true", "'window'", "a whole number"),
        ("window: '128'", "'window'", "a whole number"),
        ("calibration: 5", "'calibration'", "keys and values"),
        ("calibration: {sequences: 0}", "'calibration.sequences'", "at least 1"),
        ("gates: {max_ppl_increase: 3 pct}", "'gates.max_ppl_increase'", "such as 3%"),
        ("gates: {min_top1: 120%}", "'gates.min_top1'", "at most 1"),
        ("gates: {max_kl: .nan}", "'gates.max_kl'", "a finite number"),
        ("description: 5", "'description'", "text"),
    ],
)
def test_each_kind_of_mistake_has_its_line_and_fix(
    tmp_path: Path, line: str, key: str, allowed: str
) -> None:
    message = refusal(tmp_path, MINIMAL + line + "\n")
    assert "mine.yaml:3: " in message
    assert key in message
    assert allowed in message


@pytest.mark.parametrize("name", ["cq-8c8", "int4", "cq-8c17b", "cq-0c8b"])
def test_an_impossible_format_is_refused_where_it_stands(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, f"name: mine\nformat: {name}\n")
    assert "mine.yaml:2: 'format'" in message
    assert "cq-8c8b" in message


def test_every_mistake_is_named_in_the_order_of_the_file(tmp_path: Path) -> None:
    message = refusal(tmp_path, "format: cq-4c8b\nwindow: x\nname: mine\nsinks: y\n")
    assert [line.split(": ")[0] for line in message.splitlines()] == [
        f"{tmp_path}/mine.yaml:2",
        f"{tmp_path}/mine.yaml:4",
    ]


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "'format' is missing" in refusal(tmp_path, "name: mine\n")


def test_a_key_given_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "kmeans:\n  init: random\n  init: kmeans++\n")
    assert "mine.yaml:5: the key 'kmeans.init' stands already in line 4" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1\n",
        "a: [\n",
        "3: 4\n",
        "? [a]\n: 1\n",
        "a: *nowhere\n",
        "a: &x {b: *x}\n",
        "a: \x00",
    ],
)
def test_what_is_no_recipe_at_all_is_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    assert "mine.yaml" in refusal(tmp_path, text)


def test_python_objects_are_not_built(tmp_path: Path) -> None:
    text = MINIMAL + "description: !!python/object/apply:os.getcwd []\n"
    assert "mine.yaml:3" in refusal(tmp_path, text)


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean cq-8c8b\?.*cq-2c8b, cq-2c8b-bal"):
        load_recipe("cq-8c8")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no file"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_an_override_replaces_one_field_only() -> None:
    recipe, plain = load_recipe("demo", {"calibration.seed": 7}), load_recipe("demo")
    assert recipe.calibration.seed == 7
    assert recipe.differences(plain) == ["calibration"]
    changed = plain.calibration.model_copy(update={"seed": 7})
    assert recipe == plain.model_copy(update={"calibration": changed})


def test_a_wrong_override_is_blamed_on_the_option_not_on_the_file() -> None:
    with pytest.raises(RecipeError, match=r"^the option for calibration\.seed: '-3' .* at least 0"):
        load_recipe("demo", {"calibration.seed": -3})


def test_another_dataset_drops_what_belonged_to_the_recipes_own(tmp_path: Path) -> None:
    text = MINIMAL + "calibration: {dataset: a/b, config: c, split: s, column: body, revision: r}\n"
    path = write(tmp_path, text)
    changed = load_recipe(path, text_overrides("calibration", "my.txt", None, None, None))
    assert changed.calibration.dataset == "my.txt"
    assert (changed.calibration.config, changed.calibration.split) == (None, None)
    assert (changed.calibration.column, changed.calibration.revision) == ("text", None)
    same = load_recipe(path, text_overrides("calibration", None, None, "test", None))
    assert (same.calibration.dataset, same.calibration.config) == ("a/b", "c")
    assert same.calibration.split == "test"


def test_the_digest_follows_what_decides_a_calibration_and_nothing_else() -> None:
    plain = load_recipe("demo")
    for key, value in {
        "format": "cq-4c8b",
        "window": 64,
        "sinks": 0,
        "grouping": "pairs",
        "objective": "uniform",
        "gain": "token",
        "sharing": "heads",
        "kmeans.iterations": 7,
        "calibration.seed": 1,
    }.items():
        assert load_recipe("demo", {key: value}).digest != plain.digest, key
    for key, value in {"description": "x", "evaluation.windows": 1, "gates.max_kl": 1.0}.items():
        assert load_recipe("demo", {key: value}).digest == plain.digest, key


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("demo").window = 0  # type: ignore[misc]


def test_groups_are_chosen_for_both_kinds_or_for_each(tmp_path: Path) -> None:
    for line, groups in (
        ("", ("contiguous", "contiguous")),
        ("grouping: correlation\n", ("correlation", "correlation")),
        ("grouping: pairs\n", ("pairs", "correlation")),
        ("grouping: balanced\n", ("balanced", "balanced")),
        ("grouping: balanced-pairs\n", ("balanced-pairs", "balanced")),
        ("grouping: {key: pairs}\n", ("pairs", "contiguous")),
        ("grouping: {value: correlation}\n", ("contiguous", "correlation")),
        ("grouping: my/groups.safetensors\n", ("file", "file")),
        ("grouping: {key: pairs, value: file, file: a.safetensors}\n", ("pairs", "file")),
    ):
        recipe = load_recipe(write(tmp_path, MINIMAL + line))
        assert (recipe.spec.key.grouping, recipe.spec.value.grouping) == groups
        assert recipe.spec.name == "cq-4c8b"
        again = Recipe.model_validate(recipe.model_dump(mode="json"))
        assert again == recipe and again.digest == recipe.digest


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("grouping: correlated", "'correlated' is not possible for 'grouping'. Did you mean "),
        ("grouping: {value: pairs}", "'grouping.value'. Allowed: contiguous, correlation, bal"),
        ("grouping: file", "write {key: file, value: file, file: groups.safetensors}"),
        ("grouping: {file: groups.safetensors}", "the name needs keys or values to use it for"),
        ("grouping: {keys: pairs}", "unknown key 'grouping.keys'. Did you mean 'key'?"),
    ],
)
def test_a_wrong_grouping_is_one_sentence(tmp_path: Path, line: str, says: str) -> None:
    message = refusal(tmp_path, MINIMAL + line + "\n")
    assert says in message and "mine.yaml:3: " in message
    assert "\n" not in message


def test_a_recipe_from_before_there_were_groupings_keeps_its_digest() -> None:
    plain = load_recipe("demo")
    fields = plain.model_dump(mode="json")
    later = ("layers", "grouping", "feedback", "gain", "sharing")
    for judged in ("name", "description", "evaluation", "gates", *later):
        del fields[judged]
    # A later field that is not set may be left out as well.
    assert plain.digest in (
        digest_json(fields),
        digest_json({name: value for name, value in fields.items() if value is not None}),
    )
    grouped = load_recipe("demo", {"grouping": "correlation"})
    assert grouped.digest != plain.digest
    assert grouped.differences(plain) == plain.differences(grouped) == ["grouping"]


def test_the_encoding_follows_from_objective_and_feedback() -> None:
    made = {
        ("fisher", "none"): "nearest",
        ("uniform", "none"): "nearest",
        ("query", "none"): "metric",
        ("query", "ldlq"): "ldlq",
    }
    for (objective, feedback), encoding in made.items():
        spec = load_recipe("demo", {"objective": objective, "feedback": feedback}).spec
        assert (spec.key.encoding, spec.value.encoding) == (encoding, encoding)
    assert load_recipe("demo", {"gain": "token"}).spec.rate_of(1) == (
        "1 bit per channel and 8 bits per head and token"
    )
    with pytest.raises(RecipeError, match="write objective: query, or feedback: none"):
        load_recipe("demo", {"feedback": "ldlq"})


def test_layers_may_have_codes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    plain = MINIMAL + "grouping: correlation\n"
    path.write_text(plain + "layers:\n  0-2: cq-4c8b\n  7: {key: cq-8c8b, value: cq-4c8b}\n")
    recipe = load_recipe(str(path))
    spec = recipe.spec
    names = [
        (one.key.name, one.value.name)
        for one in (spec.of_head(layer, 0) for layer in (0, 2, 3, 6, 7, 8))
    ]
    most = (spec.key.name, spec.value.name)
    few = [("cq-4c8b", "cq-4c8b")] * 2
    assert names == [*few, most, most, ("cq-8c8b", "cq-4c8b"), most]
    assert spec.name == f"{spec.key.name}-mixed" and not spec.of_head(0, 0).layers
    assert spec.of_head(0, 0).key.grouping == spec.layers[1].value.grouping == "correlation"
    assert recipe_from(recipe.model_dump(mode="json"), {}, origin="again") == recipe
    path.write_text(plain)
    assert load_recipe(str(path)).digest != recipe.digest


@pytest.mark.parametrize(
    ("layers", "wrong"),
    [
        ("{3-1: cq-4c8b}", "names no layers"),
        ("{first: cq-4c8b}", "names no layers"),
        ("{0-3: cq-4c8b, 3: cq-2c8b}", "each once"),
        ("{5: cq-4c8b, 1: cq-2c8b}", "lowest index"),
        ("{5: int4}", "not a coupled format"),
    ],
)
def test_layers_that_make_no_sense_are_refused(layers: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL + f"layers: {layers}\n")
    with pytest.raises(RecipeError, match=wrong):
        load_recipe(str(path))


def test_several_texts_are_a_list_of_names_or_of_places_with_shares(tmp_path: Path) -> None:
    text = MINIMAL + (
        "calibration:\n  sequences: 20\n  dataset:\n  - notes.jsonl\n"
        "  - {dataset: a/b, config: c, split: s, column: body, revision: r, share: 30%}\n"
    )
    recipe = load_recipe(write(tmp_path, text))
    first, second = recipe.calibration.parts
    assert (first.dataset, first.column, first.share) == ("notes.jsonl", "text", 1.0)
    assert (second.dataset, second.config, second.split) == ("a/b", "c", "s")
    assert (second.column, second.revision, second.share) == ("body", "r", 0.3)
    again = Recipe.model_validate(recipe.model_dump(mode="json"))
    assert again == recipe and again.digest == recipe.digest
    other = load_recipe(write(tmp_path, text.replace("30%", "40%")))
    assert other.digest != recipe.digest and other.differences(recipe) == ["calibration"]


def test_a_single_text_is_written_as_before_there_were_several() -> None:
    fields = load_recipe("cq-8c8b", {"calibration.split": "train"}).calibration
    assert list(fields.model_dump(mode="json").items()) == [
        ("dataset", "auto"),
        ("config", None),
        ("split", "train"),
        ("column", "text"),
        ("revision", None),
        ("sequences", 16),
        ("sequence_length", 2048),
        ("seed", 0),
    ]
    (part,) = fields.parts
    assert (part.dataset, part.split, part.share) == ("auto", "train", 1.0)


@pytest.mark.parametrize(
    ("written", "line", "says"),
    [
        ("dataset: 5", 4, "'5' is not possible for 'calibration.dataset'; give a name, or a list"),
        ("dataset: []", 4, "the list is empty"),
        ("dataset: !!set {a, b}", 4, "give a name, or a list of names"),
        ("dataset: [a, 5]", 4, "'5' is not possible for 'calibration.dataset.1'"),
        ("dataset:\n  - a\n  - {dataset: b, shar: 2}", 6, "Did you mean 'share'? Allowed here: da"),
        ("dataset:\n  - a\n  - dataset: b\n    share: 0", 7, "give a number above 0"),
        ("dataset:\n  - share: 3 parts", 5, "such as 3%"),
        ("dataset: [a, b]\n  split: test", 5, "write {dataset: ..., split: test} in the recipe's"),
        ("dataset: [a, b]\n  column: body", 5, "'calibration.column': it belongs to one text"),
    ],
)
def test_a_wrong_list_of_texts_is_one_sentence_with_its_line(
    tmp_path: Path, written: str, line: int, says: str
) -> None:
    message = refusal(tmp_path, MINIMAL + f"calibration:\n  {written}\n")
    assert message.startswith(f"{tmp_path}/mine.yaml:{line}: ") and says in message
    assert "\n" not in message


def test_only_calibration_takes_several_texts(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "evaluation: {dataset: [a, b]}\n")
    assert "'evaluation.dataset'; give text" in message


def test_an_option_given_several_times_replaces_the_recipes_text(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "calibration: {dataset: a/b, config: c, column: body}\n")
    several = text_overrides("calibration", ["x.txt", "y.txt"], None, None, None)
    found = load_recipe(path, several).calibration
    assert [(part.dataset, part.column) for part in found.parts] == [
        ("x.txt", "text"),
        ("y.txt", "text"),
    ]
    once = load_recipe(path, text_overrides("calibration", ["x.txt"], None, None, None))
    assert once.calibration.dataset == "x.txt"
    assert text_overrides("calibration", [], None, None, None) == {}
    split = text_overrides("calibration", ["x.txt", "y.txt"], None, "test", None)
    with pytest.raises(RecipeError, match=r"^the option for calibration\.split: .* to one text"):
        load_recipe(path, split)


def test_an_unknown_key_of_an_optional_part_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, MINIMAL + "tuning:\n  step: 5\n")
    assert "mine.yaml:4: unknown key 'tuning.step'. Did you mean 'steps'?" in message

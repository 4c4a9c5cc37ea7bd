"""Codes of single heads, from a recipe to generated text: each head gets what it would alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file
from two_heads import Store
from typer.testing import CliRunner, Result

from cqtool.artifact.push import push
from cqtool.artifact.speed import read_speed
from cqtool.bench.caches import bind
from cqtool.bench.formats import open_artifact
from cqtool.cache import CQCache
from cqtool.cache.codec import HeadsCodec
from cqtool.cache.loading import load_format
from cqtool.cli.app import app
from cqtool.codebooks import calibrate as module
from cqtool.codebooks.calibrate import calibrate
from cqtool.codebooks.engines import FaissEngine
from cqtool.codebooks.fit import fit_layer
from cqtool.errors import RecipeError
from cqtool.geometry import KeyRotation
from cqtool.models.load import OpenedModel, open_model
from cqtool.progress import SILENT
from cqtool.recipe import Recipe, load_recipe, recipe_from, recipe_of
from cqtool.spec import KINDS, CacheSpec, CQSpec, LayerCodes
from cqtool.tuning.trainer import Trainer

CODES = ["cq-8c4b", "cq-4c3b"]
RECIPE = """name: by-head
format: cq-8c4b
window: 8
sinks: 2
layers:
  1: {key: [cq-8c4b, cq-4c3b], value: cq-8c3b}
"""


def fitted(spec: CacheSpec, objective: Any) -> Any:
    groups = torch.stack([torch.arange(8), torch.arange(8).flip(0)])
    given: Any = dict.fromkeys(KINDS, groups)
    store: Any = Store()
    rotation = KeyRotation("half", 8, 0, 0)
    engine = FaissEngine(20, "kmeans++")
    with SILENT.task("fit", 1) as task:
        return fit_layer(store, 0, spec, objective, engine, 1, task, rotation, given)


@pytest.mark.parametrize("gain", ["none", "token"])
@pytest.mark.parametrize(
    ("objective", "encoding"),
    [("uniform", "nearest"), ("fisher", "nearest"), ("query", "metric"), ("query", "ldlq")],
)
@pytest.mark.parametrize(
    "grouping", ["contiguous", "correlation", "pairs", "balanced", "balanced-pairs", "file"]
)
def test_a_head_is_fitted_as_if_all_heads_had_its_code(
    grouping: str, objective: str, encoding: str, gain: str
) -> None:
    of_values = {"pairs": "correlation", "balanced-pairs": "balanced"}.get(grouping, grouping)
    rest = {"encoding": encoding, "gain": gain}
    keys: Any = [CQSpec(c, b, grouping, **rest) for c, b in ((4, 3), (2, 2))]  # type: ignore[arg-type]
    values: Any = [CQSpec(c, b, of_values, **rest) for c, b in ((2, 2), (8, 4))]  # type: ignore[arg-type]
    own = LayerCodes(0, 0, tuple(keys), tuple(values))
    found = fitted(CacheSpec(keys[0], values[0], layers=(own,)), objective)
    assert sorted(found.codebooks) == [f"{kind}.heads.{head}" for kind in KINDS for head in (0, 1)]
    for head in (0, 1):
        whole = fitted(CacheSpec(keys[head], values[head]), objective)
        for kind in KINDS:
            name, one = f"{kind}.heads.{head}", slice(head, head + 1)
            assert found.codebooks[name].equal(whole.codebooks[kind][one])
            order = found.channels[name]
            if order is None:
                assert whole.channels[kind] is None
            else:
                assert order.equal(whole.channels[kind][one])
            assert found.extras[name].keys() == whole.extras[kind].keys()
            for part, extra in found.extras[name].items():
                torch.testing.assert_close(extra, whole.extras[kind][part][one], rtol=0, atol=0)


@pytest.fixture(scope="module")
def opened(tiny_model_dir: Path) -> OpenedModel:
    return open_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def recipe(tiny_text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    settings = {
        "calibration.dataset": str(tiny_text_file),
        "calibration.sequences": 4,
        "calibration.sequence_length": 64,
        "kmeans.iterations": 5,
    }
    return load_recipe(str(path), settings)


@pytest.fixture(scope="module")
def finished(opened: OpenedModel, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibration") / "cal"
    calibrate(opened, recipe, out)
    return out


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def test_an_interrupted_calibration_ends_in_the_same_bytes(
    opened: OpenedModel,
    recipe: Recipe,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, out = module.write_fit, tmp_path / "cal"

    def stopped(path: Path, fit: Any) -> None:
        original(path, fit)
        if path.stem == "layer-001":
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        calibrate(opened, recipe, out)
    # Both layers are read back now, those of single heads too.
    monkeypatch.setattr(module, "fit_layer", None)
    calibrate(opened, recipe, out, resume=True)
    for name in ("codebooks.safetensors", "cq_config.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_a_recipe_comes_back_from_what_it_made(finished: Path, recipe: Recipe) -> None:
    again = recipe_of(finished)
    assert again == recipe and again.digest == recipe.digest and again.spec == recipe.spec
    fields = recipe.model_dump(mode="json")
    assert fields["layers"] == {"1": {"key": CODES, "value": "cq-8c3b"}}
    assert recipe_from(json.loads(json.dumps(fields)), {}, origin="again") == recipe
    swapped = load_recipe(
        str(finished), {"layers": {"1": {"key": CODES[::-1], "value": "cq-8c3b"}}}
    )
    assert swapped.digest != recipe.digest and swapped.differences(recipe) == ["layers"]


@pytest.mark.parametrize(
    ("lines", "line", "says"),
    [
        ("layers:\n  1: [cq-8c4b]", 4, "write a single code as it is"),
        ("layers:\n  1: {key: [], value: cq-8c4b}", 4, "write a single code as it is"),
        ("layers:\n  1: [cq-8c4b, int4]", 4, "'int4' is not a coupled format; write cq-<chan"),
        ("layers:\n  1: {key: [cq-8c4b, 5], value: cq-8c4b}", 4, "'5' is not a name"),
        ("layers:\n  1: {key: 5, value: cq-8c4b}", 4, "give a name, or a list with one for each"),
        ("sharing: heads\nlayers:\n  1: [cq-8c4b, cq-4c3b]", 3, "write sharing: none, or one code"),
    ],
)
def test_a_wrong_list_of_codes_is_one_sentence_with_its_line(
    lines: str, line: int, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nformat: cq-8c4b\n{lines}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ") and says in message and "\n" not in message


@pytest.mark.parametrize("format", ["[cq-8c4b, cq-4c3b]", "{key: [cq-8c4b], value: cq-8c4b}"])
def test_a_list_is_for_layers_only(format: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nformat: {format}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:2: .*layers"):
        load_recipe(str(path))


def test_the_wrong_number_of_heads_is_refused_with_the_right_one(
    opened: OpenedModel, recipe: Recipe, tmp_path: Path
) -> None:
    many = {"1": ["cq-8c4b"] * 3}
    wrong = recipe_from(recipe.model_dump(mode="json"), {"layers": many}, origin="x")
    with pytest.raises(
        RecipeError, match=r"3 codes for the keys of layer 1.*has 2 key/value heads"
    ):
        calibrate(opened, wrong, tmp_path / "cal")


def test_heads_are_coded_as_by_codecs_of_their_own(opened: OpenedModel, finished: Path) -> None:
    codec = load_format(finished, opened.model).layers[1].key
    assert isinstance(codec, HeadsCodec)
    books = load_file(finished / "codebooks.safetensors")
    vectors = torch.randn(2, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    found = codec.decode(codec.encode(vectors))
    for head in range(2):
        book = books[f"layers.1.key.heads.{head}.codebook"][0].float()
        groups = vectors[:, head].reshape(2, 5, book.shape[0], -1)
        apart = (groups[..., None, :].double() - book.double()).square().sum(-1)
        expected = book[torch.arange(book.shape[0]), apart.argmin(-1)].flatten(2)
        assert torch.equal(found[:, head].float(), expected)
    # As stored: 2 codes of 4 bits take a byte of each token and head, 4 codes of 3 bits two.
    assert codec.bits_per_channel == (8 / 16 + 16 / 16) / 2
    moved = codec.to(torch.device("meta")).decode(
        {name: one.to("meta") for name, one in codec.encode(vectors).items()}
    )
    assert moved.is_meta and moved.shape == vectors.shape


def test_checked_benched_exported_pushed_and_generated_with(
    opened: OpenedModel,
    finished: Path,
    tiny_model_dir: Path,
    tiny_text_file: Path,
    tmp_path: Path,
    hub: HubServer,
) -> None:
    text = ("--dataset", tiny_text_file, "--windows", 2, "--window-length", 48)
    checked = invoke("check", tiny_model_dir, finished, *text)
    assert checked.exit_code == 0, checked.output
    sizes = ("--prompt-tokens", 16, "--new-tokens", 4, "--batch", "1", "--device", "cpu")
    words = ("bench", tiny_model_dir, finished, "--part", "end-to-end", *sizes, "--keep")
    benched = invoke(*words)
    assert benched.exit_code == 0, benched.output
    speed = read_speed(finished)
    assert speed is not None and speed.generation is not None
    out = tmp_path / "artifact"
    exported = invoke("export", finished, "--out", out)
    assert exported.exit_code == 0, exported.output
    assert invoke("verify", out).exit_code == 0
    push(out, "org/by-head")
    assert invoke("verify", "org/by-head").exit_code == 0
    card = (out / "README.md").read_text()
    assert "| cq-4c3b | 0.75 | 1 (head 1) | – |" in card
    assert "| cq-8c4b | 0.5 | 0, 1 (head 0) | 0 |" in card
    page = (out / "reports" / "report.html").read_text()
    assert "1 (head 1)" in page and "differ between layers" in page
    said = invoke("generate", tiny_model_dir, out, "--prompt", "Some words", "--max-new-tokens", 5)
    assert said.exit_code == 0, said.output
    ids = opened.tokenizer("Some words to begin with", return_tensors="pt")
    made = []
    for folder in (finished, out, "org/by-head"):
        cache = CQCache.from_pretrained(folder, opened.model)
        made.append(
            opened.model.generate(**ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
        )
    assert torch.equal(made[0], made[1]) and torch.equal(made[1], made[2])


def test_a_bench_codes_as_the_cache_does(opened: OpenedModel, finished: Path) -> None:
    bound = bind(open_artifact(str(finished)), opened.model, 0)
    loaded = load_format(finished, opened.model)
    vectors = torch.randn(1, 2, 7, 16, generator=torch.Generator().manual_seed(0))
    for one, other in zip(bound.layers, loaded.layers, strict=True):
        for mine, theirs in ((one.key, other.key), (one.value, other.value)):
            coded, expected = mine.encode(vectors), theirs.encode(vectors)
            assert coded.keys() == expected.keys()
            assert all(torch.equal(coded[name], expected[name]) for name in coded)


def test_tuning_trains_every_head(
    finished: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = ("--steps", 4, "--batch", 2, "--sequences", 4, "--sequence-length", 48)
    rest = ("--held-out", 2, "--evaluate-every", 2, "--learning-rate", 0.05)
    out = tmp_path / "tuned"
    done = invoke("tune", tiny_model_dir, finished, "--out", out, *sizes, *rest)
    assert done.exit_code == 0, done.output
    before, after = (load_file(one / "codebooks.safetensors") for one in (finished, out))
    assert before.keys() == after.keys()
    assert all(not before[name].equal(after[name]) for name in before)
    # Stopped half-way and continued, each head's are the same.
    run_next, seen = Trainer.run_until_next_look, []

    def stops(self: Trainer) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(run_next(self))

    again = ("tune", tiny_model_dir, finished, "--out", tmp_path / "again", *sizes, *rest)
    monkeypatch.setattr(Trainer, "run_until_next_look", stops)
    assert invoke(*again).exit_code == 130
    monkeypatch.undo()
    assert invoke(*again, "--resume").exit_code == 0
    resumed = load_file(tmp_path / "again" / "codebooks.safetensors")
    assert all(resumed[name].equal(after[name]) for name in after)
    load_format(out, open_model(str(tiny_model_dir), device="cpu").model)

"""The documentation's examples run: Python, recipes and the reader of the artifact format."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cqtool.cache import CQCodec
from cqtool.codebooks import codes
from cqtool.data.mixture import apportion
from cqtool.quality import CheckSettings, check
from cqtool.recipe import load_recipe

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(page: str, mark: str, language: str) -> list[tuple[int, str]]:
    """Line and text of the code blocks of a page that carry a mark."""
    text = (DOCS / page).read_text(encoding="utf-8")
    pattern = rf"<!-- {mark} -->\n```{language}\n(.*?)```"
    return [
        (text[: found.start(1)].count("\n"), found[1])
        for found in re.finditer(pattern, text, re.DOTALL)
    ]


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python, one block after the other, in one namespace."""
    for line, block in blocks(page, "test", "python"):
        # The line numbers of a traceback are those of the page.
        exec(compile("\n" * line + block, DOCS / page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_model_dir, tiny_text_file) -> Path:
    """A folder as docs/python.md describes it, after its code has run there."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(tiny_model_dir, folder / "path/to/model")
    shutil.copy(tiny_text_file, folder / "path/to/text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("python.md", {})
    return folder


def test_the_python_page_runs_and_every_block_is_part_of_it(here):
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    assert len(blocks("python.md", "test", "python")) == text.count("```python")
    assert (here / "artifact" / "manifest.json").is_file()


def test_the_documented_reader_reads_an_artifact(here, monkeypatch):
    monkeypatch.chdir(here)
    names = run("artifact-format.md", {})
    config, tensors = names["open_artifact"](here / "artifact")
    own = load_file(here / "artifact" / "codebooks.safetensors")
    key = {"channels": 4, "bits": 8, "grouping": "contiguous"}
    key |= {"encoding": "nearest", "gain": "none", "sharing": "none"}
    assert config["cache"]["key"] == key and tensors.keys() == own.keys()
    generator = torch.Generator().manual_seed(0)
    for codebook in own.values():
        heads, groups, centroids, channels = codebook.shape
        vectors = torch.randn(1, heads, 5, groups * channels, generator=generator)
        expected = codes.assign(vectors, codebook)
        found = names["encode"](vectors[0].numpy(), codebook.float().numpy())
        assert (found == expected[0].numpy()).all()
        assert centroids == 256
        decoded = names["decode"](found, codebook.float().numpy())
        assert (decoded == codes.lookup(expected, codebook)[0].float().numpy()).all()
        dim = groups * channels
        order = torch.stack([torch.randperm(dim, generator=generator) for _ in range(heads)])
        codec = CQCodec(codebook, order)
        stored, order = codec.encode(vectors), order.short().numpy()
        found = names["encode"](vectors[0].numpy(), codebook.float().numpy(), order)
        assert (found == stored["codes"][0].numpy()).all()
        decoded = names["decode"](found, codebook.float().numpy(), order)
        assert (decoded == codec.decode(stored)[0].numpy()).all()


def test_the_documented_reader_knows_metrics_feedback_and_gains():
    names, generator = run("artifact-format.md", {}), torch.Generator().manual_seed(0)
    codebook = torch.randn(2, 3, 16, 4, generator=generator)
    order = torch.stack([torch.randperm(12, generator=generator) for _ in range(2)])
    root = torch.randn(2, 3, 4, 4, generator=generator)
    metric = root @ root.mT
    feedback = torch.randn(2, 12, 12, generator=generator).triu(4)
    for start in (4, 8):
        feedback[:, start:, : start + 4] = 0
    gains = torch.logspace(-2, 1, 256).repeat(2, 1) * torch.tensor([[1.0], [0.3]])
    vectors = torch.randn(1, 2, 50, 12, generator=generator) * 3
    for given in ((metric, None, None), (metric, feedback, None), (metric, feedback, gains)):
        codec = CQCodec(codebook, order, *given)
        stored, rest, found_gains = codec.encode(vectors), vectors[0].numpy(), None
        if given[2] is not None:
            places = names["find_gains"](rest, gains.numpy())
            assert (places == stored["gains"][0, ..., 0].numpy()).all()
            found_gains = np.take_along_axis(gains.numpy(), places, axis=1)
            rest = rest / found_gains[..., None]
        tensors = [None if tensor is None else tensor.numpy() for tensor in given[:2]]
        found = names["encode"](rest, codebook.numpy(), order.numpy(), *tensors)
        assert (found == codes.unpack(stored["codes"], 4, 3)[0].numpy()).all()
        decoded = names["decode"](found, codebook.numpy(), order.numpy(), found_gains)
        assert (decoded == codec.decode(stored)[0].numpy()).all()


@pytest.mark.parametrize("bits", [1, 3, 6, 8, 10])
def test_the_documented_packing_is_that_of_the_cache(bits):
    names = run("artifact-format.md", {})
    some = torch.randint(0, 1 << bits, (4, 7), generator=torch.Generator().manual_seed(bits))
    expected = codes.pack(some, bits)
    for row, packed in zip(some.tolist(), expected, strict=True):
        assert names["pack"](row, bits) == bytes(packed.tolist())


def test_every_field_of_the_files_is_documented(here):
    """Each key of each JSON file stands as code in the page, or in the guide's part on recipes."""
    page = (DOCS / "artifact-format.md").read_text(encoding="utf-8")
    page += (DOCS / "guide.md").read_text(encoding="utf-8").split("## Recipes")[1]
    files = ("cq_config.json", "calibration.json", "reports/quality.json", "manifest.json")
    contents = [json.loads((here / "artifact" / name).read_text()) for name in files]
    free = {"fingerprint", "versions", "files", "timings"}  # keyed by parameters, packages, paths
    missing = {
        key
        for content in contents
        for key in keys(content, free)
        if not re.search(rf"`(?:[a-z0-9_.\[\]]+\.)?{key}(?:[.\[][^`]*)?`", page)
    }
    assert not missing


def keys(value: Any, closed: set[str]) -> set[str]:
    """All keys of nested objects, those inside `closed` ones left out."""
    if isinstance(value, list):
        return {key for item in value for key in keys(item, closed)}
    if not isinstance(value, dict):
        return set()
    inner = {
        key for name, item in value.items() if name not in closed for key in keys(item, closed)
    }
    return set(value) | inner


def test_the_guide_names_the_reports_of_other_windows(here):
    from cqtool.models.load import open_model

    opened = open_model(str(here / "path/to/model"), device="cpu")
    text = str(here / "path/to/text.txt")
    settings = CheckSettings(
        dataset=text, split="test", windows=2, window_length=48, window=0, sinks=0
    )
    check(opened, here / "calibration", settings)
    assert (here / "calibration/reports/quality-window0-sinks0.json").is_file()
    guide = (DOCS / "guide.md").read_text(encoding="utf-8")
    assert "reports/quality-window0-sinks0.json" in guide


def test_the_recipes_in_the_guide_are_ones(tmp_path):
    path = tmp_path / "mine.yaml"
    recipes = []
    for _, text in blocks("guide.md", "recipe", "yaml"):
        path.write_text(text)
        recipes.append(load_recipe(str(path), {}))
    recipe, mixed = recipes
    assert recipe.spec.name == "k-cq-8c8b-v-cq-4c8b"
    assert recipe.gates.max_ppl_increase == pytest.approx(0.03)
    text = mixed.calibration
    counts = apportion([part.share for part in text.parts], text.sequences)
    assert counts == [8, 16, 8]  # as the sentence below it says


def test_the_ci_example_is_a_workflow():
    ((_, text),) = blocks("guide.md", "ci", "yaml")
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert all("uses" in step or "run" in step for step in job["steps"])
    assert len(text.splitlines()) <= 18


def test_anchors_exist():
    for page in (DOCS.parent / "README.md", *DOCS.glob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
            if "://" not in target:
                linked = (page.parent / target) if target else page
                heads = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
                slugs = {
                    re.sub(r"[^a-z0-9 _-]", "", head.lower()).replace(" ", "-") for head in heads
                }
                assert anchor in slugs, f"{page.name}: {target}#{anchor}"

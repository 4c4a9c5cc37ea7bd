"""Groups that a file lists: taken as they are, or refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cqtool.artifact.export import export
from cqtool.codebooks import calibrate as module
from cqtool.codebooks.calibrate import calibrate, partial_folder
from cqtool.codebooks.engines import FaissEngine
from cqtool.codebooks.groups_file import read_groups
from cqtool.errors import RecipeError
from cqtool.geometry import NO_ROTATION, LayerGeometry, ModelGeometry
from cqtool.layout.config import read_config
from cqtool.models.load import open_model
from cqtool.models.probe import read_geometry
from cqtool.recipe import load_recipe, recipe_of
from cqtool.sampling import SampleStore
from cqtool.spec import CacheSpec, CQSpec

GEOMETRY = ModelGeometry(4, (LayerGeometry(2, 8, 12, None, NO_ROTATION),) * 3)
SPEC = CacheSpec(CQSpec(4, 3, "file"), CQSpec(4, 3, "file"))


def orders(heads: int = 2, keys: int = 8, values: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{layer}.{kind}.channels": torch.stack(
            [torch.randperm(dim, generator=generator) for _ in range(heads)]
        )
        for layer in range(3)
        for kind, dim in (("key", keys), ("value", values))
    }


def written(folder: Path, **changes: torch.Tensor | None) -> Path:
    """A file of groups; a change of None leaves a tensor out."""
    tensors = orders() | changes
    path = folder / "groups.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_an_order_is_kept_as_it_is_listed(tmp_path, dtype, monkeypatch):
    listed = {name: order.to(dtype) for name, order in orders().items()}
    written(tmp_path, **listed, other=torch.ones(3))
    monkeypatch.chdir(tmp_path)
    found = read_groups("groups.safetensors", SPEC, GEOMETRY)
    assert {
        f"layers.{layer}.{kind}.channels": order.tolist()
        for layer, kinds in found.items()
        for kind, order in kinds.items()
    } == {name: order.tolist() for name, order in orders().items()}
    assert all(order.dtype == torch.int64 for kinds in found.values() for order in kinds.values())


def test_heads_with_codes_of_their_own_list_a_row_each(tmp_path):
    whole = orders()["layers.1.key.channels"]
    rows = {
        f"layers.1.key.heads.{head}.channels": whole[head : head + 1].clone() for head in (0, 1)
    }
    path = written(tmp_path, **{"layers.1.key.channels": None}, **rows)
    assert read_groups(str(path), SPEC, GEOMETRY)[1]["key"].equal(whole)
    rows["layers.1.key.heads.1.channels"] = whole.clone()
    path = written(tmp_path, **{"layers.1.key.channels": None}, **rows)
    with pytest.raises(RecipeError, match=r"heads\.1\.channels is int64 \[2, 8\]"):
        read_groups(str(path), SPEC, GEOMETRY)
    rows["layers.1.key.heads.1.channels"] = None
    path = written(tmp_path, **{"layers.1.key.channels": None}, **rows)
    with pytest.raises(RecipeError, match=r"no tensor layers\.1\.key\.channels"):
        read_groups(str(path), SPEC, GEOMETRY)


def test_only_what_the_format_asks_for_is_read(tmp_path):
    values = {f"layers.{layer}.value.channels": None for layer in range(3)}
    path = written(tmp_path, **values)
    spec = CacheSpec(CQSpec(4, 3, "file"), CQSpec(4, 3, "correlation"))
    found = read_groups(str(path), spec, GEOMETRY)
    assert [list(kinds) for kinds in found.values()] == [["key"]] * 3
    assert read_groups(None, CacheSpec(CQSpec(4, 3), CQSpec(4, 3)), GEOMETRY) == {}


def twice(head: int, channel: int) -> torch.Tensor:
    order = torch.arange(8).repeat(2, 1)
    order[head, 5] = channel
    return order


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (None, r"has no tensor layers.2.key.channels; add it, integers \[2, 8\]"),
        (torch.arange(8), r"is int64 \[8\]; for this model give integers \[2, 8\]"),
        (torch.arange(8).repeat(3, 1), r"is int64 \[3, 8\]; for this model give integers \[2, 8\]"),
        (torch.arange(8.0).repeat(2, 1), r"is float32 \[2, 8\]; for this model give integers"),
        (twice(1, 4), "row of kv head 1 is not every channel from 0 to 7 once"),
        (twice(0, 8), "row of kv head 0 is not every channel from 0 to 7 once"),
        (twice(0, -1), "row of kv head 0 is not every channel from 0 to 7 once"),
    ],
)
def test_what_is_no_order_of_every_layer_is_refused(tmp_path, tensor, says):
    path = written(tmp_path, **{"layers.2.key.channels": tensor})
    with pytest.raises(RecipeError, match=says):
        read_groups(str(path), SPEC, GEOMETRY)


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "groups.safetensors"
    with pytest.raises(RecipeError, match=r"no file .*groups.safetensors .* give its path"):
        read_groups(str(path), SPEC, GEOMETRY)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(RecipeError, match="cannot be read as a safetensors file"):
        read_groups(str(path), SPEC, GEOMETRY)


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    return open_model(str(tiny_model_dir), device="cpu")


def recipe(text: Path, grouping: object):
    values = {
        "calibration.dataset": str(text),
        "calibration.sequences": 4,
        "calibration.sequence_length": 64,
        "kmeans.iterations": 5,
        "format": "cq-8c4b",
        "grouping": grouping,
    }
    return load_recipe("cq-8c8b", values)


@pytest.fixture(scope="module")
def chosen(opened, tiny_text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("chosen") / "cal"
    calibrate(opened, recipe(tiny_text_file, "correlation"), out)
    return out


def test_the_codebooks_of_a_calibration_are_such_a_file(chosen, opened, tiny_text_file, tmp_path):
    name = "codebooks.safetensors"
    own = recipe(tiny_text_file, str(chosen / name))
    calibrate(opened, own, tmp_path / "cal")
    assert (tmp_path / "cal" / name).read_bytes() == (chosen / name).read_bytes()
    assert read_config(tmp_path / "cal").cache.value.grouping == "file"
    assert recipe_of(tmp_path / "cal") == own
    export(tmp_path / "cal", tmp_path / "artifact")
    assert read_config(tmp_path / "artifact").recipe["grouping"] == f"./{name}"
    assert recipe_of(tmp_path / "artifact").grouping.file == f"./{name}"
    for file in (tmp_path / "artifact").rglob("*"):
        assert file.is_dir() or str(chosen).encode() not in file.read_bytes(), file
    card = (tmp_path / "artifact" / "README.md").read_text()
    assert "each group of 8 given channels of a head" in card


def test_a_wrong_file_is_refused_before_anything_is_sampled(opened, tiny_text_file, tmp_path):
    path = written(tmp_path)
    with pytest.raises(RecipeError, match=r"layers.0.key.channels is int64 \[2, 8\]"):
        calibrate(opened, recipe(tiny_text_file, str(path)), tmp_path / "cal")
    assert not partial_folder(tmp_path / "cal").exists()


def test_fits_of_a_file_that_changed_since_are_not_taken(chosen, opened, tiny_text_file, tmp_path):
    path, tensors = tmp_path / "groups.safetensors", load_file(chosen / "codebooks.safetensors")
    store, geometry = SampleStore.open(chosen), read_geometry(opened.model)
    engine, fits = FaissEngine(5, "kmeans++"), []
    for turn in (1, 7):
        save_file({n: t.roll(turn, 1) for n, t in tensors.items() if "channels" in n}, path)
        own = recipe(tiny_text_file, {"key": "file", "file": str(path)})
        fits.append(module.fit_codebooks(store, geometry, own, engine, tmp_path / "fits"))
        listed = tensors["layers.1.key.channels"].roll(turn, 1)
        assert torch.equal(fits[-1][1].channels["key"], listed.long())
        assert fits[-1][1].channels["value"] is None
    assert not torch.equal(fits[0][1].codebooks["key"], fits[1][1].codebooks["key"])
    assert json.loads(own.model_dump_json())["grouping"]["file"] == str(path)

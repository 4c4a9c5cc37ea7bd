"""Options are checked before anything long begins, and say what to write instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cqtool.bench.formats import (
    BenchFormat,
    open_artifact,
    parse_formats,
    require_divisible,
    require_geometry,
)
from cqtool.bench.settings import GROUPINGS, BenchSettings, make_settings
from cqtool.bench.shapes import SHAPES
from cqtool.bench.suites import TARGET_LOADS, decode_target
from cqtool.errors import ArtifactError, RecipeError
from cqtool.geometry import KeyRotation, LayerGeometry, ModelGeometry
from cqtool.spec import CacheSpec, CQSpec, LayerCodes


def test_without_shape_and_suite_the_targets_run() -> None:
    settings = BenchSettings()
    assert settings.chosen_suite == "targets"
    assert settings.chosen_parts == ("decode", "encode")
    assert BenchSettings(target="tiny").chosen_parts == ("decode", "encode", "end-to-end")


def test_words_are_split_at_commas_and_k_is_1024() -> None:
    settings = make_settings(
        target="tiny", parts=["encode,decode"], batches=["1, 2", "5"], tokens=["8k"], caches=None
    )
    assert settings.batches == (1, 2, 5)
    assert settings.tokens == (8192,)
    assert settings.chosen_parts == ("decode", "encode")
    assert settings.caches == ("dynamic", "static", "cq")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": ["0"]}, "--batch 0 is too small; use 1 or more"),
        ({"batches": ["1,-2"]}, "--batch -2 is not a whole number"),
        ({"tokens": ["8m"]}, "--tokens 8m is not a whole number"),
        ({"target": "tiny", "new": 1}, "--new-tokens 1 is too small; use 2 or more"),
        ({"parts": ["prefill"]}, "--part prefill is not known; use decode, encode, end-to-end"),
        ({"caches": ["paged"]}, "--cache paged is not known; use dynamic, static"),
        ({"dtype": "int8"}, "--dtype int8 is not known"),
        ({"suite": "all"}, "--suite all is not known; use targets, generation"),
        ({"target": "tiny", "suite": "targets"}, "give either a shape or --suite"),
        ({"artifact": "a"}, "Give the shape of the artifact's base model"),
        ({"target": "t", "artifact": "a", "groupings": ["pairs"]}, "is that of --format"),
        ({"groupings": ["file"]}, "--grouping file is not known; use contiguous, correlation"),
        ({"window": -1}, "--window -1 is too small"),
    ],
)
def test_wrong_options_are_refused_with_the_fix(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        make_settings(**given)
    assert message in str(raised.value)


def test_a_suite_without_the_part_asked_for_says_what_it_has() -> None:
    settings = make_settings(suite="generation", parts=["decode"])
    with pytest.raises(RecipeError, match="suite generation has only end-to-end"):
        _ = settings.chosen_parts


def test_formats_by_name_with_keys_and_values_of_their_own() -> None:
    (mixed,) = parse_formats(["k-cq-4c8b-v-cq-8c8b"], window=3)
    assert (mixed.spec.key.channels, mixed.spec.value.channels, mixed.spec.window) == (4, 8, 3)
    assert mixed.name == "k-cq-4c8b-v-cq-8c8b"
    with pytest.raises(RecipeError, match="int4"):
        parse_formats(["int4"])
    (odd,) = parse_formats(["cq-3c8b"])
    with pytest.raises(RecipeError, match="128 channels do not divide into groups of 3"):
        require_divisible(odd, SHAPES["llama-2-7b"])


def test_each_format_comes_with_each_grouping_and_values_have_no_pairs() -> None:
    names = ["cq-8c8b", "k-cq-4c8b-v-cq-8c8b"]
    found = parse_formats(names, groupings=GROUPINGS)
    assert [format.name for format in found] == [
        name + ending
        for name in names
        for ending in ("", *(f" {grouping}" for grouping in GROUPINGS[1:]))
    ]
    assert [(format.spec.key.grouping, format.spec.value.grouping) for format in found[4:]] == [
        ("contiguous", "contiguous"),
        ("correlation", "correlation"),
        ("pairs", "correlation"),
        ("balanced-pairs", "balanced"),
    ]
    (odd,) = parse_formats(["cq-1c2b"], groupings=("pairs",))
    with pytest.raises(RecipeError, match="Groups of 1 channels cannot hold whole pairs"):
        require_divisible(odd, SHAPES["tiny"])


def test_layers_with_codes_of_their_own_are_measured_one_of_each_code() -> None:
    (plain,) = parse_formats(["cq-8c8b"])
    assert plain.of_each_code == [plain]
    finer, coarse = CQSpec(4, 8, "correlation"), CQSpec(8, 4)
    spec = CacheSpec(
        plain.spec.key, plain.spec.value, 5, 2,
        (LayerCodes(0, 0, finer, coarse), LayerCodes(2, 2, finer, coarse)),
    )  # fmt: skip
    rotations = [KeyRotation("half", 8, offset) for offset in range(4)]
    geometry = ModelGeometry(2, tuple(LayerGeometry(2, 8, 8, None, turn) for turn in rotations))
    books = tuple((torch.full((2, 1, 1, 8), i), torch.full((2, 1, 1, 8), -i)) for i in range(4))
    orders = tuple((torch.arange(8).roll(i).expand(2, -1), None) for i in range(4))
    mixed = BenchFormat(spec, books, geometry, "folder", orders)
    first, second = mixed.of_each_code
    assert (first.name, second.name) == ("k-cq-4c8b-v-cq-8c4b correlation/contiguous", "cq-8c8b")
    assert (second.spec.window, second.spec.sinks, second.spec.layers) == (5, 2, ())
    assert second.codebooks is not None
    for found, own in zip(second.codebooks[0], books[1], strict=True):
        assert isinstance(found, torch.Tensor) and torch.equal(found, own)
    assert second.rotation(0, 8) == rotations[1]
    key_order, value_order = second.layer_channels(0, 2, 8, rotations[1], 0)
    assert key_order is not None and key_order.tolist() == orders[1][0].tolist()
    assert value_order is None


def test_heads_with_codes_of_their_own_are_measured_one_of_each_pair() -> None:
    cq = {name: CQSpec.parse(name) for name in ("cq-4c3b", "cq-8c4b", "cq-4c2b")}
    keys = ("cq-4c3b", "cq-8c4b", "cq-4c3b")
    spec = CacheSpec(
        *[cq["cq-4c3b"]] * 2,
        layers=(LayerCodes(1, 1, tuple(cq[name] for name in keys), cq["cq-4c2b"]),),
    )
    layer = LayerGeometry(3, 8, 8, None, KeyRotation("half", 8, 0))
    books = {
        layer: torch.stack([torch.full((2, 8, 4), 10.0 * layer + head) for head in range(3)])
        for layer in (0, 2)
    }
    own = tuple(
        torch.full((1, 8 // cq[name].channels, cq[name].centroids, cq[name].channels), 10.0 + head)
        for head, name in enumerate(keys)
    )
    values = torch.stack([torch.full((2, 4, 4), 20.0 + head) for head in range(3)])
    order = torch.stack([torch.arange(8).roll(head) for head in range(3)])
    mixed = BenchFormat(
        spec,
        ((books[0], books[0]), (own, values), (books[2], books[2])),
        ModelGeometry(3, (layer,) * 3),
        "folder",
        ((None, None), (order, None), (None, None)),
    )
    found = mixed.of_each_code
    assert [one.name for one in found] == [
        "cq-4c3b", "k-cq-4c3b-v-cq-4c2b", "k-cq-8c4b-v-cq-4c2b",
    ]  # fmt: skip
    # Which heads stand in the place of heads 0, 1 and 2.
    for one, heads in zip(found[1:], ((0, 2, 0), (1, 1, 1)), strict=True):
        assert one.codebooks is not None and one.channels is not None
        (key, value), (key_order, _) = one.codebooks[0], one.channels[0]
        assert isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)
        assert key[:, 0, 0, 0].tolist() == [10 + head for head in heads]
        assert value[:, 0, 0, 0].tolist() == [20 + head for head in heads]
        assert key_order is not None and key_order[:, 0].tolist() == [order[h, 0] for h in heads]


def test_an_artifact_keeps_its_codebooks_and_is_refused_for_another_shape(calibration) -> None:
    format = open_artifact(str(calibration))
    assert format.name == "k-cq-4c3b-v-cq-8c4b"
    assert format.codebooks is not None
    assert [tuple(book.shape) for book in format.codebooks[1]] == [(2, 4, 8, 4), (2, 2, 16, 8)]
    with pytest.raises(ArtifactError, match=r"2 layers of 2 kv heads.*llama-2-7b has 32 of 32"):
        require_geometry(format, SHAPES["llama-2-7b"])


def test_targets_are_those_of_the_four_cases() -> None:
    found = [[decode_target(load.name, name) for load in TARGET_LOADS] for name in ("cq-8c8b",)]
    assert found == [[6.5, 5.0, 4.5, 4.0]]
    assert decode_target("something else", "cq-8c8b") is None
    assert decode_target(TARGET_LOADS[0].name, "cq-16c8b") is None
    assert [load.bytes_16bit for load in TARGET_LOADS] == [2 << 30, 1 << 29, 1 << 29, 1 << 29]

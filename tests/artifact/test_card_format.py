"""What a card says of the format: codes of every layer, and which tokens are coded."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from cqtool.artifact.card_format import format_section, kept_tokens
from cqtool.artifact.markdown import dataset, size, table
from cqtool.layout.config import CQConfig, read_config
from cqtool.spec import CacheSpec, CQSpec, LayerCodes


@pytest.fixture
def config(calibration: Path) -> CQConfig:
    """Of a model of 30 layers."""
    config = read_config(calibration)
    layers = (config.geometry.layers[0],) * 30
    return replace(config, geometry=replace(config.geometry, layers=layers))


def layers_of(cell: str) -> set[int]:
    """What a cell such as ``1, 5–7`` names."""
    found: set[int] = set()
    for part in cell.split(", "):
        first, _, last = part.partition("–")
        if first:
            found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_table_of_layers_gives_back_every_layer_s_code(config: CQConfig, seed: int) -> None:
    draw = random.Random(seed)
    codes = [CQSpec(8, 6), CQSpec(8, 8), CQSpec(8, 10), CQSpec(4, 8)]
    mixed, layer = [], draw.randint(0, 3)
    while layer < 30:
        last = min(29, layer + draw.randint(0, 3))
        mixed.append(LayerCodes(layer, last, draw.choice(codes), draw.choice(codes)))
        layer = last + draw.randint(1, 4)
    cache = CacheSpec(codes[0], codes[0], layers=tuple(mixed))
    lines = list(format_section(replace(config, cache=cache)))[-1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    rates = [float(bits) for _, bits, _, _ in rows]
    assert rates == sorted(rates)
    for name, bits, keys, values in rows:
        assert float(bits) == CQSpec.parse(name).bits_per_channel
        of_layers = [cache.of_layer(index) for index in range(30)]
        assert layers_of(keys) == {i for i, one in enumerate(of_layers) if one.key.name == name}
        assert layers_of(values) == {i for i, one in enumerate(of_layers) if one.value.name == name}
    covered = [layers_of(row[2]) for row in rows]
    assert set().union(*covered) == set(range(30)) and sum(map(len, covered)) == 30


def test_one_code_for_all_layers_has_no_table_and_is_said_once(config: CQConfig) -> None:
    spec = CQSpec(8, 6, sharing="heads")
    (lines,) = format_section(replace(config, cache=CacheSpec(spec, spec, window=5)))
    assert lines.splitlines()[0] == (
        "- **Keys and values**: 6 bits for each group of 8 neighbouring channels of a head "
        "(0.75 bits per channel), the index of one of 64 learned centroids, the same for all heads "
        "of a layer; keys are coded before RoPE and rotated after decoding."
    )
    (lines,) = format_section(replace(config, cache=CacheSpec(spec, CQSpec(8, 8))))
    keys, values, tokens = lines.splitlines()
    assert "6 bits" in keys and "before RoPE" in keys
    assert "(1 bit per channel)" in values and "RoPE" not in values
    assert tokens == "- **Tokens**: all are coded, from the first to the newest."


@pytest.mark.parametrize(
    ("sinks", "window", "words"),
    [
        (4, 128, "the first 4 and the last 128 tokens"),
        (0, 128, "the last 128 tokens"),
        (1, 0, "the first 1 token"),
        (0, 0, ""),
    ],
)
def test_tokens_that_stay_are_named_and_no_others(sinks: int, window: int, words: str) -> None:
    spec = CQSpec(8, 8)
    assert kept_tokens(CacheSpec(spec, spec, sinks=sinks, window=window)) == words


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 bytes"), (1000, "1 kB"), (7768528, "7.77 MB"), (999_700, "1 MB"),
     (5_903_904, "5.9 MB"), (4_200_000_000, "4.2 GB"), (1_234_000_000_000, "1.23 TB")],
)  # fmt: skip
def test_sizes_are_in_the_unit_that_a_reader_needs(count: int, text: str) -> None:
    assert size(count) == text


def test_a_figure_and_its_error_stay_on_one_line() -> None:
    assert table(["Cache", "KL"], [["int4", "0.1 ± 0.2"]]) == (
        "| Cache | KL |\n| :--- | ---: |\n| int4 | 0.1\u00a0±\u00a00.2 |"
    )


def test_a_local_text_names_its_split_only_where_it_is_a_part() -> None:
    assert dataset({"dataset": "/home/me/a.txt", "split": "all"}) == "`a.txt`"
    assert dataset({"dataset": "/home/me/a.txt", "split": "test"}) == "`a.txt` (test)"
    assert dataset({"dataset": "org/all", "split": "all"}).endswith("/org/all) (all)")

"""What a card says of the format: codes of every layer, and which tokens are coded."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cqtool.artifact.card_format import format_section, kept_tokens
from cqtool.artifact.markdown import dataset, size, table
from cqtool.layout.config import CQConfig, read_config
from cqtool.spec import KINDS, CacheSpec, Codes, CQSpec, LayerCodes


@pytest.fixture
def config(calibration: Path) -> CQConfig:
    """Of a model of 30 layers."""
    config = read_config(calibration)
    layers = (config.geometry.layers[0],) * 30
    return replace(config, geometry=replace(config.geometry, layers=layers))


def places_of(cell: str) -> set[tuple[int, int]]:
    """The layers and heads that a cell such as ``1, 5–7, 9 (heads 0, 2)`` names, of 3 heads."""
    found: set[tuple[int, int]] = set()
    for part in re.split(r", (?![^(]*\))", cell):
        layers, _, heads = part.partition(" (")
        own = numbers(re.sub(r"heads? |\)", "", heads)) if heads else {0, 1, 2}
        found |= {(layer, head) for layer in numbers(layers) for head in own}
    return found


def numbers(text: str) -> set[int]:
    """What ``1, 5–7`` names."""
    found: set[int] = set()
    for part in text.split(", "):
        first, _, last = part.partition("–")
        if first:
            found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_table_of_layers_gives_back_every_layer_s_code(
    config: CQConfig, seed: int, by_head: bool
) -> None:
    draw = random.Random(seed)
    codes = [CQSpec(8, 6), CQSpec(8, 8), CQSpec(8, 10), CQSpec(4, 8)]

    def drawn() -> Codes:
        if by_head and draw.random() < 0.5:
            return tuple(draw.choices(codes, k=3))
        return draw.choice(codes)

    mixed, layer = [], draw.randint(0, 3)
    while layer < 30:
        last = min(29, layer + draw.randint(0, 3))
        mixed.append(LayerCodes(layer, last, drawn(), drawn()))
        layer = last + draw.randint(1, 4)
    cache = CacheSpec(codes[0], codes[0], layers=tuple(mixed))
    geometry = replace(config.geometry, layers=config.geometry.layers[:1] * 30)
    *_, note, cells = format_section(replace(config, cache=cache, geometry=geometry))
    assert ("heads of a layer" in note) is any(
        isinstance(one, tuple) for own in mixed for one in (own.key, own.value)
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in cells.splitlines()[2:]
    ]
    rates = [float(bits) for _, bits, _, _ in rows]
    assert rates == sorted(rates)
    places = {(layer, head) for layer in range(30) for head in range(3)}
    for name, bits, *columns in rows:
        assert float(bits) == CQSpec.parse(name).bits_per_channel
        for kind, cell in zip(KINDS, columns, strict=True):
            own = {place for place in places if cache.of_head(*place).code(kind).name == name}
            assert places_of(cell) == own
    covered = [places_of(row[2]) for row in rows]
    assert set().union(*covered) == places and sum(map(len, covered)) == 90


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

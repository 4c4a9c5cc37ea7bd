"""The card's words on the format: what is stored of a key and of a value, and of which tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Protocol

from cqtool.artifact.markdown import number, table
from cqtool.layout.config import CQConfig
from cqtool.spec import GROUPED_CHANNELS, KINDS, CacheSpec, CQSpec

OBJECTIVES: dict[str, str] = {
    "uniform": "plain squared errors",
    "fisher": "squared errors weighted with the loss's squared gradients",
    "query": "errors as queries and output projections read them",
}
"""What k-means made small, by :data:`cqtool.spec.Objective`, for people."""

LAYER_COLUMNS = ("Code", "Bits per channel", "Keys of layers", "Values of layers")


class Kept(Protocol):
    """How many of the first and of the newest tokens stay as they are."""

    @property
    def sinks(self) -> int: ...
    @property
    def window(self) -> int: ...


def format_section(config: CQConfig) -> Iterator[str]:
    """What becomes of a key, of a value and of the first and last tokens, one line each.

    Where layers differ, a table follows of which of them has which code.
    """
    cache = config.cache
    kept = kept_tokens(cache)
    yield "\n".join(
        [
            *_code_lines(cache),
            f"- **Tokens**: {kept} stay in the model's own precision."
            if kept
            else "- **Tokens**: all are coded, from the first to the newest.",
        ]
    )
    if cache.layers:
        who = "Layers, and heads of a layer," if by_head(cache) else "Layers,"
        yield (
            f"{who} counted from 0, differ in their codes. The name {cache.key.name} stands for "
            f"{cache.key.channels} channels in a code of {cache.key.bits} bits:"
        )
        yield table(list(LAYER_COLUMNS), layer_rows(config))


def by_head(cache: CacheSpec) -> bool:
    """Whether heads of some layer have codes of their own."""
    return any(len(own.codes(kind)) > 1 for own in cache.layers for kind in KINDS)


def kept_tokens(kept: Kept) -> str:
    """Which tokens stay as they are, such as ``the first 4 and the last 128 tokens``; empty for
    none."""
    counts = {"first": kept.sinks, "last": kept.window}
    ends = [f"the {end} {count}" for end, count in counts.items() if count]
    if not ends:
        return ""
    return f"{' and '.join(ends)} {'token' if max(counts.values()) == 1 else 'tokens'}"


def _code_lines(cache: CacheSpec) -> list[str]:
    key, value = _code(cache, cache.key), _code(cache, cache.value)
    if key == value:
        rotated = "; keys are coded before RoPE and rotated after decoding"
        return [f"- **Keys and values**: {key}{rotated}."]
    return [
        f"- **Keys**: {key}; coded before RoPE and rotated after decoding.",
        f"- **Values**: {value}.",
    ]


def _code(cache: CacheSpec, code: CQSpec) -> str:
    of = f"{GROUPED_CHANNELS[code.grouping]} of a head"
    shared = ", the same for all heads of a layer" if code.sharing == "heads" else ""
    if cache.layers:
        return f"the index of a learned centroid for each group of {of}{shared}"
    bits = code.bits_per_channel
    return (
        f"{code.bits} bits for each group of {code.channels} {of} "
        f"({number(bits)} {'bit' if bits == 1 else 'bits'} per channel), the index of one of "
        f"{code.centroids} learned centroids{shared}"
    )


def layer_rows(config: CQConfig) -> list[list[str]]:
    """A row for every code: its name, its bits, and the layers of each kind that have it, or the
    heads of layers whose heads differ; below :data:`LAYER_COLUMNS`."""
    cache, layers = config.cache, range(len(config.geometry.layers))
    codes = {code.name: code for i in layers for kind in KINDS for code in cache.codes_of(i, kind)}
    return [
        [
            name,
            number(code.bits_per_channel),
            *(_places([cache.codes_of(i, kind) for i in layers], name) for kind in KINDS),
        ]
        for name, code in sorted(codes.items(), key=lambda one: one[1].bits_per_channel)
    ]


def _places(layers: Sequence[tuple[CQSpec, ...]], name: str) -> str:
    """Where a code is used, such as ``1, 5–7, 9 (head 2), 11 (heads 0–1)``; a dash for nowhere."""
    found: list[tuple[int, str]] = []
    for index, codes in enumerate(layers):
        heads = [head for head, code in enumerate(codes) if code.name == name]
        if heads:
            some = f"{'head' if len(heads) == 1 else 'heads'} {_ranges(heads)}"
            found.append((index, "" if len(heads) == len(codes) else f" ({some})"))
    runs = (
        [_ranges([index for index, _ in run])] if not some else [f"{i}{some}" for i, _ in run]
        for some, run in ((some, list(run)) for some, run in groupby(found, key=itemgetter(1)))
    )
    return ", ".join(chain.from_iterable(runs)) or "–"


def _ranges(indices: Sequence[int]) -> str:
    """Ascending indices with neighbours joined, such as ``1, 5–7``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ", ".join("–".join(map(str, run)) for run in runs)

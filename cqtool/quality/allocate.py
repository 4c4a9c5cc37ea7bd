"""Formats for single layers or heads: a budget of bits spent where coding costs the most.

The costs of all parts (:mod:`cqtool.quality.costs`) are taken to add up, and bits are allocated by
them as Shoham and Gersho do (1988). Bits are those that a codec stores: packed codes, and gains
where there are any.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from cqtool.codebooks.codes import code_bytes
from cqtool.errors import RecipeError
from cqtool.geometry import ModelGeometry
from cqtool.quality.costs import Curve, Part
from cqtool.spec import GAIN_BITS, KINDS, CQSpec, Gain, Kind

CODES = ("cq-8c6b", "cq-8c8b", "cq-8c10b", "cq-4c8b", "cq-2c8b")
"""What layers and heads may get unless told otherwise: what the kernels decode, 0.75 to 4 bits."""


@dataclass(frozen=True)
class Size:
    """How many channels one part has: `heads` of `dim` each."""

    heads: int
    dim: int

    @property
    def channels(self) -> int:
        """Of all heads."""
        return self.heads * self.dim

    def bits(self, code: CQSpec) -> int:
        """Bits that a token takes with `code`: each head's codes in whole bytes, and its gain."""
        gain = GAIN_BITS if code.gain == "token" else 0
        return self.heads * (8 * code_bytes(self.dim // code.channels, code.bits) + gain)

    def rate(self, code: CQSpec) -> float:
        """The same a channel, as a codec's and a report's ``bits_per_channel`` are."""
        return self.bits(code) / self.channels


def part_sizes(geometry: ModelGeometry, by_head: bool) -> dict[Part, Size]:
    """The size of each layer's keys and values, or of those of each of its heads."""
    return {
        Part(index, kind, head): Size(1 if by_head else layer.kv_heads, layer.dim(kind))
        for index, layer in enumerate(geometry.layers)
        for kind in KINDS
        for head in (range(layer.kv_heads) if by_head else (None,))
    }


def usable_codes(names: str | None, dims: Collection[int], gain: Gain = "none") -> list[CQSpec]:
    """The codes to choose from for a model with heads of `dims` channels.

    Args:
        names: of codes, with commas; None for those of :data:`CODES` that divide all heads.
        dims: channels of a head, of all layers' keys and values.
        gain: what the recipe says of gains.

    Raises:
        RecipeError: a name is none of a code, or its groups do not divide a head; or no code of
            :data:`CODES` divides all heads.
    """
    usable = []
    for name in dict.fromkeys(one.strip() for one in (names.split(",") if names else CODES)):
        code = CQSpec.parse(name)
        unfit = [dim for dim in sorted(dims) if dim % code.channels]
        if unfit and names:
            raise RecipeError(
                f"{name} does not fit: heads of {unfit[0]} channels do not divide into groups of "
                f"{code.channels}; leave it out of --codes."
            )
        if not unfit:
            usable.append(replace(code, gain=gain))
    if not usable:
        raise RecipeError("No code fits all heads of this model; name some with --codes.")
    return usable


def allocate(
    costs: Mapping[Part, Curve], sizes: Mapping[Part, Size], codes: Sequence[CQSpec], bits: float
) -> dict[Part, CQSpec]:
    """The codes with the least modelled KL at no more than `bits` a channel on average.

    An exact choice, by dynamic programming over the bits spent so far (a multiple-choice knapsack).

    Args:
        costs: what each part costs.
        sizes: of each part.
        codes: to choose from; all divide the heads. Of codes that a part stores in as many bits
            it may get the one with the most bits, then the one with the most channels.
        bits: the budget, a mean over all channels, of what is stored (:meth:`Size.rate`).

    Returns:
        A code for each part, in the order of `costs`.

    Raises:
        RecipeError: not even the smallest codes are within the budget, or it is no finite number.
    """
    if not math.isfinite(bits):
        raise RecipeError(f"A budget of {bits:g} bits is none; give a number such as --bits 1.25.")
    steps = sorted(codes, key=lambda code: (code.bits_per_channel, code.channels))
    # By bits a token, ascending as the codes do.
    offers = {part: {sizes[part].bits(code): code for code in steps} for part in costs}
    unit = math.gcd(*(one for offer in offers.values() for one in offer))
    channels = sum(sizes[part].channels for part in costs)
    largest = sum(max(offer) for offer in offers.values())
    # What a user writes is rounded, such as 0.8333333 for 5/6.
    budget = int(min(bits * channels + 1e-6, largest)) // unit
    smallest = sum(min(offer) for offer in offers.values())
    if budget < smallest // unit:
        raise RecipeError(
            f"A budget of {bits:g} bits a channel is below {smallest / channels:g}, what "
            f"{steps[0].name} takes; raise it, or name a smaller code."
        )
    # The least cost of the parts so far with at most so many units, and the code of the last one.
    least, choices = np.zeros(budget + 1), []
    for part, curve in costs.items():
        rows = np.full((len(offers[part]), budget + 1), np.inf)
        for row, (used, code) in zip(rows, offers[part].items(), strict=True):
            used //= unit
            if used <= budget:
                row[used:] = least[: budget + 1 - used] + curve.kl(sizes[part].rate(code))
        # Small numbers, since large models have thousands of heads.
        choices.append(rows.argmin(axis=0).astype(np.int16))
        least = rows.min(axis=0)
    chosen: dict[Part, CQSpec] = {}
    for part, choice in zip(reversed(list(costs)), reversed(choices), strict=True):
        used, chosen[part] = list(offers[part].items())[int(choice[budget])]
        budget -= used // unit
    return {part: chosen[part] for part in costs}


def modelled_kl(
    costs: Mapping[Part, Curve], chosen: Mapping[Part, CQSpec], sizes: Mapping[Part, Size]
) -> float:
    """The sum of what all parts cost with their codes, in nats a token."""
    return sum(curve.kl(sizes[part].rate(chosen[part])) for part, curve in costs.items())


def recipe_fields(chosen: Mapping[Part, CQSpec]) -> dict[str, Any]:
    """The fields `format` and `layers` of a recipe that say the same.

    `format` is what most layers have (most heads, where parts are heads), and `layers` the others,
    neighbours with the same together. Where the heads of a layer differ, a list names the code of
    each.
    """
    heads: dict[tuple[int, Kind], list[str]] = {}
    for part in sorted(chosen, key=lambda part: (part.layer, part.head or 0)):
        heads.setdefault((part.layer, part.kind), []).append(chosen[part].name)
    count = 1 + max(part.layer for part in chosen)
    layers = [tuple(heads[layer, kind] for kind in KINDS) for layer in range(count)]
    pairs = [pair for layer in layers for pair in zip(*layer, strict=True)]
    most = max(sorted(set(pairs)), key=pairs.count)
    written = [_written(*map(_names, layer)) for layer in layers]
    own: dict[str, Any] = {}
    for name, run in groupby(range(count), key=written.__getitem__):
        indices = list(run)
        if name != _written(*most):
            place = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
            own[place] = name
    return {"format": _written(*most), "layers": own}


def _names(codes: Sequence[str]) -> str | list[str]:
    """Of the heads of a layer: a single name where they have the same code."""
    return codes[0] if len(set(codes)) == 1 else list(codes)


def _written(key: str | list[str], value: str | list[str]) -> Any:
    return key if key == value else {"key": key, "value": value}

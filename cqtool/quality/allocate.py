"""Formats for single layers: a budget of bits spent where coding costs the most.

The keys or values of a layer cost a KL of d where they alone are coded at b bits. At b' bits they
are taken to cost ``d * PER_BIT ** (b - b')``, the exponential decay of high-rate quantization; for
errors of a Gaussian it is 4 a bit (Gersho and Gray, "Vector Quantization and Signal Compression",
1992, chapter 10). The costs of all parts are taken to add up. Bits are allocated by measured costs
as Shoham and Gersho do (1988).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from cqtool.errors import ArtifactError, RecipeError
from cqtool.layout.config import MAX_JSON_BYTES
from cqtool.layout.fields import Fields
from cqtool.spec import KINDS, CQSpec, Kind
from cqtool.strictjson import read_object

PER_BIT = 3.2
"""Divides the KL for each bit more: what the paper's formats do from 1 to 2 and on to 4 bits
(3.1 and 3.3, docs/quality.md), where theory has 4."""

CODES = ("cq-8c6b", "cq-8c8b", "cq-8c10b", "cq-4c8b", "cq-2c8b")
"""What layers may get unless told otherwise: those that the kernels decode, 0.75 to 4 bits."""

Part = tuple[int, Kind]
"""A layer's keys or values."""


def allocate(
    costs: Mapping[Part, float],
    rates: Mapping[Part, float],
    channels: Mapping[Part, int],
    codes: Sequence[CQSpec],
    bits: float,
) -> dict[Part, CQSpec]:
    """The codes with the least modelled KL at no more than `bits` a channel on average.

    An exact choice, by dynamic programming over the bits spent so far (a multiple-choice knapsack).

    Args:
        costs: KL of each part coded alone, in nats a token.
        rates: bits a channel at which that was measured.
        channels: of each part, kv_heads * head_dim.
        codes: to choose from.
        bits: the budget, a mean over all channels.

    Returns:
        A code for each part, in the order of `costs`.

    Raises:
        RecipeError: not even the smallest codes are within the budget.
    """
    steps = sorted(codes, key=lambda code: (code.bits_per_channel, code.channels))
    # Bits a token, in their largest common unit.
    spent = {
        part: [channels[part] // code.channels * code.bits for code in steps] for part in costs
    }
    unit = math.gcd(*(one for all_of in spent.values() for one in all_of))
    budget = int(bits * sum(channels.values()) + 1e-6) // unit
    if budget < sum(all_of[0] for all_of in spent.values()) // unit:
        raise RecipeError(
            f"A budget of {bits:g} bits a channel is below {steps[0].bits_per_channel:g}, what "
            f"{steps[0].name} takes; raise it, or name a smaller code."
        )
    # The least cost of the parts so far with at most so many units, and the code of the last one.
    least, choices = np.zeros(budget + 1), []
    for part in costs:
        offers = np.full((len(steps), budget + 1), np.inf)
        for row, code, used in zip(offers, steps, spent[part], strict=True):
            cost, used = _modelled(costs[part], rates[part], code), used // unit
            if used <= budget:
                row[used:] = least[: budget + 1 - used] + cost
        choices.append(offers.argmin(axis=0))
        least = offers.min(axis=0)
    chosen: dict[Part, CQSpec] = {}
    for part, choice in zip(reversed(list(costs)), reversed(choices), strict=True):
        step = int(choice[budget])
        chosen[part] = steps[step]
        budget -= spent[part][step] // unit
    return {part: chosen[part] for part in costs}


def measured_costs(report: Path) -> tuple[dict[Part, float], dict[Part, float]]:
    """What ``cqtool check --by-layer`` wrote: KL of each part coded alone, and its bits a channel.

    Raises:
        ArtifactError: `report` is no such report, or damaged.
    """
    remedy = "Run `cqtool check` with --by-layer."
    fields = Fields(read_object(report, remedy, limit=MAX_JSON_BYTES), str(report), remedy)
    if not fields.values.get("by_layer"):
        raise ArtifactError(f"{report} does not say what single layers cost. {remedy}")
    costs: dict[Part, float] = {}
    rates: dict[Part, float] = {}
    for one in fields.children("by_layer"):
        kind: Kind = "key" if one.choice("kind", KINDS) == "key" else "value"
        part = one.integer("layer", minimum=0), kind
        costs[part], rates[part] = max(0.0, one.number("kl")), one.number("bits_per_channel")
    return costs, rates


def modelled_kl(
    costs: Mapping[Part, float], rates: Mapping[Part, float], chosen: Mapping[Part, CQSpec]
) -> float:
    """The sum of what all parts cost with their codes, in nats a token."""
    return sum(_modelled(cost, rates[part], chosen[part]) for part, cost in costs.items())


def _modelled(cost: float, rate: float, code: CQSpec) -> float:
    return cost * math.pow(PER_BIT, rate - code.bits_per_channel)


def recipe_fields(chosen: Mapping[Part, CQSpec]) -> dict[str, Any]:
    """The fields `format` and `layers` of a recipe that say the same.

    `format` is what most layers have, and `layers` the others, neighbours with the same together.
    """
    count = 1 + max(layer for layer, _ in chosen)
    pairs = [tuple(chosen[layer, kind].name for kind in KINDS) for layer in range(count)]
    most = max(sorted(set(pairs)), key=pairs.count)
    layers: dict[str, Any] = {}
    for pair, run in groupby(range(count), key=pairs.__getitem__):
        indices = list(run)
        if pair != most:
            place = f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
            layers[place] = _written(pair)
    return {"format": _written(most), "layers": layers}


def _written(pair: tuple[str, ...]) -> Any:
    key, value = pair
    return key if key == value else {"key": key, "value": value}

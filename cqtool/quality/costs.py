"""What single layers or heads cost by the bits that they get: measured at some rates, modelled at
others.

The keys or values of a layer, or of one of its heads, cost a KL of d where they alone are coded at
b bits. At b' bits they are taken to cost ``d * PER_BIT ** (b - b')``, the exponential decay of
high-rate quantization; for errors of a Gaussian it is 4 a bit (Gersho and Gray, "Vector
Quantization and Signal Compression", 1992, chapter 10). What was measured at several rates gives
each part a decay of its own.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from cqtool.errors import ArtifactError
from cqtool.layout.config import MAX_JSON_BYTES
from cqtool.layout.fields import Fields
from cqtool.models.names import is_hub_id
from cqtool.spec import KINDS, Kind
from cqtool.strictjson import read_object

PER_BIT = 3.2
"""Divides the KL for each bit more: what the paper's formats do from 1 to 2 and on to 4 bits
(3.1 and 3.3, docs/quality.md), where theory has 4."""

MOST_PER_BIT = 8.0
"""The most that a bit is taken to divide the KL by where that was not measured: beyond theory's 4
and the 5.4 of the demo model's parts."""

_REMEDY = "Run `cqtool check` with --by-layer or --by-head."
_MOST_BITS, _MOST_KL = 32.0, 1e6
"""What no report exceeds: a float32 channel, and nats that no model's logits come to."""


class Part(NamedTuple):
    """The keys or values of a layer, or of one of its key/value heads.

    Attributes:
        layer: index of the layer.
        kind: ``key`` or ``value``.
        head: index of the head, None for all heads of the layer.
    """

    layer: int
    kind: Kind
    head: int | None = None

    @property
    def place(self) -> str:
        """The part in words, such as ``the key of head 1 of layer 7``."""
        head = "" if self.head is None else f"head {self.head} of "
        return f"the {self.kind} of {head}layer {self.layer}"


Points = Mapping[Part, tuple[float, float]]
"""Bits a channel of each part, and the KL measured there."""


@dataclass(frozen=True)
class Curve:
    """What one part costs by the bits that it gets.

    Attributes:
        points: bits a channel and the KL measured there, in nats a token; at least one, by bits,
            and no two with the same. More bits are taken to cost no more.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, measured: Iterable[tuple[float, float]]) -> Curve:
        """Of measurements in any order, of KL of at least 0; those with the same bits count with
        their mean.

        A KL of 0 says only that it was too small to be measured. It counts as what is left of the
        one before it when each bit divides that by :data:`MOST_PER_BIT`.
        """
        by_bits: dict[float, list[float]] = {}
        for bits, kl in measured:
            by_bits.setdefault(bits, []).append(kl)
        points: list[tuple[float, float]] = []
        for bits in sorted(by_bits):
            kl = sum(by_bits[bits]) / len(by_bits[bits])
            if points:
                before, most = points[-1]
                # Noise alone can make more bits look worse.
                kl = min(kl or most * MOST_PER_BIT ** (before - bits), most)
            points.append((bits, kl))
        return cls(tuple(points))

    def kl(self, bits: float) -> float:
        """The modelled KL at so many bits a channel.

        Exponential between two measured rates. Beyond them it goes on as between the nearest two,
        but a bit divides it by no more than :data:`MOST_PER_BIT`: two points that noise has moved
        apart, or that lie close together, say little about the rest of the curve. With one rate it
        falls by a factor of :data:`PER_BIT` a bit.
        """
        if len(self.points) == 1:
            rate, kl = self.points[0]
            return kl * math.pow(PER_BIT, rate - bits)
        after = bisect([rate for rate, _ in self.points], bits)
        after = min(max(after, 1), len(self.points) - 1)
        (low, first), (high, second) = self.points[after - 1 : after + 1]
        if not second:
            return first if bits <= low else 0.0
        decay = (math.log(first) - math.log(second)) / (high - low)
        if not low <= bits <= high:
            decay = min(decay, math.log(MOST_PER_BIT))
        rate, kl = (high, second) if bits > high else (low, first)
        return kl * math.exp(-decay * (bits - rate))


@dataclass(frozen=True)
class _Report:
    """What one report says of all layers, of all heads or of both, and of how it was measured,
    where it does."""

    name: str
    layers: Points
    heads: Points
    model: str | None
    text: str | None
    settings: tuple[int, int] | None
    mode: str | None


def measured_costs(reports: Sequence[Path], model: str | None = None) -> dict[Part, Curve]:
    """What ``cqtool check`` wrote about one model, its layers or its heads, at one rate or several.

    It is heads where all reports say what these cost. A KL below its own standard error counts as
    that.

    Args:
        reports: files of the same model, text, window, sinks and mode.
        model: what the calibration names its model, to be that of the reports. Only Hub ids are
            compared: local folders may have any name.

    Raises:
        ArtifactError: one is no such report, or damaged, or of another model, or they do not go
            together.
    """
    found = [_read(report) for report in reports]
    for one in found:
        if _differ(one.model, model):
            raise ArtifactError(
                f"{one.name} is of {one.model}, and the calibration of {model}; give a report of "
                "the same model."
            )
    points = _points_of_all(found)
    for (first, own), (second, other) in combinations(zip(found, points, strict=True), 2):
        both = f"{first.name} and {second.name}"
        if _differ(first.model, second.model):
            raise ArtifactError(
                f"{both} are of {first.model} and {second.model}; give reports of one model."
            )
        if own.keys() != other.keys():
            raise ArtifactError(
                f"{both} are of models with other layers or heads; give those of one model."
            )
        if first.text is None or first.text != second.text:
            raise ArtifactError(
                f"{both} were measured on different text, or do not say on which; run `cqtool "
                f"check {_option(own)}` on the same text for both."
            )
        if first.settings != second.settings:
            raise ArtifactError(
                f"{both} were measured with different windows or sinks; run `cqtool check "
                f"{_option(own)}` with the same --window and --sinks for both."
            )
        if first.mode != second.mode:
            raise ArtifactError(
                f"{both} were measured in modes {first.mode} and {second.mode}; run `cqtool check "
                f"{_option(own)}` with the same --mode for both."
            )
    return {part: Curve.through(one[part] for one in points) for part in points[0]}


def _points_of_all(found: Sequence[_Report]) -> list[Points]:
    if all(one.heads for one in found):
        return [one.heads for one in found]
    if all(one.layers for one in found):
        return [one.layers for one in found]
    of_layers = next(one.name for one in found if not one.heads)
    of_heads = next(one.name for one in found if not one.layers)
    raise ArtifactError(
        f"{of_layers} says what single layers cost, and {of_heads} what single heads do; give "
        "reports of --by-layer only, or of --by-head only."
    )


def _option(points: Points) -> str:
    return "--by-layer" if any(part.head is None for part in points) else "--by-head"


def _read(report: Path) -> _Report:
    fields = Fields(
        read_object(report, _REMEDY, limit=MAX_JSON_BYTES), name=str(report), remedy=_REMEDY
    )
    layers, heads = _points(fields, "by_layer"), _points(fields, "by_head")
    if not layers and not heads:
        raise ArtifactError(f"{report} does not say what single layers or heads cost. {_REMEDY}")
    evaluation = fields.child("evaluation") if _has(fields, "evaluation") else None
    # The first row is full precision, the second the calibration.
    rows = list(fields.children("rows"))[1:2] if _has(fields, "rows") else []
    settings = [tuple(row.integer(key, minimum=0) for key in ("window", "sinks")) for row in rows]
    return _Report(
        str(report),
        layers,
        heads,
        fields.string("model") if _has(fields, "model") else None,
        evaluation.string("digest") if evaluation and _has(evaluation, "digest") else None,
        (settings[0][0], settings[0][1]) if settings else None,
        fields.string("mode") if _has(fields, "mode") else None,
    )


def _points(fields: Fields, name: str) -> Points:
    points: dict[Part, tuple[float, float]] = {}
    for one in fields.children(name) if fields.values.get(name) else ():
        kind: Kind = "key" if one.choice("kind", KINDS) == "key" else "value"
        head = one.integer("head", minimum=0) if name == "by_head" else None
        part = Part(one.integer("layer", minimum=0), kind, head)
        bits = one.number("bits_per_channel", above=0)
        kl = max(0.0, one.number("kl"), one.optional_number("kl_se") or 0.0)
        if part in points or bits > _MOST_BITS or kl > _MOST_KL:
            wrong = "stands there twice" if part in points else "has figures that cannot be"
            raise ArtifactError(f"{one.name}: {part.place} {wrong}. {_REMEDY}")
        points[part] = bits, kl
    return points


def _has(fields: Fields, key: str) -> bool:
    return fields.values.get(key) is not None


def _differ(one: str | None, other: str | None) -> bool:
    """Whether two names of models are Hub ids, and not the same."""
    ids = {name for name in (one, other) if name is not None and is_hub_id(name)}
    return len(ids) == 2

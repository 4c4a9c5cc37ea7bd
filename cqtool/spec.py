"""What a cache format is: which code stands for how many channels, and what stays unquantized.

Plain dataclasses without dependencies, because the runtime that a consumer needs reads them too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cqtool.errors import RecipeError

Kind = Literal["key", "value"]
"""Which half of the cache a tensor belongs to."""

KINDS: tuple[Kind, Kind] = ("key", "value")

MAX_BITS = 16
"""Codes are held in at most 16 bits, so that they fit an int16/uint16 anywhere."""

Grouping = Literal["contiguous", "correlation", "pairs", "balanced", "balanced-pairs", "file"]
"""Which channels of a head form a group: neighbours; those that correlate; for keys, whole RoPE
pairs that correlate; those that theory expects the least error of; the same for keys, with regard
to RoPE's pairs; or those that a file lists."""

PAIRED_GROUPINGS: dict[str, Grouping] = {"pairs": "correlation", "balanced-pairs": "balanced"}
"""Groupings with regard to RoPE's pairs, which only keys have, and what values have beside them."""

GROUPED_CHANNELS: dict[Grouping, str] = {
    "contiguous": "neighbouring channels",
    "correlation": "correlated channels",
    "pairs": "channels in correlated RoPE pairs",
    "balanced": "channels in balanced groups",
    "balanced-pairs": "channels in balanced groups of RoPE pairs",
    "file": "given channels",
}
"""What a group consists of, for people."""

GROUPS_SUFFIX = ".safetensors"
"""How the name of a file of groups ends, by which a recipe tells it from a grouping's name."""

Objective = Literal["uniform", "fisher", "query"]
"""What k-means makes small: the squared error; the same weighted with squared gradients of the
loss; or that in the metric by which queries and output projections read the cache."""

Encoding = Literal["nearest", "metric", "ldlq"]
"""How a vector finds its codes: the nearest centroid of each group; the nearest in a metric of the
group; or the same group after group, each making up for the error of those before it."""

Gain = Literal["none", "token"]
"""Whether vectors are divided by their root mean square, kept in 8 bits a token and head."""

GAIN_BITS = 8
"""Bits of a gain."""

Sharing = Literal["none", "heads"]
"""Whether each key/value head of a layer has codebooks of its own, or all heads have the same."""

_CQ_NAME = re.compile(r"^cq-(\d{1,3})c(\d{1,2})b$")


@dataclass(frozen=True)
class CQSpec:
    """A coupled-quantization code: `channels` channels share one of `2**bits` centroids.

    Attributes:
        channels: how many channels of a head form a group (c in the paper).
        bits: bits of a code (b in the paper).
        grouping: which channels these are; the paper takes contiguous ones.
        encoding: how a vector finds its codes; the paper takes the nearest centroids.
        gain: whether each token's vector of a head has a gain of its own.
        sharing: whether the heads of a layer share their codebooks; in the paper each has its own.
    """

    channels: int
    bits: int
    grouping: Grouping = "contiguous"
    encoding: Encoding = "nearest"
    gain: Gain = "none"
    sharing: Sharing = "none"

    def __post_init__(self) -> None:
        if self.channels < 1 or not 1 <= self.bits <= MAX_BITS:
            raise RecipeError(
                f"{self.name} is not a possible format: use at least 1 channel and 1 to "
                f"{MAX_BITS} bits, for example cq-8c8b."
            )

    @classmethod
    def parse(cls, name: str) -> CQSpec:
        """Read a name such as ``cq-8c8b`` (8 channels, 8 bits, 1 bit per channel).

        Raises:
            RecipeError: `name` is not of that form.
        """
        match = _CQ_NAME.match(name)
        if match is None:
            raise RecipeError(
                f"'{name}' is not a coupled format; write cq-<channels>c<bits>b, for example "
                "cq-8c8b for 1 bit per channel."
            )
        return cls(channels=int(match[1]), bits=int(match[2]))

    @property
    def name(self) -> str:
        """The format's name, for example ``cq-8c8b``."""
        return f"cq-{self.channels}c{self.bits}b"

    @property
    def centroids(self) -> int:
        """Entries of a codebook."""
        return 1 << self.bits

    @property
    def bits_per_channel(self) -> float:
        """Bits one channel costs in codes alone."""
        return self.bits / self.channels

    def codebook_heads(self, kv_heads: int) -> int:
        """Heads that a layer's codebook is stored for: one that stands for all where they share."""
        return 1 if self.sharing == "heads" else kv_heads


Codes = CQSpec | tuple[CQSpec, ...]
"""The code of all key/value heads of a layer, or that of each."""


@dataclass(frozen=True)
class LayerCodes:
    """Codes of layers that have others than the rest of a cache.

    Attributes:
        first: index of the first layer.
        last: index of the last one, which belongs to them.
        key: code of their keys, or of the keys of each head.
        value: code of their values, or of the values of each head.
    """

    first: int
    last: int
    key: Codes
    value: Codes

    def __post_init__(self) -> None:
        for kind in KINDS:
            given = self.key if kind == "key" else self.value
            if isinstance(given, CQSpec):
                continue
            if len(given) < 2:
                raise RecipeError(
                    f"A list of codes for the {kind}s of {self.place} names one for each head; "
                    "write a single code as it is."
                )
            if any(code.sharing != "none" for code in given):
                raise RecipeError(
                    f"The heads of {self.place} have codes of their own, so they cannot share "
                    "codebooks; use sharing: none, or one code for all heads."
                )

    def codes(self, kind: Kind) -> tuple[CQSpec, ...]:
        """The code of each head; a single one stands for all."""
        codes = self.key if kind == "key" else self.value
        return (codes,) if isinstance(codes, CQSpec) else codes

    @property
    def place(self) -> str:
        """The layers in words, such as ``layers 0 to 3``."""
        if self.first == self.last:
            return f"layer {self.first}"
        return f"layers {self.first} to {self.last}"


@dataclass(frozen=True)
class CacheSpec:
    """A whole cache format.

    Attributes:
        key: code of the keys (taken before RoPE).
        value: code of the values.
        window: how many of the newest tokens stay in the model's dtype.
        sinks: how many of the first tokens stay in the model's dtype.
        layers: layers with other codes than `key` and `value`, in ascending order.
    """

    key: CQSpec
    value: CQSpec
    window: int = 0
    sinks: int = 0
    layers: tuple[LayerCodes, ...] = ()

    def __post_init__(self) -> None:
        if self.window < 0 or self.sinks < 0:
            raise RecipeError("window and sinks count tokens: use 0 or more.")
        for code in self.codes("value"):
            if code.grouping in PAIRED_GROUPINGS:
                raise RecipeError(
                    "Nothing turns values, so they have no pairs; use "
                    f"'{PAIRED_GROUPINGS[code.grouping]}'."
                )
        end = -1
        for codes in self.layers:
            if not end < codes.first <= codes.last:
                raise RecipeError(
                    f"The codes of {codes.place} are out of order or given twice; name layers "
                    "from the lowest index on, each once, such as 0-3 and 28-29."
                )
            end = codes.last

    @property
    def name(self) -> str:
        """``cq-8c8b``, or ``k-cq-4c8b-v-cq-8c8b`` when keys and values differ; with ``-mixed`` when
        some layers have other codes."""
        ending = "-mixed" if self.layers else ""
        if self.key.name == self.value.name:
            return self.key.name + ending
        return f"k-{self.key.name}-v-{self.value.name}{ending}"

    @property
    def bits_per_channel(self) -> float:
        """Mean bits per channel in codes alone, window and sinks not counted, of the layers that
        have no codes of their own."""
        return (self.key.bits_per_channel + self.value.bits_per_channel) / 2

    def of_head(self, layer: int, head: int) -> CacheSpec:
        """The format of one key/value head of a layer: the same codes for all heads and layers."""
        pair = (self.codes_of(layer, kind) for kind in KINDS)
        key, value = (codes[head] if len(codes) > 1 else codes[0] for codes in pair)
        return replace(self, key=key, value=value, layers=())

    def codes_of(self, layer: int, kind: Kind) -> tuple[CQSpec, ...]:
        """The code of each head's keys or values in a layer; a single one stands for all heads."""
        for own in self.layers:
            if own.first <= layer <= own.last:
                return own.codes(kind)
        return (self.code(kind),)

    def rate_of(self, bits: float) -> str:
        """Bits a channel in words, such as ``1 bit per channel``."""
        codes = f"{bits:.4g} {'bit' if bits == 1 else 'bits'} per channel"
        gains = any(self.code(kind).gain == "token" for kind in KINDS)
        return f"{codes} and {GAIN_BITS} bits per head and token" if gains else codes

    def code(self, kind: Kind) -> CQSpec:
        """The code of the keys or of the values."""
        return self.key if kind == "key" else self.value

    def owners(self, layer: int, kind: Kind) -> Iterator[tuple[str, CQSpec, int | None]]:
        """Who has codebooks in a layer.

        Yields:
            ``key``, its code and None for all heads; or where each head has a code of its own,
            ``key.heads.0``, its code and 0, and so on.
        """
        codes = self.codes_of(layer, kind)
        if len(codes) == 1:
            yield kind, codes[0], None
        else:
            yield from ((f"{kind}.heads.{head}", code, head) for head, code in enumerate(codes))

    def parts(self, layer: int, kv_heads: int) -> dict[CacheSpec, tuple[int, ...]]:
        """The formats of a layer's heads, and which heads have each: what kernels take at once.

        Which channels form groups makes no difference to that, so the formats leave it out.
        """
        heads: dict[CacheSpec, tuple[int, ...]] = {}
        for head in range(kv_heads):
            found = self.of_head(layer, head)
            key, value = (replace(found.code(kind), grouping="contiguous") for kind in KINDS)
            own = replace(found, key=key, value=value)
            heads[own] = (*heads.get(own, ()), head)
        return heads

    def codes(self, kind: Kind) -> tuple[CQSpec, ...]:
        """All codes that keys or values have in some layer, some of them more than once."""
        return (self.code(kind), *(code for own in self.layers for code in own.codes(kind)))

    def to_json(self) -> dict[str, Any]:
        """The JSON form, as cq_config.json has it; `layers` only where there are some."""
        value = asdict(self)
        if not self.layers:
            del value["layers"]
        return value

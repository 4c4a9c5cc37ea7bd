"""Cache formats of a benchmark: by name with random codebooks, or an artifact's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cqtool.bench.shapes import Shape
from cqtool.codebooks.grouping import choose_groups
from cqtool.errors import ArtifactError, RecipeError
from cqtool.geometry import NO_ROTATION, KeyRotation, ModelGeometry
from cqtool.spec import KINDS, PAIRED_GROUPINGS, CacheSpec, CQSpec, Grouping, Kind

Books = Tensor | tuple[Tensor, ...]
"""Codebooks ``[kv_heads, groups, centroids, channels]`` of a layer's keys or values, or where its
heads have codes of their own, those of each: ``[1, groups, centroids, channels]``."""


@dataclass(frozen=True)
class BenchFormat:
    """A cache format with the codebooks to run it.

    Attributes:
        spec: codes, window and sinks.
        codebooks: per layer those of keys and of values, float16 on the CPU; None for random ones.
        geometry: of the artifact's cache, None for random codebooks.
        source: the artifact, None for random codebooks.
        channels: per layer the channels of the key and value groups ``[kv_heads, head_dim]``, each
            None for contiguous ones; None for random codebooks.
        beside: random codebooks beside an artifact, which may have the same codes; named so.
    """

    spec: CacheSpec
    codebooks: tuple[tuple[Books, Books], ...] | None = None
    geometry: ModelGeometry | None = None
    source: str | None = None
    channels: tuple[tuple[Tensor | None, Tensor | None], ...] | None = None
    beside: bool = False

    @property
    def name(self) -> str:
        """The format's name, and how its channels are grouped where they are not contiguous."""
        key, value = self.spec.key.grouping, self.spec.value.grouping
        random = ", random codebooks" if self.beside else ""
        if key == value == "contiguous":
            return self.spec.name + random
        # Values have no pairs: theirs go by the grouping without them then.
        same = value == PAIRED_GROUPINGS.get(key, key)
        return f"{self.spec.name} {key if same else f'{key}/{value}'}{random}"

    def layer_codebooks(
        self, layer: int, kv_heads: int, head_dim: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Key and value codebook of a layer whose heads have the same codes, on the generator's
        device.

        Random centroids are normal with variance one, which is about how keys and values of a model
        with random weights are distributed.
        """
        device = generator.device
        if self.codebooks is not None:
            own_key, own_value = self.codebooks[layer]
            assert isinstance(own_key, Tensor) and isinstance(own_value, Tensor)
            return own_key.to(device), own_value.to(device)
        key, value = (
            torch.randn(
                kv_heads,
                head_dim // code.channels,
                code.centroids,
                code.channels,
                generator=generator,
                device=device,
            ).half()
            for code in (self.spec.key, self.spec.value)
        )
        return key, value

    def layer_channels(
        self, layer: int, kv_heads: int, head_dim: int, rotation: KeyRotation, seed: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Channels of a layer's groups of keys and of values, on the CPU; None for contiguous ones.

        With random codebooks they are chosen as a calibration does, from noise.

        Args:
            layer: the layer's index.
            kv_heads: its key/value heads.
            head_dim: channels of a head.
            rotation: how its keys are turned.
            seed: of the noise.
        """
        if self.channels is not None:
            return self.channels[layer]
        generator = torch.Generator().manual_seed(seed + layer)

        def choose(code: CQSpec, turned: KeyRotation) -> Tensor | None:
            noise = torch.randn(2 * head_dim, kv_heads, head_dim, generator=generator)
            return choose_groups(noise, code.grouping, code.channels, turned)

        return choose(self.spec.key, rotation), choose(self.spec.value, NO_ROTATION)

    @property
    def of_each_code(self) -> list[BenchFormat]:
        """A format of one layer for each pair of codes: itself, but where layers have codes of
        their own.

        Each has the codebooks of the first layer with such heads. Where only some heads of that
        layer have the pair, theirs are repeated for all heads of the layer: what is timed is a
        whole layer of the one pair, which the artifact then does not hold as such.
        """
        if not self.spec.layers or self.geometry is None:
            return [self]
        first: dict[CacheSpec, tuple[int, tuple[int, ...]]] = {}
        for index, layer in enumerate(self.geometry.layers):
            for heads in self.spec.parts(index, layer.kv_heads).values():
                # By its own name, which says how channels are grouped.
                first.setdefault(self.spec.of_head(index, heads[0]), (index, heads))
        return [self._repeated(layer, heads) for layer, heads in first.values()]

    def _repeated(self, layer: int, heads: Sequence[int]) -> BenchFormat:
        assert self.geometry is not None
        count = self.geometry.layers[layer].kv_heads
        return self.of_heads(layer, [heads[index % len(heads)] for index in range(count)])

    def of_heads(self, layer: int, heads: Sequence[int]) -> BenchFormat:
        """An artifact's format of one layer that has these heads and no others.

        Args:
            layer: the artifact's layer that they are of.
            heads: which; all have the same pair of codes, and one may come several times.
        """
        heads = list(heads)
        spec = self.spec.of_head(layer, heads[0])
        assert self.codebooks and self.geometry and self.channels
        (key, value), (key_order, value_order) = self.codebooks[layer], self.channels[layer]
        own = replace(self.geometry.layers[layer], kv_heads=len(heads))
        geometry = replace(self.geometry, layers=(own,))

        def books(stored: Books) -> Tensor:
            return torch.cat([_of_head(stored, head) for head in heads])

        def order(stored: Tensor | None) -> Tensor | None:
            return None if stored is None else stored[heads]

        return BenchFormat(
            spec,
            ((books(key), books(value)),),
            geometry,
            self.source,
            ((order(key_order), order(value_order)),),
        )

    def rotation(self, layer: int, rotary_dim: int) -> KeyRotation:
        """How a layer's keys are turned: the artifact's own, else pairs as Llama has them."""
        if self.geometry is not None:
            return self.geometry.layers[layer].rotation
        return KeyRotation("half", rotary_dim, 0, 0)


def _of_head(books: Books, head: int) -> Tensor:
    """``[1, groups, centroids, channels]`` of one head."""
    return books[head : head + 1] if isinstance(books, Tensor) else books[head]


def parse_formats(
    names: Sequence[str],
    window: int = 0,
    sinks: int = 0,
    groupings: Sequence[Grouping] = ("contiguous",),
) -> list[BenchFormat]:
    """Formats by name, such as ``cq-8c8b`` or ``k-cq-4c8b-v-cq-8c8b``, each with each grouping.

    Groupings with regard to pairs are those of keys; values, which have none, go by the grouping
    without it.

    Raises:
        RecipeError: a name is none.
    """
    return [
        BenchFormat(_parse(name, window, sinks, grouping))
        for name in names
        for grouping in groupings
    ]


def _parse(name: str, window: int, sinks: int, grouping: Grouping) -> CacheSpec:
    key = value = name
    if name.startswith("k-") and "-v-" in name:
        key, value = name.removeprefix("k-").split("-v-", 1)
    return CacheSpec(
        replace(CQSpec.parse(key), grouping=grouping),
        replace(CQSpec.parse(value), grouping=PAIRED_GROUPINGS.get(grouping, grouping)),
        window,
        sinks,
    )


def require_divisible(format: BenchFormat, shape: Shape) -> None:
    """Refuse a format whose groups do not fill the heads of a shape, or cannot hold RoPE's pairs.

    Raises:
        RecipeError: they do not.
    """
    key = format.spec.key
    if key.grouping in PAIRED_GROUPINGS and key.channels % 2:
        raise RecipeError(
            f"Groups of {key.channels} channels cannot hold whole pairs; choose another --format, "
            "or --grouping correlation."
        )
    for kind in KINDS:
        channels = format.spec.code(kind).channels
        if shape.head_dim % channels:
            raise RecipeError(
                f"{format.name} cannot code {shape.name}: {shape.head_dim} channels do not divide "
                f"into groups of {channels}. Choose another --format."
            )


def open_artifact(path: str) -> BenchFormat:
    """Read an artifact's (or calibration folder's) configuration and codebooks.

    Raises:
        ArtifactError: it is missing or damaged.
        HubError: the repository cannot be reached.
    """
    from safetensors.torch import load_file

    from cqtool.cache.loading import resolve
    from cqtool.layout.codebook_file import check_codebooks
    from cqtool.layout.config import (
        CODEBOOKS_NAME,
        channels_name,
        codebook_name,
        owner_name,
        read_config,
    )

    folder: Path = resolve(path, None)
    config = read_config(folder)
    check_codebooks(folder, config)
    tensors = load_file(folder / CODEBOOKS_NAME)

    def names(layer: int, kind: Kind) -> list[str]:
        return [owner_name(layer, owner) for owner, _, _ in config.cache.owners(layer, kind)]

    def codebook(layer: int, kind: Kind) -> Books:
        stored = [tensors[codebook_name(name)].half() for name in names(layer, kind)]
        if len(stored) > 1:
            return tuple(stored)
        heads = config.geometry.layers[layer].kv_heads
        return stored[0].expand(heads, -1, -1, -1).contiguous()  # a shared one, once for each head

    def channels(layer: int, kind: Kind) -> Tensor | None:
        found = [tensors.get(channels_name(name)) for name in names(layer, kind)]
        if not any(one is not None for one in found):
            return None
        same = torch.arange(config.geometry.layers[layer].dim(kind))[None]
        return torch.cat([same if one is None else one.long() for one in found])

    layers = range(len(config.geometry.layers))
    codebooks = tuple((codebook(layer, "key"), codebook(layer, "value")) for layer in layers)
    orders = tuple((channels(layer, "key"), channels(layer, "value")) for layer in layers)
    return BenchFormat(config.cache, codebooks, config.geometry, path, orders)


def require_geometry(format: BenchFormat, shape: Shape) -> None:
    """Refuse an artifact whose cache has other shapes than the model.

    Raises:
        ArtifactError: it has.
    """
    found = format.geometry
    if found is None:
        return
    own = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in found.layers]
    wanted = [(shape.kv_heads, shape.head_dim, shape.head_dim)] * shape.layers
    if own != wanted or found.query_heads != shape.heads:
        first = found.layers[0]
        raise ArtifactError(
            f"{format.source} has {len(own)} layers of {first.kv_heads} kv heads with "
            f"{first.key_dim} channels for {found.query_heads} query heads, and {shape.name} has "
            f"{shape.layers} of {shape.kv_heads} with {shape.head_dim} for {shape.heads}; give the "
            "shape of the artifact's base model."
        )

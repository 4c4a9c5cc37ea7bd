"""Formats by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cqtool.cache.codec import TokenCodec
from cqtool.cache.format import CacheFormat, LayerCodecs
from cqtool.errors import RecipeError
from cqtool.geometry import ModelGeometry
from cqtool.schemes.scalar import HalfCodec, IntCodec, NF4Codec

SCHEMES: dict[str, Callable[[int], TokenCodec]] = {
    "bf16": lambda dim: HalfCodec(torch.bfloat16),
    "fp16": lambda dim: HalfCodec(torch.float16),
    "int2": lambda dim: IntCodec(2, dim),
    "int3": lambda dim: IntCodec(3, dim),
    "int4": lambda dim: IntCodec(4, dim),
    "int8": lambda dim: IntCodec(8, dim),
    "nf4": NF4Codec,
}
"""Name -> codec for heads of a given number of channels."""


def make_format(name: str, geometry: ModelGeometry, window: int, sinks: int) -> CacheFormat:
    """A format that needs no calibration.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in SCHEMES:
        raise RecipeError(
            f"There is no format '{name}'; use {', '.join(sorted(SCHEMES))}, a coupled one such as "
            "cq-4c8b, or a calibration folder."
        )
    make = SCHEMES[name]
    layers = tuple(LayerCodecs(make(g.key_dim), make(g.value_dim)) for g in geometry.layers)
    return CacheFormat(name, geometry, layers, window, sinks)

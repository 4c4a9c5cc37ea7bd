"""A bench format by hand: heads with codes of their own in one layer, one code in the other."""

from __future__ import annotations

import torch

from cqtool.bench.formats import BenchFormat
from cqtool.geometry import KeyRotation, LayerGeometry, ModelGeometry
from cqtool.spec import CacheSpec, CQSpec, LayerCodes

KEYS = ("cq-8c8b", "cq-4c8b", "cq-8c8b", "cq-8c6b")
"""Codes of the heads' keys in the first layer."""
BITS = {"cq-8c8b": 1.0, "cq-4c8b": 2.0, "cq-8c6b": 0.75}


def mixed_format() -> BenchFormat:
    """Keys of the first layer as in :data:`KEYS`, all else cq-8c8b; heads of 64 channels."""
    head_dim, kv_heads = 64, len(KEYS)
    generator = torch.Generator().manual_seed(0)

    def book(heads: int, name: str) -> torch.Tensor:
        code = CQSpec.parse(name)
        shape = (heads, head_dim // code.channels, code.centroids, code.channels)
        return torch.randn(shape, generator=generator).half()

    plain = CQSpec.parse("cq-8c8b")
    own = tuple(CQSpec.parse(name) for name in KEYS)
    rotation = KeyRotation("half", head_dim, 0, 0)
    layer = LayerGeometry(kv_heads, head_dim, head_dim, None, rotation)
    keys = tuple(book(1, name) for name in KEYS)
    whole = [book(kv_heads, "cq-8c8b") for _ in range(3)]
    return BenchFormat(
        CacheSpec(plain, plain, layers=(LayerCodes(0, 0, own, plain),)),
        ((keys, whole[0]), (whole[1], whole[2])),
        ModelGeometry(2 * kv_heads, (layer, layer)),
        "folder",
        ((None, None), (None, None)),
    )

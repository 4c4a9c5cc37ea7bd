"""Writes the table of rates, everything counted, into docs/guide.md: computed, without a model.

python docs/update_rates.py           rewrite the part between the markers
python docs/update_rates.py --check   only say whether the page is current
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pages import replaced, rewrite

from cqtool.cache import CacheFormat, CQCodec, LayerCodecs
from cqtool.geometry import KeyRotation, LayerGeometry, ModelGeometry
from cqtool.quality.storage import context_bits
from cqtool.recipe import Recipe, load_recipe
from cqtool.spec import KINDS, CQSpec

PAGE = Path(__file__).resolve().parent / "guide.md"
RECIPES = (
    *("cq-8c6b", "cq-8c8b", "cq-8c10b", "cq-k8c8b-v4c8b"),
    *("cq-4c8b", "cq-k4c8b-v2c8b", "cq-2c8b"),
)
CONTEXTS = (2048, 8192, 32768, 131072)
LAYER = LayerGeometry(8, 128, 128, None, KeyRotation("half", 128, 0, 0))
GEOMETRY = ModelGeometry(query_heads=32, layers=(LAYER,) * 32)
"""Of Llama-3.1-8B."""
FULL_BITS = 16.0


def format_of(recipe: Recipe) -> CacheFormat:
    """What `recipe` stores in :data:`GEOMETRY`; its centroids are zeros."""
    spec = recipe.spec

    def codec(code: CQSpec, dim: int) -> CQCodec:
        shape = LAYER.kv_heads, dim // code.channels, 2**code.bits, code.channels
        gains = torch.ones(LAYER.kv_heads, 256) if code.gain == "token" else None
        return CQCodec(torch.zeros(shape, dtype=torch.float16), gains=gains)

    layer = LayerCodecs(*(codec(spec.code(kind), LAYER.dim(kind)) for kind in KINDS))
    layers = (layer,) * len(GEOMETRY.layers)
    return CacheFormat(spec.name, GEOMETRY, layers, spec.window, spec.sinks)


def table() -> str:
    """What stands between the markers."""
    heads = ["recipe", "bits", *(f"at {tokens}" for tokens in CONTEXTS), "codebooks (MiB)"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name in RECIPES:
        recipe = load_recipe(name)
        format = format_of(recipe)
        bits = recipe.spec.bits_per_channel
        counted = [context_bits(format, tokens, FULL_BITS) for tokens in CONTEXTS]
        books = (codec.codebook for codecs in format.layers for codec in (codecs.key, codecs.value))
        mib = sum(book.nbytes for book in books) / 2**20
        lines.append([f"`{name}`", f"{bits:g}", *(f"{one:.2f}" for one in counted), f"{mib:.0f}"])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def updated(page: str) -> str:
    """`page` with a current table."""
    return replaced(page, "rates", table())


if __name__ == "__main__":
    sys.exit(rewrite(PAGE, updated))

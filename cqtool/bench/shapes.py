"""Models by name: the numbers of their public configurations, enough to run them without weights.

No torch here; :mod:`cqtool.bench.models` makes transformers configurations of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from cqtool.errors import RecipeError

Architecture = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]
"""transformers' model types that a named shape may have."""


@dataclass(frozen=True)
class Shape:
    """What decides a model's speed and the size of its cache.

    Attributes:
        name: for people, and for the command line.
        architecture: transformers' model type.
        layers: attention layers.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: channels of a head.
        hidden: width of the residual stream.
        intermediate: width of the gated MLP.
        vocabulary: rows of the embedding.
        rope_theta: base of RoPE's frequencies.
        rope_scaling: further fields of transformers' `rope_parameters`.
        positions: tokens the model was made for.
        sliding_window: tokens that sliding layers attend to, None when no layer slides.
        full_every: with sliding layers, every how manieth layer attends to all tokens; 0 for none.
        local_rope_theta: base of the sliding layers' own RoPE, None when they share the other.
        tied: whether the output layer is the embedding.
    """

    name: str
    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    positions: int = 4096
    sliding_window: int | None = None
    full_every: int = 0
    local_rope_theta: float | None = None
    tied: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA32_ROPE = _LLAMA3_ROPE | {"factor": 32.0}

# name, architecture, layers, heads, kv heads, head_dim, hidden, intermediate, vocabulary, theta
_SHAPES = (
    Shape("llama-2-7b", "llama", 32, 32, 32, 128, 4096, 11008, 32000, 1e4),
    Shape("llama-2-13b", "llama", 40, 40, 40, 128, 5120, 13824, 32000, 1e4),
    Shape("llama-2-70b", "llama", 80, 64, 8, 128, 8192, 28672, 32000, 1e4),
    Shape(
        "llama-3.1-8b", "llama", 32, 32, 8, 128, 4096, 14336, 128256, 5e5, _LLAMA3_ROPE, 131072
    ),
    Shape(
        "llama-3.2-1b", "llama", 16, 32, 8, 64, 2048, 8192, 128256, 5e5, _LLAMA32_ROPE, 131072,
        tied=True,
    ),
    Shape("mistral-7b", "mistral", 32, 32, 8, 128, 4096, 14336, 32768, 1e6, positions=32768),
    Shape("qwen2.5-7b", "qwen2", 28, 28, 4, 128, 3584, 18944, 152064, 1e6, positions=32768),
    Shape("qwen3-0.6b", "qwen3", 28, 16, 8, 128, 1024, 3072, 151936, 1e6, None, 40960, tied=True),
    Shape("qwen3-8b", "qwen3", 36, 32, 8, 128, 4096, 12288, 151936, 1e6, positions=40960),
    Shape(
        "gemma-3-270m", "gemma3_text", 18, 4, 1, 256, 640, 2048, 262144, 1e6, None, 32768,
        sliding_window=512, full_every=6, local_rope_theta=1e4, tied=True,
    ),
    Shape("smollm2-135m", "llama", 30, 9, 3, 64, 576, 1536, 49152, 1e5, None, 8192, tied=True),
    Shape("smollm2-1.7b", "llama", 24, 32, 32, 64, 2048, 8192, 49152, 1.3e5, None, 8192, tied=True),
    # No model of anybody's: small enough to try every command on a CPU.
    Shape("tiny", "llama", 2, 4, 2, 64, 64, 128, 256, 1e4),
)  # fmt: skip
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _SHAPES}


def named_shape(name: str) -> Shape:
    """A shape by its name, capitals ignored.

    Raises:
        RecipeError: there is none; the sentence lists all.
    """
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise RecipeError(
            f"There is no shape '{name}'; use one of {', '.join(SHAPES)}, or a model folder or "
            "Hub id such as org/name, of which only the configuration is read."
        )
    return shape

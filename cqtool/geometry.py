"""The shape of a model's key/value cache: plain dataclasses, read by tools that need no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cqtool.spec import Kind

Style = Literal["none", "half", "interleaved"]


@dataclass(frozen=True)
class KeyRotation:
    """How one layer turns its keys.

    Attributes:
        style: ``half`` pairs channel p with p + dim/2 (Llama), ``interleaved`` pairs 2p with 2p + 1
            (GPT-J, Cohere), ``none`` leaves keys as they are.
        dim: how many channels of a head are turned (partial rotary when less than head_dim).
        offset: the first of them.
        source: which of the model's RoPE tables the layer uses (Gemma-3 has two), None with
            ``none``. How tables are told apart depends on how the model is spread over devices, so
            it does not count when geometries are compared.
    """

    style: Style
    dim: int = 0
    offset: int = 0
    source: int | None = field(default=None, compare=False)


NO_ROTATION = KeyRotation("none")


@dataclass(frozen=True)
class LayerGeometry:
    """Shapes of one attention layer's cache.

    Attributes:
        kv_heads: key/value heads.
        key_dim: channels of a key head.
        value_dim: channels of a value head.
        sliding_window: tokens the layer attends to, None for all.
        rotation: how keys are turned between projection and cache.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    sliding_window: int | None
    rotation: KeyRotation

    def dim(self, kind: Kind) -> int:
        """Channels of a head of the keys or of the values."""
        return self.key_dim if kind == "key" else self.value_dim


@dataclass(frozen=True)
class ModelGeometry:
    """Shapes of a whole cache; `query_heads` is the number of heads that read each token."""

    query_heads: int
    layers: tuple[LayerGeometry, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON form, as cq_config.json has it."""
        return {"query_heads": self.query_heads, "layers": [asdict(layer) for layer in self.layers]}

    @property
    def channels_per_token(self) -> int:
        """Scalars a token puts into an unquantized cache."""
        return sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers)

"""Watches a model's attention layers from outside: where they are, and the RoPE angles they use.

Since transformers 5.4 a cache receives keys after RoPE and nothing else. What is missing to undo
the rotation is seen by forward hooks: the rotary modules return (cos, sin) for given positions,
and each attention module receives the pair it applies. One tap serves every cache of a model.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cqtool.models.rotation import PairLayout, pair_angles, pair_layout

_ATTRIBUTE = "_cqtool_attention_tap"


@dataclass
class RopeStep:
    """The angles one forward pass applied to its new tokens.

    Attributes:
        cos: ``[batch or 1, tokens, dim / 2]``, one entry per channel pair, as the model scaled it.
        sin: same shape.
        positions: int ``[batch or 1, tokens]`` that produced them, None when not seen.
        inv_freq: float ``[dim / 2]`` the table was computed from, None when not seen.
        scaling: factor on cos and sin (YaRN's attention_scaling).
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None = None
    inv_freq: Tensor | None = None
    scaling: float = 1.0

    def recomputed(self) -> tuple[Tensor, Tensor] | None:
        """cos and sin computed afresh from positions and inv_freq, None without them."""
        if self.positions is None or self.inv_freq is None:
            return None
        return angles(self.positions, self.inv_freq, self.scaling, self.cos.dtype)


def angles(
    positions: Tensor, inv_freq: Tensor, scaling: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin ``[batch, tokens, dim / 2]`` in `dtype`, by transformers' own formula.

    Args:
        positions: int ``[batch, tokens]``.
        inv_freq: float ``[dim / 2]``, or ``[tokens, dim / 2]`` when it differs by token.
        scaling: factor on both.
        dtype: the model's dtype, to which transformers rounds.
    """
    freqs = positions[..., None].float() * inv_freq.float()
    return (freqs.cos() * scaling).to(dtype), (freqs.sin() * scaling).to(dtype)


class AttentionTap:
    """The hooks on one model; create it with :meth:`of`.

    Attributes:
        steps: the current forward pass's angles, per layer index; None where a layer uses no RoPE.
        sources: rotary table -> its index, in the order in which layers first used them.
        source_of: the table each layer index was last given.
        padding_mask: the ``[batch, tokens]`` mask given to the running forward pass, None without.
        mask_editor: called with (layer index, keyword arguments) of each attention module and
            returning the arguments to use; None but while a caller simulates a cache in one pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.steps: dict[int, RopeStep | None] = {}
        self.sources: dict[object, int] = {}
        self.source_of: dict[int, int | None] = {}
        self.padding_mask: Tensor | None = None
        self.mask_editor: Any = None
        self.attention: dict[int, nn.Module] = {}
        self._running: list[nn.Module] = []
        self._produced: dict[int, tuple[Tensor, object, RopeStep]] = {}
        self._layouts: dict[object, PairLayout] = {}
        model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        for module in model.modules():
            if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
                module.register_forward_hook(self._on_rotary, with_kwargs=True)
            if isinstance(getattr(module, "layer_idx", None), int):
                module.register_forward_pre_hook(self._on_enter, with_kwargs=True)
                module.register_forward_hook(self._on_leave, always_call=True)

    @classmethod
    def of(cls, model: nn.Module) -> AttentionTap:
        """The model's tap, hooked in on first use."""
        tap = model.__dict__.get(_ATTRIBUTE)
        if tap is None:
            tap = cls(model)
            # Straight into __dict__, where it was looked for: a plain attribute, no submodule.
            model.__dict__[_ATTRIBUTE] = tap
        assert isinstance(tap, AttentionTap)
        return tap

    def claim(self, layer: int) -> None:
        """Called from a cache's update: the innermost running module is the layer's attention."""
        if self._running:
            self.attention[layer] = self._running[-1]

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # What earlier passes produced is of no use any more, and large after a long prompt.
        self._produced.clear()
        mask = kwargs.get("attention_mask")
        self.padding_mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _on_rotary(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not (isinstance(output, tuple) and len(output) == 2):
            return
        cos, sin = output
        if not (isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.dim() == 3):
            return
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        except TypeError:
            bound = {}
        layer_type = bound.get("layer_type")
        prefix = f"{layer_type}_" if layer_type is not None else ""
        inv_freq = getattr(module, f"{prefix}inv_freq", None)
        positions = bound.get("position_ids")
        known = isinstance(positions, Tensor) and positions.dim() == 2
        pairs = inv_freq.shape[-1] if isinstance(inv_freq, Tensor) else None
        source = (id(module), layer_type)
        layout = self._layouts.get(source)
        if layout is None:
            layout = pair_layout(cos, sin, pairs)
            # A single token may stand at position 0, where every layout looks alike. Once known,
            # it is not compared again, which would stall a GPU in every decode step.
            if cos.shape[1] > 1:
                self._layouts[source] = layout
        pair_cos, pair_sin = pair_angles(cos, sin, layout)
        step = RopeStep(
            cos=pair_cos,
            sin=pair_sin,
            positions=positions if known else None,
            inv_freq=inv_freq if isinstance(inv_freq, Tensor) else None,
            scaling=float(getattr(module, f"{prefix}attention_scaling", 1.0)),
        )
        # Keyed by the identity of the very tensor that reaches the layers; kept alive by the entry.
        # A model has a handful of tables: older entries belong to passes that are over.
        self._produced[id(cos)] = (cos, source, step)
        while len(self._produced) > 16:
            self._produced.pop(next(iter(self._produced)))

    def _on_enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        layer = module.layer_idx
        assert isinstance(layer, int)
        self._running.append(module)
        found = self._find_angles(module, args, kwargs)
        if found is not None:
            source, step = found
            self.steps[layer] = step
            self.source_of[layer] = self.sources.setdefault(source, len(self.sources))
        elif not any(m is not module and m.layer_idx == layer for m in self._running):
            self.steps[layer] = None
            self.source_of[layer] = None
        if self.mask_editor is not None and self.attention.get(layer) is module:
            return args, self.mask_editor(layer, kwargs)
        return None

    def _on_leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in self._running:
            del self._running[self._running.index(module) :]

    def _find_angles(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[object, RopeStep] | None:
        pair = kwargs.get("position_embeddings")
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            pair = next((a for a in args if isinstance(a, tuple) and len(a) == 2), None)
        if pair is not None and all(isinstance(part, Tensor) for part in pair):
            cos, sin = pair
            produced = self._produced.get(id(cos))
            if produced is not None and produced[0] is cos:
                return produced[1], produced[2]
            if cos.dim() == 3 and not torch.is_complex(cos):
                # A copy of what a rotary module returned (a model spread over several GPUs): it
                # cannot be told from which table, so the layer gets one of its own.
                return ("copy", module.layer_idx), RopeStep(
                    *pair_angles(cos, sin, pair_layout(cos, sin))
                )
            return None
        # GPT-J and CodeGen keep a table [positions, 2 * pairs] of sines, then cosines, inside.
        table = getattr(module, "embed_positions", None)
        positions = kwargs.get("position_ids")
        if isinstance(table, Tensor) and table.dim() == 2 and isinstance(positions, Tensor):
            sin, cos = table.to(positions.device)[positions].chunk(2, dim=-1)
            return "sinusoidal", RopeStep(cos, sin)
        return None


class ObservingCache(Cache):
    """A cache that keeps nothing: it hands each layer's new keys and values to a callback."""

    def __init__(self, on_update: Any) -> None:
        super().__init__(layers=[])
        self._on_update = on_update

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Call back with (layer, keys, values) and return what comes back from it."""
        result = self._on_update(layer_idx, key_states, value_states)
        return (key_states, value_states) if result is None else result

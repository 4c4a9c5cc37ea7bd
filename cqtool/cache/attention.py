"""The attention function that attends to a cache's codes, and how a model comes to call it.

transformers picks the attention function, and the function that makes its mask, by a name in the
model's configuration. While a pass over a few tokens runs with a cache that can attend to its
codes, the name is this module's; before and after it is what it was, so that everything else
(prompts, other caches, ``output_attentions``) goes the model's own way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from cqtool.cache.fused import MARK, FusedLayer
from cqtool.cache.passes import PassState
from cqtool.cache.tiled import FEW
from cqtool.geometry import ModelGeometry
from cqtool.models.probe import text_config
from cqtool.models.tap import ObservingCache

NAME = "cqtool"
_ATTRIBUTE = "_cqtool_attention_switch"
_PROBE_TOKENS = 24
# Of the largest output; what a term left out changes is far more than rounding to bfloat16.
_TOLERANCE = 0.03
# The configurations that bear this module's name at the moment, by identity: what they bear else.
_switched: dict[int, tuple[str, Switch]] = {}


class Switch:
    """Turns one model's attention over to this module for the passes that want it.

    Get it with :meth:`of`.

    Attributes:
        problem: why the model cannot attend through this module, None when it can.
    """

    def __init__(self, model: PreTrainedModel, geometry: ModelGeometry) -> None:
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, make_mask)
        self.probe: _Probe | None = None
        self.layers: list[Any] = []
        self.state: PassState | None = None
        self._configs = _configs(model)
        self.problem = self._find_problem(model, geometry)
        if self.problem is None:
            model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
            model.register_forward_hook(self._on_done, always_call=True)

    @classmethod
    def of(cls, model: PreTrainedModel, geometry: ModelGeometry) -> Switch:
        """The model's switch, built and tried out on first use."""
        switch = model.__dict__.get(_ATTRIBUTE)
        if switch is None:
            switch = model.__dict__[_ATTRIBUTE] = cls(model, geometry)
        assert isinstance(switch, Switch)
        return switch

    def can_skip_mask(self, new: int) -> bool:
        """Whether no layer of the running pass will look at a mask."""
        if self.state is None or new != 1 or self._moving:
            return False
        # A model may make several masks in a pass, for layers of several kinds.
        if not self.state.mask_skipped:
            self.state.mask_skipped = all(
                isinstance(each, FusedLayer) and each.can_attend(new) for each in self.layers
            )
        return self.state.mask_skipped

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._release()
        cache = next(
            (
                each
                for each in (*kwargs.values(), *args)
                if isinstance(each, Cache) and isinstance(getattr(each, "state", None), PassState)
            ),
            None,
        )
        if cache is None or model.training or _wants_weights(model, kwargs):
            return
        if torch.is_grad_enabled() and _is_differentiable(model, kwargs):
            return
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            return
        tokens = _tokens(args, kwargs)
        if tokens is None or tokens > FEW or cache.get_seq_length() == 0:
            return
        self.state, self.layers = cache.state, cache.layers  # type: ignore[attr-defined]
        self.state.running = True
        self._take()

    def _on_done(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._release()

    def _take(self) -> None:
        for config in self._configs:
            if config._attn_implementation != NAME:
                _switched[id(config)] = config._attn_implementation, self
                config._attn_implementation_internal = NAME

    def _release(self) -> None:
        for config in self._configs:
            if id(config) in _switched:
                config._attn_implementation_internal = _switched.pop(id(config))[0]
        if self.state is not None:
            self.state.running = self.state.mask_skipped = False
        self.state, self.layers = None, []

    def _find_problem(self, model: PreTrainedModel, geometry: ModelGeometry) -> str | None:
        """Run a few tokens through the model and look at what arrives here."""
        name = type(model).__name__
        windows = [layer.sliding_window for layer in geometry.layers]
        self._moving = _tables_move(text_config(model).to_dict())
        self.probe = _Probe(windows)
        vocabulary = int(getattr(text_config(model), "vocab_size", 2))
        ids = (vocabulary // 2 + torch.arange(_PROBE_TOKENS, device=model.device)) % vocabulary
        self._take()
        try:
            with torch.no_grad():
                model(
                    input_ids=ids[None],
                    past_key_values=ObservingCache(self.probe.on_update),
                    use_cache=True,
                )
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            TypeError,
            ValueError,
        ) as error:
            return f"{name} does not run with another attention function ({error})."
        finally:
            self._release()
            probe, self.probe = self.probe, None
        if probe.reached != dict.fromkeys(range(len(windows)), 1):
            return f"{name} does not hand each layer's keys to transformers' attention function."
        if not probe.agrees:
            return f"{name}'s attention has a term that the kernels do not know."
        if not probe.plain_masks:
            return f"{name} masks tokens in a way that the kernels do not know."
        return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it; marked keys are attended to as codes.

    Args:
        module: the attention layer.
        query: ``[batch, heads, tokens, head_dim]``.
        key: ``[batch, kv_heads, tokens, head_dim]``.
        value: the same.
        attention_mask: as :func:`make_mask` made it.
        kwargs: ``scaling``, ``softcap`` and others.

    Returns:
        ``[batch, tokens, heads, head_dim]`` and no weights.
    """
    layer = getattr(key, MARK, None)
    if isinstance(layer, FusedLayer):
        out = layer.attend(query, _scale(query, kwargs), float(kwargs.get("softcap") or 0.0))
        return out.transpose(1, 2), None
    config = getattr(module, "config", None)
    name, switch = _switched.get(id(config), (None, None))
    own = _own_function(module, name)
    if isinstance(layer, int):
        assert switch is not None and switch.probe is not None
        kwargs["dropout"] = 0.0
        out, weights = own(module, query, key, value, attention_mask, **kwargs)
        switch.probe.compare(layer, query, key, value, out, kwargs)
        return out, weights
    found: tuple[Tensor, Tensor | None] = own(module, query, key, value, attention_mask, **kwargs)
    return found


def make_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask of the model's own attention function, or None where nobody will look at it."""
    name, switch = _switched.get(id(kwargs.get("config")), ("sdpa", None))
    if switch is not None:
        if switch.probe is not None:
            switch.probe.look_at(kwargs.get("mask_function"))
        elif switch.can_skip_mask(kwargs["q_length"]):
            return None
    known = AttentionMaskInterface()  # type: ignore[no-untyped-call]
    return known[name](*args, **kwargs) if name in known else None


class _Probe:
    """What a trial run shows of a model's attention."""

    def __init__(self, windows: list[int | None]) -> None:
        self.windows = windows
        self.reached: dict[int, int] = {}
        self.agrees = True
        self.plain_masks = True

    def on_update(self, layer: int, keys: Tensor, values: Tensor) -> None:
        setattr(keys, MARK, layer)

    def compare(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        kwargs: dict[str, Any],
    ) -> None:
        """Whether the model's own function does what the kernels would."""
        self.reached[layer] = self.reached.get(layer, 0) + 1
        group = query.shape[1] // key.shape[1]
        if group * key.shape[1] != query.shape[1] or layer >= len(self.windows):
            self.agrees = False
            return
        keys, values = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
        scores = query.float() @ keys.mT * _scale(query, kwargs)
        if cap := kwargs.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        seen = _expected(torch.arange(_PROBE_TOKENS, device=query.device), self.windows[layer])
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        expected = (weights @ values).transpose(1, 2)
        same_shape = expected.shape == out.shape
        error = (expected - out.float()).abs().max() if same_shape else torch.inf
        # Written so that a NaN disagrees.
        self.agrees &= bool(error <= _TOLERANCE * expected.abs().max())

    def look_at(self, mask_function: Callable[..., Any] | None) -> None:
        """Whether a mask is causal, or causal within a layer's window."""
        if mask_function is None:
            return
        places = {0, *(1 << power for power in range(21))}
        for window in filter(None, self.windows):
            places |= {k * window + d for k in (1, 2, 3) for d in (-1, 0, 1)}
        places |= {a - w for a in places for w in filter(None, self.windows) if a >= w}
        column = torch.tensor(sorted(places))
        query, key = (part.flatten() for part in torch.meshgrid(column, column, indexing="ij"))
        row = torch.zeros_like(query)
        try:
            seen = mask_function(row, row, query, key)
        except (IndexError, RuntimeError, TypeError):
            self.plain_masks = False
            return
        patterns = [_expected(column, window) for window in {None, *self.windows}]
        self.plain_masks &= any(torch.equal(seen, pattern.flatten()) for pattern in patterns)


def _expected(columns: Tensor, window: int | None) -> Tensor:
    seen = columns <= columns[:, None]
    return seen if window is None else seen & (columns > columns[:, None] - window)


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configurations by which the model's layers and masks choose their function."""
    found = {id(text_config(model)): text_config(model)}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(getattr(module, "layer_idx", None), int) and config is not None:
            found[id(config)] = config
    return list(found.values())


def _own_function(module: nn.Module, name: str | None) -> Callable[..., Any]:
    """The function that `module` would have called under its own name."""
    for cls in type(module).__mro__:
        source = sys.modules.get(cls.__module__)
        known = getattr(source, "ALL_ATTENTION_FUNCTIONS", None)
        if isinstance(known, AttentionInterface):
            eager: Any = getattr(source, "eager_attention_forward", None)
            own: Callable[..., Any] | None = known.get_interface(name or "sdpa", eager)
            if own is None:
                break
            return own
    raise NotImplementedError(f"{type(module).__name__} keeps its attention function to itself")


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    scaling = kwargs.get("scaling")
    return float(scaling) if scaling is not None else float(query.shape[-1] ** -0.5)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    for each in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(each, Tensor) and each.dim() >= 2:
            return each.shape[1]
    return None


def _wants_weights(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_attentions")
    config = text_config(model)  # type: ignore[arg-type]
    return bool(getattr(config, "output_attentions", False) if asked is None else asked)


def _is_differentiable(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether somebody may want gradients, which the kernels do not give."""
    given = kwargs.get("inputs_embeds")
    if isinstance(given, Tensor) and given.requires_grad:
        return True
    return any(parameter.requires_grad for parameter in model.parameters())


def _tables_move(value: Any) -> bool:
    """Whether a configuration names a kind of RoPE whose table changes as the text grows."""
    if isinstance(value, dict):
        return any(_tables_move(each) for each in value.values())
    return value in ("dynamic", "longrope")

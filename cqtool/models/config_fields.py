"""What of a model's configuration decides what it computes over given weights."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from cqtool.layout.fields import is_number, is_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A list of what is compared, and none of what is not: configurations carry a hundred fields that
# decide nothing (ids, defaults of generation, dropout, how they were saved), every version of
# transformers and every training script adds some, and one of those that was forgotten would refuse
# the right model. What is forgotten here, weights, geometry and RoPE still have a chance to tell.
# Sizes that a parameter's shape tells are left out.
_FIELDS = (
    # heads of the same width in all
    "num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim", "multi_query",
    "new_decoder_architecture", "num_kv_shared_layers",
    # what a layer attends to, and where it is turned
    "layer_types", "sliding_window", "attention_chunk_size", "attention_layers", "window_size",
    "no_rope_layers", "partial_rotary_factor", "rotary_dim", "rotary_pct", "alibi",
    "use_bidirectional_attention",
    # functions, and the order of things in a block
    "hidden_act", "hidden_activation", "activation_function", "activation",
    "activation_sparsity_pattern", "swiglu_alpha", "swiglu_limit", "use_parallel_residual",
    "parallel_attn", "use_qk_norm", "apply_residual_connection_post_layernorm",
    "do_layer_norm_before",
    # norms
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon",
    # scales and limits
    "attention_multiplier", "query_pre_attn_scalar", "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx", "attn_temperature_tuning", "attn_scale", "floor_scale",
    "attention_value_scale", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv",
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb",
    "scale_depth", "dim_model_base",
    # experts
    "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group",
    "scoring_func",
)  # fmt: skip
_NULL_TURNS_OFF = {
    "sliding_window", "attention_chunk_size", "swiglu_limit", "attn_logit_softcapping",
    "final_logit_softcapping", "clip_qkv",
}  # fmt: skip
"""Elsewhere null stands for a value that some versions of transformers fill in, others not."""
_SAME_NUMBER = 1e-5
"""Relative: GGUF files keep as float32 what a configuration says in decimal digits."""


def config_fields(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of the configuration of the part that generates text, as far as it has them.

    Returns:
        Field -> a JSON value that is plain (:func:`cqtool.layout.fields.is_plain`), in alphabetical
        order; a list by layer where layers have values of their own.
    """
    config = model.config.get_text_config(decoder=True)
    # transformers raises where one of these is read from the configuration of all layers.
    by_layer = frozenset(config.per_layer_attributes or ()).intersection(_FIELDS)
    told = {
        name: getattr(config, name)
        for name in _FIELDS
        if name not in by_layer and hasattr(config, name)
    }
    if by_layer:
        layers = list(config.per_layer_config)
        told |= {name: [getattr(layer, name) for layer in layers] for name in by_layer}
    tables = getattr(config, "rope_parameters", None)
    if isinstance(tables, dict) and "partial_rotary_factor" in tables:
        told["partial_rotary_factor"] = tables["partial_rotary_factor"]
    if "sliding_window" in told and not _slides(config):
        told["sliding_window"] = None
    told = {name: list(v) if isinstance(v, tuple) else v for name, v in told.items()}
    return {
        name: value
        for name, value in sorted(told.items())
        if is_plain(value) and (value is not None or name in _NULL_TURNS_OFF)
    }


def config_difference(expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    """The first field that both tell and that differs, as part of a sentence."""
    for name in sorted(expected.keys() & actual.keys()):
        one, other = expected[name], actual[name]
        if _same(one, other):
            continue
        if isinstance(one, list) and isinstance(other, list):
            if len(one) != len(other):
                return f"its {name} has {len(other)} entries instead of {len(one)}"
            place = next(
                i for i, pair in enumerate(zip(one, other, strict=True)) if not _same(*pair)
            )
            name, one, other = f"{name}[{place}]", one[place], other[place]
        return f"its {name} is {_shown(other)} instead of {_shown(one)}"
    return None


def _slides(config: Any) -> bool:
    """Whether any layer has the window: some configurations name one that none has."""
    types = getattr(config, "layer_types", None)
    if isinstance(types, list | tuple):
        return any("sliding" in str(one) or "chunked" in str(one) for one in types)
    return getattr(config, "use_sliding_window", True) is not False


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if is_number(one) and is_number(other):
        return math.isclose(one, other, rel_tol=_SAME_NUMBER)
    return bool(_function(one) == _function(other))


def _function(value: Any) -> Any:
    """One name for the approximations of a function: transformers itself replaces the "gelu" of
    some configurations by "gelu_pytorch_tanh", and has two names for SiLU."""
    if value in ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python", "gelu_pytorch_tanh"):
        return "gelu"
    return "silu" if value == "swish" else value


def _shown(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else json.dumps(value)

"""Models with random weights, made from a shape or from a configuration; nothing is downloaded."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cqtool.bench.shapes import Shape, named_shape
from cqtool.errors import EnvironmentProblem, ModelError


@dataclass(frozen=True)
class Target:
    """What is measured.

    Attributes:
        shape: its numbers.
        config: the transformers configuration that models are made from.
    """

    shape: Shape
    config: Any


def find_target(name: str) -> Target:
    """A named shape, or the shape of a model's own configuration.

    Args:
        name: a name from :data:`shapes.SHAPES`, a model folder, or a Hub id, of which only the
            configuration is read.

    Raises:
        RecipeError: it is none of them.
        ModelError: the configuration cannot be read, or is of no decoder with a key/value cache.
    """
    if "/" not in name and not Path(name).is_dir():
        shape = named_shape(name)
        return Target(shape, config_of(shape))
    try:
        config = AutoConfig.from_pretrained(name).get_text_config(decoder=True)
        return Target(_shape_of(public_name(name), config), config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"Cannot take the shape of {name} ({type(error).__name__}: {reason:.200}); give a "
            "folder or Hub id with the config.json of a decoder, or the name of a shape."
        ) from error


def public_name(text: str) -> str:
    """A Hub id as it is, and of a local folder only its name: reports are made to be shown."""
    path = Path(text)
    return path.resolve().name if path.is_dir() else text


def config_of(shape: Shape) -> Any:
    """The transformers configuration of a named shape."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    rope |= shape.rope_scaling or {}
    fields: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": shape.tied,
        "rope_parameters": rope,
        # No token ends a text, and none is padding: random weights would produce them by chance.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if shape.architecture == "mistral":
        fields["sliding_window"] = shape.sliding_window
    if shape.architecture == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": shape.local_rope_theta}
        fields |= {
            "sliding_window": shape.sliding_window,
            "layer_types": [
                "full_attention" if (i + 1) % shape.full_every == 0 else "sliding_attention"
                for i in range(shape.layers)
            ],
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
            "query_pre_attn_scalar": shape.head_dim,
        }
    return AutoConfig.for_model(shape.architecture, **fields)


def _shape_of(name: str, config: Any) -> Shape:
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return Shape(
        name=name,
        architecture=str(config.model_type),
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        hidden=hidden,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * hidden),
        vocabulary=int(config.vocab_size),
        rope_theta=float(rope.get("rope_theta") or 1e4),
        positions=int(getattr(config, "max_position_embeddings", 0) or 0),
        sliding_window=getattr(config, "sliding_window", None),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def with_layers(config: Any, layers: int) -> Any:
    """A copy of a configuration with only the first `layers` layers."""
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = layers
    if getattr(changed, "layer_types", None) is not None:
        changed.layer_types = changed.layer_types[:layers]
    return changed


def count_parameters(config: Any) -> int:
    """Parameters of the model, tied ones counted once."""
    with torch.device("meta"):
        model = _from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def random_model(
    config: Any, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PreTrainedModel:
    """A model with the random weights that transformers starts a training with.

    Raises:
        EnvironmentProblem: there is not enough memory for the weights.
    """
    wanted = count_parameters(config) * dtype.itemsize
    free = free_memory(device)
    if wanted > free:
        raise EnvironmentProblem(
            f"The weights take {wanted / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free on "
            f"{device}; use a smaller shape or another --device."
        )
    torch.manual_seed(seed)
    with torch.device(device):
        model = _from_config(config, dtype=dtype, attn_implementation="sdpa")
    generation: Any = model.generation_config
    generation.eos_token_id = generation.pad_token_id = generation.bos_token_id = None
    return model


def _from_config(config: Any, **options: Any) -> PreTrainedModel:
    make: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = make(copy.deepcopy(config), **options).eval().requires_grad_(False)
    return model


def free_memory(device: torch.device) -> int:
    """Bytes free on a device, with what torch holds unused; on a CPU without swapping."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

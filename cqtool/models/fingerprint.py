"""Know a base model again: the same checkpoint in any dtype, and no other one.

Codebooks fit the activations of one checkpoint. A fingerprint is small enough to sit in a JSON
file, takes milliseconds, and survives a load in another floating-point type or on another device.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FROM_EMBEDDING = 16
_FROM_VECTORS = 16
_FROM_MATRICES = 32
_RELATIVE = 0.01
"""A float16 copy may differ by one step of bfloat16 (at most 0.8 %) after rounding twice."""
_ABSOLUTE = 1e-6
"""float16 has no finer steps than 6e-8 near zero."""


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Describe a model's weights.

    Returns:
        JSON-ready: ``model_type``; ``shapes_sha256`` over the sorted names and shapes of all
        parameters (tied ones once); ``probe``, 64 weights rounded to bfloat16: 16 of the input
        embedding, 16 of the vectors (norms, biases) and 32 from as many different matrices, so
        that a fine-tune which left the embedding alone is noticed too.
    """
    parameters = dict(sorted(_parameters(model)))
    shapes = [[name, list(parameter.shape)] for name, parameter in parameters.items()]
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    tensors: list[torch.Tensor] = [p for p in parameters.values() if p is not embedding]
    vectors = [tensor for tensor in tensors if tensor.dim() == 1]
    matrices = [tensor for tensor in tensors if tensor.dim() > 1]
    probe = (
        _spread([embedding], _FROM_EMBEDDING)
        + _spread(vectors or [embedding], _FROM_VECTORS)
        + _one_each(matrices or [embedding], _FROM_MATRICES)
    )
    return {
        "model_type": str(model.config.model_type),
        "shapes_sha256": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        "probe": torch.stack(probe).to(torch.bfloat16).tolist(),
    }


def compare_fingerprints(expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    """Compare two fingerprints.

    Returns:
        None when they are of one checkpoint; otherwise what differs, as part of a sentence.
    """
    if expected["model_type"] != actual["model_type"]:
        return f"its type is {actual['model_type']} instead of {expected['model_type']}"
    if expected["shapes_sha256"] != actual["shapes_sha256"]:
        return "its parameters have other names or shapes"
    pairs = list(zip(expected["probe"], actual["probe"], strict=False))
    far = sum(not abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE for a, b in pairs)
    if far or len(expected["probe"]) != len(actual["probe"]):
        return f"its weights differ ({far} of {len(pairs)} compared values)"
    return None


def _parameters(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters, tied ones once, with torch.compile's prefix taken off."""
    return [(name.removeprefix("_orig_mod."), value) for name, value in model.named_parameters()]


def _spread(tensors: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """`count` values (0-d float32 on the CPU) at even distances through `tensors` end to end."""
    sizes = [tensor.numel() for tensor in tensors]
    total = sum(sizes)
    values = []
    for step in range(count):
        position = (2 * step + 1) * total // (2 * count)
        index = 0
        while position >= sizes[index]:
            position -= sizes[index]
            index += 1
        values.append(_value(tensors[index], position))
    return values


def _one_each(tensors: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """`count` values, each from another tensor as far as there are as many."""
    values = []
    for step in range(count):
        tensor = tensors[(2 * step + 1) * len(tensors) // (2 * count)]
        values.append(_value(tensor, (2 * step + 1) * tensor.numel() // (2 * count)))
    return values


def _value(tensor: torch.Tensor, position: int) -> torch.Tensor:
    index = torch.unravel_index(torch.tensor(position), tensor.shape)
    # Indexed, not flattened: a flattened view of a strided matrix would be a copy of all of it.
    return tensor.detach()[tuple(int(i) for i in index)].to("cpu", torch.float32)

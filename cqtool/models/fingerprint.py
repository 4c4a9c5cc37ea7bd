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
_FREQUENCIES, _SCALE = "original_inv_freq", "attention_scaling"
"""What transformers calls a RoPE table's frequencies, as they were before any text, and the factor
of its cosines and sines; after the type of the layers, where a model has several tables."""


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Describe a model's weights and its RoPE.

    Returns:
        JSON-ready: ``model_type``; ``shapes_sha256`` over the sorted names and shapes of all
        parameters (tied ones once); ``probe``, 64 weights rounded to bfloat16: 16 of the input
        embedding, 16 of the vectors (norms, biases) and 32 from as many different matrices, so
        that a fine-tune which left the embedding alone is noticed too; and ``rope``, where the
        model has such tables, of each five numbers: the factor of its cosines and sines, and four
        of its frequencies from the highest to the lowest.
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
    tables = _rope_tables(model)
    return {
        "model_type": str(model.config.model_type),
        "shapes_sha256": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        "probe": torch.stack(probe).to(torch.bfloat16).tolist(),
    } | ({"rope": tables} if tables else {})


def compare_fingerprints(expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    """Compare two fingerprints; RoPE only where both tell of it.

    Returns:
        None when they are of one checkpoint; otherwise what differs, as part of a sentence.
    """
    if expected["model_type"] != actual["model_type"]:
        return f"its type is {actual['model_type']} instead of {expected['model_type']}"
    if expected["shapes_sha256"] != actual["shapes_sha256"]:
        return "its parameters have other names or shapes"
    pairs = list(zip(expected["probe"], actual["probe"], strict=False))
    far = sum(not _close(a, b) for a, b in pairs)
    if far or len(expected["probe"]) != len(actual["probe"]):
        return f"its weights differ ({far} of {len(pairs)} compared values)"
    # A version of transformers may keep a table that another one does without.
    fewer, more = sorted((expected.get("rope", []), actual.get("rope", [])), key=len)
    if not all(any(_same_table(one, other) for other in more) for one in fewer):
        return "its RoPE has another base or scaling"
    return None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE


def _same_table(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(map(_close, one, other))


def _rope_tables(model: PreTrainedModel) -> list[list[float]]:
    """Five numbers for each different RoPE table; nothing for models that turn in another way."""
    found = set()
    for module in model.modules():
        # Some versions of transformers keep them as buffers, some as they are.
        for name in {*vars(module), *dict(module.named_buffers(recurse=False))}:
            table = getattr(module, name) if name.endswith(_FREQUENCIES) else None
            if isinstance(table, torch.Tensor) and table.dim() == 1 and len(table) > 0:
                last = len(table) - 1
                places = [last * part // 3 for part in range(4)]
                scale = getattr(module, name.removesuffix(_FREQUENCIES) + _SCALE, 1.0)
                factor = float(scale) if isinstance(scale, int | float) else 1.0
                numbers = torch.tensor([factor, *table.detach().cpu()[places].tolist()])
                found.add(tuple(numbers.to(torch.bfloat16).tolist()))
    return [list(numbers) for numbers in sorted(found)]


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

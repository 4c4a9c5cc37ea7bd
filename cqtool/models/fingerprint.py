"""Know a base model again: the same checkpoint in any dtype, and no other one.

Codebooks fit the activations of one checkpoint. A fingerprint is small enough to sit in a JSON
file, takes milliseconds, and survives a load in another floating-point type or on another device.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from cqtool.models.config_fields import config_difference, config_fields
from cqtool.models.weight_sums import distance, weight_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FROM_EMBEDDING, _FROM_MATRICES, _FROM_VECTORS = 16, 32, 16
_MATRICES_MOVED = 0.0023
"""How far embedding and matrices may have moved, relative to their norm. Rounding among float32,
float16 and bfloat16, in any order, moved 24 tiny random models by at most 0.195 % and SmolLM2-135M
by 0.16 %; noise of 0.3 % of each weight, or of the weights' rms, moved them by 0.268 % or more,
rounded or not; a factor of 1.003 by 0.397 % or more."""
_VECTORS_MOVED = 0.008
"""The same for vectors. A norm's weights may all be the same number, and are then rounded all by
as much: by 0.39 % at worst, which shows as 0.59 %."""
_RELATIVE = 0.01
"""Of a number of a RoPE table: one step of bfloat16 is at most 0.8 %."""
_ABSOLUTE = 1e-6
"""Of the same: the lowest frequencies are near zero."""
_FREQUENCIES, _SCALE = "original_inv_freq", "attention_scaling"
"""What transformers calls a RoPE table's frequencies, as they were before any text, and the factor
of its cosines and sines; after the type of the layers, where a model has several tables."""


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Describe a model's weights, its configuration and its RoPE.

    Returns:
        JSON-ready: ``model_type``; ``config``, what of the configuration decides what is computed
        (:func:`cqtool.models.config_fields.config_fields`); ``shapes_sha256`` over the sorted names
        and shapes of all parameters (tied ones once); ``probe``, 64 times the norm and three signed
        sums of weights (:func:`cqtool.models.weight_sums.weight_sums`): 16 of the input embedding,
        32 from as many different matrices, so that a fine-tune which left the embedding alone is
        noticed too, and 16 of the vectors (norms, biases); and ``rope``, where the model has such
        tables, of each five numbers: the factor of its cosines and sines, and four of its
        frequencies from the highest to the lowest.
    """
    parameters = dict(sorted(_parameters(model)))
    shapes = [[name, list(parameter.shape)] for name, parameter in parameters.items()]
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    tensors: list[torch.Tensor] = [p for p in parameters.values() if p is not embedding]
    vectors = [tensor for tensor in tensors if tensor.dim() == 1]
    matrices = [tensor for tensor in tensors if tensor.dim() > 1]
    probe = (
        weight_sums([embedding], _FROM_EMBEDDING)
        + weight_sums(matrices or [embedding], _FROM_MATRICES)
        + weight_sums(vectors or [embedding], _FROM_VECTORS)
    )
    tables = _rope_tables(model)
    return {
        "model_type": str(model.config.model_type),
        "config": config_fields(model),
        "shapes_sha256": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        "probe": probe,
    } | ({"rope": tables} if tables else {})


def compare_fingerprints(expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    """Compare two fingerprints; fields of the configuration, and RoPE, only where both tell.

    Returns:
        None when they are of one checkpoint; otherwise what differs, as part of a sentence.
    """
    if expected["model_type"] != actual["model_type"]:
        return f"its type is {actual['model_type']} instead of {expected['model_type']}"
    if expected["shapes_sha256"] != actual["shapes_sha256"]:
        return "its parameters have other names or shapes"
    field = config_difference(expected.get("config", {}), actual.get("config", {}))
    if field is not None:
        return field
    first = _FROM_EMBEDDING + _FROM_MATRICES
    matrices = distance(expected["probe"][:first], actual["probe"][:first])
    vectors = distance(expected["probe"][first:], actual["probe"][first:])
    # Not "larger than": what is damaged may be NaN.
    if not (matrices <= _MATRICES_MOVED and vectors <= _VECTORS_MOVED):
        return "its weights differ"
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
    """Names and parameters, tied ones once, without what torch.compile puts before a module's."""
    return [(name.replace("_orig_mod.", ""), value) for name, value in model.named_parameters()]

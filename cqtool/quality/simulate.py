"""Decoding over a quantized cache, computed for all positions of a text in one pass.

At position t a decoder attends to the newest `window` tokens and the sinks as they are and to all
others as codes, so a key is seen in both forms, by different queries. The same happens without a
window where tokens are encoded in blocks, because a block that is not full yet is kept as it is:
position t sees token j as a code when j's whole block lies before t + 1 - `window`. Every layer is
therefore given its keys and values twice, decoded ones first, and a mask by which each query
attends to exactly one copy of each token it may see. The softmax over both halves is the softmax of
the decode step. tests/quality checks it against decoding token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cqtool.cache.codec import ExactCodec, TokenCodec
from cqtool.cache.format import CacheFormat
from cqtool.errors import ModelError
from cqtool.geometry import NO_ROTATION, KeyRotation
from cqtool.models.probe import read_geometry
from cqtool.models.rotation import rotate, unrotate
from cqtool.models.tap import AttentionTap, ObservingCache

_GUARD_TOKENS = 64
# A model that counts keys is far beyond; half precision rounds the doubled attention otherwise.
_GUARD_KL, _GUARD_KL_HALF = 1e-3, 0.02
# Masks kept of one pass. Models have one or two; some cut a new one in every layer.
_MASKS = 4

States = Mapping[int, tuple[Tensor, Tensor]]
"""Keys and values of a pass by layer, ``[batch, kv_heads, tokens, head_dim]``, keys after RoPE."""


def teacher_forced_logits(
    model: PreTrainedModel, format: CacheFormat, ids: Tensor, prefilled: States | None = None
) -> Tensor:
    """Logits at every position of `ids`, each as decoding up to there would give them.

    Args:
        model: the model.
        format: on the model's device.
        ids: int64 ``[tokens]``.
        prefilled: of :func:`full_pass` over ``ids[None]``: each position as the first step after a
            prompt instead, see :func:`simulated_cache`.

    Returns:
        ``[tokens, vocabulary]`` in the model's dtype.
    """
    batch = ids.unsqueeze(0).to(model.device)
    with torch.no_grad(), simulated_cache(model, format, ids.shape[0], prefilled) as cache:
        logits = model(input_ids=batch, past_key_values=cache, use_cache=True).logits[0]
    assert isinstance(logits, Tensor)
    return logits


def full_pass(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, States]:
    """Logits of the unquantized model, and the keys and values that a prompt leaves in its cache.

    Args:
        model: the model.
        ids: int64 ``[sequences, tokens]`` on its device.
    """
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def on_update(layer: int, keys: Tensor, values: Tensor) -> None:
        states[layer] = keys, values

    with torch.no_grad():
        cache = ObservingCache(on_update)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits, states


@contextmanager
def simulated_cache(
    model: PreTrainedModel, format: CacheFormat, tokens: int, prefilled: States | None = None
) -> Iterator[ObservingCache]:
    """A cache for one pass over whole sequences, with which every position sees what decoding
    up to there would see.

    The pass belongs into the block, and a backward pass that computes activations again too.
    Gradients reach what the codecs' `decode` depends on, and through the keys and values that stay
    in full precision what came before.

    Args:
        model: the model.
        format: on the model's device.
        tokens: of each sequence.
        prefilled: keys and values of :func:`full_pass` over the same sequences: then every position
            sees what the first step after a prompt sees, which was computed in full precision and
            coded after that. Its own key and value are those of the full pass, too: a small
            difference from that step. None for what this pass makes out of codes.
    """
    tap = AttentionTap.of(model)
    if not tap.attention:
        # It is the attention modules whose masks are edited; the probe finds them.
        read_geometry(model)

    def on_update(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        codecs = format.layers[layer]
        rotation = format.geometry.layers[layer].rotation
        shared = (codecs.block, format.sinks, tap, layer)
        if prefilled is not None:
            keys, values = prefilled[layer]
        decoded_keys = _round_trip(codecs.key, keys, rotation, *shared)
        decoded_values = _round_trip(codecs.value, values, NO_ROTATION, *shared)
        if not _sees_both(format, layer):
            return decoded_keys, decoded_values
        return torch.cat((decoded_keys, keys), dim=2), torch.cat((decoded_values, values), dim=2)

    with _doubled_masks(tap, format, tokens, model.device):
        yield ObservingCache(on_update)


def require_simulation(model: PreTrainedModel, format: CacheFormat, ids: Tensor) -> None:
    """Make sure that the model's attention honours the doubled keys' mask.

    Models that compute position biases from the number of keys (ALiBi) do not.

    Raises:
        ModelError: with the mode that works for them.
    """
    if not any(_sees_both(format, layer) for layer in range(len(format.layers))):
        return
    codec = _Doubled()
    layers = tuple(type(format.layers[0])(codec, codec) for _ in format.layers)
    window = min(max(format.window, format.block), _GUARD_TOKENS // 4)
    identity = CacheFormat("identity", format.geometry, layers, window, 0)
    ids = ids[:_GUARD_TOKENS]
    with torch.no_grad():
        expected = model(input_ids=ids.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    try:
        found = teacher_forced_logits(model, identity, ids)
        logs = [part.float().log_softmax(dim=-1) for part in (expected, found)]
        divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).mean())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError):
        divergence = float("inf")
    if not divergence < (_GUARD_KL if model.dtype == torch.float32 else _GUARD_KL_HALF):
        raise ModelError(
            f"The attention of {type(model).__name__} cannot be given a window in one pass (it "
            "places tokens by counting keys); use --mode decode, or --window 0 and no format that "
            "encodes several tokens together."
        )


class _Doubled(ExactCodec):
    """Exact, but shown twice as codes are."""


def _sees_both(format: CacheFormat, layer: int) -> bool:
    """Whether tokens are seen as they are by some queries and as codes by others."""
    codecs = format.layers[layer]
    # Of a layer that stays as it is, which most are where the cost of one is measured, both copies
    # would be the same.
    exact = type(codecs.key) is type(codecs.value) is ExactCodec
    return not exact and (format.window > 0 or codecs.block > 1)


def _round_trip(
    codec: TokenCodec,
    states: Tensor,
    rotation: KeyRotation,
    block: int,
    sinks: int,
    tap: AttentionTap,
    layer: int,
) -> Tensor:
    whole = states.shape[2] - states.shape[2] % block
    if whole <= sinks or type(codec) is ExactCodec:
        return states
    plain = states[:, :, :whole]
    turned = codec.before_rope and rotation.style != "none"
    if turned:
        step = tap.steps[layer]
        assert step is not None
        cos, sin = step.cos[:, :whole], step.sin[:, :whole]
        plain = unrotate(plain, cos, sin, rotation)
    if codec.block > 1 and sinks:
        # As the cache does, lest the sinks stretch the scales of the block they are in.
        plain = torch.cat((plain[:, :, [sinks] * sinks], plain[:, :, sinks:]), dim=2)
    decoded = codec.decode(codec.encode(plain))
    if turned:
        decoded = rotate(decoded, cos, sin, rotation)
    decoded = decoded[:, :, sinks:].to(states.dtype)
    return torch.cat((states[:, :, :sinks], decoded, states[:, :, whole:]), dim=2)


@contextmanager
def _doubled_masks(
    tap: AttentionTap, format: CacheFormat, tokens: int, device: torch.device
) -> Iterator[None]:
    if not any(_sees_both(format, layer) for layer in range(len(format.layers))):
        yield
        return
    column = torch.arange(tokens, device=device)
    made: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}

    def edit(layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not _sees_both(format, layer):
            return kwargs
        given, block = kwargs.get("attention_mask"), format.layers[layer].block
        # Layers of a kind are given the same mask, also where they are computed again. It is kept
        # beside what was made of it: another one in its place in memory could have its id.
        key = (id(given), block)
        if key not in made:
            made[key] = given, _doubled(given, column, block, format.window)
            while len(made) > _MASKS:
                made.pop(next(iter(made)))
        return {**kwargs, "attention_mask": made[key][1]}

    tap.mask_editor = edit
    try:
        yield
    finally:
        tap.mask_editor = None


def _doubled(mask: Tensor | None, column: Tensor, block: int, window: int) -> Tensor:
    """What each query may see of the decoded tokens, then of those as they are.

    Args:
        mask: the model's own ``[batch or 1, 1, tokens, tokens]``, boolean or to be added; None
            where each query sees all before it.
        column: 0, 1, ... ``[tokens]``.
        block: tokens that are encoded together.
        window: newest tokens that are kept as they are.

    Returns:
        The same kind of mask, ``[batch or 1, 1, tokens, 2 * tokens]``.
    """
    # The columns behind a token's block, against those that a query's window leaves over.
    behind = column - column % block + block
    recent = behind[None, :] > column[:, None] + 1 - window
    if mask is None:
        mask = (column[:, None] >= column[None, :])[None, None]
    elif mask.stride(0) == 0:
        # One mask, shown once for each sequence of the batch.
        mask = mask[:1]
    if mask.dtype == torch.bool:
        halves = (mask & ~recent, mask & recent)
    else:
        lowest = torch.finfo(mask.dtype).min
        halves = (mask.masked_fill(recent, lowest), mask.masked_fill(~recent, lowest))
    return torch.cat(halves, dim=-1)

"""One format on all windows: per-window figures, from full-precision and quantized logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cqtool.cache import CacheFormat, CQCache
from cqtool.errors import ModelError
from cqtool.quality.positions import buckets
from cqtool.quality.simulate import States, full_pass, teacher_forced_logits

Mode = Literal["teacher", "prefill", "decode"]
"""What a position follows: tokens decoded one by one, computed in one pass (`teacher`) or really so
(`decode`), or a prompt that was computed in full precision (`prefill`)."""

# log-softmax of this many positions is held at once, in float32.
_CHUNK = 256


@dataclass
class WindowFigures:
    """Means over the tokens of each window, one entry a window.

    Attributes:
        nll: negative log-likelihood of the next token, in nats.
        kl: KL(full precision || this) of the next-token distribution, in nats.
        top1: share of positions with the same most likely token as full precision.
        kl_at: `kl` over the positions of each bucket of :func:`cqtool.quality.positions.buckets`.
        top1_at: the same for `top1`.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    kl_at: list[list[float]] = field(default_factory=list)
    top1_at: list[list[float]] = field(default_factory=list)


def full_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of the unquantized model for ``ids [tokens]``."""
    with torch.no_grad():
        logits = model(input_ids=ids.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    assert isinstance(logits, Tensor)
    return logits


def prompt_states(model: PreTrainedModel, ids: Tensor, mode: Mode) -> States | None:
    """What a prompt of these tokens leaves in the cache, where `mode` asks for it."""
    return full_pass(model, ids.unsqueeze(0).to(model.device))[1] if mode == "prefill" else None


def quantized_logits(
    model: PreTrainedModel,
    format: CacheFormat,
    ids: Tensor,
    mode: Mode,
    states: States | None = None,
) -> Tensor:
    """Logits ``[tokens, vocabulary]`` over a cache of `format`, in one pass or token by token.

    Args:
        model: the model.
        format: on the model's device.
        ids: int64 ``[tokens]``.
        mode: how.
        states: what :func:`prompt_states` gives for these tokens and this mode, where that is
            known already.
    """
    if mode != "decode":
        states = states or prompt_states(model, ids, mode)
        return teacher_forced_logits(model, format, ids, states)
    cache = CQCache(format, model)
    steps = []
    with torch.no_grad():
        for position in range(ids.shape[0]):
            token = ids[None, position : position + 1].to(model.device)
            steps.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits[0])
    return torch.cat(steps)


def add_window(figures: WindowFigures, full: Tensor, logits: Tensor, ids: Tensor) -> None:
    """Add one window's figures.

    Args:
        figures: to add to.
        full: ``[tokens, vocabulary]`` of full precision.
        logits: the same over the quantized cache; may be `full` itself.
        ids: int64 ``[tokens]``.

    Raises:
        ModelError: the logits hold NaN or infinities.
    """
    tokens = ids.shape[0]
    nll = 0.0
    divergences, agreements = [], []
    targets = ids.to(logits.device)
    for start in range(0, tokens, _CHUNK):
        stop = min(start + _CHUNK, tokens)
        reference = full[start:stop].float().log_softmax(dim=-1)
        found = logits[start:stop].float().log_softmax(dim=-1)
        following = targets[start + 1 : stop + 1]
        rows = torch.arange(following.shape[0], device=found.device)
        nll -= float(found[rows, following].double().sum())
        divergences.append(kl_divergence(reference, found).double().cpu())
        agreements.append((reference.argmax(dim=-1) == found.argmax(dim=-1)).double().cpu())
    kl, same = torch.cat(divergences), torch.cat(agreements)
    if not math.isfinite(nll) or not bool(kl.isfinite().all()):
        raise ModelError(
            "The model's output over this cache is NaN or infinite, so its quality cannot be "
            "measured; run the model in another --dtype (bfloat16 or float32)."
        )
    parts = [slice(first, last) for first, last in buckets(tokens)]
    figures.nll.append(nll / (tokens - 1))
    # Rounding can bring the sum of a lossless cache a little below zero.
    figures.kl.append(max(0.0, float(kl.mean())))
    figures.top1.append(float(same.mean()))
    figures.kl_at.append([max(0.0, float(kl[part].mean())) for part in parts])
    figures.top1_at.append([float(same[part].mean()) for part in parts])


def kl_divergence(reference: Tensor, found: Tensor) -> Tensor:
    """KL(reference || found) in nats, ``[...]``, of log-probabilities ``[..., vocabulary]``."""
    share = reference.exp()
    # Some models mask unused entries of the vocabulary with -inf: 0 * (-inf + inf) is no NaN.
    return torch.where(share > 0, share * (reference - found), 0.0).sum(dim=-1)

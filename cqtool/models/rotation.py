"""Rotary position embedding (RoPE), seen from the key: how it was applied and how to undo it.

RoPE (Su et al., RoFormer, 2021) turns pairs of channels by an angle ``position * inv_freq``. Models
differ in which channels pair up and in whether only a part of a head is turned; YaRN and LongRoPE
also scale the rotated key. All of that is contained in the cosines and sines a model computes, so
both directions below work from those alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cqtool.geometry import KeyRotation

PairLayout = Literal["single", "halves", "neighbours"]
"""How cosines stand for pairs: one entry each, all of them twice over, or each entry twice."""


def pair_layout(cos: Tensor, sin: Tensor, pairs: int | None = None) -> PairLayout:
    """How a model's cosines and sines are laid out. Compares values: it waits for a GPU.

    Args:
        cos: ``[batch or 1, tokens, dim]`` or ``[batch or 1, tokens, dim / 2]``.
        sin: same shape.
        pairs: dim / 2 where it is known. It cannot be seen at position 0, where all are equal.
    """
    if cos.shape[-1] == pairs:
        return "single"
    half = cos.shape[-1] // 2
    if all(torch.equal(x[..., :half], x[..., half:]) for x in (cos, sin)):
        return "halves"
    if all(torch.equal(x[..., 0::2], x[..., 1::2]) for x in (cos, sin)):
        return "neighbours"
    return "single"


def pair_angles(cos: Tensor, sin: Tensor, layout: PairLayout) -> tuple[Tensor, Tensor]:
    """Reduce a model's cosines and sines to one entry per channel pair.

    Args:
        cos: ``[batch or 1, tokens, dim or dim / 2]``.
        sin: same shape.
        layout: from :func:`pair_layout`.

    Returns:
        Two tensors ``[batch or 1, tokens, dim / 2]`` in the dtype given.
    """
    if layout == "single":
        return cos, sin
    if layout == "neighbours":
        return cos[..., 0::2], sin[..., 0::2]
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., :half]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, rotation: KeyRotation) -> Tensor:
    start, stop = rotation.offset, rotation.offset + rotation.dim
    part = x[..., start:stop]
    if rotation.style == "half":
        first, second = part.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = part[..., 0::2], part[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        turned = turned.flatten(-2)
    return torch.cat((x[..., :start], turned, x[..., stop:]), dim=-1)


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, rotation: KeyRotation) -> Tensor:
    """Turn keys as the model does.

    Args:
        keys: ``[batch, kv_heads, tokens, head_dim]``.
        cos: ``[batch or 1, tokens, dim / 2]``, one entry a pair, scaled as the model scales them.
        sin: same shape.
        rotation: how the layer pairs channels.

    Returns:
        float32 keys of the same shape.
    """
    keys = keys.float()
    if rotation.style == "none":
        return keys
    return _turn(keys, cos.float().unsqueeze(1), sin.float().unsqueeze(1), rotation)


def unrotate(keys: Tensor, cos: Tensor, sin: Tensor, rotation: KeyRotation) -> Tensor:
    """Undo :func:`rotate`, exactly up to rounding, whatever scale cos and sin carry.

    The inverse of ``[[c, -s], [s, c]]`` is its transpose over ``c*c + s*s``. Dividing by that
    quantity covers YaRN's attention_scaling, and also the rounding of cos and sin to bfloat16, by
    which they no longer lie on the unit circle.
    """
    keys = keys.float()
    if rotation.style == "none":
        return keys
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    norm = cos.square() + sin.square()
    return _turn(keys, cos / norm, -sin / norm, rotation)


def unrotate_gradient(gradient: Tensor, cos: Tensor, sin: Tensor, rotation: KeyRotation) -> Tensor:
    """The gradient with respect to unrotated keys from that with respect to rotated ones.

    By the chain rule it is the transposed rotation, scale included, applied to `gradient`
    (``[batch, kv_heads, tokens, head_dim]``).
    """
    gradient = gradient.float()
    if rotation.style == "none":
        return gradient
    return _turn(gradient, cos.float().unsqueeze(1), -sin.float().unsqueeze(1), rotation)

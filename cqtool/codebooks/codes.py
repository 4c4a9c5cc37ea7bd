"""Encoding and decoding: the reference that defines what a code means. Needs torch only."""

from __future__ import annotations

import torch
from torch import Tensor

# Distances for at most this many (group, token, centroid) triples are held at once: 128 MiB.
_CHUNK = 1 << 25


def code_bytes(groups: int, bits: int) -> int:
    """Bytes that one token's codes of one head take when packed."""
    return (groups * bits + 7) // 8


def split_groups(tensor: Tensor, size: int) -> Tensor:
    """View the last dimension as groups: ``[..., groups * size]`` to ``[..., groups, size]``."""
    return tensor.reshape(*tensor.shape[:-1], tensor.shape[-1] // size, size)


def assign(vectors: Tensor, codebook: Tensor) -> Tensor:
    """The nearest centroid of each group, in squared Euclidean distance; ties go to the lower one.

    Args:
        vectors: ``[batch, kv_heads, tokens, head_dim]``.
        codebook: ``[kv_heads, groups, centroids, channels]``, groups * channels = head_dim.

    Returns:
        int64 ``[batch, kv_heads, tokens, groups]``.
    """
    heads, groups, centroids, channels = codebook.shape
    batch, _, tokens, _ = vectors.shape
    table = codebook.float().flatten(0, 1)
    grouped = vectors.float().reshape(batch, heads, tokens, groups, channels)
    points = grouped.permute(1, 3, 0, 2, 4).reshape(heads * groups, batch * tokens, channels)
    # |x - c|^2 = |x|^2 - 2 x.c + |c|^2, and |x|^2 does not change the order.
    offset = table.square().sum(dim=-1).unsqueeze(1)
    transposed = table.transpose(1, 2)
    step = max(1, _CHUNK // (heads * groups * centroids))
    parts = [
        torch.baddbmm(offset, points[:, start : start + step], transposed, alpha=-2).argmin(dim=-1)
        for start in range(0, batch * tokens, step)
    ]
    codes = torch.cat(parts, dim=1) if parts else points.new_zeros(points.shape[:2]).long()
    return codes.reshape(heads, groups, batch, tokens).permute(2, 0, 3, 1)


def lookup(codes: Tensor, codebook: Tensor) -> Tensor:
    """The vectors that `codes` stand for.

    Args:
        codes: int ``[batch, kv_heads, tokens, groups]``.
        codebook: ``[kv_heads, groups, centroids, channels]``.

    Returns:
        ``[batch, kv_heads, tokens, groups * channels]`` in the codebook's dtype.
    """
    heads, groups = codebook.shape[:2]
    head = torch.arange(heads, device=codes.device)[None, :, None, None]
    group = torch.arange(groups, device=codes.device)[None, None, None, :]
    return codebook[head, group, codes.long()].flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes: bit k of the stream is bit k % bits of code k // bits, low bits first.

    Args:
        codes: int ``[..., groups]``, each below 2**bits.
        bits: bits of a code.

    Returns:
        uint8 ``[..., ceil(groups * bits / 8)]``; unused bits of the last byte are zero.
    """
    if bits == 8:
        return codes.to(torch.uint8)
    groups = codes.shape[-1]
    shifts = torch.arange(bits, device=codes.device)
    stream = ((codes.long().unsqueeze(-1) >> shifts) & 1).flatten(-2)
    padding = 8 * code_bytes(groups, bits) - groups * bits
    stream = split_groups(torch.nn.functional.pad(stream, (0, padding)), 8)
    weights = 1 << torch.arange(8, device=codes.device)
    return (stream * weights).sum(dim=-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, groups: int) -> Tensor:
    """Undo :func:`pack`: uint8 ``[..., bytes]`` to int64 ``[..., groups]``."""
    if bits == 8:
        return packed.long()
    shifts = torch.arange(8, device=packed.device)
    stream = ((packed.long().unsqueeze(-1) >> shifts) & 1).flatten(-2)
    stream = split_groups(stream[..., : groups * bits], bits)
    return (stream << torch.arange(bits, device=packed.device)).sum(dim=-1)

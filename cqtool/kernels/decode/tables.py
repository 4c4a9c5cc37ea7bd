"""What the decode kernels read of one layer: tables, channel maps and RoPE's steps, on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cqtool.geometry import KeyRotation
from cqtool.kernels.layout import (
    CodeFormat,
    KeyPlan,
    channel_pairs,
    key_table,
    phase_steps,
    plan_keys,
    turn_table,
    turns_slowly,
    value_table,
)


@dataclass(frozen=True)
class RopeTable:
    """One RoPE table, as a layer's kernels want it.

    Attributes:
        steps: int64 ``[kv_heads, key_dim / 2]``, see :func:`layout.phase_steps`.
        turns: float16 ``[kv_heads, 23, 2, key_dim / 2]``, see :func:`layout.turn_table`.
        scale: factor on turned keys (YaRN's attention_scaling).
        slow: see :func:`layout.turns_slowly`.
    """

    steps: Tensor
    turns: Tensor
    scale: float = 1.0
    slow: bool = False


class LayerTables:
    """One layer's codebooks in the kernels' layout.

    Args:
        key_codebook: ``[kv_heads, groups, centroids, channels]`` of keys before RoPE.
        value_codebook: the same of values.
        rotation: how RoPE pairs the channels of a key head.
        key_permutation: int ``[kv_heads, key_dim]`` or ``[key_dim]``: the model channel of each
            codebook channel, None for the identity.
        value_permutation: the same for values.

    Raises:
        ValueError: no kernel takes such codebooks; the sentence says why.
    """

    def __init__(
        self,
        key_codebook: Tensor,
        value_codebook: Tensor,
        rotation: KeyRotation,
        key_permutation: Tensor | None = None,
        value_permutation: Tensor | None = None,
    ) -> None:
        self.key_format, self.value_format = _format(key_codebook), _format(value_codebook)
        for format in (self.key_format, self.value_format):
            if reason := format.unsupported():
                raise ValueError(reason)
        self.rotation = rotation
        self.kv_heads = key_codebook.shape[0]
        device = key_codebook.device
        self.plans = key_plans(self.key_format, rotation, key_permutation, self.kv_heads)
        self.pairing = self.plans[0].pairing
        self.key_table = torch.cat(
            [key_table(key_codebook[h : h + 1], plan) for h, plan in enumerate(self.plans)]
        ).contiguous()
        self.value_table = value_table(value_codebook, self.value_format).contiguous()
        maps = [_channel_maps(plan, rotation) for plan in self.plans]
        self.pair_channels = torch.stack([pairs for pairs, _ in maps]).int().to(device)
        self.natural_place = torch.stack([place for _, place in maps]).short().to(device)
        if value_permutation is None:
            value_permutation = torch.arange(self.value_format.head_dim)
        self.value_channels = (
            value_permutation.int().expand(self.kv_heads, -1).contiguous().to(device)
        )
        self._no_rope = self.rope(torch.zeros(rotation.dim // 2))

    def rope(self, inv_freq: Tensor, scale: float = 1.0) -> RopeTable:
        """A RoPE table for this layer.

        Args:
            inv_freq: ``[rotation.dim / 2]`` radians a token.
            scale: factor on turned keys.
        """
        device = self.key_table.device
        # Heads without permutations of their own have one plan.
        made = {
            plan: (phase_steps(inv_freq, plan), turn_table(inv_freq, plan))
            for plan in set(self.plans)
        }
        steps = torch.stack([made[plan][0] for plan in self.plans])
        turns = torch.stack([made[plan][1] for plan in self.plans])
        slow = all(turns_slowly(inv_freq, plan) for plan in made)
        return RopeTable(steps.to(device), turns.to(device), scale, slow)

    @property
    def no_rope(self) -> RopeTable:
        """The table of a layer whose keys are not turned."""
        return self._no_rope


def _format(codebook: Tensor) -> CodeFormat:
    _, groups, centroids, channels = codebook.shape
    return CodeFormat(groups * channels, channels, centroids.bit_length() - 1)


def key_plans(
    format: CodeFormat, rotation: KeyRotation, permutation: Tensor | None, kv_heads: int
) -> list[KeyPlan]:
    """The plan of each key head, all of one pairing.

    Args:
        format: of the keys.
        rotation: how RoPE pairs the channels of a head.
        permutation: as :class:`LayerTables` takes it.
        kv_heads: how many heads there are.
    """
    if permutation is None:
        return [plan_keys(format, rotation)] * kv_heads
    rows = permutation.expand(kv_heads, -1).tolist()
    plans = [plan_keys(format, rotation, tuple(row)) for row in rows]
    if len({plan.pairing for plan in plans}) > 1:
        # One kernel serves all heads of a layer.
        plans = [plan_keys(format, rotation, tuple(row), scatter=True) for row in rows]
    return plans


def _channel_maps(plan: KeyPlan, rotation: KeyRotation) -> tuple[Tensor, Tensor]:
    """Each pair's model channels ``[dim / 2, 2]``, and where "scatter" puts kernel channels."""
    dim = plan.format.head_dim
    pairs = torch.tensor(channel_pairs(plan, rotation))
    place = torch.zeros(dim, dtype=torch.long)
    if plan.pairing == "scatter":
        place[pairs.flatten()] = torch.arange(dim)
        place = place[torch.tensor(plan.channels)]
    return pairs.T, place

"""Attention over a layer whose heads have codes of their own: a call for each pair of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cqtool.kernels.decode.arguments import CodedTokens, Columns, DenseTokens
from cqtool.kernels.decode.op import decode_attention
from cqtool.kernels.decode.tables import LayerTables, RopeTable
from cqtool.kernels.lanes import side_by_side


class _Run(NamedTuple):
    """Neighbouring heads of a layer that are neighbours in one of its parts too."""

    head: int
    part: int
    place: int
    size: int


class HeadOrder:
    """Which key/value heads of a layer its parts have.

    Args:
        parts: the heads of each part, ascending; together all heads of the layer.

    Attributes:
        parts: the same.
        kv_heads: heads of the layer.
        copies: whether some part's heads lie so that it gets a copy of them.
    """

    def __init__(self, parts: Sequence[Sequence[int]]) -> None:
        self.parts = tuple(map(tuple, parts))
        self.kv_heads = sum(map(len, self.parts))
        self._runs = _runs(self.parts)
        self._steps = [_step(heads) for heads in self.parts]
        self.copies = None in self._steps

    def divide(self, states: Tensor) -> list[Tensor]:
        """Each part's heads of ``[batch, heads, ...]``, read in place where strides can say which.

        Args:
            states: of key/value heads, or of query heads, of which neighbours read the same one.
        """
        if len(self.parts) == 1:
            return [states]
        readers = states.shape[1] // self.kv_heads
        found = []
        for part, (heads, step) in enumerate(zip(self.parts, self._steps, strict=True)):
            if step is not None and (step == 1 or readers == 1):
                last = (heads[-1] + 1) * readers
                found.append(states[:, heads[0] * readers : last : step])
                continue
            own = [
                states.narrow(1, run.head * readers, run.size * readers)
                for run in self._runs
                if run.part == part
            ]
            found.append(torch.cat(own, dim=1))
        return found

    def join(self, found: Sequence[Tensor]) -> Tensor:
        """What was found for the parts, ``[batch, own heads, ...]``, in the order of the heads."""
        if len(found) == 1:
            return found[0]
        readers = sum(each.shape[1] for each in found) // self.kv_heads
        return torch.cat(
            [
                found[run.part].narrow(1, run.place * readers, run.size * readers)
                for run in self._runs
            ],
            dim=1,
        )


@dataclass(frozen=True)
class CodedPart:
    """Tokens of some heads of a layer, and how to read them.

    Attributes:
        coded: their tiles.
        tables: their codebooks.
        rope: their RoPE table.
        dense: their sinks and recent tokens, None without any.
    """

    coded: CodedTokens
    tables: LayerTables
    rope: RopeTable
    dense: DenseTokens | None = None


def decode_parts(
    query: Tensor,
    parts: Sequence[CodedPart],
    order: HeadOrder,
    columns: Columns,
    *,
    scale: float,
    sliding: int = 0,
    softcap: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`decode_attention` of a layer in parts, which run side by side.

    :func:`cqtool.kernels.decode.share.room_beside` says how they share the GPU.

    Args:
        query: ``[batch, heads, tokens, key_dim]`` of the whole layer.
        parts: tokens and tables of each part.
        order: which heads they have.
        columns: the rows' lengths.
        scale: factor on scores.
        sliding: columns a token attends to; 0 for all.
        softcap: soft cap of the scores; 0 for none.
        mask: uint8 ``[batch, columns]``.

    Returns:
        ``[batch, heads, tokens, value_dim]`` of the whole layer.
    """
    attend = partial(
        decode_attention, columns=columns, scale=scale, sliding=sliding, softcap=softcap, mask=mask
    )
    if len(parts) == 1:
        (only,) = parts
        return attend(query, only.coded, only.tables, only.rope, dense=only.dense)
    calls = [
        partial(
            attend,
            own,
            part.coded,
            part.tables,
            part.rope,
            dense=part.dense,
            beside=order.kv_heads - len(heads),
        )
        for own, part, heads in zip(order.divide(query), parts, order.parts, strict=True)
    ]
    return order.join(side_by_side(query.device, calls))


def divide_dense(dense: DenseTokens, order: HeadOrder) -> list[DenseTokens]:
    """Each part's sinks and recent tokens of a whole layer's."""
    tensors = (dense.recent_keys, dense.recent_values, dense.sink_keys, dense.sink_values)
    none = [None] * len(order.parts)
    divided = [none if each is None else order.divide(each) for each in tensors]
    return [DenseTokens(*own) for own in zip(*divided, strict=True)]


def _runs(parts: Sequence[Sequence[int]]) -> list[_Run]:
    """The heads of all parts in order, neighbours together."""
    places = sorted(
        (head, part, place) for part, heads in enumerate(parts) for place, head in enumerate(heads)
    )
    runs: list[_Run] = []
    for head, part, place in places:
        if runs and runs[-1].part == part:
            runs[-1] = runs[-1]._replace(size=runs[-1].size + 1)
        else:
            runs.append(_Run(head, part, place, 1))
    return runs


def _step(heads: Sequence[int]) -> int | None:
    """The distance from each head to the next, None where it differs."""
    steps = {after - before for before, after in pairwise(heads)}
    return None if len(steps) > 1 else next(iter(steps), 1)

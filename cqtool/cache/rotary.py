"""The RoPE angles of every cached token, kept as positions where they can be computed again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cqtool.models.tap import RopeStep, angles

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class RotaryHistory:
    """What one RoPE table of a model did to the tokens of one cache.

    A token keeps its position (4 bytes, shared by all layers) and, with tables that change as the
    sequence grows (dynamic NTK, LongRoPE), the frequencies it was rotated with: transformers never
    rotates a cached key again. Angles that do not follow from positions are kept as they are.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.length = 0
        self._positions: Tensor | None = None
        self._observed: tuple[Tensor, Tensor] | None = None
        self._tables: list[tuple[int, Tensor, float]] = []
        self._last: tuple[Tensor, int] | None = None
        self._dtype = torch.float32
        self._origin: Tensor | None = None
        self._straight = 0
        self._on_cpu: tuple[Tensor, Tensor] | None = None
        self._memo: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def observe(self, step: RopeStep, total: int) -> None:
        """Take note of a forward pass that brings the cache to `total` tokens.

        Every layer reports the same pass; only the first report counts.
        """
        if self.length >= total:
            return
        self._memo.clear()
        if self._observed is None and not self._append_positions(step):
            past = self.angles(0, self.length) if self.length else None
            self._observed = _join(past, (step.cos, step.sin))
            self._positions = None
            self._memo.clear()
        elif self._observed is not None:
            self._observed = _join(self._observed, (step.cos, step.sin))
        self.length = total

    def angles(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """cos and sin ``[batch or 1, stop - start, dim / 2]`` of a range of cached tokens."""
        if self._observed is not None:
            cos, sin = self._observed
            return cos[:, start:stop], sin[:, start:stop]
        if (start, stop) not in self._memo:
            assert self._positions is not None
            inv_freq, scaling = self._frequencies(start, stop)
            positions = self._positions[:, start:stop]
            if self._origin is not None and stop <= self._straight:
                # The same but for padding, whose positions are then those the kernels take.
                columns = torch.arange(start, stop, device=positions.device)
                positions = columns - self._origin[:, None]
            self._memo[start, stop] = angles(positions, inv_freq, scaling, self._dtype)
        return self._memo[start, stop]

    @property
    def table(self) -> tuple[Tensor, float] | None:
        """inv_freq ``[dim / 2]``, on the CPU, and scale when one table turned every token.

        None otherwise. Copied from the GPU once a table.
        """
        if self._observed is not None or len(self._tables) != 1:
            return None
        only = self._tables[0]
        if self._on_cpu is None or self._on_cpu[0] is not only[1]:
            self._on_cpu = only[1], only[1].float().cpu()
        return self._on_cpu[1], only[2]

    def origin(self, first: Tensor, check: bool) -> Tensor | None:
        """The column of each row's position 0, if positions follow the columns from `first` on.

        Args:
            first: int ``[batch]``, the rows' first columns that are not padding.
            check: compare the positions that came in since the last check, which waits for the
                GPU; without it they are trusted to go on as before.

        Returns:
            int32 ``[batch]``, the same object until something changes; None when positions jump.
        """
        if self._positions is None or self._positions.shape[1] == 0:
            return None
        if self._straight < self.length and (check or self._straight == 0):
            columns = torch.arange(self.length, device=self._positions.device)
            offsets = columns - self._positions  # [batch or 1, tokens]
            padding = columns < first.to(offsets.device)[:, None]
            same = bool(((offsets == offsets[:, -1:]) | padding).all())
            newest = offsets[:, -1].expand(first.shape[0]).to(torch.int32)
            if not same:
                self._origin = None
            elif self._origin is None or not torch.equal(self._origin, newest):
                self._origin = newest.contiguous()
        self._straight = self.length
        return self._origin

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.length = min(self.length, length)
        self._straight = min(self._straight, length)
        self._tables = [table for table in self._tables if table[0] < max(1, length)]
        self._last = None
        self._map(lambda tensor: tensor[:, :length])

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension (reorder, repeat, select)."""
        # A batch of one stands for all rows.
        self._map(lambda tensor: tensor if tensor.shape[0] == 1 else change(tensor))
        if self._origin is not None:
            self._origin = change(self._origin).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        stored = [self._positions, *(self._observed or ()), *(table[1] for table in self._tables)]
        return sum(tensor.nbytes for tensor in stored if tensor is not None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._memo.clear()
        if self._positions is not None:
            self._positions = change(self._positions)
        if self._observed is not None:
            self._observed = change(self._observed[0]), change(self._observed[1])

    def _append_positions(self, step: RopeStep) -> bool:
        if step.positions is None or step.inv_freq is None:
            return False
        if not self._is_last(step.inv_freq):
            expected = step.recomputed()
            assert expected is not None
            limit = _TOLERANCE.get(step.cos.dtype, 1e-4) * max(1.0, step.scaling)
            if expected[0].shape != step.cos.shape or not all(
                torch.allclose(a.float(), b.float(), rtol=0, atol=limit)
                for a, b in zip(expected, (step.cos, step.sin), strict=True)
            ):
                return False
            known = self._tables[-1] if self._tables else None
            if known is None or not torch.equal(known[1], step.inv_freq):
                self._tables.append((self.length, step.inv_freq.clone(), step.scaling))
            if not step.inv_freq.is_inference():
                self._last = step.inv_freq, step.inv_freq._version
        self._dtype = step.cos.dtype
        new = step.positions.to(torch.int32)
        self._positions = new.clone() if self._positions is None else _cat(self._positions, new)
        return True

    def _is_last(self, inv_freq: Tensor) -> bool:
        """Whether the table is that of the pass before; comparing values would stall a GPU.

        When a table changes, some transformers versions register another tensor and some write into
        the same one (LongRoPE since 5.23), which then counts up its version.
        """
        if self._last is None or inv_freq.is_inference():
            return False
        return inv_freq is self._last[0] and inv_freq._version == self._last[1]

    def _frequencies(self, start: int, stop: int) -> tuple[Tensor, float | Tensor]:
        if len(self._tables) == 1:
            return self._tables[0][1], self._tables[0][2]
        starts = [table[0] for table in self._tables]
        device = self._tables[0][1].device
        columns = torch.arange(start, stop, device=device)
        index = torch.bucketize(columns, torch.tensor(starts, device=device), right=True) - 1
        inv_freq = torch.stack([table[1] for table in self._tables])[index]
        scaling = torch.tensor([table[2] for table in self._tables], device=device)[index]
        return inv_freq, scaling[:, None]


def _cat(past: Tensor, new: Tensor) -> Tensor:
    batch = max(past.shape[0], new.shape[0])
    parts = [part.expand(batch, *part.shape[1:]) for part in (past, new)]
    return torch.cat(parts, dim=1)


def _join(past: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if past is None:
        return new
    return _cat(past[0], new[0]), _cat(past[1], new[1])

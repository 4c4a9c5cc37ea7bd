"""What the layers of a cache share about the running pass: lengths on the device, and the mask."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Literal

import torch
from torch import Tensor

from cqtool.cache.sinks import SinkColumns
from cqtool.models.tap import AttentionTap

MaskKind = Literal["plain", "holes", "unfit"]


class PassState:
    """Of one cache; the layers ask it, so that each question costs once a pass, not once a layer.

    Nothing here waits for the GPU in a pass over one token but for the first after a prompt.

    Attributes:
        running: whether the model attends through :mod:`cqtool.cache.attention` in this pass.
        mask_skipped: whether the model was given no mask because every layer would do without.
    """

    def __init__(self, sinks: SinkColumns, tap: AttentionTap) -> None:
        self.sinks = sinks
        self.tap = tap
        self.running = False
        self.mask_skipped = False
        self.clear()

    def clear(self) -> None:
        """Forget the tokens."""
        self._known: dict[Hashable, tuple[Tensor | None, Tensor]] = {}
        self._kind: MaskKind | None = None
        self._seen: Tensor | None = None

    def derived(self, key: Hashable, source: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        """A small tensor made from `source`, remembered as long as that stays the same object."""
        known = self._known.get(key)
        if known is None or known[0] is not source:
            if len(self._known) > 64:
                self._known.clear()
            known = self._known[key] = source, make()
        return known[1]

    def column(self, value: int, device: torch.device) -> Tensor:
        """``value`` for every row: int32 ``[batch]``."""
        start = self.sinks.start
        assert start is not None
        return self.derived(
            ("column", value, device),
            start,
            lambda: torch.full(start.shape, value, dtype=torch.int32, device=device),
        )

    def first(self, base: int, device: torch.device) -> Tensor:
        """The rows' first tokens as columns counted from `base`: int32 ``[batch]``."""
        start = self.sinks.start
        assert start is not None
        return self.derived(
            ("first", base, device),
            start,
            lambda: (start - base).clamp(min=0).to(device, torch.int32),
        )

    def forget_mask(self) -> None:
        """Look at the next mask anew: a pass over several tokens may have hidden some of them."""
        self._kind = self._seen = None

    def mask_kind(self, new: int, total: int) -> MaskKind:
        """What the running pass's mask asks for.

        Args:
            new: the pass's tokens.
            total: columns with them.

        Returns:
            ``plain`` when a row sees all from its first token on, ``holes`` when the mask must be
            read, ``unfit`` when it contradicts the padding seen in the first pass.
        """
        start, mask = self.sinks.start, self.tap.padding_mask
        assert start is not None
        if mask is None:
            return "plain" if self.sinks.limit == self.sinks.sinks else "unfit"
        if mask.shape != (start.shape[0], total):
            return "unfit"
        if self._kind is None or (new > 1 and mask is not self._seen):
            seen, real = mask.to(start.device) != 0, self._real(total, start)
            if bool((seen == real).all()):
                self._kind = "plain"
            else:
                self._kind = "unfit" if bool((seen & ~real).any()) else "holes"
        self._seen = mask
        return self._kind

    def byte_mask(self, base: int, device: torch.device) -> Tensor | None:
        """The mask as the kernels read it, uint8 ``[batch, columns from base on]``."""
        mask = self.tap.padding_mask
        if mask is None or self._kind != "holes":
            return None
        return self.derived(
            ("mask", base, device),
            mask,
            lambda: (mask[:, base:] != 0).to(device, torch.uint8).contiguous(),
        )

    @staticmethod
    def _real(total: int, start: Tensor) -> Tensor:
        return torch.arange(total, device=start.device) >= start[:, None]

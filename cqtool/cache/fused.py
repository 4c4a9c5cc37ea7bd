"""A cache layer that keeps its codes as the kernels read them, and attends to them undecoded.

It means what :class:`CQLayer` means. In a pass over a few tokens the new keys and values go back to
the model as they came, marked; the attention function of :mod:`cqtool.cache.attention` finds the
mark and asks the layer to attend. Every other pass gets keys and values decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cqtool.cache.tiled import DTYPES, FEW, TiledLayer
from cqtool.kernels.decode.arguments import CodedTokens, Columns, DenseTokens
from cqtool.kernels.decode.parts import CodedPart, decode_parts, divide_dense

MARK = "_cqtool_layer"
"""The attribute by which a key tensor names the layer that is to attend."""


class FusedLayer(TiledLayer):  # type: ignore[no-untyped-call]
    """A :class:`CQLayer` on the kernels; the arguments are those of :class:`TiledLayer`."""

    def _clear(self) -> None:
        super()._clear()
        # Whether marked keys are under way, and whether the ring is to be encoded after them.
        self.pending = self.unsettled = False
        self._divided: tuple[tuple[Tensor | None, ...], list[DenseTokens]] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new states; see :meth:`CQLayer.update`.

        Returns:
            Keys and values to attend to, or the new ones alone, marked for :meth:`attend`.
        """
        self._check_attended()
        new = self._observe(key_states, value_states)
        if self.rotary is not None:
            assert self.sinks.start is not None
            self.rotary.origin(self.sinks.start, check=new > 1)
        differentiable = torch.is_grad_enabled() and key_states.requires_grad
        if self.state.running and self.can_attend(new) and not differentiable:
            return self._take_marked(key_states, value_states)
        if self.state.mask_skipped:
            raise RuntimeError(
                f"Layer {self.index} cannot attend to its codes in this pass, which only turned "
                'out after the mask was left out; use CQCache(..., implementation="reference").'
            )
        if new > 1:
            self.state.forget_mask()
        keys, values = self._take_decoded(key_states, value_states)
        if self.sliding_window is not None:
            visible = self.sliding_window - 1 + new
            keys, values = keys[:, :, -visible:], values[:, :, -visible:]
        return keys, values

    def can_attend(self, new: int) -> bool:
        """Whether a pass over `new` more tokens can attend to the codes as they are."""
        return (
            self.is_initialized
            and self.length > 0
            and new <= FEW
            and self.dtype in DTYPES
            and (self.key_rotation.style == "none" or self._ropes() is not None)
            and self.state.mask_kind(new, self.length + new) != "unfit"
        )

    def attend(self, query: Tensor, scale: float, softcap: float) -> Tensor:
        """Attend to everything in the cache, the pass's own tokens included.

        Args:
            query: ``[batch, heads, tokens, head_dim]`` after RoPE, of the tokens just taken in.
            scale: factor on scores.
            softcap: soft cap of the scores, 0 for none.

        Returns:
            ``[batch, heads, tokens, value_dim]``.
        """
        self.pending = False
        state, base, sliding = self.state, self.base, self.sliding_window or 0
        dtype = query.dtype
        query = query.to(self.dtype)
        if query.stride(3) != 1:
            query = query.contiguous()
        found = decode_parts(
            query,
            self._coded_parts(base, max(1, self.coded_end - base)),
            self.order,
            Columns(
                first=state.first(base, self.device),
                coded=state.column(self.coded_end - base, self.device),
                total=state.column(self.length - base, self.device),
                origin=self._origin(base),
            ),
            scale=scale,
            sliding=sliding,
            softcap=softcap,
            mask=state.byte_mask(base, self.device),
        )
        if self.unsettled:
            self.unsettled = False
            self._settle(self.length - self.window)
        self._slide(self.length)
        return found.to(dtype)

    def _coded_parts(self, base: int, tokens: int) -> list[CodedPart]:
        ropes = self._ropes() or [part.kernels.tables.no_rope for part in self.parts]
        return [
            CodedPart(
                CodedTokens(part.stores["key"].tiles, part.stores["value"].tiles, tokens),
                part.kernels.tables,
                rope,
                dense,
            )
            for part, rope, dense in zip(self.parts, ropes, self._dense_parts(base), strict=True)
        ]

    def _dense_parts(self, base: int) -> list[DenseTokens]:
        """Each part's window and sinks: divided anew only where they are other tensors."""
        assert self.keys is not None and self.values is not None
        has_ring = self.keys.shape[2] > 0
        # Once columns are dropped, no sink is in sight any more.
        has_sinks = bool(self.kept) and base == 0
        tensors = (
            self.keys if has_ring else None,
            self.values if has_ring else None,
            self.kept["key"] if has_sinks else None,
            self.kept["value"] if has_sinks else None,
        )
        known = self._divided
        if known is not None and all(a is b for a, b in zip(known[0], tensors, strict=True)):
            return known[1]
        divided = divide_dense(DenseTokens(*tensors), self.order)
        # Views stay what they are while the window is written to; copies do not.
        self._divided = None if self.order.copies else (tensors, divided)
        return divided

    def _take_marked(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if keys.shape[2] == 1:
            self._append(keys, values)
        else:
            self._write(keys, values, self.length)
            self.length += keys.shape[2]
            # A pass over several tokens sees the window before them as it was.
            self.unsettled = True
        setattr(keys, MARK, self)
        self.pending = True
        return keys, values

    def _take_decoded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        new, past = keys.shape[2], self.length
        if new == 1:
            self._append(keys, values)
            found = self._materialize()
        else:
            found = self._materialize((keys, values)) if past else (keys, values)
            # What no later token attends to need not be encoded.
            self._slide(past + new)
            self._append(keys, values)
        self._slide(self.length)
        return found

    def _check_attended(self) -> None:
        if self.pending:
            raise RuntimeError(
                f"Layer {self.index}'s keys never came to the attention function that understands "
                "them, so the last pass attended to its own tokens only: the attention "
                "implementation was changed, or an error was ignored. Reset the cache, or use "
                'CQCache(..., implementation="reference").'
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; see :meth:`CQLayer.crop`."""
        self._check_attended()
        super().crop(tokens_to_remove)

    def map_dense(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension to all but the codes."""
        self._check_attended()
        super().map_dense(change)

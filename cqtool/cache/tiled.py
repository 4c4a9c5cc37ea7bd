"""The storage of a fused layer: codes in tiles, the window in a ring, both written in place.

Column n of the window lies at ``n % capacity``. Nothing is concatenated in a decode step. Without a
window there is no ring until a pass over several tokens attends to codes, which needs one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cqtool.cache.coded_heads import CodedHeads
from cqtool.cache.format import LayerCodecs
from cqtool.cache.head_parts import head_parts
from cqtool.cache.layer import CQLayer
from cqtool.cache.passes import PassState
from cqtool.cache.ring import make_ring, put
from cqtool.cache.rotary import RotaryHistory
from cqtool.cache.sinks import SinkColumns
from cqtool.cache.tiles import TileStore
from cqtool.geometry import LayerGeometry
from cqtool.kernels.decode.parts import HeadOrder
from cqtool.kernels.decode.tables import RopeTable
from cqtool.kernels.layout import TILE
from cqtool.models.rotation import rotate, unrotate
from cqtool.models.tap import AttentionTap

FEW = 8
"""Tokens of a pass up to which a layer attends to codes; the ring has room for so many more."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels read."""
# Numbers of which plain torch holds float32 copies at a time.
_CHUNK = 1 << 24


class TiledLayer(CQLayer):  # type: ignore[no-untyped-call]
    """A :class:`CQLayer` that keeps its tokens as the kernels read them.

    Args:
        index: the layer's index in the model.
        geometry: its shapes.
        codecs: how keys and values are stored; the kernels must have their formats.
        window: newest tokens kept in the model's dtype.
        sinks: the rows' first tokens, shared by all layers of the cache.
        rotary: angles of the cached tokens, shared by the layers with the same RoPE table.
        tap: the model's hooks.
        state: of the running pass, shared by all layers of the cache.
        max_length: tokens of the longest text to come, None when nobody knows.
    """

    def __init__(
        self,
        index: int,
        geometry: LayerGeometry,
        codecs: LayerCodecs,
        window: int,
        sinks: SinkColumns,
        rotary: RotaryHistory | None,
        tap: AttentionTap,
        state: PassState,
        max_length: int | None = None,
    ) -> None:
        if geometry.sliding_window is not None:
            # No token beyond is attended to, but for those that a rejected draft gives back.
            window = min(window, geometry.sliding_window + FEW)
        super().__init__(index, geometry, codecs, window, sinks, rotary, tap)
        self.geometry = geometry
        self.shared_codecs = codecs
        self.state = state
        self.max_length = max_length
        self.capacity = -(-(window + FEW) // 8) * 8
        # Columns are dropped from the front in steps that leave the rest in its place in the ring.
        self.unit = math.lcm(TILE, self.capacity)

    def _clear(self) -> None:
        super()._clear()
        # Heads with the same pair of codes together: all of them in most layers.
        self.parts: list[CodedHeads] = []
        self._known_ropes: tuple[Tensor, list[RopeTable]] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn dtype, device and batch from the first states, and make room for a window."""
        super().lazy_initialization(key_states, value_states)
        parts = head_parts(self.geometry, self.shared_codecs)
        self.order = HeadOrder([part.heads for part in parts])
        batch = key_states.shape[0]
        self.parts = [CodedHeads(part, batch, self.device, self.expected) for part in parts]
        # No view of the states, which would keep a whole prompt in memory.
        self.keys = make_ring(key_states, 0, self.dtype)
        self.values = make_ring(value_states, 0, self.dtype)
        if self.window:
            self.make_ring()

    @property
    def expected(self) -> int:
        """Columns of codes that the longest text will have at a time, 0 when nobody knows."""
        if self.max_length is None:
            return 0
        most = self.max_length
        if self.sliding_window is not None:
            # Dropped in steps of a unit, and not before the sinks are out of sight.
            most = min(most, self.sliding_window + max(self.unit, self.sinks.limit) + FEW)
        return max(1, most - self.window)

    def make_ring(self) -> None:
        """Make room for a window and a pass over several tokens, unless it is there."""
        assert self.keys is not None and self.values is not None
        if self.keys.shape[2] == 0:
            self.keys = make_ring(self.keys, self.capacity, self.dtype)
            self.values = make_ring(self.values, self.capacity, self.dtype)

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        key_states, value_states = key_states.detach(), value_states.detach()
        past = self.length
        self.length += key_states.shape[2]
        stop = max(self.coded_end, self.length - self.window)
        self._settle(min(past, stop))
        if stop > past:
            self._encode_columns(
                key_states[:, :, : stop - past], value_states[:, :, : stop - past], past
            )
        recent = max(0, stop - past)
        self._write(key_states[:, :, recent:], value_states[:, :, recent:], past + recent)

    def _write(self, keys: Tensor, values: Tensor, column: int) -> None:
        """Put up to `capacity` tokens into the ring."""
        if keys.shape[2] == 0:
            return
        self.make_ring()
        assert self.keys is not None and self.values is not None
        put(self.keys, keys.detach(), column)
        put(self.values, values.detach(), column)

    def _settle(self, stop: int) -> None:
        """Encode the ring's columns before `stop`."""
        assert self.keys is not None and self.values is not None
        while self.coded_end < stop:
            index = self.coded_end % self.capacity
            part = slice(index, index + min(stop - self.coded_end, self.capacity - index))
            self._encode_columns(self.keys[:, :, part], self.values[:, :, part], self.coded_end)

    def _slide(self, length: int) -> None:
        """Let go of what no token from column `length` on attends to."""
        if self.sliding_window is not None and not self.record_past:
            self.start = max(self.start, length - self.sliding_window + 1)
            self._drop(self.coded_end)

    def _drop(self, stop: int) -> int:
        """Give up tiles before `start`, and before `stop`; returns the first column kept."""
        # Sinks are found by the first column of a row, so none may go while one is in sight.
        if self.start >= self.sinks.limit:
            for store in self.stores:
                store.drop_before(min(self.start, stop) // self.unit * self.unit)
        return self.base

    @property
    def stores(self) -> list[TileStore]:
        """Where the codes of all parts lie."""
        return [store for part in self.parts for store in part.stores.values()]

    @property
    def base(self) -> int:
        """The first column that codes are kept of, the same for all parts."""
        return self.parts[0].stores["key"].base

    def _encode_columns(self, keys: Tensor, values: Tensor, column: int) -> None:
        """Encode tokens ``[batch, kv_heads, n, head_dim]`` that follow the last coded one."""
        stop = column + keys.shape[2]
        skipped = max(0, self._drop(stop) - column)
        # The kernels read the states as they are; un-rotating in torch makes copies of them.
        step = self._chunk(keys) if self._needs_angles() else keys.shape[2]
        for begin in range(skipped, keys.shape[2], step):
            part = slice(begin, begin + step)
            self._encode_part("key", keys[:, :, part], column + begin)
            self._encode_part("value", values[:, :, part], column + begin)
        self.coded_end = stop

    def _encode_part(self, name: str, states: Tensor, column: int) -> None:
        if name in self.kept and column < self.sinks.limit:
            kept = self.sinks.capture(self.kept[name], states, column)
            self.kept[name] = kept.contiguous()
        ropes: list[RopeTable] | None = None
        position = None
        if name == "key" and self.key_rotation.style != "none":
            ropes = self._ropes()
            if ropes is not None:
                position = self._position(column)
            else:
                assert self.rotary is not None
                cos, sin = self.rotary.angles(column, column + states.shape[2])
                states = unrotate(states, cos, sin, self.key_rotation)
        if states.dtype not in DTYPES:
            states = states.float()
        place = partial(self.state.column, device=self.device)
        for index, (part, own) in enumerate(
            zip(self.parts, self.order.divide(states), strict=True)
        ):
            part.append(name, own, column, place, position, ropes[index] if ropes else None)

    def _materialize(self, new: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the columns from `start` on in the model's dtype, `new` ones last."""
        found = []
        for kind, (name, ring) in enumerate((("key", self.keys), ("value", self.values))):
            assert ring is not None
            extra = new[kind] if new is not None else ring[:, :, :0]
            batch, heads, _, dim = ring.shape
            past = self.length - self.start
            out = ring.new_empty(batch, heads, past + extra.shape[2], dim)
            step = self._chunk(ring)
            for begin in range(self.start, self.coded_end, step):
                stop = min(begin + step, self.coded_end)
                out[:, :, begin - self.start : stop - self.start] = self._decode(name, begin, stop)
            recent = max(self.start, self.coded_end)
            places = torch.arange(recent, self.length, device=self.device) % self.capacity
            out[:, :, recent - self.start : past] = ring.index_select(2, places)
            out[:, :, past:] = extra
            found.append(out)
        return found[0], found[1]

    def _decode(self, name: str, begin: int, stop: int) -> Tensor:
        vectors = self.order.join([part.decode(name, begin, stop) for part in self.parts])
        if name == "key" and self.key_rotation.style != "none":
            assert self.rotary is not None
            cos, sin = self.rotary.angles(begin, stop)
            vectors = rotate(vectors, cos, sin, self.key_rotation)
        vectors = vectors.to(self.dtype)
        return self.sinks.overlay(vectors, self.kept[name], begin) if self.kept else vectors

    def _ropes(self) -> list[RopeTable] | None:
        """The RoPE table of each part; None without one, or where positions jump."""
        if self.key_rotation.style == "none" or self.rotary is None:
            return None
        table, start = self.rotary.table, self.sinks.start
        if table is None or start is None or self.rotary.origin(start, check=False) is None:
            return None
        inv_freq, scale = table
        if scale != 1 and self.key_rotation.dim < self.geometry.key_dim:
            # The kernels scale a whole key, the model only what it turns.
            return None
        known = self._known_ropes
        if known is None or known[0] is not inv_freq:
            tables = [part.kernels.rope(inv_freq, scale) for part in self.parts]
            known = self._known_ropes = inv_freq, tables
        return known[1]

    def _needs_angles(self) -> bool:
        return self.key_rotation.style != "none" and self._ropes() is None

    @staticmethod
    def _chunk(states: Tensor) -> int:
        """How many tokens of such rows to hold in float32 at a time."""
        batch, heads, _, dim = states.shape
        return max(TILE, _CHUNK // (batch * heads * dim))

    def _origin(self, base: int) -> Tensor:
        """The column of position 0 counted from `base`, int32 ``[batch]``."""
        if self.key_rotation.style == "none" or self.rotary is None:
            return self.state.column(0, self.device)
        assert self.sinks.start is not None
        origin = self.rotary.origin(self.sinks.start, check=False)
        assert origin is not None
        key = ("origin", id(self.rotary), base, self.device)
        return self.state.derived(key, origin, lambda: (origin - base).to(self.device))

    def _position(self, column: int) -> Tensor:
        """The rows' positions of a column, int32 ``[batch]``."""
        origin = self._origin(0)
        key = ("position", id(self.rotary), column, self.device)
        return self.state.derived(key, origin, lambda: column - origin)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; see :meth:`CQLayer.crop`."""
        if not self._shorten(tokens_to_remove):
            return
        self.coded_end = min(self.coded_end, self.length)
        for store in self.stores:
            store.crop(self.coded_end)
        if self.sliding_window is not None:
            recording, self.record_past = self.record_past, False
            self._slide(self.length)
            self.record_past = recording

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension to every stored tensor."""
        self.map_dense(change)
        with torch.inference_mode(False):
            for store in self.stores:
                store.map_batch(change)

    def map_dense(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension to all but the codes."""
        with torch.inference_mode(False):
            super().map_batch(change)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors of the layer with their reserves, codebooks not counted."""
        return super().nbytes + sum(store.nbytes for store in self.stores)

    @property
    def nbytes_full(self) -> int:
        """Bytes that the tokens of this layer take in the model's dtype."""
        if self.keys is None or self.values is None:
            return 0
        rows = self.keys.shape[0] * self.keys.shape[1] * (self.length - self.start)
        return rows * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

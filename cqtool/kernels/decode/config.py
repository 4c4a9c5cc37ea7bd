"""Which compiled variant of the decode kernels serves a case, and how it is launched. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pairing = Literal["paired", "closed", "scatter"]
PAIRINGS: tuple[Pairing, ...] = ("paired", "closed", "scatter")
DTYPES = ("float16", "bfloat16", "float32")
# Dynamic shared memory a block may have, by compute capability (CUDA programming guide).
SHARED_BYTES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@dataclass(frozen=True)
class DecodeCase:
    """What decides the kernels' code.

    Attributes:
        key_dim: channels of a key head.
        value_dim: channels of a value head.
        key_channels: channels of a key group.
        key_bits: bits of a key code.
        value_channels: channels of a value group.
        value_bits: bits of a value code.
        rows: query rows (query heads per kv head times query tokens).
        pairing: how RoPE's pairs lie in the key groups.
        rotate: whether keys are turned at all.
        slow: whether the later half of the pairs turns little within a tile, see
            :func:`cqtool.kernels.layout.turns_slowly`.
        dtype: of queries, recent tokens and output.
        softcap: whether scores are capped.
        mask: whether there is a mask of columns.
        gain: whether tokens have gains.
        paged: whether tiles lie in pages behind a block table.
    """

    key_dim: int
    value_dim: int
    key_channels: int
    key_bits: int
    value_channels: int
    value_bits: int
    rows: int
    pairing: Pairing = "paired"
    rotate: bool = True
    slow: bool = False
    dtype: str = "float16"
    softcap: bool = False
    mask: bool = False
    gain: bool = False
    paged: bool = False

    @property
    def row_block(self) -> int:
        """Query rows a warp serves at once: the next power of two, at most 8."""
        return min(8, 1 << max(0, self.rows - 1).bit_length())

    @property
    def key_slots(self) -> int:
        """Slots of a key head: four units of two groups each."""
        return _ceil(self.key_dim // (2 * self.key_channels), 4)

    @property
    def value_blocks(self) -> int:
        """Blocks of groups that share the rows of a value table."""
        return _ceil(self.value_dim // self.value_channels, 64 // self.value_channels)

    @property
    def row_groups(self) -> int:
        """Blocks of query rows."""
        return -(-self.rows // self.row_block)


@dataclass(frozen=True)
class Tuning:
    """What speed depends on, found by measurement; `every` costs precision as well.

    Attributes:
        order: orders of a token's key entries that are columns of the queries.
        shared_orders: times as many that read the same queries, with slots exchanged.
        tiles: of a step.
        every: query fragments from one that is made anew to the next; those between are turned on
            in registers, in half precision. 1: all are made anew.
    """

    order: int
    shared_orders: int
    tiles: int
    every: int

    @property
    def slot_orders(self) -> int:
        """Orders in which tokens take their slots."""
        return self.order // 2 * self.shared_orders


# By query rows and channels a key group, on an H100.
_TUNING = {
    (1, 8): Tuning(2, 1, 4, 8),
    (1, 4): Tuning(4, 1, 2, 4),
    (1, 2): Tuning(4, 1, 2, 8),
    (2, 8): Tuning(2, 1, 2, 8),
    (2, 4): Tuning(2, 2, 2, 4),
    (2, 2): Tuning(2, 2, 2, 4),
    (4, 8): Tuning(2, 1, 2, 8),
    (4, 4): Tuning(2, 2, 2, 8),
    (4, 2): Tuning(2, 2, 1, 8),
    (8, 8): Tuning(2, 1, 1, 1),
    (8, 4): Tuning(2, 2, 1, 1),
    (8, 2): Tuning(2, 2, 1, 1),
}
# The same where scores and values are kernels of their own, which leaves registers for heads of up
# to 128 channels.
_TUNING_PARTS = {
    (1, 8): Tuning(2, 1, 8, 8),
    (1, 4): Tuning(4, 1, 4, 4),
    (1, 2): Tuning(4, 1, 4, 8),
    (2, 8): Tuning(2, 1, 4, 8),
    (2, 4): Tuning(2, 2, 4, 8),
    (2, 2): Tuning(2, 2, 4, 8),
    (4, 8): Tuning(2, 1, 4, 8),
    (4, 4): Tuning(2, 2, 4, 8),
    (4, 2): Tuning(2, 2, 2, 8),
}
# (columns, copies) of the values, best first: what fits into shared memory is taken. Entries of 8
# channels are read as matrices instead where two copies fit; not for eight rows, where twice the
# products cost what the reads save.
_SELECTS = {
    1: ((4, 1),),
    2: ((2, 2), (4, 1)),
    4: ((1, 2), (2, 1)),
    8: ((1, 2), (1, 1)),
}
_MATRICES = (2, 2, True)


@dataclass(frozen=True)
class DecodeLaunch:
    """Constants of decode.cu for one case on one architecture; the names are the kernel's own.

    Attributes:
        case: what is computed.
        fused: whether one kernel does scores and values.
        key_parts: passes over the keys' channels.
        value_parts: passes over the values' channels.
        warps: of a block.
        select: columns by which lanes are told apart in the values' products.
        copies: of the values' tables in shared memory.
        matrices: whether values are read as matrices.
        tuning: what was found by measurement.
    """

    case: DecodeCase
    fused: bool
    key_parts: int
    value_parts: int
    warps: int
    select: int
    copies: int
    matrices: bool
    tuning: Tuning

    @property
    def offsets(self) -> int:
        """Tiles whose queries one set of B fragments holds."""
        return max(1, 8 // self.tuning.order // self.case.row_block)

    @property
    def tiles(self) -> int:
        """Tiles of a step."""
        return self.tuning.tiles

    @property
    def slow(self) -> bool:
        """Whether the later half of the slots leaves cosines out."""
        orders = self.tuning.slot_orders
        slots = _ceil(self.case.key_slots, orders) * orders
        halves = slots % (2 * orders) == 0
        return self.case.slow and self.case.rotate and self.key_parts == 1 and halves

    @property
    def key_table(self) -> int:
        """Bytes of the key tables a block holds."""
        c = self.case
        slots = _ceil(c.key_slots, self.key_parts)
        return _ceil(slots, 8 // c.key_channels) * (1 << c.key_bits) * 128

    @property
    def value_table(self) -> int:
        """Bytes of one copy of the value tables a block holds."""
        c = self.case
        return _ceil(c.value_blocks, self.value_parts) * (1 << c.value_bits) * 128

    def shared_bytes(self, scores: bool, values: bool) -> int:
        """Dynamic shared memory of a block."""
        c, rows = self.case, self.case.row_block
        # A part's own slots, but all where a part's channels lie anywhere.
        query_slots = c.key_slots if c.pairing == "scatter" else _ceil(c.key_slots, self.key_parts)
        orders = self.tuning.slot_orders
        slots = _ceil(query_slots, orders) * orders
        exchange = slots * self.offsets * rows * 16 * c.key_channels
        held = 4 // self.select
        apart = (8 if self.matrices else 16) if held > 1 else 0
        buffer = held * (c.value_dim + apart) * 4
        union = max(exchange if scores else 0, buffer if values else 0)
        kept = 4 * (4 if c.dtype == "float32" else 2) if scores and self.tuning.every > 1 else 0
        raw = rows * _ceil(query_slots * 2 * c.key_channels, 32) * 32 * kept
        weights = rows * (self.tiles * 16 + 8) * 2 if values else 0
        natural = 16 * (c.key_dim + 8) * 2 if scores and c.pairing == "scatter" else 0
        warp = _ceil(union + raw + weights + natural, 16) * 16
        tables = self.key_table * scores + self.value_table * self.copies * values
        return tables + self.warps * warp

    def defines(self, mode: int) -> tuple[tuple[str, int], ...]:
        """-D options of decode.cu; mode 0 both, 1 scores, 2 values."""
        c = self.case
        keys = mode != 2  # what only keys depend on would make equal kernels different
        found = {
            "MODE": mode,
            "KEY_DIM": c.key_dim,
            "VALUE_DIM": c.value_dim,
            "KEY_CHANNELS": c.key_channels,
            "KEY_BITS": c.key_bits,
            "VALUE_CHANNELS": c.value_channels,
            "VALUE_BITS": c.value_bits,
            "ROWS": c.row_block,
            "PAIRING": PAIRINGS.index(c.pairing) if keys else 0,
            "ROTATE": int(c.rotate and keys),
            "DTYPE": DTYPES.index(c.dtype),
            "SOFTCAP": int(c.softcap),
            "HAS_MASK": int(c.mask),
            "HAS_GAIN": int(c.gain),
            "PAGED": int(c.paged),
            "WARPS": self.warps,
            "KORD": self.tuning.order,
            "VSEL": self.select,
            "VCOPIES": self.copies,
            "VMATRICES": int(self.matrices),
            "TILES": self.tiles,
            "SHARED_ORDERS": self.tuning.shared_orders,
            "EVERY": self.tuning.every,
            "SLOW": int(self.slow and keys),
            "MAX_REGISTERS": min(255, 65536 // (32 * self.warps) // 8 * 8),
            "KEY_PARTS": self.key_parts,
            "VALUE_PARTS": self.value_parts,
        }
        return tuple(found.items())

    def finish_defines(self) -> tuple[tuple[str, int], ...]:
        """-D options of finish.cu."""
        c = self.case
        found = {
            "KEY_DIM": c.key_dim,
            "VALUE_DIM": c.value_dim,
            "ROWS": c.row_block,
            "DTYPE": DTYPES.index(c.dtype),
            "SOFTCAP": int(c.softcap),
            "HAS_MASK": int(c.mask),
            "WARPS": self.finish_warps,
        }
        return tuple(found.items())

    @property
    def finish_warps(self) -> int:
        """Warps of a block of cq_finish: it keeps (rows + 1) x warps x value_dim floats."""
        return 8 if (self.case.row_block + 1) * self.case.value_dim <= 1280 else 4


def choose(case: DecodeCase, capability: int) -> DecodeLaunch | None:
    """The variant for a GPU.

    Args:
        case: what is to be computed.
        capability: compute capability times ten, 90 for an H100.

    Returns:
        One kernel for scores and values where both tables fit into shared memory, else two kernels,
        else as many passes over parts of the channels as needed; None when not even one slot fits.
    """
    limit = SHARED_BYTES.get(capability, 99) * 1024
    rows = case.row_block
    # Fewer warps with all registers beat more with spills: 12 were 10 % slower on an H100.
    warps = 8
    tuning = _TUNING[rows, case.key_channels]
    selects: tuple[tuple[int, int, bool], ...] = tuple((*found, False) for found in _SELECTS[rows])
    fused = selects[:1]
    if case.value_channels == 8 and rows <= 4:
        fused, selects = (_MATRICES, *fused), (_MATRICES, *selects)
    for select in fused:
        launch = DecodeLaunch(case, True, 1, 1, warps, *select, tuning)
        if launch.shared_bytes(True, True) <= limit and _fits_registers(case):
            return launch
    if case.key_dim <= 128:
        tuning = _TUNING_PARTS.get((rows, case.key_channels), tuning)
    slots, blocks = case.key_slots, case.value_blocks
    per_table = 8 // case.key_channels
    for key_parts in range(1, slots + 1):
        if slots % key_parts or (key_parts > 1 and (slots // key_parts) % per_table):
            continue
        trial = DecodeLaunch(case, False, key_parts, 1, warps, *selects[-1], tuning)
        if trial.shared_bytes(True, False) <= limit:
            break
    else:
        return None
    for value_parts in range(1, blocks + 1):
        if blocks % value_parts:
            continue
        for select in selects:
            trial = DecodeLaunch(case, False, key_parts, value_parts, warps, *select, tuning)
            if trial.shared_bytes(False, True) <= limit and case.value_dim // value_parts <= 128:
                return trial
    return None


def _fits_registers(case: DecodeCase) -> bool:
    """Whether a kernel of scores and values keeps its queries and sums without many spills."""
    most, scatter = 384, case.pairing == "scatter"
    if case.key_dim > 128 and case.row_block >= (2 if scatter else 8):
        most = 256
    elif case.key_dim > 128 and scatter:
        most = 320
    return case.key_dim <= 192 and case.key_dim + case.value_dim <= most


def _ceil(a: int, b: int) -> int:
    return -(-a // b)

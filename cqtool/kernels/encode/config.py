"""Which compiled variant of the encode kernel serves a case, and how it is launched. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from cqtool.kernels.variants import Variant

DTYPES = ("float16", "bfloat16", "float32")
_TILE = 16
_MAX_WARPS = 8
# From here on a decode step has work enough to share a table's loads among 64 rows of a warp.
_MANY_ROWS = 1024


@dataclass(frozen=True)
class EncodeCase:
    """What decides the kernel's code.

    Attributes:
        head_dim: channels of a head.
        channels: channels of a group.
        bits: bits of a code.
        dtype: of the vectors.
        is_key: whether tiles are laid out for keys.
        flat: whether rows are (batch, token) pairs in any order, not whole tiles.
        tiles: 16-row tiles of a warp: 4, or 1 when flat.
        vector: whether neighbouring channels can be loaded together.
        metric: whether distances have a metric.
        unrotate: whether keys are un-rotated first.
        gain: whether vectors are normalized first.
    """

    head_dim: int
    channels: int
    bits: int
    dtype: str
    is_key: bool
    flat: bool
    tiles: int
    vector: bool = True
    metric: bool = False
    unrotate: bool = False
    gain: bool = False


@cache
def encode_variant(case: EncodeCase) -> Variant:
    """The variant that serves a case; encode.cu says what the macros mean."""
    return Variant(
        "encode/encode.cu",
        (
            ("HEAD_DIM", case.head_dim),
            ("CHANNELS", case.channels),
            ("BITS", case.bits),
            ("DTYPE", DTYPES.index(case.dtype)),
            ("KIND_KEY", int(case.is_key)),
            ("FLAT", int(case.flat)),
            ("MTILES", case.tiles),
            ("VECTOR", int(case.vector)),
            ("HAS_METRIC", int(case.metric)),
            ("UNROTATE", int(case.unrotate)),
            ("HAS_GAIN", int(case.gain)),
        ),
    )


@dataclass(frozen=True)
class LaunchShape:
    """How the work is cut.

    Attributes:
        grid: blocks of rows, kv heads, ranges of groups.
        warps: of a block.
        flat: see :class:`EncodeCase`.
        tiles: see :class:`EncodeCase`.
        span: groups that a block goes through.
    """

    grid: tuple[int, int, int]
    warps: int
    flat: bool
    tiles: int
    span: int


@cache
def launch_shape(batch: int, heads: int, tokens: int, groups: int, processors: int) -> LaunchShape:
    """Cut `tokens` new tokens of `batch` rows for a GPU of so many processors."""
    flat, tiles = tokens < _TILE, 4
    spans: tuple[int, ...] = (16, 8, 4, 2)
    if flat:
        tiles = 4 if batch * tokens >= _MANY_ROWS else 1
        items = -(-batch * tokens // (_TILE * tiles))
        spans = (*spans, 1)
    else:
        # A row that starts in the middle of a tile touches one more.
        items = batch * -(-((tokens + 2 * _TILE - 2) // _TILE) // 4)
    warps = min(_MAX_WARPS if tiles == 4 else 4, items)
    blocks = -(-items // warps)
    # Two blocks share a processor: at least four rounds of them, so that the last is a small part.
    wanted = 8 * processors
    span = next((s for s in spans if blocks * heads * -(-groups // s) >= wanted), spans[-1])
    return LaunchShape((blocks, heads, -(-groups // span)), warps, flat, tiles, span)

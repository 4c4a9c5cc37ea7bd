"""What attention over a coded cache is given: codes, lengths, and tokens kept in full precision."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """Which columns each row of a batch has; all int32 ``[batch]``, read on the GPU.

    Attributes:
        first: the first column that is not padding.
        coded: columns below this are codes (or sinks), those from here on are recent tokens. Each
            query token sees all codes, so with several of them `coded` is at most their number less
            one below `total`.
        total: columns in all, the query's own included; the last query token's is ``total - 1``.
        origin: the column of position 0.
    """

    first: Tensor
    coded: Tensor
    total: Tensor
    origin: Tensor


@dataclass(frozen=True)
class CodedTokens:
    """The tiles of a layer.

    Attributes:
        keys: uint8 ``[pages, kv_heads, tiles a page, tile_bytes]``; one page is one row's unless
            there is a block table.
        values: the same.
        tokens: no row has more coded columns than this; decides how the work is cut.
        block_table: int32 ``[batch, pages a row]`` or None; tiles a page must be a power of two.
        key_gain: float16 ``[batch, kv_heads, columns]``, factor on each key, or None.
        value_gain: the same for values.
    """

    keys: Tensor
    values: Tensor
    tokens: int
    block_table: Tensor | None = None
    key_gain: Tensor | None = None
    value_gain: Tensor | None = None


@dataclass(frozen=True)
class DenseTokens:
    """Tokens in the model's dtype, keys after RoPE.

    Attributes:
        recent_keys: ``[batch, kv_heads, capacity, head_dim]``; column n lies at n % capacity.
        recent_values: the same.
        sink_keys: ``[batch, kv_heads, sinks, head_dim]``, the columns from `first` on, or None.
        sink_values: the same.
    """

    recent_keys: Tensor | None = None
    recent_values: Tensor | None = None
    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None

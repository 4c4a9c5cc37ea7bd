"""`decode_attention`: a few query tokens attend to codes, sinks and recent tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cqtool.errors import KernelError
from cqtool.kernels.decode.arguments import CodedTokens, Columns, DenseTokens
from cqtool.kernels.decode.config import DecodeCase, DecodeLaunch, choose
from cqtool.kernels.decode.reference import decode_attention_reference
from cqtool.kernels.decode.share import room_beside, share
from cqtool.kernels.decode.tables import LayerTables, RopeTable
from cqtool.kernels.layout import CodeFormat
from cqtool.kernels.load import load, warn_fallback
from cqtool.kernels.module import LoadedModule
from cqtool.kernels.operators import define_operator
from cqtool.kernels.variants import Variant

_LOG2E = 1.4426950408889634


def decode_attention(
    query: Tensor,
    coded: CodedTokens,
    tables: LayerTables,
    rope: RopeTable,
    columns: Columns,
    *,
    scale: float,
    dense: DenseTokens | None = None,
    sliding: int = 0,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    beside: int = 0,
) -> Tensor:
    """Attention of new tokens over a coded cache, one softmax over all its parts.

    Args:
        query: ``[batch, heads, tokens, key_dim]`` after RoPE, the newest tokens of each row; the
            innermost dimension is contiguous.
        coded: the codes.
        tables: the layer's codebooks.
        rope: the layer's RoPE table.
        columns: the rows' lengths.
        scale: factor on scores.
        dense: sinks and recent tokens; tokens newer than a query token are not seen by it.
        sliding: columns a token attends to, its own included; 0 for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none.
        mask: uint8 ``[batch, columns]``, zero where a column is not to be seen.
        beside: key/value heads of other calls that run at the same time, to leave room for.

    Returns:
        ``[batch, heads, tokens, value_dim]`` in the query's dtype, zeros for a row that sees
        nothing.
    """
    dense = dense or DenseTokens()
    out: Tensor = _decode_op(
        query,
        coded.keys,
        coded.values,
        tables.key_table,
        tables.value_table,
        tables.pair_channels,
        rope.steps,
        rope.turns,
        tables.natural_place,
        tables.value_channels,
        columns.first,
        columns.coded,
        columns.total,
        columns.origin,
        dense.recent_keys,
        dense.recent_values,
        dense.sink_keys,
        dense.sink_values,
        coded.block_table,
        mask,
        coded.key_gain,
        coded.value_gain,
        tables.key_format.channels,
        tables.key_format.bits,
        tables.value_format.channels,
        tables.value_format.bits,
        tables.pairing,
        tables.rotation.style != "none",
        rope.slow,
        coded.tokens,
        scale,
        rope.scale,
        sliding,
        softcap,
        beside,
    )
    return out


def _decode_attention(
    query: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    key_table: Tensor,
    value_table: Tensor,
    pair_channels: Tensor,
    steps: Tensor,
    turns: Tensor,
    natural_place: Tensor,
    value_channels: Tensor,
    first: Tensor,
    coded: Tensor,
    total: Tensor,
    origin: Tensor,
    recent_keys: Tensor | None,
    recent_values: Tensor | None,
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    block_table: Tensor | None,
    mask: Tensor | None,
    key_gain: Tensor | None,
    value_gain: Tensor | None,
    key_channels: int,
    key_bits: int,
    value_channels_a_group: int,
    value_bits: int,
    pairing: str,
    rotate: bool,
    slow: bool,
    tokens: int,
    scale: float,
    rope_scale: float,
    sliding: int,
    softcap: float,
    beside: int,
) -> Tensor:
    kv_heads, pairs = steps.shape
    batch, heads, length, _ = query.shape
    key_format = CodeFormat(2 * pairs, key_channels, key_bits)
    value_format = CodeFormat(value_channels.shape[1], value_channels_a_group, value_bits)
    case = DecodeCase(
        key_format.head_dim,
        value_format.head_dim,
        key_channels,
        key_bits,
        value_channels_a_group,
        value_bits,
        heads // kv_heads * length,
        pairing,  # type: ignore[arg-type]
        rotate,
        slow and rotate,
        str(query.dtype).removeprefix("torch."),
        softcap > 0,
        mask is not None,
        key_gain is not None or value_gain is not None,
        block_table is not None,
    )
    kernels = _kernels(case, query.device.index) if query.is_cuda else None
    if kernels is None:
        return decode_attention_reference(
            query,
            key_codes,
            value_codes,
            key_table,
            value_table,
            pair_channels,
            steps,
            natural_place,
            value_channels,
            first,
            coded,
            total,
            origin,
            recent_keys,
            recent_values,
            sink_keys,
            sink_values,
            block_table,
            mask,
            key_gain,
            value_gain,
            key_format,
            value_format,
            pairing,
            scale,
            rope_scale,
            sliding,
            softcap,
        )
    out = query.new_empty(batch, heads, length, value_format.head_dim)
    if batch == 0:
        return out
    launch, row_groups, passes, finish, processors = kernels
    dense = recent_keys is not None or sink_keys is not None
    room = room_beside(batch, kv_heads, tokens, processors, beside)
    cut = share(batch, kv_heads, tokens, launch, room, finish=dense)
    rows = row_groups * case.row_block
    # With one split and nothing to add the kernel writes the result itself.
    partial = dense or cut.splits > 1
    parts = peaks = None
    if partial:
        shape = (batch, kv_heads, cut.splits, rows)
        parts = query.new_empty(*shape, value_format.head_dim, dtype=torch.float32)
        peaks = query.new_empty(*shape, 2, dtype=torch.float32)
    columns = -(-tokens // 16) * 16
    scores = (
        None
        if launch.fused
        else query.new_empty(launch.key_parts, batch, kv_heads, rows, columns, dtype=torch.float32)
    )
    stream = torch.cuda.current_stream(query.device.index).cuda_stream
    sinks = sink_keys.shape[2] if sink_keys is not None else 0
    # Scores are taken to base 2; with a soft cap, tanh comes first.
    factor, cap = (scale / softcap, softcap * _LOG2E) if softcap > 0 else (scale * _LOG2E, 0.0)
    gain = key_gain if key_gain is not None else value_gain
    mask_stride = mask.stride(0) if mask is not None else 0
    arguments = (
        key_codes.data_ptr(),
        value_codes.data_ptr(),
        key_table.data_ptr(),
        value_table.data_ptr(),
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        query.stride(2),
        pair_channels.data_ptr(),
        steps.data_ptr(),
        turns.data_ptr(),
        natural_place.data_ptr(),
        first.data_ptr(),
        coded.data_ptr(),
        total.data_ptr(),
        origin.data_ptr(),
        _pointer(block_table),
        block_table.shape[1] if block_table is not None else 0,
        key_codes.shape[2],
        _pointer(mask),
        mask_stride,
        _pointer(key_gain),
        _pointer(value_gain),
        gain.shape[2] if gain is not None else 0,
        _pointer(scores),
        columns,
        _pointer(parts),
        _pointer(peaks),
        0 if partial else out.data_ptr(),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        value_channels.data_ptr(),
        batch,
        kv_heads,
        heads // kv_heads,
        length,
        cut.splits,
        cut.team,
        sinks,
        sliding,
        float(factor * rope_scale),
        float(cap),
    )
    for each in passes:
        each.module.launch(
            each.entry,
            (kv_heads * cut.parts, row_groups, each.depth),
            each.block,
            each.shared_bytes,
            stream,
            *arguments,
            overlap=True,
        )
    if not partial:
        return out
    finish.module.launch(
        finish.entry,
        (batch * kv_heads, row_groups, 1),
        finish.block,
        0,
        stream,
        _pointer(parts),
        _pointer(peaks),
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        query.stride(2),
        _pointer(recent_keys),
        _pointer(recent_values),
        *_strides(recent_keys),
        *_strides(recent_values),
        recent_keys.shape[2] if recent_keys is not None else 1,
        _pointer(sink_keys),
        _pointer(sink_values),
        *_strides(sink_keys),
        *_strides(sink_values),
        value_channels.data_ptr(),
        first.data_ptr(),
        coded.data_ptr(),
        total.data_ptr(),
        _pointer(mask),
        mask_stride,
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        kv_heads,
        heads // kv_heads,
        length,
        cut.splits,
        rows,
        sinks,
        sliding,
        float(factor),
        float(cap),
        overlap=True,
    )
    return out


def _decode_fake(query: Tensor, *args: object) -> Tensor:
    value_channels = args[8]
    assert isinstance(value_channels, Tensor)
    return query.new_empty(*query.shape[:3], value_channels.shape[1])


_decode_op = define_operator(
    "decode_attention", cpu=_decode_attention, cuda=_decode_attention, fake=_decode_fake
)


_ENTRIES = ("cq_decode", "cq_scores", "cq_values")


class _Pass(NamedTuple):
    """A kernel with what is the same in all its launches."""

    module: LoadedModule
    entry: str
    block: tuple[int, int, int]
    shared_bytes: int = 0
    depth: int = 1


class _Kernels(NamedTuple):
    """What serves a case: worked out once, since a step asks once a layer."""

    launch: DecodeLaunch
    row_groups: int
    passes: list[_Pass]
    finish: _Pass
    processors: int


@lru_cache(maxsize=256)
def _kernels(case: DecodeCase, device: int) -> _Kernels | None:
    """The kernels of a case; None where the reference serves."""
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major * 10 + properties.minor
    launch = choose(case, capability)
    if launch is None:
        warn_fallback(
            f"{case.key_bits}-bit codes at head_dim {case.key_dim} need more shared memory than "
            f"{properties.name} has"
        )
        return None
    try:
        passes = [
            _Pass(
                load(variant, device),
                _ENTRIES[mode],
                (32 * launch.warps, 1, 1),
                launch.shared_bytes(mode != 2, mode != 1),
                (1, launch.key_parts, launch.value_parts)[mode],
            )
            for mode, variant in variants(launch)
        ]
        ending = load(Variant("decode/finish.cu", launch.finish_defines()), device)
    except KernelError as error:
        warn_fallback(str(error))
        return None
    finish = _Pass(ending, "cq_finish", (32 * launch.finish_warps, 1, 1))
    return _Kernels(launch, case.row_groups, passes, finish, properties.multi_processor_count)


def variants(launch: DecodeLaunch) -> list[tuple[int, Variant]]:
    """The variants of decode.cu that a launch runs one after the other, with their modes."""
    modes = (0,) if launch.fused else (1, 2)
    return [(mode, Variant("decode/decode.cu", launch.defines(mode))) for mode in modes]


def _pointer(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None else 0


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (tensor.stride(0), tensor.stride(1)) if tensor is not None else (0, 0)

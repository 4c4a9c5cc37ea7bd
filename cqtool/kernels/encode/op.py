"""The torch op ``cqtool::encode``, and the prepared object of one layer that calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cqtool.geometry import KeyRotation
from cqtool.kernels.encode import reference
from cqtool.kernels.encode.config import EncodeCase, encode_variant, launch_shape
from cqtool.kernels.encode.tables import (
    build_tables,
    has_neighbours,
    key_maps,
    ordered_codebook,
    read_entries,
    value_maps,
)
from cqtool.kernels.layout import CodeFormat, KeyPlan
from cqtool.kernels.load import load
from cqtool.kernels.operators import define_operator

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Rope:
    """How keys were turned before they reach the encoder.

    Attributes:
        steps: int64 ``[head_dim / 2]``, or ``[kv_heads, head_dim / 2]`` when heads have plans of
            their own: :func:`cqtool.kernels.layout.phase_steps` of the plan.
        scale: what the model multiplies cosines and sines by (YaRN's attention_scaling).
    """

    steps: Tensor
    scale: float = 1.0


def _encode_cpu(
    x: Tensor,
    storage: Tensor,
    gains: Tensor | None,
    column: Tensor,
    block_table: Tensor | None,
    image: Tensor,
    scaling: Tensor,
    maps: Tensor,
    metric: Tensor | None,
    steps: Tensor | None,
    position: Tensor | None,
    rope_scale: float,
    channels: int,
    bits: int,
    is_key: bool,
    neighbours: bool,
) -> None:
    """Encode `x` into `storage`; see :meth:`Encoder.encode`. On the CPU, the naive reference."""
    format = CodeFormat(x.shape[3], channels, bits)
    if steps is None:
        vectors = reference.take(x, maps)
    else:
        assert position is not None
        vectors = reference.unrotate(x, maps, steps, position, rope_scale)
    if gains is not None:
        values = reference.token_gains(vectors)
        reference.write_gains(values, gains, column, block_table, storage)
        divisor = values.float().unsqueeze(3)
        vectors = torch.where(divisor > 0, vectors / divisor, 0.0)
    entries = read_entries(image, scaling, channels)
    codes = reference.nearest(vectors, entries, metric)
    reference.write_codes(codes, storage, column, block_table, format, is_key)


def _encode_fake(*args: object) -> None:
    return None


def _encode_cuda(
    x: Tensor,
    storage: Tensor,
    gains: Tensor | None,
    column: Tensor,
    block_table: Tensor | None,
    image: Tensor,
    scaling: Tensor,
    maps: Tensor,
    metric: Tensor | None,
    steps: Tensor | None,
    position: Tensor | None,
    rope_scale: float,
    channels: int,
    bits: int,
    is_key: bool,
    neighbours: bool,
) -> None:
    batch, heads, tokens, head_dim = x.shape
    if x.numel() == 0:
        return
    shape = launch_shape(batch, heads, tokens, head_dim // channels, _processors(x.device.index))
    even = x.data_ptr() % (2 * x.element_size()) == 0 and not any(s % 2 for s in x.stride()[:3])
    case = EncodeCase(
        head_dim,
        channels,
        bits,
        _DTYPES[x.dtype],
        is_key,
        shape.flat,
        shape.tiles,
        vector=neighbours and even,
        metric=metric is not None,
        unrotate=steps is not None,
        gain=gains is not None,
    )
    load(encode_variant(case), x.device.index).launch(
        "cq_encode",
        shape.grid,
        (32 * shape.warps, 1, 1),
        0,
        torch.cuda.current_stream(x.device.index).cuda_stream,
        x.data_ptr(),
        *x.stride()[:3],
        column.data_ptr(),
        storage.data_ptr(),
        *storage.stride()[:2],
        storage.shape[2],
        _pointer(block_table),
        block_table.shape[1] if block_table is not None else 0,
        image.data_ptr(),
        scaling.data_ptr(),
        maps.data_ptr(),
        _pointer(metric),
        _pointer(steps),
        steps.shape[1] if steps is not None and steps.dim() == 2 else 0,
        _pointer(position),
        1.0 / rope_scale,
        _pointer(gains),
        *(gains.stride()[:2] if gains is not None else (0, 0)),
        batch,
        tokens,
        shape.span,
        256,
    )


encode_op = define_operator(
    "encode",
    cpu=_encode_cpu,
    cuda=_encode_cuda,
    fake=_encode_fake,
    mutates=("storage", "gains"),
)


def _pointer(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None else 0


@cache
def _processors(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


class Encoder:
    """Encodes the keys or the values of one layer.

    Centroids are rounded to float16, as decoding has them.

    Args:
        codebook: ``[kv_heads, groups, centroids, channels]``, on the device to run on.
        plan: of the keys, one or one per kv head; of values, their format.
        rotation: how the layer turns keys, needed to un-rotate when a plan is "scatter".
        permutation: of values: model channel of each codebook channel, ``[(kv_heads,) head_dim]``.
        transform: float32 ``[kv_heads, groups, channels, channels]`` L: distances are Euclidean
            after ``x L`` and ``c L``, that is under the metric ``L L^T``.

    Raises:
        ValueError: the kernels have no such format.
    """

    def __init__(
        self,
        codebook: Tensor,
        plan: KeyPlan | Sequence[KeyPlan] | CodeFormat,
        *,
        rotation: KeyRotation | None = None,
        permutation: Tensor | None = None,
        transform: Tensor | None = None,
    ) -> None:
        heads, device = codebook.shape[0], codebook.device
        self.is_key = not isinstance(plan, CodeFormat)
        entries = codebook.half().float()
        metric = transform.float() @ transform.float().mT if transform is not None else None
        if isinstance(plan, CodeFormat):
            self.format = plan
            maps = value_maps(plan.head_dim, heads, permutation)
        else:
            plans = [plan] * heads if isinstance(plan, KeyPlan) else list(plan)
            self.format = plans[0].format
            maps = key_maps(plans, rotation)
            entries, slot = ordered_codebook(entries, plans)
            if metric is not None:
                metric = _reorder_metric(metric, plans, slot)
        reason = self.format.unsupported()
        if reason is not None:
            raise ValueError(reason)
        self._can_unrotate = self.is_key and (
            rotation is not None or all(p.pairing != "scatter" for p in plans)
        )
        self._neighbours = has_neighbours(maps)
        self._maps = maps.to(device)
        self._image, self._scaling, self._metric = build_tables(entries, self.format, metric)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, on the device."""
        tensors = (self._image, self._scaling, self._maps, self._metric)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def encode(
        self,
        x: Tensor,
        storage: Tensor,
        column: Tensor,
        *,
        block_table: Tensor | None = None,
        position: Tensor | None = None,
        rope: Rope | None = None,
        gains: Tensor | None = None,
    ) -> None:
        """Write the codes of `x` into tiles; nothing is read back, and nothing else is changed.

        Args:
            x: float16, bfloat16 or float32 ``[batch, kv_heads, tokens, head_dim]``; channels
                contiguous, other strides free.
            storage: uint8 ``[pages, kv_heads, tiles_per_page, tile_bytes]``.
            column: int32 ``[batch]``: where each row's first token goes. Rows with a negative
                column, and tokens beyond the storage, are left out.
            block_table: int32 ``[batch, max_pages]``, the pages of each row, negative where there
                is none; without it page b is row b.
            position: int32 ``[batch]``: RoPE's position of each row's first token, `column` when
                None. Only read with `rope`.
            rope: un-rotate keys first.
            gains: float16 ``[pages, kv_heads, 16 * tiles_per_page]``: each vector is divided by its
                root mean square, which is written here.

        Raises:
            ValueError: a tensor has the wrong shape, dtype or strides.
        """
        self._check(x, storage, column, block_table, rope)
        if x.stride(3) != 1:
            x = x.contiguous()
        encode_op(
            x,
            storage,
            gains,
            column,
            block_table,
            self._image,
            self._scaling,
            self._maps,
            self._metric,
            rope.steps if rope is not None else None,
            (position if position is not None else column) if rope is not None else None,
            rope.scale if rope is not None else 1.0,
            self.format.channels,
            self.format.bits,
            self.is_key,
            self._neighbours,
        )

    def _check(
        self,
        x: Tensor,
        storage: Tensor,
        column: Tensor,
        block_table: Tensor | None,
        rope: Rope | None,
    ) -> None:
        heads, size = self._maps.shape[0], self.format.tile_bytes
        if x.dtype not in _DTYPES or x.shape[1::2] != (heads, self.format.head_dim):
            raise ValueError(
                f"cannot encode {x.dtype} {list(x.shape)}: {heads} kv heads of "
                f"{self.format.head_dim} channels in float16, bfloat16 or float32 are expected"
            )
        strides = storage.stride()
        aligned = storage.data_ptr() % 4 == 0 and strides[0] % 4 == strides[1] % 4 == 0
        if (
            storage.dtype != torch.uint8
            or storage.shape[1::2] != (heads, size)
            or strides[2:] != (size, 1)
            or not aligned
        ):
            raise ValueError(
                f"storage must be uint8 [pages, {heads}, tiles, {size}] with whole tiles one after "
                f"the other, not {storage.dtype} {list(storage.shape)} with strides {strides}"
            )
        for name, tensor in (("column", column), ("block_table", block_table)):
            if tensor is not None and (
                tensor.dtype != torch.int32
                or tensor.shape[0] != x.shape[0]
                or not tensor.is_contiguous()
            ):
                raise ValueError(f"{name} must be contiguous int32 with a row for each of x")
        if block_table is None and storage.shape[0] < x.shape[0]:
            raise ValueError("storage has fewer rows than x")
        if rope is not None and not self._can_unrotate:
            raise ValueError("un-rotating keys of a scattered plan needs the layer's rotation")


def _reorder_metric(metric: Tensor, plans: Sequence[KeyPlan], slot: Tensor) -> Tensor:
    """A metric in codebook order brought into kernel order, channels of a group included."""
    heads = torch.arange(metric.shape[0], device=metric.device)[:, None]
    ordered = metric[heads, torch.tensor([p.groups for p in plans], device=metric.device)]
    c = slot.shape[2]
    ordered = ordered.gather(2, slot.unsqueeze(3).expand(-1, -1, -1, c))
    return ordered.gather(3, slot.unsqueeze(2).expand(-1, -1, c, -1))

"""One layer's codebooks as the kernels want them, shared by all caches of a format."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cqtool.cache.codec import CQCodec
from cqtool.cache.format import LayerCodecs
from cqtool.cache.head_parts import head_parts
from cqtool.geometry import LayerGeometry
from cqtool.kernels.decode.config import DecodeCase, Pairing, choose
from cqtool.kernels.decode.tables import LayerTables, RopeTable, key_plans
from cqtool.kernels.encode import Encoder
from cqtool.kernels.layout import CodeFormat, KeyPlan, key_codes_in_order, unpack_values


def unsupported(
    geometry: LayerGeometry,
    codecs: LayerCodecs,
    query_heads: int,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Why the kernels cannot serve a layer, None when they can.

    Args:
        geometry: the layer's shapes.
        codecs: how it is stored.
        query_heads: heads that read each token.
        capability: of the GPU, None for the torch reference on a CPU.
    """
    readers = query_heads // geometry.kv_heads
    reasons = (
        _part_unsupported(part.geometry, part.codecs, readers, capability)
        for part in head_parts(geometry, codecs)
    )
    return next((reason for reason in reasons if reason is not None), None)


def _part_unsupported(
    geometry: LayerGeometry,
    codecs: LayerCodecs,
    readers: int,
    capability: tuple[int, int] | None,
) -> str | None:
    formats = []
    for codec, dim in ((codecs.key, geometry.key_dim), (codecs.value, geometry.value_dim)):
        if type(codec) is not CQCodec:
            return f"{type(codec).__name__} has no kernel."
        if codec.feedback is not None:
            return "Encoding with error feedback (feedback: ldlq) has no kernel."
        if codec.gains is not None:
            return "Codes with an 8-bit gain for each token (gain: token) have no kernel."
        heads, groups, centroids, channels = codec.codebook.shape
        if heads != geometry.kv_heads or groups * channels != dim:
            return "The codebooks do not cover the heads."
        formats.append(CodeFormat(dim, channels, centroids.bit_length() - 1))
        if reason := formats[-1].unsupported():
            return f"{reason}."
    if capability is None:
        return None
    key, value = formats
    pairing = _pairing(geometry, codecs, key)
    major, minor = capability
    for rows in (readers, 8):
        case = DecodeCase(
            key.head_dim,
            value.head_dim,
            key.channels,
            key.bits,
            value.channels,
            value.bits,
            rows,
            pairing,
        )
        if choose(case, 10 * major + minor) is None:
            return (
                f"Codes of {key.bits} and {value.bits} bits need more shared memory than a GPU of "
                f"compute capability {major}.{minor} has."
            )
    return None


class LayerKernels:
    """Tables to decode with, encoders, and the same in plain torch.

    Args:
        geometry: the layer's shapes.
        codecs: with codebooks on the device to run on.
    """

    def __init__(self, geometry: LayerGeometry, codecs: LayerCodecs) -> None:
        key, value = codecs.key, codecs.value
        assert isinstance(key, CQCodec) and isinstance(value, CQCodec)
        rotation = geometry.rotation
        self.tables = LayerTables(
            key.codebook, value.codebook, rotation, key.channels, value.channels
        )
        plans = self.tables.plans
        self.encoders = {
            "key": Encoder(key.codebook, plans, rotation=rotation, transform=key.factor),
            "value": Encoder(
                value.codebook,
                self.tables.value_format,
                permutation=value.channels,
                transform=value.factor,
            ),
        }
        # The kernels' tables are float16.
        self.codecs = {
            "key": CQCodec(key.codebook.half(), key.channels),
            "value": CQCodec(value.codebook.half(), value.channels),
        }
        self.unpack: dict[str, Callable[[Tensor], Tensor]] = {
            "key": _KeyUnpacker(plans, key.codebook.device),
            "value": partial(unpack_values, format=self.tables.value_format),
        }
        self._ropes: dict[tuple[bytes, float], RopeTable] = {}

    def decode(self, name: str, codes: Tensor) -> Tensor:
        """The vectors that codes ``[batch, kv_heads, tokens, groups]`` stand for, in float32."""
        return self.codecs[name].look_up(codes)

    def tile_bytes(self, name: str) -> int:
        """Bytes of a tile of keys or of values."""
        tables = self.tables
        return (tables.key_format if name == "key" else tables.value_format).tile_bytes

    def rope(self, inv_freq: Tensor, scale: float) -> RopeTable:
        """The layer's table for these frequencies (on the CPU), made once."""
        key = inv_freq.float().numpy().tobytes(), scale
        if key not in self._ropes:
            self._ropes[key] = self.tables.rope(inv_freq, scale)
        return self._ropes[key]


class _KeyUnpacker:
    """Tiles of keys to codes in codebook order; heads may have plans of their own."""

    def __init__(self, plans: list[KeyPlan], device: torch.device) -> None:
        self._format = plans[0].format
        self._places = torch.stack([plan.position for plan in plans]).to(device)

    def __call__(self, tiles: Tensor) -> Tensor:
        codes = key_codes_in_order(tiles, self._format)
        return codes.gather(3, self._places[:, None].expand_as(codes))


_pairings: WeakKeyDictionary[LayerCodecs, Pairing] = WeakKeyDictionary()


def _pairing(geometry: LayerGeometry, codecs: LayerCodecs, format: CodeFormat) -> Pairing:
    # Kept, because every new cache asks, and plans of many heads take a while.
    if codecs not in _pairings:
        assert isinstance(codecs.key, CQCodec)
        plans = key_plans(format, geometry.rotation, codecs.key.channels, geometry.kv_heads)
        _pairings[codecs] = plans[0].pairing
    return _pairings[codecs]


_made: WeakKeyDictionary[LayerCodecs, dict[torch.device, LayerKernels]] = WeakKeyDictionary()


def layer_kernels(
    geometry: LayerGeometry, codecs: LayerCodecs, device: torch.device
) -> LayerKernels:
    """The kernels' form of `codecs` on `device`, made when a cache first needs it."""
    by_device = _made.setdefault(codecs, {})
    if device not in by_device:
        moved = LayerCodecs(codecs.key.to(device), codecs.value.to(device))
        by_device[device] = LayerKernels(geometry, moved)
    return by_device[device]

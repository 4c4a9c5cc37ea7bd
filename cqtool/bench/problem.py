"""Random decode problems, coded and in 16 bits, and the float64 answer to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from cqtool.bench.formats import BenchFormat
from cqtool.geometry import KeyRotation
from cqtool.kernels.decode.arguments import CodedTokens, Columns
from cqtool.kernels.decode.config import DecodeCase, DecodeLaunch, choose
from cqtool.kernels.decode.op import decode_attention, variants
from cqtool.kernels.decode.tables import LayerTables
from cqtool.kernels.layout import TILE, CodeFormat, unpack_keys, unpack_values
from cqtool.kernels.load import load
from cqtool.kernels.variants import Variant


@dataclass(frozen=True)
class AttentionLoad:
    """One decode step of one layer.

    Attributes:
        name: for people.
        batch: rows.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: channels of a head.
        tokens: cached tokens of each row.
        rope_theta: base of RoPE's frequencies.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    rope_theta: float = 1e4

    @property
    def bytes_16bit(self) -> int:
        """Bytes of the keys and values in 16 bits."""
        return self.batch * self.kv_heads * self.tokens * self.head_dim * 2 * 2

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def inverse_frequencies(theta: float, dim: int) -> Tensor:
    """RoPE's radians a token, float64 ``[dim / 2]``."""
    return torch.as_tensor(theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / max(1, dim)))


def attention_float64(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One kv head's attention in float64.

    Args:
        query: ``[group, head_dim]`` of the query heads that share the kv head.
        keys: ``[tokens, head_dim]`` after RoPE.
        values: ``[tokens, head_dim]``.

    Returns:
        float64 ``[group, head_dim]``.
    """
    scores = query.double() @ keys.double().T / math.sqrt(query.shape[1])
    return torch.softmax(scores, dim=-1) @ values.double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|``; NaN when anything found is."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(difference)


def rotate_float64(keys: Tensor, position: Tensor, rotation: KeyRotation, rates: Tensor) -> Tensor:
    """Turn keys ``[tokens, head_dim]`` by RoPE's definition, in float64."""
    keys = keys.double()
    if rotation.style == "none":
        return keys
    angle = position.double()[:, None] * rates.to(keys.device)
    cos, sin = angle.cos(), angle.sin()
    begin, end = rotation.offset, rotation.offset + rotation.dim
    part = keys[:, begin:end]
    turned = torch.empty_like(part)
    half = slice(None, rotation.dim // 2), slice(rotation.dim // 2, None)
    first, second = half if rotation.style == "half" else (slice(0, None, 2), slice(1, None, 2))
    turned[:, first] = part[:, first] * cos - part[:, second] * sin
    turned[:, second] = part[:, second] * cos + part[:, first] * sin
    return torch.cat((keys[:, :begin], turned, keys[:, end:]), dim=1)


class CodedProblem:
    """A layer's cache of random codes, in as many copies as keep it out of the L2 cache.

    Args:
        load: the decode step.
        format: codes and codebooks; those of the first layer.
        dtype: of queries and output.
        device: where.
        copies: sets of codes and queries.
        seed: of everything random.
    """

    def __init__(
        self,
        load: AttentionLoad,
        format: BenchFormat,
        dtype: torch.dtype,
        device: torch.device,
        copies: int = 1,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)
        self.load, self.device = load, device
        self.codebooks = format.layer_codebooks(0, load.kv_heads, load.head_dim, generator)
        self.rotation = format.rotation(0, load.head_dim)
        self.rates = inverse_frequencies(load.rope_theta, self.rotation.dim)
        self.channels = format.layer_channels(0, load.kv_heads, load.head_dim, self.rotation, seed)
        self.tables = LayerTables(*self.codebooks, self.rotation, *self.channels)
        self.rope = self.tables.rope(self.rates)
        self.queries = [
            torch.randn(
                load.batch, load.heads, 1, load.head_dim, generator=generator, device=device
            ).to(dtype)
            for _ in range(copies)
        ]
        self.coded = [self._codes(generator) for _ in range(copies)]
        count = torch.full((load.batch,), load.tokens, dtype=torch.int32, device=device)
        zero = torch.zeros_like(count)
        self.columns = Columns(zero, count, count, zero)

    def _codes(self, generator: torch.Generator) -> CodedTokens:
        load, tiles = self.load, -(-self.load.tokens // TILE)

        def random_tiles(format: CodeFormat) -> Tensor:
            shape = (load.batch, load.kv_heads, tiles, format.tile_bytes)
            return torch.randint(
                0, 256, shape, dtype=torch.uint8, generator=generator, device=self.device
            )

        keys = random_tiles(self.tables.key_format)
        return CodedTokens(keys, random_tiles(self.tables.value_format), load.tokens)

    @cached_property
    def case(self) -> DecodeCase:
        """What the kernels are compiled for."""
        tables, query = self.tables, self.queries[0]
        return DecodeCase(
            tables.key_format.head_dim,
            tables.value_format.head_dim,
            tables.key_format.channels,
            tables.key_format.bits,
            tables.value_format.channels,
            tables.value_format.bits,
            self.load.heads // self.load.kv_heads,
            tables.pairing,
            self.rotation.style != "none",
            self.rope.slow,
            str(query.dtype).removeprefix("torch."),
        )

    def load_kernels(self) -> DecodeLaunch:
        """Compile and load the kernels, so that none of what is timed is their reference.

        Raises:
            KernelError: they cannot be had.
            ValueError: no kernel takes such codes on this GPU.
        """
        major, minor = torch.cuda.get_device_capability(self.device)
        launch = choose(self.case, 10 * major + minor)
        if launch is None:
            raise ValueError(f"the tables do not fit into the shared memory of sm_{major}{minor}")
        index = self.device.index or 0
        for _, variant in variants(launch):
            load(variant, index)
        load(Variant("decode/finish.cu", launch.finish_defines()), index)
        return launch

    @property
    def code_bytes(self) -> int:
        """Bytes of one copy of the codes."""
        return self.coded[0].keys.nbytes + self.coded[0].values.nbytes

    @property
    def bytes_read(self) -> int:
        """The fewest bytes a step moves: codes, tables, queries and output, each once."""
        tables = self.tables.key_table.nbytes + self.tables.value_table.nbytes
        return self.code_bytes + tables + 2 * self.queries[0].nbytes

    def attend(self, copy: int) -> Tensor:
        """Run the operator; ``[batch, heads, 1, head_dim]``."""
        scale = 1 / math.sqrt(self.load.head_dim)
        return decode_attention(
            self.queries[copy], self.coded[copy], self.tables, self.rope, self.columns, scale=scale
        )

    def calls(self) -> list[Callable[[], object]]:
        """The operator on each copy."""
        return [partial(self.attend, copy) for copy in range(len(self.coded))]

    def error(self, copy: int = 0) -> float:
        """Relative error of the first and last row to float64; NaN when any row is not finite."""
        poison_freed_memory(self.queries[0])
        return self.error_of(self.attend(copy), copy)

    def error_of(self, found: Tensor, copy: int = 0) -> float:
        """:meth:`error` of an answer ``[batch, heads, 1, head_dim]``."""
        if not bool(torch.isfinite(found).all()):
            return math.nan
        rows = sorted({0, self.load.batch - 1})
        return max(relative_error(found[row, :, 0], self.expected(copy, row)) for row in rows)

    def expected(self, copy: int = 0, row: int = -1) -> Tensor:
        """A row's answer by definition: codes looked up, turned and attended to, in float64."""
        load, coded = self.load, self.coded[copy]
        group = load.heads // load.kv_heads
        query = self.queries[copy][row, :, 0].view(load.kv_heads, group, load.head_dim)
        position = torch.arange(load.tokens, device=self.device)
        parts = []
        for head in range(load.kv_heads):
            plan = self.tables.plans[head]
            key_codes = unpack_keys(coded.keys[row, head][None, None], plan)[0, 0, : load.tokens]
            tiles = coded.values[row, head][None, None]
            value_codes = unpack_values(tiles, self.tables.value_format)
            value_codes = value_codes[0, 0, : load.tokens]
            keys, values = (
                _look_up(book[head], codes, None if order is None else order[head])
                for book, codes, order in zip(
                    self.codebooks, (key_codes, value_codes), self.channels, strict=True
                )
            )
            keys = rotate_float64(keys, position, self.rotation, self.rates)
            parts.append(attention_float64(query[head], keys, values))
        return torch.cat(parts)


def _look_up(codebook: Tensor, codes: Tensor, channels: Tensor | None) -> Tensor:
    """Vectors ``[tokens, head_dim]`` of codes ``[tokens, groups]``, in groups of `channels`."""
    group = torch.arange(codebook.shape[0], device=codes.device)
    found = codebook[group, codes].flatten(1)
    return found if channels is None else found[:, channels.argsort().to(codes.device)]


def poison_freed_memory(like: Tensor) -> None:
    """Leave NaN in memory that the next output of this size is likely to get."""
    held = [torch.full_like(like, math.nan) for _ in range(4)]
    del held


class DenseProblem:
    """The same decode step over 16-bit keys and values.

    Args:
        load: the decode step.
        dtype: float16 or bfloat16.
        device: where.
        copies: sets of keys, values and queries.
        seed: of everything random.
    """

    def __init__(
        self,
        load: AttentionLoad,
        dtype: torch.dtype,
        device: torch.device,
        copies: int = 1,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(seed)

        def random(heads: int, tokens: int) -> Tensor:
            shape = (load.batch, heads, tokens, load.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.load = load
        self.queries = [random(load.heads, 1) for _ in range(copies)]
        self.keys = [random(load.kv_heads, load.tokens) for _ in range(copies)]
        self.values = [random(load.kv_heads, load.tokens) for _ in range(copies)]

    def error(self, found: Tensor) -> float:
        """Relative error of the last row of the first copy's ``[batch, heads, head_dim]``."""
        if not bool(torch.isfinite(found).all()):
            return math.nan
        load = self.load
        query = self.queries[0][-1, :, 0].view(load.kv_heads, -1, load.head_dim)
        expected = [
            attention_float64(query[head], self.keys[0][-1, head], self.values[0][-1, head])
            for head in range(load.kv_heads)
        ]
        return relative_error(found[-1], torch.cat(expected))

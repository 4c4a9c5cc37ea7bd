"""Encoding: of a prompt, against the prefill it follows, and of one decode step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cqtool.bench.formats import BenchFormat
from cqtool.bench.kernels import KernelSettings, WrongResult, reason_of
from cqtool.bench.memory import release_memory
from cqtool.bench.models import Target, random_model, with_layers
from cqtool.bench.problem import inverse_frequencies, rotate_float64
from cqtool.bench.timing import Spread, copies_beyond_cache, time_calls, time_eagerly
from cqtool.errors import EnvironmentProblem, KernelError
from cqtool.kernels.decode.tables import LayerTables
from cqtool.kernels.encode.op import Encoder, Rope
from cqtool.kernels.layout import TILE, unpack_keys, unpack_values
from cqtool.spec import KINDS, Kind

_LIMIT = 1e-3
"""Largest excess of the squared error over that of the nearest centroids."""
_CHECKED = 128
"""Tokens whose codes are compared with float64."""
_PREFILL_LAYERS = (1, 3)
"""Layers of the two models whose difference is the time of a layer."""


class EncodeProblem:
    """The keys or values of one layer that are to be encoded, and where to.

    Args:
        target: the model's shape.
        format: codes and codebooks; those of the first layer.
        kind: keys (after RoPE, which encoding undoes) or values.
        batch: rows.
        tokens: new tokens of each row.
        past: tokens cached before them.
        settings: device, dtype and seed.
    """

    def __init__(
        self,
        target: Target,
        format: BenchFormat,
        kind: Kind,
        batch: int,
        tokens: int,
        past: int,
        settings: KernelSettings,
    ) -> None:
        shape, device = target.shape, settings.device
        generator = torch.Generator(device=device).manual_seed(settings.seed)
        books = format.layer_codebooks(0, shape.kv_heads, shape.head_dim, generator)
        self.codebook = books[KINDS.index(kind)]
        self.is_key, self.past, self.tokens = kind == "key", past, tokens
        self.rotation = format.rotation(0, shape.head_dim)
        self.rates = inverse_frequencies(shape.rope_theta, self.rotation.dim)
        orders = format.layer_channels(
            0, shape.kv_heads, shape.head_dim, self.rotation, settings.seed
        )
        self.channels = orders[KINDS.index(kind)]
        self.tables = LayerTables(*books, self.rotation, *orders)
        rope = self.tables.rope(self.rates)
        self.rope = Rope(rope.steps, rope.scale) if self.is_key else None
        self.format = self.tables.key_format if self.is_key else self.tables.value_format
        self.encoder = (
            Encoder(self.codebook, self.tables.plans, rotation=self.rotation)
            if self.is_key
            else Encoder(self.codebook, self.format, permutation=self.channels)
        )
        size = batch * shape.kv_heads * tokens * shape.head_dim * settings.dtype.itemsize
        copies = copies_beyond_cache(size, settings.cache_bytes) if device.type == "cuda" else 1
        self.vectors = [
            torch.randn(
                batch, shape.kv_heads, tokens, shape.head_dim, generator=generator, device=device
            ).to(settings.dtype)
            for _ in range(copies)
        ]
        tiles = -(-(past + tokens) // TILE)
        self.storage = torch.randint(
            0, 256, (batch, shape.kv_heads, tiles, self.format.tile_bytes),
            dtype=torch.uint8, generator=generator, device=device,
        )  # fmt: skip
        self.column = torch.full((batch,), past, dtype=torch.int32, device=device)

    def encode(self, copy: int) -> None:
        """Encode one copy into the storage."""
        self.encoder.encode(self.vectors[copy], self.storage, self.column, rope=self.rope)

    def calls(self) -> list[Callable[[], object]]:
        """The encoder on each copy."""
        return [partial(self.encode, copy) for copy in range(len(self.vectors))]

    def excess(self) -> float:
        """How much larger than needed the squared error of the last row's newest tokens is."""
        self.encode(0)
        found = best = 0.0
        for head in range(self.codebook.shape[0]):
            one = slice(head, head + 1)
            tiles = self.storage[-1:, one]
            codes = (
                unpack_keys(tiles, self.tables.plans[head])
                if self.is_key
                else unpack_values(tiles, self.format)
            )
            first = max(0, self.tokens - _CHECKED)
            codes = codes[0, 0, self.past + first : self.past + self.tokens]
            distances = self._distances(self.vectors[0][-1, head, first:], head, first)
            found += float(distances.gather(2, codes.unsqueeze(2)).sum())
            best += float(distances.min(dim=2).values.sum())
        return found / best - 1

    def _distances(self, vectors: Tensor, head: int, first: int) -> Tensor:
        """Squared distances to all centroids, float64 ``[tokens, groups, centroids]``."""
        vectors = vectors.double()
        if self.is_key:
            position = self.past + torch.arange(first, self.tokens, device=vectors.device)
            vectors = rotate_float64(vectors, -position, self.rotation, self.rates)
        if self.channels is not None:
            vectors = vectors[:, self.channels[head].to(vectors.device)]
        book = self.codebook[head].double()
        groups = vectors.view(len(vectors), book.shape[0], 1, book.shape[2])
        return (groups - book).square().sum(dim=-1)


def time_encoding(
    target: Target,
    format: BenchFormat,
    batch: int,
    tokens: int,
    past: int,
    settings: KernelSettings,
) -> dict[str, Any]:
    """Time encoding the keys and the values of one layer.

    Raises:
        KernelError: the kernels cannot be had.
        ValueError: there are none for the format.
        WrongResult: the codes are not the nearest centroids'.
    """
    row: dict[str, Any] = {"format": format.name, "batch": batch, "tokens": tokens, "past": past}
    spreads: list[Spread] = []
    for kind in KINDS:
        problem = EncodeProblem(target, format, kind, batch, tokens, past, settings)
        excess = problem.excess()
        if not abs(excess) <= _LIMIT:
            raise WrongResult(
                f"wrong codes of {kind}s: squared error {excess:.2%} above the nearest centroids'"
            )
        spread = time_calls(problem.calls(), settings.repeats)
        row[kind] = spread.to_json()
        row[f"{kind}_excess_error"] = excess
        spreads.append(spread)
    layer = sum(spread.median for spread in spreads)
    return row | {"layer": layer, "all_layers": layer * target.shape.layers}


def time_prefill(
    target: Target, batch: int, tokens: int, settings: KernelSettings
) -> dict[str, Any]:
    """Time the prefill of a model with random weights, from a few of its layers.

    Models of one and of three layers are timed; their difference gives a layer, and all layers are
    taken to be alike. The output layer is left out: a prefill needs it for one token only.
    """
    counts = [min(count, target.shape.layers) for count in _PREFILL_LAYERS]
    ids = torch.randint(target.shape.vocabulary, (batch, tokens), device=settings.device)
    spreads = []
    for count in counts:
        config = with_layers(target.config, count)
        model: Any = random_model(config, settings.dtype, settings.device, settings.seed).base_model

        def forward(model: Any = model) -> None:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)

        for _ in range(3):
            forward()
        spreads.append(time_eagerly(forward, max(5, settings.repeats // 3)))
        del model, forward
        release_memory(settings.device)
    few, many = spreads
    layer = (many.median - few.median) / max(1, counts[1] - counts[0])
    total = many.median + layer * (target.shape.layers - counts[1])
    return {
        "batch": batch,
        "tokens": tokens,
        "layers_timed": counts,
        "layers": target.shape.layers,
        "times": [spread.to_json() for spread in spreads],
        "layer": layer,
        "all_layers": total,
        "extrapolated": target.shape.layers > counts[1],
    }


def bench_encode(
    target: Target,
    formats: Sequence[BenchFormat],
    settings: KernelSettings,
    prompt: int,
    batches: Sequence[int],
    past: int,
) -> dict[str, Any]:
    """Time encoding in each format: a prompt of one row, and a step of each of some batches.

    Returns:
        ``prefill``: the model's own time for the prompt; ``prompt`` and ``step``: rows of
        :func:`time_encoding`, with ``share``, the part of the prefill, in the former;
        ``unavailable``: names and reasons.
    """
    unavailable: list[dict[str, str]] = []
    prefill = None
    try:
        prefill = time_prefill(target, 1, prompt, settings)
    except (EnvironmentProblem, torch.cuda.OutOfMemoryError) as error:
        unavailable.append({"name": "prefill", "reason": reason_of(error)})
    cases = [("prompt", 1, prompt, 0)] + [("step", batch, 1, past) for batch in batches]
    rows: dict[str, list[dict[str, Any]]] = {"prompt": [], "step": []}
    for format in formats:
        for what, batch, tokens, before in cases:
            try:
                row = time_encoding(target, format, batch, tokens, before, settings)
            except (KernelError, WrongResult, ValueError, torch.cuda.OutOfMemoryError) as error:
                unavailable.append({"name": f"{format.name} {what}", "reason": reason_of(error)})
            else:
                if what == "prompt":
                    row["share"] = row["all_layers"] / prefill["all_layers"] if prefill else None
                rows[what].append(row)
            release_memory(settings.device)
    return {"shape": target.shape.name, "prefill": prefill, **rows, "unavailable": unavailable}

"""Generates with one kind of cache on one model, and measures it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from cqtool.bench.caches import CacheMaker
from cqtool.bench.memory import PeakMemory, allocated_bytes, peak_memory, within_memory
from cqtool.bench.timing import Spread

CHUNK_TOKENS = 16384
"""Prompt tokens of one prefill pass; the rows of a larger batch are prefilled in several."""
_PROBE_STEPS = 3


@dataclass(frozen=True)
class GenerationSettings:
    """What to generate.

    Attributes:
        prompt: tokens of the prompt.
        new: tokens to generate.
        caches: kinds of caches.
        batches: rows; None for the largest batch of each cache.
        most: no batch is larger.
        device: where.
        dtype: of the model.
        seed: of weights and prompts.
    """

    prompt: int
    new: int
    caches: tuple[str, ...]
    batches: tuple[int, ...] | None
    most: int
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of a row in the end."""
        return self.prompt + self.new


class Runner:
    """Generates with one kind of cache on one model."""

    def __init__(self, model: PreTrainedModel, maker: CacheMaker, settings: GenerationSettings):
        self.model: Any = model
        self.maker = maker
        self.settings = settings
        self.vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self.implementation: str | None = None

    def prompts(self, rows: int, tokens: int) -> Tensor:
        """Random prompts, int64 ``[rows, tokens]``."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        ids = torch.randint(self.vocabulary, (rows, tokens), generator=generator)
        return ids.to(self.settings.device)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> tuple[Cache, Tensor]:
        """Take in the prompts; the filled cache, and the prompts with a token more."""
        rows, tokens = ids.shape
        length = self.settings.length
        step = self._rows_a_pass(rows, tokens)
        if step == rows:
            cache = self.maker.make(rows, length)
            return cache, self._extend(ids, cache)
        chunks, longer = [], []
        for part in torch.split(ids, step):
            chunk = self.maker.chunk(len(part), tokens)
            longer.append(self._extend(part, chunk))
            chunks.append(chunk)
        return self.maker.join(chunks, rows, length), torch.cat(longer)

    def _rows_a_pass(self, rows: int, tokens: int) -> int:
        """Of so many prompts, how many are taken in at a time: all, where caches do not join."""
        return min(rows, max(1, CHUNK_TOKENS // tokens)) if self.maker.joins else rows

    def _extend(self, ids: Tensor, cache: Cache) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return torch.cat((ids, out.logits[:, -1:].argmax(dim=-1)), dim=1)

    def decode(self, ids: Tensor, cache: Cache, new: int) -> Tensor:
        """Generate `new` tokens, as a user would: through transformers' `generate`."""
        found: Tensor = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            disable_compile=not self.maker.compiled,
        )
        return found

    def fits(self, rows: int) -> bool:
        """Whether a batch gets to its end: its last steps, on a cache filled with one prompt.

        Also compiles and loads whatever the steps of such a batch need.
        """
        return within_memory(lambda: self._last_steps(rows), self.settings.device)

    @torch.no_grad()
    def _last_steps(self, rows: int) -> None:
        length = self.settings.length
        ids = self.prompts(1, max(1, length - _PROBE_STEPS - 1))
        chunk = self.maker.chunk(1, ids.shape[1])
        ids = self._extend(ids, chunk)
        before = allocated_bytes(self.settings.device)
        cache = self.maker.repeat(chunk, rows, length)
        if self._rows_a_pass(rows, self.settings.prompt) < rows:
            # Caches are joined layer by layer, so that one layer is there twice for a moment; and
            # the passes over the prompts leave gaps: once as much again for them.
            layer = (allocated_bytes(self.settings.device) - before) // len(cache.layers)
            torch.empty(2 * layer, dtype=torch.uint8, device=self.settings.device)
        self.decode(ids.expand(rows, -1).contiguous(), cache, min(_PROBE_STEPS, length - 2))

    @torch.no_grad()
    def warm(self, rows: int) -> None:
        """Run one prefill pass of such a batch, which loads and compiles what it needs."""
        ids = self.prompts(self._rows_a_pass(rows, self.settings.prompt), self.settings.prompt)
        self._extend(ids, self.maker.chunk(len(ids), self.settings.prompt))

    def measure(self, rows: int, runs: int, found_rows: list[dict[str, Any]]) -> None:
        """Generate whole texts; how long it took and what it cost is appended to `found_rows`.

        Raises:
            RuntimeError: it does not fit.
        """
        settings = self.settings
        prefills, decodes = [], []
        with peak_memory(settings.device) as memory:
            for _ in range(runs):
                ids = self.prompts(rows, settings.prompt)
                start = self._now()
                cache, ids = self.prefill(ids)
                middle = self._now()
                found = self.decode(ids, cache, settings.new - 1)
                end = self._now()
                assert found.shape == (rows, settings.length), "a text ended early"
                prefills.append(middle - start)
                decodes.append(end - middle)
                self.implementation = self.maker.implementation(cache)
                held = cache_bytes(cache)
                del cache, found
        found_rows.append(self._row(rows, prefills, decodes, held, memory))

    def _row(
        self,
        rows: int,
        prefills: Sequence[float],
        decodes: Sequence[float],
        held: int,
        memory: PeakMemory,
    ) -> dict[str, Any]:
        totals = [a + b for a, b in zip(prefills, decodes, strict=True)]
        total, prefill, decode = (Spread.of(times) for times in (totals, prefills, decodes))
        settings = self.settings
        return {
            "cache": self.maker.cache,
            "format": self.maker.format,
            "implementation": self.implementation,
            "batch": rows,
            "tokens_per_second": rows * settings.new / total.median,
            "decode_tokens_per_second": rows * (settings.new - 1) / decode.median,
            "prefill_seconds": prefill.median,
            "total": total.to_json(),
            "prefill": prefill.to_json(),
            "decode": decode.to_json(),
            "prefill_chunks": -(-rows // self._rows_a_pass(rows, settings.prompt)),
            "cache_bytes": held,
            "memory": memory.to_json(),
            "speedup": None,
            "batch_ratio": None,
        }

    def _now(self) -> float:
        if self.settings.device.type == "cuda":
            torch.cuda.synchronize(self.settings.device)
        return time.perf_counter()


def cache_bytes(cache: Cache) -> int:
    """Bytes that a filled cache holds."""
    own = getattr(cache, "nbytes", None)
    if own is not None:
        return int(own)
    layers: list[Any] = list(cache.layers)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

"""The fixed sets of cases whose results are quoted, and the speed that each is to reach."""

from __future__ import annotations

from dataclasses import dataclass

from cqtool.bench.problem import AttentionLoad

TARGET_LOADS = (
    AttentionLoad("32 kv heads, batch 16, 8k tokens", 16, 32, 32, 128, 8192),
    AttentionLoad("32 kv heads, batch 1, 32k tokens", 1, 32, 32, 128, 32768),
    AttentionLoad("8 kv heads of 32, batch 16, 8k tokens", 16, 32, 8, 128, 8192, 5e5),
    AttentionLoad("8 kv heads of 32, batch 1, 128k tokens", 1, 32, 8, 128, 131072, 5e5),
)
"""The decode steps of the targets, with many and with few kv heads."""

_SPEEDUPS: dict[str, tuple[float, float, float, float]] = {
    "cq-8c8b": (6.5, 5.0, 4.5, 4.0),
    "cq-4c8b": (5.0, 4.0, 3.5, 3.5),
    "cq-8c10b": (2.0, 2.0, 2.0, 2.0),
    "cq-2c8b": (2.5, 2.5, 2.5, 2.5),
}
ENCODE_SHARE = 0.08
"""Encoding a prompt is to take at most this part of the prefill of a 7B model."""
THROUGHPUT = 4.5
"""Tokens a second at the largest batch, over the better 16-bit cache."""
LARGEST_BATCH = 12.0
"""The largest batch, over that of the better 16-bit cache."""
OBJECTIVE_LIMIT = 0.005
"""A k-means engine's objective is to be at most this part above the lowest of all engines."""


@dataclass(frozen=True)
class Generation:
    """Text to generate: tokens of each row's prompt, and new tokens."""

    prompt: int
    new: int


GENERATIONS = (Generation(160, 338), Generation(4096, 256))
"""The end-to-end targets, of the shape llama-2-7b."""


def decode_target(case: str, format: str) -> float | None:
    """The speedup over the best 16-bit kernel that a format is to reach on a case, if any."""
    names = [load.name for load in TARGET_LOADS]
    if case not in names or format not in _SPEEDUPS:
        return None
    return _SPEEDUPS[format][names.index(case)]

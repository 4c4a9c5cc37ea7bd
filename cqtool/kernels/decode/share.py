"""How the work of a decode call is cut among blocks and warps. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cqtool.kernels.decode.config import DecodeLaunch


@dataclass(frozen=True)
class Share:
    """How the work is cut.

    Attributes:
        parts: blocks per kv head.
        splits: pieces a row's tokens are cut into; each leaves one partial result.
        team: warps of a block that work on one piece.
    """

    parts: int
    splits: int
    team: int


_LONG = 8192
"""Tokens a multiprocessor from which heads that run side by side do not divide the GPU."""


def room_beside(batch: int, kv_heads: int, tokens: int, sms: int, beside: int) -> int:
    """The multiprocessors that a call is to fill while others run at the same time.

    With few tokens it is the call's part of the heads: all calls' blocks have room at once, and
    load their tables at once. With many it is the whole GPU, on which blocks of the next call take
    the place of those that are done: codes differ in what a token costs, so that parts of a GPU
    divided by heads would not end together.

    Args:
        batch: rows.
        kv_heads: heads of the call.
        tokens: most coded tokens of a row.
        sms: multiprocessors of the GPU.
        beside: heads of the other calls.
    """
    heads = kv_heads + beside
    if batch * heads * tokens > _LONG * sms:
        return sms
    return max(1, sms * kv_heads // heads)


def share(
    batch: int, kv_heads: int, tokens: int, launch: DecodeLaunch, sms: int, finish: bool = True
) -> Share:
    """Cut the work so that all warps have about as much to do.

    Args:
        batch: rows.
        kv_heads: heads, each with tables of its own.
        tokens: most coded tokens of a row.
        launch: the kernels' constants.
        sms: multiprocessors of the GPU, or as many as are to be filled.
        finish: whether cq_finish runs even where one split would not need it.
    """
    steps = max(1, _ceil(_ceil(tokens, 16), launch.tiles))
    # Passes over parts of the channels, and groups of query rows, are blocks of their own. All are
    # to run at once: a second wave of blocks would load its tables while nothing else runs.
    passes = max(launch.key_parts, launch.value_parts) * launch.case.row_groups
    parts = max(1, sms // (kv_heads * passes))
    return _share(batch, parts, steps, launch.warps, finish)


# The search takes a tenth of a millisecond and more, and a decode step asks once a layer. Only the
# number of steps matters, so that an answer holds for many tokens.
@lru_cache(maxsize=1024)
def _share(batch: int, parts: int, steps: int, warps: int, finish: bool) -> Share:
    best, best_cost = Share(1, 1, 1), float("inf")
    for team in range(1, warps + 1):
        if warps % team:
            continue
        teams = warps // team
        workers = parts * teams
        for splits in range(1, max(1, min(steps // team, 4 * workers // batch)) + 1):
            # In steps: what a warp walks, what a unit's start and end cost, what cq_finish costs.
            rounds = _ceil(batch * splits, workers)
            walk = _ceil(steps, splits * team) + (2 if team == 1 else 2.5)
            cost = rounds * walk + 0.03 * splits + (3 if splits > 1 and not finish else 0)
            if cost < best_cost:
                used = _ceil(batch * splits, teams)
                best, best_cost = Share(min(parts, used), splits, team), cost
    return best


def _ceil(a: int, b: int) -> int:
    return -(-a // b)

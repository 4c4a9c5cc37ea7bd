"""What can go wrong between a client and the Hub, on a schedule that a seed decides.

A schedule depends on the seed, the request and how often that request came before, not on the order
in which a client's threads happen to ask.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable

Faults = Callable[[str, str], "str | None"]
"""From method and path of a request to the fault that it meets, None for none."""

STATUSES = {"rate-limit": 429, "internal": 500, "gateway": 502, "unavailable": 503}
"""Faults that are an answer; `rate-limit` has a Retry-After."""
KINDS = (
    *STATUSES,
    "drop",  # the connection ends in the middle of what the client sends
    "lost",  # the request is carried out, and the connection ends without an answer
    "truncate",  # the answer ends in its middle
    "slow",
    "conflict",  # somebody else's commit comes first
    "corrupt",  # a downloaded file has a wrong byte
)
SLOW_SECONDS = 0.01
SILENT = "silent"
"""The request is carried out, and nothing is answered until the client gives up. Only by plan: each
costs the time that the client waits."""


def applies(kind: str, method: str, path: str) -> bool:
    """Whether the fault can happen to such a request."""
    if kind == "conflict":
        return method == "POST" and "/commit/" in path
    if kind == "corrupt":
        return method == "GET" and "/resolve/" in path
    return kind != "truncate" or method != "HEAD"


class Schedule:
    """Faults at random: each request meets one with probability `rate`.

    Attributes:
        met: kinds of the faults so far.
    """

    def __init__(self, seed: int, rate: float, kinds: tuple[str, ...] = KINDS) -> None:
        self.met: list[str] = []
        self._seed = seed
        self._rate = rate
        self._kinds = kinds
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> str | None:
        request = f"{method} {path}"
        with self._lock:
            self._counts[request] += 1
            chance = random.Random(f"{self._seed} {request} {self._counts[request]}")
            possible = [kind for kind in self._kinds if applies(kind, method, path)]
            if not possible or chance.random() >= self._rate:
                return None
            kind = chance.choice(possible)
            self.met.append(kind)
            return kind


def planned(*plan: tuple[str, str, str]) -> Faults:
    """Faults one after the other: (method, part of the path, kind), each for one request."""
    waiting, lock = list(plan), threading.Lock()

    def choose(method: str, path: str) -> str | None:
        with lock:
            for entry in waiting:
                if entry[0] == method and entry[1] in path:
                    waiting.remove(entry)
                    return entry[2]
        return None

    return choose

"""Device time: CUDA graphs of many calls, replayed between events; and the memory's read speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], object]

_GRAPH_SECONDS = 2e-3
"""A graph runs about this long, so that the gaps around it do not count."""
_WARM_SECONDS = 0.1
"""Replayed before measuring, until clocks have risen."""


@dataclass(frozen=True)
class Spread:
    """Seconds of one call, over repeated measurements of many calls each.

    Attributes:
        median: of the measurements.
        minimum: the fastest.
        maximum: the slowest.
        iqr: distance of the quartiles.
        repeats: how many measurements there were.
        calls: how many calls each of them had.
    """

    median: float
    minimum: float
    maximum: float
    iqr: float
    repeats: int
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int = 1) -> Spread:
        """The spread of measurements, each already divided by its `calls`."""
        if len(seconds) > 1:
            low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        else:
            low = high = seconds[0]
        return cls(
            statistics.median(seconds), min(seconds), max(seconds), high - low, len(seconds), calls
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, times in seconds."""
        return asdict(self)


def time_calls(calls: Sequence[Call], repeats: int = 30) -> Spread:
    """Time calls on the current GPU, one after the other in a CUDA graph.

    Args:
        calls: the same work on different data, as many as it takes to keep the inputs out of the
            L2 cache (:func:`copies_beyond_cache`); each has run before, or may run first here.
        repeats: measurements; each is one replay of the graph.

    Returns:
        Seconds of one call.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        estimate = _elapsed(lambda: [call() for call in calls], stream) / len(calls)
        rounds = max(1, min(100, math.ceil(_GRAPH_SECONDS / max(estimate, 1e-6) / len(calls))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        count = rounds * len(calls)
        first = _elapsed(graph.replay, stream)
        for _ in range(max(2, min(200, math.ceil(_WARM_SECONDS / max(first, 1e-6))))):
            graph.replay()
        seconds = [_elapsed(graph.replay, stream) / count for _ in range(repeats)]
    torch.cuda.current_stream().wait_stream(stream)
    del graph
    return Spread.of(seconds, count)


def time_eagerly(call: Call, repeats: int = 10) -> Spread:
    """Time work that a graph cannot hold, launch gaps included; for long calls only."""
    call()
    stream = torch.cuda.current_stream()
    return Spread.of([_elapsed(call, stream) for _ in range(repeats)])


def _elapsed(call: Call, stream: torch.cuda.Stream) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def copies_beyond_cache(bytes_read: int, cache_bytes: int, limit: int = 16) -> int:
    """How many sets of inputs to rotate, so that none is in the L2 cache when its turn comes.

    Args:
        bytes_read: bytes of one set.
        cache_bytes: bytes of the cache.
        limit: at most so many; beyond, `bytes_read` is too small to be worth a measurement.
    """
    return max(1, min(limit, math.ceil(3 * cache_bytes / max(1, bytes_read))))


@dataclass(frozen=True)
class Bandwidth:
    """What the GPU's memory delivers in this run.

    Attributes:
        read: bytes a second of the faster of two large reductions; the floor of every kernel here.
        copy: bytes a second, read plus written, of a large device-to-device copy.
        bytes: size of the buffer.
        read_spread: seconds of the reduction.
        copy_spread: seconds of the copy.
    """

    read: float
    copy: float
    bytes: int
    read_spread: Spread
    copy_spread: Spread

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "read_bytes_per_second": self.read,
            "copy_bytes_per_second": self.copy,
            "bytes": self.bytes,
            "read": self.read_spread.to_json(),
            "copy": self.copy_spread.to_json(),
        }


def measure_bandwidth(device: torch.device, repeats: int = 20) -> Bandwidth:
    """Measure reading and copying of a buffer much larger than the cache, on random data."""
    free, _ = torch.cuda.mem_get_info(device)
    rows = max(1, min(1 << 31, free // 4) // (8192 * 4))
    source = torch.empty(rows, 8192, device=device).uniform_()
    target = torch.empty_like(source)
    reads = [
        time_calls([lambda: torch.sum(source)], repeats),
        time_calls([lambda: torch.sum(source, dim=1)], repeats),
    ]
    read = min(reads, key=lambda spread: spread.median)
    copy = time_calls([lambda: target.copy_(source)], repeats)
    size = source.nbytes
    return Bandwidth(size / read.median, 2 * size / copy.median, size, read, copy)

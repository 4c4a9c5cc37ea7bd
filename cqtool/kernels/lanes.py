"""Work of one GPU stream that runs side by side, and is one piece of work to everything after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


class _Lanes(threading.local):
    """A thread's own streams, each with the event that ends its work, and what they start after."""

    def __init__(self) -> None:
        self._begin: dict[torch.device, torch.cuda.Event] = {}
        self._lanes: dict[torch.device, list[tuple[torch.cuda.Stream, torch.cuda.Event]]] = {}

    def begin(self, device: torch.device) -> torch.cuda.Event:
        if device not in self._begin:
            self._begin[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return self._begin[device]

    def get(
        self, device: torch.device, count: int
    ) -> list[tuple[torch.cuda.Stream, torch.cuda.Event]]:
        lanes = self._lanes.setdefault(device, [])
        while len(lanes) < count:
            stream, end = torch.cuda.Stream(device), torch.cuda.Event()  # type: ignore[no-untyped-call]
            lanes.append((stream, end))
        return lanes[:count]


_lanes = _Lanes()


def side_by_side(device: torch.device, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Call functions so that what they queue on a GPU may run at the same time.

    The first queues on the current stream, each other on one of its own, after all that the current
    one holds; what is queued on that afterwards runs when all are done. A CUDA graph captures them
    as branches.

    Args:
        device: where the work runs; on a CPU they are called one after the other.
        calls: what to call. What they read has to live until this returns.

    Returns:
        What they returned. Tensors among it belong to the streams that made them: let go of them
        on this thread, whose next such call is what waits before it writes there again.
    """
    if device.type != "cuda" or len(calls) < 2:
        return [call() for call in calls]
    current, begin = torch.cuda.current_stream(device), _lanes.begin(device)
    lanes = _lanes.get(device, len(calls) - 1)
    begin.record(current)
    found: list[T] = []
    try:
        for call, (stream, _) in zip(calls[1:], lanes, strict=True):
            stream.wait_event(begin)
            with torch.cuda.stream(stream):
                found.append(call())
        found.insert(0, calls[0]())
    finally:
        # Also where a launch failed: what the others read is let go of when this is left.
        for stream, end in lanes:
            end.record(stream)
            current.wait_event(end)
    return found

"""Work of one GPU stream that runs side by side, and is one piece of work to everything after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


class _Lanes:
    """The streams beside one stream, each with the event that ends its work.

    Not shared with other streams: what a lane's stream freed is written to again by its next work,
    which waits for this one stream only.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lanes: list[tuple[torch.cuda.Stream, torch.cuda.Event]] = []
        self.begin = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def get(self, count: int) -> list[tuple[torch.cuda.Stream, torch.cuda.Event]]:
        while len(self._lanes) < count:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._lanes.append((stream, torch.cuda.Event()))  # type: ignore[no-untyped-call]
        return self._lanes[:count]


class _Known(threading.local):
    """Of a thread, since events are used again: the lanes of each device and stream."""

    def __init__(self) -> None:
        self.lanes: dict[tuple[torch.device, int], _Lanes] = {}


_known = _Known()


def side_by_side(device: torch.device, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Call functions so that what they queue on a GPU may run at the same time.

    The first queues on the current stream, each other on one of its own, after all that the current
    one holds; what is queued on that afterwards runs when all are done. A CUDA graph captures them
    as branches.

    Args:
        device: where the work runs; on a CPU they are called one after the other.
        calls: what to call. What they read has to live until this returns.

    Returns:
        What they returned. Tensors among it belong to the streams that made them: they are to be
        used on the current stream, whose next such call waits before it writes there again.
    """
    if device.type != "cuda" or len(calls) < 2:
        return [call() for call in calls]
    current = torch.cuda.current_stream(device)
    key = device, current.cuda_stream
    if key not in _known.lanes:
        _known.lanes[key] = _Lanes(device)
    begin, lanes = _known.lanes[key].begin, _known.lanes[key].get(len(calls) - 1)
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

"""Peak memory of a piece of work, as torch counts it and as the driver does."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cqtool.errors import KernelError

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass
class PeakMemory:
    """Bytes on one GPU; all None on a CPU, where torch does not count them.

    Attributes:
        torch_peak_bytes: most that tensors took at once, weights included.
        torch_reserved_bytes: most that torch had taken from the driver at once.
        driver_before_bytes: in use before the work, of every process on the GPU.
        driver_peak_bytes: in use after it, before torch gave anything back: torch keeps what it has
            once taken, so this is the peak that nvidia-smi shows.
    """

    torch_peak_bytes: int | None = None
    torch_reserved_bytes: int | None = None
    driver_before_bytes: int | None = None
    driver_peak_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the work inside the block; the figures are there when it ends."""
    found = PeakMemory()
    if device.type != "cuda":
        yield found
        return
    release_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    found.driver_before_bytes = _in_use(device)
    yield found
    torch.cuda.synchronize(device)
    found.torch_peak_bytes = torch.cuda.max_memory_allocated(device)
    found.torch_reserved_bytes = torch.cuda.max_memory_reserved(device)
    found.driver_peak_bytes = _in_use(device)


def allocator_setting() -> str | None:
    """What the environment asks of torch's memory allocator, None for nothing."""
    return next((os.environ[name] for name in _VARIABLES if name in os.environ), None)


@contextmanager
def growing_segments(device: torch.device) -> Iterator[str | None]:
    """Have torch's allocator map memory piece by piece, so that what one cache freed fits the next.

    Without it, freed blocks are of use to tensors of no larger size, and a cache that grows by
    copies runs out of memory earlier than its bytes say. What the environment asks for stays.

    Set while running: which of the environment's variables counts depends on torch's version, and
    both count only before the GPU is first used.

    Yields:
        The settings that hold inside the block; None on a CPU.
    """
    given = allocator_setting()
    if device.type != "cuda" or given is not None:
        yield given if device.type == "cuda" else None
        return
    release_memory(device)
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    try:
        yield "expandable_segments:True"
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


def allocated_bytes(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _in_use(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, by whichever library it was noticed."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    words = ("out of memory", "out_of_memory", "alloc_failed", "can't allocate memory")
    return isinstance(error, RuntimeError | KernelError) and any(word in text for word in words)


def release_memory(device: torch.device) -> None:
    """Give unused memory back to the driver."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def within_memory(work: Callable[[], object], device: torch.device) -> bool:
    """Do some work; whether there was memory enough for it."""
    done = False
    try:
        work()
        done = True
    except (RuntimeError, KernelError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the handler, whose traceback would keep the tensors alive.
    release_memory(device)
    return done

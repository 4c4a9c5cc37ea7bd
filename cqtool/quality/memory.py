"""A format that does not fit into memory, told from every other failure.

One such format need not end a comparison of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cqtool.errors import EnvironmentProblem


class OutOfMemory(EnvironmentProblem):
    """The model and one format did not fit into memory together; other formats may."""


@contextmanager
def memory_explained(label: str) -> Iterator[None]:
    """Say what to do where memory does not suffice.

    Args:
        label: of the format that is made or measured in the block.

    Raises:
        OutOfMemory: in place of what torch raises, which differs by device.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU it is a plain RuntimeError.
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        raise OutOfMemory(
            f"Memory ran out while {label} was measured; use a shorter --window-length, or "
            "--dtype bfloat16."
        ) from error

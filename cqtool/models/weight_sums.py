"""Numbers that tell one set of weights from another, however they were rounded.

A sum of many weights with random signs moves with every one of them: it is a random projection
(Johnson and Lindenstrauss, 1984). The mean square of what some of these sums moved estimates the
square of how far the weights moved, all of them together.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

SUMS = 3
_RUNS, _RUN = 16, 256
_SEED = b"cqtool"
_FLOOR = 1e-3
"""Of a norm. 4096 weights that are smaller than what float16 tells from zero move by 1e-6."""


def weight_sums(tensors: list[Tensor], count: int) -> list[list[float]]:
    """`count` lists of the norm of some weights and of sums of them with random signs.

    Args:
        tensors: at least one, of any shape, dtype, strides and device. As many of them take part
            as there are lists; where there are fewer, they are cut into as many parts as it takes.
        count: how many lists.

    Returns:
        Of each list 1 + :data:`SUMS` numbers, rounded to float32. Weights that are no finite
        numbers count as 0.
    """
    parts = -(-count // len(tensors))
    signs = _signs(count)
    lists = []
    for step in range(count):
        tensor = tensors[(2 * step + 1) * len(tensors) // (2 * count)].detach()
        part, size = step % parts, tensor.numel()
        weights = _weights(tensor, part * size // parts, (part + 1) * size // parts)
        sums = (signs[step] * weights).sum((1, 2))
        norm = weights.square().sum().sqrt()
        lists.append([norm.float().item(), *sums.float().tolist()])
    return lists


def distance(expected: list[list[float]], actual: list[list[float]]) -> float:
    """How far weights moved relative to their norm: the root of the mean square over all lists.

    A list's square is that of its norm's move and the mean of those of its sums' moves. The norm
    takes part because the sums of weights that are all larger by a factor may be near zero.
    """
    if len(expected) != len(actual) or not expected:
        return math.inf
    total = 0.0
    for one, other in zip(expected, actual, strict=True):
        norm = max(abs(one[0]), abs(other[0])) + _FLOOR
        moved, *sums = ((b - a) / norm for a, b in zip(one, other, strict=True))
        total += moved * moved + sum(by * by for by in sums) / SUMS
    return math.sqrt(total / len(expected))


def _weights(tensor: Tensor, first: int, end: int) -> Tensor:
    """Up to 256 weights from each of 16 places at even distances, ``[16, 256]`` float64 on the CPU;
    zeros where a run is shorter."""
    weights = torch.zeros(_RUNS, _RUN, dtype=torch.float64)
    for run in range(_RUNS):
        start, stop = (first + (end - first) * at // _RUNS for at in (run, run + 1))
        if start < stop:
            *row, column = _place(start, tensor.shape)
            # Indexed, not flattened: a flattened view of a strided matrix would copy all of it.
            found = tensor[tuple(row)][column : column + min(_RUN, stop - start)]
            # To the CPU first: not every device has float64.
            weights[run, : len(found)] = found.cpu()
    return weights.nan_to_num_(0.0, 0.0, 0.0)


def _place(position: int, shape: torch.Size) -> list[int]:
    """Indices of an element that is counted in row-major order."""
    indices = []
    for size in reversed(shape):
        position, index = divmod(position, size)
        indices.append(index)
    return indices[::-1]


@lru_cache(maxsize=8)
def _signs(count: int) -> Tensor:
    """1 and -1, ``[count, SUMS, 16, 256]`` int8, from a stream of bits that every language has."""
    shape = (count, SUMS, _RUNS, _RUN)
    stream = hashlib.shake_256(_SEED).digest(math.prod(shape) // 8)
    octets = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    bits = (octets[:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    return 1 - 2 * bits.reshape(shape).to(torch.int8)

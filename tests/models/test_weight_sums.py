"""The sums of weights are those that the format's document defines."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest
import torch

from cqtool.models.weight_sums import distance, weight_sums


def by_the_document(tensors: list[list[float]], row: int, count: int) -> list[list[float]]:
    """Lists of tensors, of rows of `row` elements, element by element."""
    stream = hashlib.shake_256(b"cqtool").digest(count * 3 * 4096 // 8)
    result = []
    for s in range(count):
        tensor = tensors[(2 * s + 1) * len(tensors) // (2 * count)]
        parts = math.ceil(count / len(tensors))
        part = [(s % parts + k) * len(tensor) // parts for k in (0, 1)]
        edges = [part[0] + run * (part[1] - part[0]) // 16 for run in range(17)]
        squares, sums = 0.0, [0.0] * 3
        for run, (start, end) in enumerate(pairwise(edges)):
            for j in range(min(end - start, 256, row - start % row)):
                weight = tensor[start + j]
                squares += weight * weight
                for k in range(3):
                    bit = ((s * 3 + k) * 16 + run) * 256 + j
                    minus = stream[bit // 8] >> (7 - bit % 8) & 1
                    sums[k] += -weight if minus else weight
        result.append([math.sqrt(squares), *sums])
    return result


@pytest.mark.parametrize(
    ("shape", "tensors", "count"),
    [
        ((90, 100), 3, 3), ((90, 100), 2, 5), ((40, 700), 1, 2), ((3, 20, 17), 5, 3), ((7,), 1, 2),
        ((6000,), 2, 2), ((1,), 3, 4),
    ],
)  # fmt: skip
def test_sums_are_those_of_the_document(shape: tuple[int, ...], tensors: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for _ in range(tensors)]
    expected = by_the_document([one.flatten().tolist() for one in weights], shape[-1], count)
    found = weight_sums(weights, count)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_distance_is_that_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, 64, generator=generator) for _ in range(64)]
    other = [one + 0.01 * torch.randn(64, 64, generator=generator) for one in weights]
    assert distance(weight_sums(weights, 64), weight_sums(other, 64)) == pytest.approx(
        0.01, rel=0.2
    )
    assert distance(weight_sums(weights, 64), weight_sums(weights, 64)) == 0


def test_distance_of_nothing_or_of_fewer_is_infinite() -> None:
    one = [1.0, 0.0, 0.0, 0.0]
    assert distance([], []) == distance([one], [one, one]) == math.inf

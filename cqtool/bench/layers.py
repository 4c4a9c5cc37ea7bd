"""Decode attention of a whole format, whose codes differ from layer to layer or head to head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from cqtool.bench.formats import BenchFormat
from cqtool.bench.problem import AttentionLoad, CodedProblem, poison_freed_memory
from cqtool.kernels.decode.parts import CodedPart, HeadOrder, decode_parts


class LayerProblem:
    """One layer's cache of random codes, each head's in the format that it has there.

    Args:
        load: the decode step.
        format: an artifact's.
        layer: the layer's index.
        dtype: of queries and output.
        device: where.
        copies: sets of codes and queries.
        seed: of everything random.

    Attributes:
        problems: one for each pair of codes, of the heads that have it.
    """

    def __init__(
        self,
        load: AttentionLoad,
        format: BenchFormat,
        layer: int,
        dtype: torch.dtype,
        device: torch.device,
        copies: int = 1,
        seed: int = 0,
    ) -> None:
        readers = load.heads // load.kv_heads
        parts = list(format.spec.parts(layer, load.kv_heads).values())
        self.load, self.order = load, HeadOrder(parts)
        self.problems = [
            CodedProblem(
                replace(load, kv_heads=len(heads), heads=len(heads) * readers),
                format.of_heads(layer, heads),
                dtype,
                device,
                copies,
                seed + load.kv_heads * layer + heads[0],
            )
            for heads in parts
        ]
        queries = zip(*(problem.queries for problem in self.problems), strict=True)
        self.queries = [self.order.join(own) for own in queries]

    def attend(self, copy: int = 0) -> Tensor:
        """Run the operator on all heads; ``[batch, heads, 1, head_dim]``."""
        parts = [
            CodedPart(problem.coded[copy], problem.tables, problem.rope)
            for problem in self.problems
        ]
        columns, scale = self.problems[0].columns, 1 / math.sqrt(self.load.head_dim)
        return decode_parts(self.queries[copy], parts, self.order, columns, scale=scale)

    def errors(self) -> list[float]:
        """Each part's relative error to float64; NaN where a row is not finite."""
        poison_freed_memory(self.queries[0])
        pairs = zip(self.problems, self.order.divide(self.attend()), strict=True)
        return [problem.error_of(own) for problem, own in pairs]


class ModelProblem:
    """The caches of all layers of a format, to be attended to one after the other as a step does.

    Args:
        layers: one problem each, with equally many sets of codes.
    """

    def __init__(self, layers: Sequence[LayerProblem]) -> None:
        self.layers = layers

    def load_kernels(self) -> None:
        """Compile and load the kernels; see :meth:`CodedProblem.load_kernels`."""
        for part in self.parts:
            part.load_kernels()

    def error(self) -> float:
        """Relative error to float64, the root of its mean square over all parts; NaN when any is.

        An artifact's keys differ in size by far from layer to layer, and with them the scores of
        random queries and what rounding does to them: some layer is always the worst. A part that
        is wrong is off by about one, and shows among a hundred.
        """
        errors = [error for layer in self.layers for error in layer.errors()]
        return math.sqrt(sum(error**2 for error in errors) / len(errors))

    def calls(self) -> list[Callable[[], object]]:
        """The layers' attention in the order of a step, step after step."""
        copies = range(len(self.layers[0].queries))
        return [partial(layer.attend, copy) for copy in copies for layer in self.layers]

    @property
    def parts(self) -> list[CodedProblem]:
        """What the kernels take at once, of all layers."""
        return [problem for layer in self.layers for problem in layer.problems]


def mean_bits(format: BenchFormat) -> float:
    """Bits a channel of an artifact's codes, over all layers and heads."""
    assert format.geometry is not None
    bits = [
        format.spec.of_head(index, head).bits_per_channel
        for index, layer in enumerate(format.geometry.layers)
        for head in range(layer.kv_heads)
    ]
    return sum(bits) / len(bits)

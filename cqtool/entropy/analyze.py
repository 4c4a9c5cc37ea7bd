"""Entropy of coupled channels over a whole model, as in Figures 1 and 2 of the paper.

For every layer, keys and values apart, the head's channels are cut into contiguous groups of c, as
the quantizer cuts them, and the joint entropy of a group is set against the sum of its channels'
marginal entropies. Where the joint entropy grows more slowly, coupling saves bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from cqtool.entropy.estimators import (
    DEFAULT_BINS,
    bin_channels,
    cell_count,
    cell_ids,
    correlation_matrix,
    entropy_of_cells,
)
from cqtool.entropy.report import (
    CorrelationMatrix,
    EntropyReport,
    GroupEntropy,
    LayerCorrelation,
)
from cqtool.errors import RecipeError, SampleError
from cqtool.progress import SILENT, Progress
from cqtool.spec import KINDS, Kind

DEFAULT_MAX_COUPLED = 8
DEFAULT_MAX_GROUPS = 64
MATRIX_CHANNELS = 32
"""Channels shown in a correlation matrix, as in the paper's Figure 2."""


class Samples(Protocol):
    """What :func:`analyze` reads; :class:`cqtool.sampling.SampleStore` is one."""

    @property
    def layers(self) -> int:
        """Layers that hold samples."""

    @property
    def tokens(self) -> int:
        """Samples per layer."""

    @property
    def meta(self) -> dict[str, Any]:
        """Where the samples come from."""

    def load(self, layer: int, kind: Kind) -> Tensor:
        """One layer's keys (before RoPE) or values, float32 [tokens, kv_heads, head_dim]."""


def analyze(
    store: Samples,
    *,
    max_coupled: int = DEFAULT_MAX_COUPLED,
    bins: int = DEFAULT_BINS,
    max_groups: int = DEFAULT_MAX_GROUPS,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
) -> EntropyReport:
    """Measure how entropy grows with the number of coupled channels, one layer in memory at a time.

    Args:
        store: the samples.
        max_coupled: couple 1, 2 ... up to this many contiguous channels of a head.
        bins: equal-width bins per channel.
        max_groups: measure at most this many groups per layer and kind, evenly spread.
        max_tokens: use at most this many samples, evenly spread; None for all.
        progress: told of every layer's keys and values.

    Raises:
        SampleError: NaN among the samples (names the layer), or no samples.
        RecipeError: an option out of range, or ``bins**max_coupled`` beyond 64 bits.
    """
    for name, value in (("max-coupled", max_coupled), ("max-groups", max_groups)):
        if value < 1:
            raise RecipeError(f"--{name} {value} measures nothing; use 1 or more.")
    if max_tokens is not None and max_tokens < 1:
        raise RecipeError(f"{max_tokens} tokens measure nothing; use 1 or more, or all.")
    cell_count(bins, max_coupled)
    if store.layers == 0 or store.tokens == 0:
        raise SampleError("The sample store is empty; sample again with at least one sequence.")
    rows = _evenly(store.tokens, max_tokens or store.tokens)
    shown = {0, store.layers // 2, store.layers - 1}
    entries: list[GroupEntropy] = []
    correlations: list[LayerCorrelation] = []
    matrices: list[CorrelationMatrix] = []
    with progress.task("entropy", store.layers * len(KINDS)) as task:
        for layer in range(store.layers):
            for kind in KINDS:
                samples = store.load(layer, kind)
                if len(rows) < samples.shape[0]:
                    samples = samples[rows]
                entries += _layer_entropies(samples, layer, kind, max_coupled, bins, max_groups)
                correlation = _mean_absolute_correlation(samples)
                correlations.append(LayerCorrelation(layer, kind, correlation))
                if layer in shown:
                    matrix = _matrix_rows(correlation_matrix(samples[:, 0, :MATRIX_CHANNELS]))
                    matrices.append(CorrelationMatrix(layer, kind, 0, matrix))
                task.advance()
    return EntropyReport(
        bins=bins,
        tokens=len(rows),
        max_coupled=max_coupled,
        max_groups=max_groups,
        layers=store.layers,
        source=dict(store.meta),
        entries=tuple(entries),
        summary=_summarize(entries),
        correlations=tuple(correlations),
        matrices=tuple(matrices),
    )


def _evenly(total: int, count: int) -> Tensor:
    """`count` of the numbers 0 .. total - 1, evenly spread and ascending; all when they are fewer.

    int64 [min(total, count)].
    """
    if count >= total:
        return torch.arange(total)
    return (torch.arange(count) * total) // count


def _layer_entropies(
    samples: Tensor, layer: int, kind: Kind, max_coupled: int, bins: int, max_groups: int
) -> list[GroupEntropy]:
    """The entries of one layer's `samples` [tokens, kv_heads, head_dim], by number of channels."""
    _, heads, dim = samples.shape
    binned = bin_channels(samples.flatten(1), bins, f"layer {layer}, {kind}s")
    marginals = entropy_of_cells(cell_ids(binned[:, None], bins), bins)
    found = []
    for channels in range(1, min(max_coupled, dim) + 1):
        # First channel of each group; a rest that does not fill a group is left out.
        starts = torch.arange(dim // channels) * channels
        firsts = (torch.arange(heads)[:, None] * dim + starts).flatten()
        firsts = firsts[_evenly(len(firsts), max_groups)]
        members = firsts[:, None] + torch.arange(channels)  # [groups, channels]
        cells = cell_count(bins, channels)
        estimate = entropy_of_cells(cell_ids(binned[members], bins), cells)
        sums = marginals.bits[members].sum(dim=1)
        found.append(
            GroupEntropy(
                layer=layer,
                kind=kind,
                channels=channels,
                groups=len(firsts),
                joint=float(estimate.bits.mean()),
                joint_std=float(estimate.bits.std(correction=0)),
                joint_corrected=float(estimate.miller_madow.mean()),
                marginal_sum=float(sums.mean()),
                marginal_sum_std=float(sums.std(correction=0)),
                cells=cells,
                occupied=float(estimate.occupied.double().mean()),
                small_sample_share=float(estimate.small_sample.double().mean()),
            )
        )
    return found


def _summarize(entries: list[GroupEntropy]) -> tuple[GroupEntropy, ...]:
    """Pool the layers: every group counts once, deviations are over all groups of all layers."""
    pooled = []
    for kind in KINDS:
        for channels in sorted({entry.channels for entry in entries}):
            part = [e for e in entries if e.kind == kind and e.channels == channels]
            if not part:
                continue
            groups = [e.groups for e in part]
            joint, joint_std = _pool(groups, ((e.joint, e.joint_std) for e in part))
            sums, sums_std = _pool(groups, ((e.marginal_sum, e.marginal_sum_std) for e in part))
            pooled.append(
                GroupEntropy(
                    layer=None,
                    kind=kind,
                    channels=channels,
                    groups=sum(groups),
                    joint=joint,
                    joint_std=joint_std,
                    joint_corrected=_pool(groups, ((e.joint_corrected, 0.0) for e in part))[0],
                    marginal_sum=sums,
                    marginal_sum_std=sums_std,
                    cells=part[0].cells,
                    occupied=_pool(groups, ((e.occupied, 0.0) for e in part))[0],
                    small_sample_share=_pool(groups, ((e.small_sample_share, 0) for e in part))[0],
                )
            )
    return tuple(pooled)


def _pool(groups: list[int], parts: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Mean and standard deviation of the union of parts with given sizes, means, deviations."""
    parts = list(parts)
    total = sum(groups)
    mean = sum(n * part[0] for n, part in zip(groups, parts, strict=True)) / total
    square = sum(
        n * (part[1] ** 2 + (part[0] - mean) ** 2) for n, part in zip(groups, parts, strict=True)
    )
    return mean, math.sqrt(square / total)


def _mean_absolute_correlation(samples: Tensor) -> float | None:
    """Over the pairs of different channels of one head of `samples` [tokens, kv_heads, head_dim].

    Pairs with a channel that never changes are left out.
    """
    total, pairs = 0.0, 0
    for head in range(samples.shape[1]):
        matrix = correlation_matrix(samples[:, head]).abs()
        matrix.fill_diagonal_(torch.nan)
        defined = ~matrix.isnan()
        total += float(matrix[defined].sum())
        pairs += int(defined.sum())
    return total / pairs if pairs else None


def _matrix_rows(matrix: Tensor) -> tuple[tuple[float | None, ...], ...]:
    """`matrix` as nested tuples of four decimals, None for NaN."""
    return tuple(
        tuple(None if math.isnan(value) else round(value, 4) for value in row)
        for row in matrix.tolist()
    )

"""What an entropy analysis found, as it is kept in entropy.json."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cqtool.spec import Kind

FORMAT_VERSION = 1


@dataclass(frozen=True)
class GroupEntropy:
    """Entropy in bits of groups of `channels` coupled channels; means and deviations over groups.

    Attributes:
        layer: the layer, or None for all layers together.
        kind: keys or values.
        channels: coupled channels (c).
        groups: groups that were measured.
        joint: mean joint entropy, plug-in estimate.
        joint_std: its standard deviation over the groups.
        joint_corrected: mean of the Miller-Madow corrected joint entropy.
        marginal_sum: mean of the sum of the channels' marginal entropies.
        marginal_sum_std: its standard deviation over the groups.
        cells: cells of a group, ``bins**channels``.
        occupied: mean number of cells that hold a sample.
        small_sample_share: share of the groups whose sample is too small for the cells.
    """

    layer: int | None
    kind: Kind
    channels: int
    groups: int
    joint: float
    joint_std: float
    joint_corrected: float
    marginal_sum: float
    marginal_sum_std: float
    cells: int
    occupied: float
    small_sample_share: float

    @property
    def small_sample(self) -> bool:
        """The sample is too small for most groups: the joint entropy is a lower bound at best."""
        return self.small_sample_share > 0.5

    @property
    def saving(self) -> float:
        """Share of the marginal bits that coupling makes unnecessary, 0 .. 1."""
        return 1 - self.joint / self.marginal_sum if self.marginal_sum > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "saving": self.saving, "small_sample": self.small_sample}


@dataclass(frozen=True)
class LayerCorrelation:
    """Mean absolute correlation between different channels of one head, over a layer's heads.

    `mean_absolute` is None where no two channels vary.
    """

    layer: int
    kind: Kind
    mean_absolute: float | None


@dataclass(frozen=True)
class CorrelationMatrix:
    """Correlation of the first channels of a layer's first head.

    `matrix` is [channels][channels]; None stands where a channel never changes.
    """

    layer: int
    kind: Kind
    head: int
    matrix: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class EntropyReport:
    """What :func:`cqtool.entropy.analyze` found.

    Attributes:
        bins: equal-width bins per channel.
        tokens: samples each estimate rests on; none can exceed ``log2(tokens)`` bits.
        max_coupled: the largest number of coupled channels looked at.
        max_groups: how many groups per layer and kind were measured at most.
        layers: layers of the model.
        source: where the samples come from.
        entries: one per layer, kind and number of channels.
        summary: one per kind and number of channels, over all layers.
        correlations: one per layer and kind.
        matrices: of the first, the middle and the last layer.
    """

    bins: int
    tokens: int
    max_coupled: int
    max_groups: int
    layers: int
    source: dict[str, Any]
    entries: tuple[GroupEntropy, ...]
    summary: tuple[GroupEntropy, ...]
    correlations: tuple[LayerCorrelation, ...]
    matrices: tuple[CorrelationMatrix, ...]

    @property
    def ceiling(self) -> float:
        """The most bits an entropy estimated from `tokens` samples can have."""
        return math.log2(self.tokens)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the content of entropy.json."""
        return {
            "format_version": FORMAT_VERSION,
            "bins": self.bins,
            "tokens": self.tokens,
            "ceiling_bits": self.ceiling,
            "max_coupled": self.max_coupled,
            "max_groups": self.max_groups,
            "layers": self.layers,
            "source": self.source,
            "summary": [entry.to_json() for entry in self.summary],
            "entries": [entry.to_json() for entry in self.entries],
            "correlations": [asdict(value) for value in self.correlations],
            "matrices": [asdict(value) for value in self.matrices],
        }

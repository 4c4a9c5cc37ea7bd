"""The figures, drawn from the dictionaries in entropy.json and quality.json.

Figure objects are used without pyplot, so that nothing global changes and no display is needed.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; shapes and line styles say
the same a second time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cqtool.files import atomic_file
from cqtool.spec import KINDS, Kind

_KL_RANGE = 1e4
DPI = 144
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_JOINT, _SUM, _MUTED = _COLOURS[0], _COLOURS[1], "#666666"
_TITLES = {"key": "Keys (before RoPE)", "value": "Values"}


def plot_entropy(report: dict[str, Any], path: Path) -> None:
    """Draw joint entropy against the sum of marginals (the paper's Figure 1), then layer by layer.

    Args:
        report: the content of entropy.json.
        path: the PNG to write.

    Raises:
        EnvironmentProblem: `path` cannot be written.
    """
    figure = _figure(8.6, 7.4)
    axes = figure.subplots(2, 2, sharey="row", squeeze=False)
    for column, kind in enumerate(KINDS):
        _entropy_panel(axes[0, column], report, kind)
        _layer_panel(axes[1, column], report, kind)
    axes[0, 0].set_ylabel("Entropy of the group (bits)")
    axes[1, 0].set_ylabel("Joint entropy per channel (bits)")
    # One legend per row, over what both of its panels show.
    axes[0, 0].legend(*_all_handles(axes[0]), loc="upper left", fontsize=9)
    # Below the panels: a curve may run anywhere in them.
    handles, labels = _all_handles(axes[1])
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=max(1, len(labels)),
        fontsize=9,
        title="Coupled channels c",
    )
    figure.suptitle(
        f"Entropy of coupled channels: {report['tokens']:,} tokens, {report['layers']} "
        f"{'layer' if report['layers'] == 1 else 'layers'}, {report['bins']} bins per channel",
        fontsize=12,
    )
    _save(figure, path)


def _entropy_panel(axes: Axes, report: dict[str, Any], kind: Kind) -> None:
    """Joint entropy and sum of marginals over the number of coupled channels, all layers."""
    rows = [row for row in report["summary"] if row["kind"] == kind]
    channels = [row["channels"] for row in rows]
    series = (
        ("marginal_sum", "Sum of marginals", _SUM, "s", "--"),
        ("joint", "Joint entropy", _JOINT, "o", "-"),
    )
    for name, label, colour, marker, line in series:
        mean = np.array([row[name] for row in rows])
        deviation = np.array([row[f"{name}_std"] for row in rows])
        axes.plot(channels, mean, line, color=colour, marker=marker, label=label)
        axes.fill_between(
            channels, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0
        )
    small = [row for row in rows if row["small_sample"]]
    if small:
        axes.plot(
            [row["channels"] for row in small],
            [row["joint"] for row in small],
            "o",
            color=_JOINT,
            markerfacecolor="white",
            zorder=3,
            label="Joint, sample too small",
        )
        axes.axvspan(small[0]["channels"] - 0.5, max(channels) + 0.5, color="#000000", alpha=0.06)
    axes.axhline(report["ceiling_bits"], color=_MUTED, linestyle=":", label="Ceiling, log₂(tokens)")
    axes.set_title(_TITLES[kind], fontsize=11)
    axes.set_xlabel("Coupled channels c")
    axes.set_xticks(channels)
    axes.set_xlim(0.5, max(channels, default=1) + 0.5)
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _layer_panel(axes: Axes, report: dict[str, Any], kind: Kind) -> None:
    """Joint entropy divided by c, layer by layer, for c = 1, 2, 4, 8 ..."""
    rows = [row for row in report["entries"] if row["kind"] == kind]
    shown = [c for c in sorted({row["channels"] for row in rows}) if c & (c - 1) == 0]
    for index, channels in enumerate(shown):
        curve = [row for row in rows if row["channels"] == channels]
        small = any(row["small_sample"] for row in curve)
        axes.plot(
            [row["layer"] for row in curve],
            [row["joint"] / channels for row in curve],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4.5,
            markerfacecolor="white" if small else None,
            label=f"{channels}{', sample too small' if small else ''}",
        )
    axes.set_xlabel("Layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    _tidy(axes)


def plot_correlation(report: dict[str, Any], path: Path) -> None:
    """Draw the channel correlation of the first, middle and last layer (the paper's Figure 2).

    Args:
        report: the content of entropy.json.
        path: the PNG to write.

    Raises:
        EnvironmentProblem: `path` cannot be written.
    """
    layers = sorted({matrix["layer"] for matrix in report["matrices"]})
    figure = _figure(1.4 + 2.4 * len(layers), 5.4)
    axes = figure.subplots(2, len(layers), squeeze=False)
    colours: Colormap = colormaps["RdBu_r"].with_extremes(bad="#BBBBBB")
    for matrix in report["matrices"]:
        panel = axes[KINDS.index(matrix["kind"]), layers.index(matrix["layer"])]
        values = np.array(matrix["matrix"], dtype=float)  # None becomes NaN, drawn grey
        image = panel.imshow(values, cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
        panel.set_title(f"{matrix['kind'].capitalize()}s, layer {matrix['layer']}", fontsize=11)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for panel in axes[-1]:
        panel.set_xlabel("Channel of head 0")
    for panel in axes[:, 0]:
        panel.set_ylabel("Channel of head 0")
    figure.colorbar(image, ax=axes, shrink=0.7, label="Pearson correlation")
    _save(figure, path)


def plot_quality(quality: dict[str, Any], path: Path) -> None:
    """Draw bits per channel against KL divergence and perplexity.

    A full marker stands at the bits of the codes, a hollow one at the effective bits, window and
    sinks counted. Error bars are one standard error; perplexity's is that of the difference from
    full precision on the same text.

    Args:
        quality: the content of quality.json; its first row is full precision.
        path: the PNG to write.

    Raises:
        EnvironmentProblem: `path` cannot be written.
    """
    base, *rows = quality["rows"]
    legend_rows = math.ceil((len(rows) + 3) / 3)
    figure = _figure(8.6, 4.2 + 0.22 * legend_rows)
    divergence, perplexity = figure.subplots(1, 2)
    # What is as good as lossless would stretch the axis over many decades and squeeze the rest.
    least = max((row["kl"] for row in rows), default=0.0) / _KL_RANGE
    for index, row in enumerate(rows):
        colour = _COLOURS[index % len(_COLOURS)]
        # The shapes have a cycle of their own, so that 70 rows differ in colour or shape.
        marker = _MARKERS[index % len(_MARKERS)]
        style = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 3}
        # A single window has no standard errors.
        error = base["perplexity"] * (row["perplexity_increase_se"] or 0.0)
        for axes, value, deviation in (
            (divergence, row["kl"], row["kl_se"] or 0.0),
            (perplexity, row["perplexity"], error),
        ):
            if axes is divergence and value <= 0:
                continue  # nothing lost, nothing to show on a logarithmic axis
            if axes is divergence and value < least:
                value, deviation = least, 0.0
                axes.annotate(
                    "≤",
                    (row["bits_per_channel"], least),
                    xytext=(-14, -4),
                    textcoords="offset points",
                )
            bits = (row["bits_per_channel"], row["effective_bits"])
            axes.plot(bits, (value, value), color=colour, linewidth=0.8, alpha=0.6)
            axes.errorbar(bits[0], value, deviation, **style)
            axes.plot(bits[1], value, marker, color=colour, markerfacecolor="white")
        label = f"{row['label']} ({_number(row['bits_per_channel'])} bit)"
        perplexity.errorbar([], [], [], label=label, **style)
    perplexity.axhline(base["perplexity"], color=_MUTED, linestyle=":", label=base["label"])
    grey = {"marker": "o", "linestyle": "none", "color": _MUTED}
    perplexity.plot([], [], label="filled: codes alone", **grey)
    perplexity.plot([], [], markerfacecolor="white", label="hollow: with window, sinks", **grey)
    divergence.set_yscale("log")
    divergence.set_ylabel("Mean KL divergence per token (nats)")
    perplexity.set_ylabel("Perplexity")
    values = [row["perplexity"] for row in quality["rows"]]
    if max(values) > 2 * min(values):
        perplexity.set_yscale("log")
        perplexity.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        perplexity.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        perplexity.yaxis.set_minor_locator(NullLocator())
    for axes in (divergence, perplexity):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator([2.0**n for n in range(-3, 6)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        axes.set_xlabel("Bits per channel")
        _tidy(axes)
    # The formats in their order, then what is the same for all: matplotlib would put lines first.
    handles, labels = perplexity.get_legend_handles_labels()
    handles, labels = handles[3:] + handles[:3], labels[3:] + labels[:3]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    evaluation = quality["evaluation"]
    figure.suptitle(
        f"Quality of {quality['model']} on {evaluation['windows']} held-out windows of "
        f"{evaluation['window_length']} tokens",
        fontsize=12,
    )
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _all_handles(row: Any) -> tuple[list[Any], list[str]]:
    """Legend handles and labels of a row of panels, each label once."""
    found: dict[str, Any] = {}
    for axes in row:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _save(figure: Figure, path: Path) -> None:
    # Without matplotlib's version in the file, the same pixels are the same bytes.
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})

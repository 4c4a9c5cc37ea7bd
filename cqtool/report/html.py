"""One self-contained page about a calibration or artifact, from the files in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cqtool import __version__
from cqtool.artifact.card_format import LAYER_COLUMNS, layer_rows
from cqtool.artifact.measured import QualityReport, QualityRow, read_quality
from cqtool.errors import ArtifactError
from cqtool.files import write_text
from cqtool.layout.config import (
    CALIBRATION_NAME,
    CONFIG_NAME,
    MAX_JSON_BYTES,
    REPORTS_NAME,
    CQConfig,
    read_config,
    text_parts,
)
from cqtool.report.html_scores import costliest, paired, scores, with_error
from cqtool.report.markup import Markup, element, facts, figure, page, table, tiles, verdict
from cqtool.strictjson import read_object

REPORT_NAME = "report.html"
ENTROPY_NAME = "entropy.json"
QUALITY_PLOT = "quality.png"
PARETO_PLOT = "quality-pareto.png"
ENTROPY_PLOT = "entropy.png"
CORRELATION_PLOT = "correlation.png"

_GATES = {
    "max_ppl_increase": ("Perplexity increase, at most", "{:.2%}"),
    "max_kl": ("KL divergence per token (nats), at most", "{:.4g}"),
    "min_top1": ("Top-1 agreement, at least", "{:.2%}"),
}


def write_report(folder: Path) -> Path:
    """Write ``reports/report.html`` from what a calibration folder or artifact holds.

    Args:
        folder: holds cq_config.json, calibration.json and reports/ with quality.json, entropy.json
            and PNG plots; a section is left out where its file is missing.

    Returns:
        The path of the report.

    Raises:
        ArtifactError: there is nothing to report on, or a file is damaged.
        EnvironmentProblem: the report cannot be written.
    """
    reports = folder / REPORTS_NAME
    config = read_config(folder) if (folder / CONFIG_NAME).exists() else None
    calibration = _read(folder / CALIBRATION_NAME, "Run `cqtool calibrate` again.")
    quality = read_quality(folder)
    entropy = _read(reports / ENTROPY_NAME, "Run `cqtool analyze-entropy` again.")
    if config is None and calibration is None and quality is None and entropy is None:
        raise ArtifactError(
            f"{folder} holds nothing to report on; make a calibration folder with "
            "`cqtool calibrate` first."
        )
    title = _title(config, quality)
    sections = [element("h1", title)]
    try:
        if config is not None:
            sections += _format(config)
        if quality is not None:
            sections += _quality(quality, config, reports)
        if entropy is not None:
            sections += _entropy(entropy, reports)
        if config is not None or calibration is not None:
            sections += _calibration(config, calibration or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"A report file in {folder} lacks or garbles a field ({error}); run the command that "
            "made it again."
        ) from error
    sections.append(element("footer", f"Written by cqtool {__version__}."))
    path = reports / REPORT_NAME
    write_text(path, page(title, *sections))
    return path


def _read(path: Path, remedy: str) -> dict[str, Any] | None:
    return read_object(path, remedy, limit=MAX_JSON_BYTES) if path.exists() else None


def _title(config: CQConfig | None, quality: QualityReport | None) -> str:
    if config is not None:
        return f"{config.cache.name} for {config.base_model.id}"
    return f"KV cache of {quality.model}" if quality is not None else "KV cache"


def _format(config: CQConfig) -> list[Markup]:
    cache = config.cache
    revision = f" at revision {config.base_model.revision}" if config.base_model.revision else ""
    codes = " and ".join(
        f"{kind}s in groups of {code.channels} {'channels' if code.channels > 1 else 'channel'} "
        f"with {code.bits}-bit codes"
        for kind, code in (("key", cache.key), ("value", cache.value))
    )
    # Layer after layer, a sentence would have as many parts as the model has heads.
    own = [table(LAYER_COLUMNS, layer_rows(config), right=(1,))] if cache.layers else []
    if own:
        codes = "keys and values in codes that differ between layers, as the table says"
    return [
        element(
            "p",
            f"Coupled quantization of the KV cache of {config.base_model.id}{revision}: {codes}, "
            f"fitted with the {config.objective} objective. The first {cache.sinks} and the last "
            f"{cache.window} tokens stay in the model's precision.",
        ),
        *own,
    ]


def _quality(quality: QualityReport, config: CQConfig | None, reports: Path) -> list[Markup]:
    own = quality.row_of(config.cache.name, config.objective) if config is not None else None
    rows = [
        (
            row.label,
            f"{row.bits_per_channel:.2f}",
            f"{row.effective_bits:.2f}",
            _bytes(row.cache_bytes_per_token),
            with_error(row.perplexity, row.perplexity_se, ".2f"),
            with_error(row.perplexity_increase, row.perplexity_increase_se, "+.2f", scale=100),
            with_error(row.kl, row.kl_se, ".4f"),
            with_error(row.top1, row.top1_se, ".2f", scale=100),
        )
        for row in quality.rows
    ]
    columns = (
        "Format",
        "Bits per channel",
        "Effective bits",
        "Cache per token",
        "Perplexity",
        "Increase (%)",
        "KL (nats)",
        "Top-1 (%)",
    )
    source = quality.evaluation.get("dataset", "held-out text")
    return [
        _headline(own) if own is not None else Markup(),
        element("h2", "Quality"),
        element(
            "p",
            f"Measured on {quality.windows} held-out windows of {quality.window_length} tokens of "
            f"{source}, on {quality.device}, against the full-precision cache on the same tokens. "
            "After ± stands one standard error. Effective bits count everything that is stored at "
            "this length: codes, scales, window and sinks.",
        ),
        _gates(quality),
        table(columns, rows, right=range(1, len(columns))),
        figure(
            reports / QUALITY_PLOT,
            "Bits per channel against KL divergence and perplexity; KL by position in the window.",
        ),
        figure(
            reports / PARETO_PLOT,
            "Effective bits per channel, everything counted, against KL divergence. The line joins "
            "the formats that no other beats in both; the star is the one checked.",
        ),
        paired(quality),
        costliest(quality.by_layer),
        costliest(quality.by_head),
        scores("Text generated greedily over the cache", quality.generation),
        scores("Tasks of lm-evaluation-harness over the cache", quality.tasks),
    ]


def _gates(quality: QualityReport) -> Markup:
    rows = []
    for gate in quality.gates:
        name, number = _GATES.get(gate.name, (gate.name, "{:.4g}"))
        limit, value = number.format(gate.limit), number.format(gate.value)
        rows.append((name, limit, value, verdict(gate.passed)))
    return table(("Gate", "Limit", "Measured", "Result"), rows, right=(1, 2)) if rows else Markup()


def _headline(row: QualityRow) -> Markup:
    smaller = row.cache_bytes_per_token_full / row.cache_bytes_per_token
    return tiles(
        (
            ("bits per channel in codes", f"{row.bits_per_channel:.4g}"),
            ("perplexity increase", f"{row.perplexity_increase:+.2%}"),
            ("KL per token (nats)", f"{row.kl:.3g}"),
            ("same top-1 token", f"{row.top1:.1%}"),
            ("smaller cache, all counted", f"{smaller:.1f}×"),
        )
    )


def _entropy(entropy: Mapping[str, Any], reports: Path) -> list[Markup]:
    rows = [
        (
            f"{row['kind']}s",
            row["channels"],
            with_error(row["joint"], row["joint_std"], ".2f"),
            with_error(row["marginal_sum"], row["marginal_sum_std"], ".2f"),
            f"{row['saving']:.1%}",
            "too small" if row["small_sample"] else "",
        )
        for row in entropy["summary"]
    ]
    return [
        element("h2", "Entropy of coupled channels"),
        element(
            "p",
            f"Each channel is cut into {entropy['bins']} equal-width bins; {entropy['tokens']} "
            "tokens per estimate. Where the joint entropy grows more slowly than the sum of the "
            "marginals, coupling channels saves bits. After ± stands the standard deviation over "
            "groups and layers. Where the sample is too small for the number of cells, the joint "
            "entropy is underestimated: no estimate can exceed log2(tokens) = "
            f"{entropy['ceiling_bits']:.1f} bits.",
        ),
        figure(
            reports / ENTROPY_PLOT,
            "Joint entropy against the sum of marginal entropies (band: one standard deviation), "
            "and joint entropy per channel in each layer.",
        ),
        table(
            ("Kind", "Channels", "Joint (bits)", "Marginal sum (bits)", "Saving", "Sample"),
            rows,
            right=(1, 2, 3, 4),
        ),
        figure(
            reports / CORRELATION_PLOT,
            "Correlation of the first channels of head 0 in the first, middle and last layer.",
        ),
    ]


def _calibration(config: CQConfig | None, calibration: Mapping[str, Any]) -> list[Markup]:
    known: list[tuple[str, object]] = []
    data: Mapping[str, Any] = calibration.get("data", {})
    if config is not None:
        data = {**config.calibration.dataset, "digest": config.calibration.digest, **data}
        known += [
            ("Sequences", config.calibration.sequences),
            ("Tokens in each", config.calibration.sequence_length),
            ("License of the base model", config.base_model.license),
        ]
    if "parts" in data:
        texts = {f"text {number}": part for number, part in enumerate(text_parts(data), start=1)}
        data = texts | {name: value for name, value in data.items() if name != "parts"}
    for key in ("objective", "engine", "engine_detail", "seed", "device", "dtype"):
        if key in calibration:
            known.append((key.replace("_", " ").capitalize(), _plain(calibration[key])))
    parts = [element("h2", "Calibration"), facts(known)]
    for caption, value, heading in (
        ("Text", data, "Field"),
        ("Versions", calibration.get("versions", {}), "Package"),
    ):
        if value:
            shown = [(name, _plain(item)) for name, item in value.items()]
            parts.append(table((heading, caption), shown))
    return parts


def _plain(value: object) -> object:
    """A JSON value for a reader: short floats, lists and objects on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(_plain(item)) for item in value)
    return value


def _bytes(count: float) -> str:
    return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count:.0f} B"

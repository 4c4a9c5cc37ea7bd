"""What entropy and quality reports leave beside their JSON: plots, and the HTML report anew."""

from __future__ import annotations

from pathlib import Path

from cqtool.entropy import EntropyReport
from cqtool.files import write_json
from cqtool.quality import QualityReport, report_path
from cqtool.report.html import write_report
from cqtool.report.pareto import PARETO_ROWS, pareto_path, plot_pareto
from cqtool.report.plots import plot_correlation, plot_entropy
from cqtool.report.quality_plots import plot_quality


def write_entropy(report: EntropyReport, folder: Path) -> dict[str, Path]:
    """Write ``entropy.json`` and its two plots to `folder`; path by file name."""
    value = report.to_json()
    files = {name: folder / name for name in ("entropy.json", "entropy.png", "correlation.png")}
    write_json(files["entropy.json"], value)
    plot_entropy(value, files["entropy.png"])
    plot_correlation(value, files["correlation.png"])
    return files


def draw_quality(calibration: Path, report: QualityReport) -> dict[str, str]:
    """Draw the plots of a check of `calibration` and write the HTML report anew.

    Returns:
        Path by file name, the report's JSON included; empty inside an artifact, which is sealed.
    """
    path = report_path(calibration, report)
    if path is None:
        return {}
    plot, pareto, content = path.with_suffix(".png"), pareto_path(path), report.to_json()
    plot_quality(content, plot)
    # That of an earlier check with more formats would stand beside figures of this one.
    pareto.unlink(missing_ok=True)
    if len(report.rows) >= PARETO_ROWS:
        plot_pareto(content, pareto)
    files = [path, plot, pareto, write_report(calibration)]
    return {file.name: str(file) for file in files if file.exists()}

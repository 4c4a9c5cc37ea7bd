"""What a cache format costs in quality, measured on held-out text, and gates on it."""

from cqtool.quality.check import CheckSettings, check, report_path
from cqtool.quality.report import Gates, QualityReport, Row

__all__ = ["CheckSettings", "Gates", "QualityReport", "Row", "check", "report_path"]

"""End-to-end tuning: codebooks that make the model's own predictions change least."""

from cqtool.tuning.tune import TuningResult, tune

__all__ = ["TuningResult", "tune"]

"""Activations and gradients out of a running model, into an on-disk sample store."""

from cqtool.sampling.collect import collect
from cqtool.sampling.store import SampleStore
from cqtool.sampling.text import calibration_windows

__all__ = ["SampleStore", "calibration_windows", "collect"]

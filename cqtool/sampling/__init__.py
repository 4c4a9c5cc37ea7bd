"""Activations and gradients out of a running model, into an on-disk sample store."""

from cqtool.sampling.collect import collect
from cqtool.sampling.store import SampleStore

__all__ = ["SampleStore", "collect"]

"""How much channels depend on each other: the measurement that coupled quantization rests on."""

from __future__ import annotations

from cqtool.entropy.analyze import analyze
from cqtool.entropy.report import EntropyReport

__all__ = ["EntropyReport", "analyze"]

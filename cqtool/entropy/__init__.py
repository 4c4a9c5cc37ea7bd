"""How much channels depend on each other: the measurement that coupled quantization rests on."""

from __future__ import annotations

from cqtool.entropy.analyze import EntropyReport, analyze

__all__ = ["EntropyReport", "analyze"]

"""Other cache formats behind the same interface, to measure coupled quantization against."""

from cqtool.schemes.registry import SCHEMES, make_format

__all__ = ["SCHEMES", "make_format"]

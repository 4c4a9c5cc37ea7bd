"""Encode keys and values into tiles of codes: the op, its CUDA source and its naive reference."""

from cqtool.kernels.encode.op import Encoder, Rope

__all__ = ["Encoder", "Rope"]

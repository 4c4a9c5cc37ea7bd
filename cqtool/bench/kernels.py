"""Decode attention over codes against every 16-bit kernel there is, checked before it is timed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cqtool.bench.formats import BenchFormat
from cqtool.bench.layers import LayerProblem, ModelProblem, mean_bits
from cqtool.bench.memory import is_out_of_memory, release_memory
from cqtool.bench.problem import AttentionLoad, CodedProblem, DenseProblem, poison_freed_memory
from cqtool.bench.rivals import RIVALS
from cqtool.bench.timing import Bandwidth, Spread, copies_beyond_cache, time_calls
from cqtool.errors import KernelError

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error against float64 with which a kernel is timed, by the model's dtype."""


@dataclass(frozen=True)
class KernelSettings:
    """How kernels are measured.

    Attributes:
        device: a GPU.
        dtype: of queries, of 16-bit caches and of outputs.
        repeats: measurements of each kernel.
        seed: of the random data.
    """

    device: torch.device
    dtype: torch.dtype = torch.float16
    repeats: int = 30
    seed: int = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the GPU's L2 cache."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)


class WrongResult(Exception):
    """A kernel's result is not what float64 says; its time would mean nothing."""


def require_right(error: float, dtype: torch.dtype) -> float:
    """`error`, when it is within :data:`TOLERANCES`.

    Raises:
        WrongResult: it is not, or is NaN.
    """
    limit = TOLERANCES[dtype]
    if not error <= limit:
        raise WrongResult(f"wrong result: relative error {error:.2g}, limit {limit:.2g}")
    return error


def bench_decode(
    load: AttentionLoad,
    formats: Sequence[BenchFormat],
    settings: KernelSettings,
    bandwidth: Bandwidth,
    models: Sequence[BenchFormat] = (),
) -> dict[str, Any]:
    """Time one decode step of one layer, in 16 bits and in each format.

    Args:
        load: the step.
        formats: of which every layer has the same codes.
        settings: how to measure.
        bandwidth: of the GPU's memory.
        models: formats whose layers have codes of their own: of each, the mean of all its layers,
            one after the other.

    Returns:
        ``case``; ``kernels``, one row each; ``unavailable``, names and reasons of those that could
        not be timed; ``best_16bit``, the rival that the speedups refer to, and its time when
        measured again at the end.
    """
    rows: list[dict[str, Any]] = []
    unavailable: list[dict[str, str]] = []
    for name in RIVALS:
        with warnings.catch_warnings(record=True) as said:  # how torch says why a backend won't do
            warnings.simplefilter("always")
            try:
                rows.append(_time_rival(name, load, settings, bandwidth))
            except Exception as error:  # whatever a rival lacks here is a row, not an end
                reason = reason_of(error, said[0].message if said else None)
                unavailable.append({"name": name, "reason": reason})
        release_memory(settings.device)
    best = min(rows, key=lambda row: row["time"]["median"], default=None)
    timed = [(_time_format, format) for format in formats]
    timed += [(_time_model, format) for format in models]
    for time, format in timed:
        try:
            rows.append(time(format, load, settings, bandwidth))
        except (KernelError, WrongResult, ValueError, torch.cuda.OutOfMemoryError) as error:
            unavailable.append({"name": format.name, "reason": reason_of(error)})
        release_memory(settings.device)
    again = None
    if best is not None:
        # The GPU may have become slower or faster meanwhile; a rival gets the better of its times.
        again = _time_rival(best["name"], load, settings, bandwidth)["time"]
        release_memory(settings.device)
        fastest = min(best["time"]["median"], again["median"])
        for row in rows:
            row["speedup"] = fastest / row["time"]["median"]
    return {
        "case": load.to_json() | {"bytes_16bit": load.bytes_16bit},
        "kernels": rows,
        "unavailable": unavailable,
        "best_16bit": {"name": best["name"], "time": best["time"], "again": again}
        if best is not None
        else None,
    }


def _time_rival(
    name: str, load: AttentionLoad, settings: KernelSettings, bandwidth: Bandwidth
) -> dict[str, Any]:
    copies = copies_beyond_cache(load.bytes_16bit, settings.cache_bytes)
    problem = DenseProblem(load, settings.dtype, settings.device, copies, settings.seed)
    calls = RIVALS[name](problem)
    poison_freed_memory(problem.queries[0])
    error = require_right(problem.error(calls[0]()), settings.dtype)
    spread = time_calls(calls, settings.repeats)
    moved = load.bytes_16bit + 2 * problem.queries[0].nbytes
    dtype = str(settings.dtype).removeprefix("torch.")
    return _row(name, dtype, spread, moved, load.bytes_16bit, error, bandwidth)


def _time_format(
    format: BenchFormat, load: AttentionLoad, settings: KernelSettings, bandwidth: Bandwidth
) -> dict[str, Any]:
    bits = format.spec.bits_per_channel
    copies = copies_beyond_cache(int(load.bytes_16bit * bits / 16), settings.cache_bytes)
    problem = CodedProblem(load, format, settings.dtype, settings.device, copies, settings.seed)
    launch = problem.load_kernels()
    error = require_right(problem.error(), settings.dtype)
    spread = time_calls(problem.calls(), settings.repeats)
    row = _row(
        "cqtool", format.name, spread, problem.bytes_read, problem.code_bytes, error, bandwidth
    )
    return row | {
        "bits_per_channel": bits,
        "kernel": {
            "pairing": problem.tables.pairing,
            "passes": 1 if launch.fused else launch.key_parts + launch.value_parts,
            "warps": launch.warps,
        },
    }


def _time_model(
    format: BenchFormat, load: AttentionLoad, settings: KernelSettings, bandwidth: Bandwidth
) -> dict[str, Any]:
    assert format.geometry is not None
    bits, layers = mean_bits(format), len(format.geometry.layers)
    size = int(layers * load.bytes_16bit * bits / 16)
    copies = copies_beyond_cache(size, settings.cache_bytes)
    rest = (settings.dtype, settings.device, copies, settings.seed)
    problem = ModelProblem([LayerProblem(load, format, index, *rest) for index in range(layers)])
    problem.load_kernels()
    error = require_right(problem.error(), settings.dtype)
    spread = time_calls(problem.calls(), settings.repeats)
    parts = problem.parts
    row = _row(
        "cqtool",
        f"{format.name}, mean of {layers} layers",
        spread,
        sum(part.bytes_read for part in parts) // layers,
        sum(part.code_bytes for part in parts) // layers,
        error,
        bandwidth,
    )
    return row | {"bits_per_channel": bits, "kernel": {"layers": layers, "parts": len(parts)}}


def _row(
    name: str,
    format: str,
    spread: Spread,
    moved: int,
    cache_bytes: int,
    error: float,
    bandwidth: Bandwidth,
) -> dict[str, Any]:
    floor = moved / bandwidth.read
    return {
        "name": name,
        "format": format,
        "time": spread.to_json(),
        "cache_bytes": cache_bytes,
        "bytes": moved,
        "floor": floor,
        "over_floor": spread.median / floor,
        "relative_error": error,
        "speedup": None,
    }


def reason_of(error: BaseException, said: Warning | str | None = None) -> str:
    """An exception in one line, and a warning that came before it in another sentence."""
    if is_out_of_memory(error):
        return "not enough GPU memory"
    if isinstance(error, ModuleNotFoundError):  # others are installed and say what is broken
        return "not installed"
    ours = isinstance(error, KernelError | WrongResult | NotImplementedError | ValueError)
    lines = [("" if ours else f"{type(error).__name__}: ") + _first_line(error)]
    if said is not None:
        lines.append(_first_line(said).split(" (Triggered internally")[0])
    return " ".join(lines)


def _first_line(said: object) -> str:
    return str(said).strip().split("\n")[0][:250]

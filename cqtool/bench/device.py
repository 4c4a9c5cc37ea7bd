"""What a measurement was taken on: device, driver, versions, sources."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cqtool import __version__
from cqtool.bench.memory import allocator_setting
from cqtool.errors import EnvironmentProblem

_PACKAGES = (
    "transformers",
    "flashinfer-python",
    "flash-attn",
    "flash-attn-3",
    "cuda-core",
    "triton",
)


def resolve_device(name: str) -> torch.device:
    """The device to measure on: ``auto`` (a GPU when there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        EnvironmentProblem: there is no such device.
    """
    try:
        found = torch.device(name) if name != "auto" else _best()
    except RuntimeError as error:
        raise EnvironmentProblem(f"There is no device '{name}'; use auto, cpu or cuda.") from error
    if found.type not in ("cpu", "cuda"):
        raise EnvironmentProblem(f"bench does not run on '{name}'; use auto, cpu or cuda.")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = found.index if found.index is not None else 0
        if index >= count:
            raise EnvironmentProblem(
                f"There is no device '{name}': torch sees {count or 'no'} GPUs. Use --device cpu, "
                "or run `cqtool doctor`."
            )
        found = torch.device("cuda", index)
        torch.cuda.set_device(found)
    return found


def _best() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, memory and driver, for the report."""
    if device.type == "cpu":
        return {"type": "cpu", "name": platform.processor() or platform.machine()}
    gpu = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "l2_bytes": gpu.L2_cache_size,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """The version of the NVIDIA driver, as the kernel module states it."""
    path = Path("/proc/driver/nvidia/version")
    if path.is_file():
        words = path.read_text(encoding="utf-8", errors="replace").split("\n")[0].split()
        found = [word for word in words if word[:1].isdigit() and "." in word]
        if found:
            return found[0]
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def _commit(folder: Path) -> str | None:
    """The commit that runs: what CI says it is, else git's, marked when files differ from it."""
    for name in ("GIT_COMMIT", "GITHUB_SHA"):
        if os.environ.get(name):
            return os.environ[name]
    head = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--", ".")
    return f"{head}-dirty" if head is not None and changed else head


def describe_software() -> dict[str, Any]:
    """Versions, and what identifies the kernels' sources."""
    from cqtool.kernels.variants import KERNELS, read_sources

    return {
        "cqtool": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(KERNELS),
        "kernels_sha256": hashlib.sha256(read_sources().encode()).hexdigest(),
        **{name: _version(name) for name in _PACKAGES},
        "allocator": allocator_setting(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

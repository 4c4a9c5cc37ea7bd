"""Find a variant's binary for a GPU and load it: shipped, else cached, else compiled, else not.

Everything is decided once per variant and GPU in a process, failures included.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cqtool.errors import KernelError, KernelsUnavailable
from cqtool.kernels import cubins
from cqtool.kernels.build import compile_variant, toolchain
from cqtool.kernels.module import Device, LoadedModule, driver, open_device
from cqtool.kernels.variants import (
    KERNELS,
    OLDEST,
    Variant,
    compatible_architectures,
    read_sources,
)

_Key = tuple[Variant, int, Path]

_results: dict[_Key, LoadedModule | KernelError] = {}
_locks: dict[_Key, threading.Lock] = {}
_guard = threading.Lock()
_warned = False


@dataclass(frozen=True)
class Cubin:
    """A binary that may run on a GPU, and where it was found."""

    arch: str
    data: bytes
    origin: str


def load(variant: Variant, device_index: int, root: Path = KERNELS) -> LoadedModule:
    """The kernels of a variant on a GPU; the first call finds or compiles them, and may take long.

    Do not let the first call happen inside the capture of a CUDA graph.

    Args:
        variant: what to load.
        device_index: torch's index of the GPU.
        root: the kernels folder.

    Raises:
        KernelsUnavailable: no binary can be had or used; the sentence says why, for each way.
    """
    key = (variant, device_index, root)
    found = _results.get(key)
    if found is None:
        with _guard:
            lock = _locks.setdefault(key, threading.Lock())
        with lock:
            found = _results.get(key)
            if found is None:
                found = _results[key] = _load(variant, device_index, root)
    if isinstance(found, LoadedModule):
        return found
    raise KernelsUnavailable(str(found)) from found


def forget() -> None:
    """Decide anew on the next call, for example after a folder was registered."""
    _results.clear()


def register_folder(folder: Path) -> None:
    """Use the compiled kernels that `folder` ships (see :func:`cubins.register_folder`)."""
    cubins.register_folder(folder)
    for key, result in list(_results.items()):
        if isinstance(result, KernelError):
            _results.pop(key, None)


def _load(variant: Variant, device_index: int, root: Path) -> LoadedModule | KernelError:
    reasons: list[str] = []
    try:
        device = open_device(device_index)
        for cubin in candidates(variant, device.capability, root, reasons):
            module = _try(variant, device, cubin, reasons)
            if module is not None:
                return module
    except KernelError as error:
        reasons.append(str(error))
    return KernelsUnavailable(" ".join(reasons))


def _try(variant: Variant, device: Device, cubin: Cubin, reasons: list[str]) -> LoadedModule | None:
    try:
        return LoadedModule(variant, device, cubin.arch, cubin.data, cubin.origin)
    except KernelError as error:
        reasons.append(f"{error} It came from {cubin.origin}.")
        return None


def candidates(
    variant: Variant, capability: tuple[int, int], root: Path, reasons: list[str]
) -> Iterator[Cubin]:
    """The binaries that may run a variant on a GPU, the preferred first.

    Each is looked for only when it is asked for, so the compiler runs when nothing else would do.

    Args:
        variant: what to look for.
        capability: the GPU's compute capability, such as (9, 0).
        root: the kernels folder.
        reasons: why each way had nothing to give is appended here.
    """
    if capability < OLDEST:
        reasons.append(_too_old(capability))
        return
    text = read_sources(root)
    for folder in cubins.registered_folders():
        try:
            arch, data = cubins.find_shipped(folder, variant, capability, text)
        except KernelError as error:
            reasons.append(str(error))
        else:
            yield Cubin(arch, data, f"the compiled kernels in {folder}")
    architectures = compatible_architectures(capability)
    refused = set()
    for arch in architectures:
        cached = cubins.read_cached(variant.digest(text, arch))
        if cached is not None:
            refused.add(cached)
            yield Cubin(arch, cached, f"the cache {cubins.cache_folder()}")
    try:
        yield _compile(variant, architectures, text, root, refused)
    except KernelError as error:
        reasons.append(str(error))


def _compile(
    variant: Variant, architectures: list[str], text: str, root: Path, refused: set[bytes]
) -> Cubin:
    tools = toolchain()
    # A GPU newer than this NVRTC runs what is compiled for an earlier one of its kind.
    known = [arch for arch in architectures if arch in tools.architectures]
    arch = known[0] if known else architectures[0]
    digest = variant.digest(text, arch)
    with cubins.compiling(digest):
        # Another process may have compiled it while this one waited for the lock.
        cached = cubins.read_cached(digest)
        if cached is not None and cached not in refused:
            return Cubin(arch, cached, f"the cache {cubins.cache_folder()}")
        cubin = compile_variant(variant, arch, root).cubin
        cubins.write_cached(digest, cubin)
    return Cubin(arch, cubin, f"NVRTC {tools.nvrtc}")


def _too_old(capability: tuple[int, int]) -> str:
    major, minor = capability
    return (
        f"The GPU has compute capability {major}.{minor}; the kernels need {OLDEST[0]}.{OLDEST[1]} "
        "or later."
    )


@dataclass(frozen=True)
class Outlook:
    """What kernels on a GPU would come from, as far as can be told without loading one.

    Attributes:
        source: the first way that is open.
        detail: what was found, for people; for ``reference`` why nothing else was.
    """

    source: Literal["shipped", "nvrtc", "cache", "reference"]
    detail: str


def outlook(capability: tuple[int, int]) -> Outlook:
    """Which way kernels would be found on a GPU of this compute capability."""
    if capability < OLDEST:
        return Outlook("reference", _too_old(capability))
    try:
        driver()
    except KernelError as error:
        return Outlook("reference", str(error))
    architectures = compatible_architectures(capability)
    for folder in cubins.registered_folders():
        try:
            shipped = {arch for _, arch in cubins.shipped_index(folder)}
        except KernelError:
            continue
        if best := next((arch for arch in architectures if arch in shipped), None):
            return Outlook("shipped", f"compiled for {best} in {folder}")
    count, _ = cubins.cache_content()
    try:
        tools = toolchain()
    except KernelError as error:
        if count:
            return Outlook("cache", f"only the {count} in the cache, where they fit. {error}")
        return Outlook("reference", str(error))
    if not set(architectures) & set(tools.architectures):
        return Outlook("reference", f"NVRTC {tools.nvrtc} does not know {architectures[0]}.")
    return Outlook("nvrtc", f"compiled by NVRTC {tools.nvrtc} on first use, then from the cache")


def warn_fallback(reason: str) -> None:
    """Say, once in a process, that a GPU runs the torch reference instead of the kernels."""
    global _warned
    with _guard:
        if _warned:
            return
        _warned = True
    warnings.warn(
        f"The CUDA kernels are not used, and the torch reference that replaces them is many times "
        f"slower. {reason}",
        RuntimeWarning,
        stacklevel=2,
    )

"""Compile a variant for one architecture with NVRTC; no GPU, driver or nvcc needed.

NVRTC comes with the package nvidia-cuda-nvrtc, which a CUDA build of torch depends on, and the
headers behind ``cuda_fp16.h`` with nvidia-cuda-runtime and nvidia-cuda-crt, or a CUDA Toolkit.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cqtool.errors import KernelError
from cqtool.kernels.variants import COMPILE_OPTIONS, KERNELS, Variant

_BINDING = "pip install 'cuda-core>=1.2' 'cuda-bindings>=13,<14'"
_NVRTC = "pip install 'nvidia-cuda-nvrtc>=13,<14'"
_HEADERS = "pip install 'nvidia-cuda-runtime>=13,<14' 'nvidia-cuda-crt>=13,<14'"

# cuda_fp16.h is of one package and what it includes of another: a folder may hold only one of them.
_NEEDED_HEADERS = ("cuda_fp16.h", "crt/host_defines.h")
_TOOLKIT = "/usr/local/cuda"
_LOG_LINES = 12

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_CUMULATIVE = re.compile(r"(\d+) bytes cumulative stack size")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class ResourceUsage:
    """What one kernel takes, as ptxas reports it.

    Attributes:
        registers: per thread.
        spill_stores: bytes of registers written to local memory.
        spill_loads: bytes of registers read back from local memory.
        stack: bytes of local memory per thread, those of called functions and spills included.
        shared: bytes of static shared memory per block; dynamic shared memory comes on top.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


@dataclass(frozen=True)
class CompiledKernel:
    """A cubin (an ELF file for one architecture), the compiler's log, and usage by entry."""

    cubin: bytes
    log: str
    usage: dict[str, ResourceUsage]


@dataclass(frozen=True)
class Toolchain:
    """What kernels are compiled with on this machine.

    Attributes:
        nvrtc: the version, such as ``13.0``.
        architectures: what it can compile for, such as ``sm_90``.
        headers: the include folders, in search order.
    """

    nvrtc: str
    architectures: tuple[str, ...]
    headers: tuple[Path, ...]


def toolchain() -> Toolchain:
    """Find the compiler and its headers.

    Raises:
        KernelError: a piece is missing; the sentence names it and what to install.
    """
    nvrtc = _nvrtc()
    try:
        major, minor = _values(nvrtc.nvrtcVersion())
        (numbers,) = _values(nvrtc.nvrtcGetSupportedArchs())
    except RuntimeError as error:  # what cuda-bindings raises when it finds no libnvrtc.so
        raise KernelError(
            f"The compiler NVRTC (libnvrtc.so) cannot be loaded on this machine; run: {_NVRTC}."
        ) from error
    architectures = tuple(f"sm_{number}" for number in numbers)
    return Toolchain(f"{major}.{minor}", architectures, _find_headers(major))


def _nvrtc() -> Any:
    try:
        importlib.import_module("cuda.core")
        return importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        missing = "cuda-bindings" if "bindings" in str(error) else "cuda-core"
        raise KernelError(
            f"The package {missing}, which compiles and loads CUDA kernels, cannot be imported "
            f"({error}); run: {_BINDING}."
        ) from error


def _values(result: tuple[Any, ...]) -> tuple[Any, ...]:
    code, *values = result
    if int(code) != 0:
        raise KernelError(f"NVRTC does not answer ({code}); reinstall it: {_NVRTC}.")
    return tuple(values)


def _find_headers(major: int) -> tuple[Path, ...]:
    """One folder that has every header, else all folders that have some of them."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    folders = [package / f"cu{major}" / "include" for package in packages]
    folders += [path for package in packages for path in sorted(package.glob("*/include"))]
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _TOOLKIT]
    folders += [Path(root) / "include" for root in roots if root]
    found = {folder: [(folder / name).is_file() for name in _NEEDED_HEADERS] for folder in folders}
    complete = [folder for folder, has in found.items() if all(has)]
    if complete:
        return (complete[0],)
    partial = tuple(folder for folder, has in found.items() if any(has))
    for index, name in enumerate(_NEEDED_HEADERS):
        if not any(found[folder][index] for folder in partial):
            raise KernelError(
                f"The CUDA header {name} is in no Python package and in no CUDA Toolkit under "
                f"CUDA_HOME or /usr/local/cuda; run: {_HEADERS}."
            )
    return partial


@cache
def _toolchain_once() -> Toolchain:
    return toolchain()


def compile_variant(variant: Variant, arch: str, root: Path = KERNELS) -> CompiledKernel:
    """Compile one variant. The same sources and compiler give the same bytes.

    The macro MAX_REGISTERS is the compiler's option of that name too: with ``__launch_bounds__``
    alone it leaves registers unused that would hide latency.

    Args:
        variant: what to compile.
        arch: the real architecture to compile for, such as ``sm_90``.
        root: the kernels folder. ``#include "..."`` searches the source's own folder, then this
            one, then CUDA's headers; the folder that the process runs in is not searched.

    Raises:
        KernelError: the source is missing or wrong (with the compiler's first error lines), the
            architecture is unknown to this NVRTC, or a piece of the compiler is missing.
    """
    tools = _toolchain_once()
    if arch not in tools.architectures:
        raise KernelError(
            f"NVRTC {tools.nvrtc} cannot compile for {arch}, only for "
            f"{', '.join(tools.architectures)}; for a newer GPU run: pip install -U "
            "nvidia-cuda-nvrtc."
        )
    source = root / variant.source
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise KernelError(f"The kernel source {source} is missing; reinstall cqtool.") from error
    core: Any = importlib.import_module("cuda.core")
    options = core.ProgramOptions(
        name=variant.source,
        arch=arch,
        include_path=[str(path) for path in (source.parent, root, *tools.headers)],
        define_macro=[(name, str(value)) for name, value in variant.defines] or None,
        ptxas_options=["-v"],
        max_register_count=dict(variant.defines).get("MAX_REGISTERS"),
        **_keywords(COMPILE_OPTIONS),
    )
    log = io.StringIO()
    try:
        program = core.Program(text, "c++", options)
        cubin = bytes(program.compile("cubin", logs=log).code)
    except Exception as error:
        # cuda-core's exception types are private; the text is the compiler's log.
        raise KernelError(
            f"NVRTC {tools.nvrtc} cannot compile {variant} for {arch}:\n{_first_errors(str(error))}"
        ) from error
    return CompiledKernel(cubin, log.getvalue(), parse_usage(log.getvalue()))


def _keywords(options: tuple[str, ...]) -> dict[str, Any]:
    """The compiler's options as cuda-core spells them."""
    spelled: dict[str, dict[str, Any]] = {
        "-std=c++17": {"std": "c++17"},
        "-default-device": {"device_as_default_execution_space": True},
        "--no-source-include": {"no_source_include": True},
    }
    return {key: value for option in options for key, value in spelled[option].items()}


def _first_errors(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if re.search(r"error\s*:", line)), 0)
    return "\n".join(lines[first : first + _LOG_LINES])


def parse_usage(log: str) -> dict[str, ResourceUsage]:
    """Resource usage by entry function, from the log of ``ptxas -v``."""
    usage: dict[str, ResourceUsage] = {}
    # Functions that were not inlined have lines of their own beside those of their kernel.
    for name, lines in zip(*[iter(_ENTRY.split(log)[1:])] * 2, strict=True):
        own = lines[lines.find(f"Function properties for {name}\n") :]
        stack = _STACK.search(own)
        used = _REGISTERS.search(own)
        if stack is None or used is None:
            continue
        line = own[used.start() : own.find("\n", used.start())]
        shared, cumulative = _SHARED.search(line), _CUMULATIVE.search(line)
        frame, stores, loads = map(int, stack.groups())
        usage[name] = ResourceUsage(
            int(used[1]),
            stores,
            loads,
            int(cumulative[1]) if cumulative else frame,
            int(shared[1]) if shared else 0,
        )
    return usage

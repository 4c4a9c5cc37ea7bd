"""The code in an artifact: cqtool's runtime in build/torch-cuda, and custom_generate beside it.

The runtime is a Python package of its own: the modules that `CQCache` needs, the CUDA sources, and
compiled kernels for many GPUs. Its folder has the shape that the `kernels` package loads, and
imports without it just as well. custom_generate is what transformers runs of a repository once the
user trusts it. Nothing of when or where they were made goes in: the same cqtool and compiler give
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cqtool
from cqtool.artifact.runtime_init import NEEDED
from cqtool.artifact.runtime_kernels import (
    NO_CHANNELS,
    CompiledKernels,
    compile_kernels,
    known_architectures,
)
from cqtool.artifact.runtime_modules import runtime_modules
from cqtool.errors import KernelError, RecipeError
from cqtool.kernels.variants import ARCHITECTURES, KERNELS
from cqtool.layout.codebook_file import Channels
from cqtool.layout.config import CQConfig
from cqtool.progress import SILENT, Progress

FORMAT_VERSION = 1
FILES_NAME = "files.json"
METADATA_NAME = "metadata.json"
LICENSE_ID = "Apache-2.0"
GENERATE_NAME = "custom_generate"
"""A folder of the artifact, of a name that transformers knows."""

_INIT = Path(__file__).with_name("runtime_init.py")
_GENERATE = Path(__file__).with_name("runtime_generate.py")
# Python would write bytecode of __init__.py here, and run what somebody else has put here, without
# a look at any digest. A file in the folder's place prevents both, and changes nothing else.
_NO_BYTECODE = "__pycache__"
_NO_BYTECODE_TEXT = "In the place of a folder, so that no bytecode is read or written here.\n"


@dataclass(frozen=True)
class RuntimeChoice:
    """What goes into an artifact beside its data.

    Attributes:
        package: whether the runtime is in it at all; without, an artifact holds no code.
        architectures: what kernels are compiled for, such as ``sm_90``; none for the sources alone.
        note: why no kernels are compiled, for people.
    """

    package: bool = True
    architectures: tuple[str, ...] = ARCHITECTURES
    note: str | None = None


DATA_ONLY = RuntimeChoice(package=False, architectures=())
"""An artifact without any code."""


def choose_runtime(kernels: bool | None, architectures: Sequence[str] | None) -> RuntimeChoice:
    """What an export is to carry, as far as this machine can make it.

    Args:
        kernels: False for none and no runtime; True for an error where they cannot be compiled;
            None for them where the compiler is there, and a note where it is not.
        architectures: what to compile for, None for :data:`ARCHITECTURES`.

    Raises:
        RecipeError: an architecture is not known.
        KernelError: kernels were asked for and there is no compiler.
    """
    if kernels is False:
        return DATA_ONLY
    try:
        known = known_architectures()
    except KernelError as error:
        if kernels or architectures is not None:
            raise
        return RuntimeChoice(architectures=(), note=str(error))
    if architectures is None:
        return RuntimeChoice(architectures=tuple(arch for arch in ARCHITECTURES if arch in known))
    for arch in architectures:
        if arch not in known:
            raise RecipeError(
                f"There are no kernels for {arch!r:.40}; give some of {', '.join(known)}."
            )
    return RuntimeChoice(architectures=tuple(architectures))


def build_runtime(
    config: CQConfig,
    architectures: Sequence[str],
    channels: Channels = NO_CHANNELS,
    progress: Progress = SILENT,
) -> tuple[dict[str, bytes], CompiledKernels]:
    """Make the package.

    Args:
        config: of the artifact; decides which kernels are compiled.
        architectures: what they are compiled for; none for a package with sources only.
        channels: of the artifact's groups, see :func:`artifact_variants`.
        progress: is told of each kernel.

    Returns:
        The package's files, by path in its folder with ``/``; and what it ships of kernels.

    Raises:
        KernelError: a kernel cannot be compiled.
    """
    compiled = CompiledKernels({})
    if architectures:
        compiled = compile_kernels(config, architectures, channels, progress)
    files = {path: text.encode() for path, text in runtime_modules().items()}
    for source in (path for path in KERNELS.rglob("*") if path.suffix in (".cu", ".cuh")):
        files[f"kernels/{source.relative_to(KERNELS).as_posix()}"] = source.read_bytes()
    files["__init__.py"] = _INIT.read_bytes()
    files[_NO_BYTECODE] = _NO_BYTECODE_TEXT.encode()
    files |= compiled.files
    files[METADATA_NAME] = _json(_metadata(files, compiled.architectures))
    files[FILES_NAME] = _json(
        {
            "format_version": FORMAT_VERSION,
            "cqtool": cqtool.__version__,
            "files": _digests(files),
        }
    )
    return dict(sorted(files.items())), compiled


def build_generate() -> dict[str, bytes]:
    """What transformers' ``generate(custom_generate=...)`` looks for in a repository.

    Returns:
        The files, by path in the artifact with ``/``: the code, and the packages that transformers
        asks for, with their versions, before it runs the code.
    """
    return {
        f"{GENERATE_NAME}/generate.py": _GENERATE.read_bytes(),
        f"{GENERATE_NAME}/requirements.txt": "".join(f"{need}\n" for need in NEEDED).encode(),
    }


def _metadata(files: Mapping[str, bytes], architectures: Sequence[str]) -> dict[str, Any]:
    """metadata.json as the `kernels` package reads it.

    The id becomes the module's name, so that artifacts with other contents do not meet in one
    process. Of Python dependencies, only a few that torch kernels use can be named there.
    """
    identity = hashlib.sha256(_json(_digests(files))).hexdigest()
    backend: dict[str, Any] = {"type": "cuda"}
    if architectures:
        backend["archs"] = [re.sub(r"sm_(\d+)(\d)", r"\1.\2", arch) for arch in architectures]
    return {
        "id": f"cqtool_{identity[:16]}",
        "name": "cqtool",
        "version": FORMAT_VERSION,
        "license": LICENSE_ID,
        "python-depends": [],
        "backend": backend,
    }


def _digests(files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(files.items())
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()

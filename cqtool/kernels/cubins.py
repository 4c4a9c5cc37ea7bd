"""Where compiled kernels are kept: shipped with a package, or in this user's cache.

Both are checked before use. A shipped cubin must come from the very sources, macros and options
that are asked for and have the recorded SHA-256; a cached one carries its own SHA-256 at its end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cqtool.errors import ArtifactError, EnvironmentProblem, KernelError
from cqtool.files import atomic_file, cache_root
from cqtool.kernels.build import compile_variant
from cqtool.kernels.variants import (
    ARCHITECTURES,
    KERNELS,
    Variant,
    compatible_architectures,
    read_sources,
)
from cqtool.strictjson import read_object

INDEX = "index.json"
_FORMAT = 1
_MAX_INDEX_BYTES = 16 << 20
_MAGIC = b"cqtool-cubin-sha256:"
_TRAILER = len(_MAGIC) + 64

_folders: list[Path] = []
_lock = threading.Lock()
_told_unwritable = False


def register_folder(folder: Path) -> None:
    """Look for shipped cubins in ``folder/cubin`` from now on, before any folder of before.

    Only for folders whose content the user trusts: what is in them runs on the GPU.
    """
    with _lock:
        _folders[:] = [folder, *(known for known in _folders if known != folder)]


def registered_folders() -> tuple[Path, ...]:
    """The folders of :func:`register_folder`, the newest first."""
    return tuple(_folders)


def ship(
    folder: Path,
    variants: Iterable[Variant],
    architectures: Iterable[str] = ARCHITECTURES,
    root: Path = KERNELS,
) -> list[Path]:
    """Compile `variants` into ``folder/cubin`` and write ``folder/index.json`` for them.

    Returns:
        The files written: the cubins, then the index.

    Raises:
        KernelError: a variant cannot be compiled.
        EnvironmentProblem: the folder cannot be written.
    """
    architectures = list(architectures)
    compiled = [
        (variant, arch, compile_variant(variant, arch, root).cubin)
        for variant in variants
        for arch in architectures
    ]
    written = []
    for name, data in shipped_files(compiled, read_sources(root)).items():
        written.append(folder / name)
        with atomic_file(written[-1]) as temporary:
            temporary.write_bytes(data)
    return written


def shipped_files(
    compiled: Iterable[tuple[Variant, str, bytes]], source_text: str, compiler: str | None = None
) -> dict[str, bytes]:
    """The files of a folder that ships cubins, by relative path: the cubins, then the index.

    Args:
        compiled: variants, the architectures they were compiled for, and their cubins.
        source_text: what they were compiled from, from :func:`read_sources`.
        compiler: what compiled them, for people.
    """
    files: dict[str, bytes] = {}
    entries: list[dict[str, Any]] = []
    for variant, arch, cubin in compiled:
        files[_shipped_name(variant, arch)] = cubin
        entries.append(
            {
                "name": variant.name,
                "arch": arch,
                "source": variant.source,
                "defines": dict(variant.defines),
                "source_digest": variant.digest(source_text, arch),
                "sha256": hashlib.sha256(cubin).hexdigest(),
            }
        )
    index = {"format": _FORMAT, "compiler": compiler, "cubins": entries}
    files[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    return files


def _shipped_name(variant: Variant, arch: str) -> str:
    return f"cubin/{variant.name}.{arch}.cubin"


def shipped_index(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The index of a folder's cubins, by variant name and architecture.

    Raises:
        KernelError: there is no index, or it is not one.
    """
    return {(entry["name"], entry["arch"]): entry for entry in _read_index(folder)["cubins"]}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = read_object(folder / INDEX, "", limit=_MAX_INDEX_BYTES)
        if index["format"] != _FORMAT:
            raise ValueError(f"format {index['format']!r:.40}")
        for entry in index["cubins"]:
            missing = {"name", "arch", "source", "defines", "source_digest", "sha256"} - {*entry}
            if missing:
                raise ValueError(f"no {min(missing)}")
            if not isinstance(entry["name"], str) or not isinstance(entry["arch"], str):
                raise ValueError("a name that is no text")
    except (ArtifactError, ValueError, KeyError, TypeError) as error:
        raise KernelError(
            f"The compiled kernels in {folder} have no readable {INDEX} ({error}); download or "
            "export the artifact again."
        ) from error
    return index


def find_shipped(
    folder: Path, variant: Variant, capability: tuple[int, int], source_text: str
) -> tuple[str, bytes]:
    """The architecture and bytes of the best cubin of a folder for a GPU.

    Raises:
        KernelError: the folder has none for this GPU, or it is damaged, or of other sources.
    """
    index = shipped_index(folder)
    architectures = compatible_architectures(capability)
    arch = next((arch for arch in architectures if (variant.name, arch) in index), None)
    if arch is None:
        raise KernelError(
            f"{folder} ships no {variant.name} for {architectures[0]}; artifacts ship kernels for "
            "float16 and bfloat16, contiguous storage, passes over 1 to 8 tokens and RoPE bases "
            "from 10000 on."
        )
    entry = index[variant.name, arch]
    if entry.get("source_digest") != variant.digest(source_text, arch):
        raise KernelError(f"{variant.name} for {arch} in {folder} was compiled from other sources.")
    path = folder / _shipped_name(variant, arch)
    try:
        cubin = path.read_bytes()
    except OSError as error:
        raise KernelError(f"{path} cannot be read ({error.strerror}).") from error
    if hashlib.sha256(cubin).hexdigest() != entry.get("sha256"):
        raise KernelError(f"{path} is damaged; download or export the artifact again.")
    return arch, cubin


def cache_folder() -> Path:
    """Where kernels compiled on this machine are kept: ``kernels`` in cqtool's cache folder."""
    return cache_root() / "kernels"


def cache_content() -> tuple[int, int]:
    """How many kernels the cache keeps, and their bytes."""
    sizes = []
    for path in cache_folder().glob("*.cubin"):
        with suppress(OSError):
            sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)


def read_cached(digest: str) -> bytes | None:
    """The cubin kept under a digest, or None when there is none or it is damaged."""
    try:
        data = (cache_folder() / f"{digest}.cubin").read_bytes()
    except OSError:
        return None
    cubin, trailer = data[:-_TRAILER], data[-_TRAILER:]
    return cubin if trailer == _seal(cubin) else None


def write_cached(digest: str, cubin: bytes) -> None:
    """Keep a cubin. Where the cache cannot be written this warns, once, and does nothing."""
    global _told_unwritable
    path = cache_folder() / f"{digest}.cubin"
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(cubin + _seal(cubin))
    except (OSError, EnvironmentProblem) as error:
        if not _told_unwritable:
            _told_unwritable = True
            reason = error.__cause__ or error
            warnings.warn(
                f"Compiled kernels cannot be kept in {path.parent} ({reason}), so that every "
                "process compiles them again; set CQTOOL_CACHE to a folder you may write to.",
                RuntimeWarning,
                stacklevel=2,
            )


def _seal(cubin: bytes) -> bytes:
    # Behind the ELF file, where every tool ignores it: one file, so never half of a pair.
    return _MAGIC + hashlib.sha256(cubin).hexdigest().encode()


@contextmanager
def compiling(digest: str) -> Iterator[None]:
    """Hold the lock of a digest, so that of several processes only one compiles it.

    Without a lock, in a folder that cannot be written or on a file system that has none, the work
    may be done twice; the result is right all the same.
    """
    path = cache_folder() / f"{digest}.lock"
    file = None
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            file.close()  # which also lets go of the lock

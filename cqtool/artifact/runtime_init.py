"""The runtime of a cqtool artifact: `CQCache` without an installed cqtool.

`cqtool export` writes this file as ``build/torch-cuda/__init__.py``. Importing it compares every
file of the folder with its digest, before anything else of the folder is used, and the modules then
run from the very bytes that were compared; Python's bytecode cache is left out of it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

NAMESPACE = re.sub(r"\W", "_", f"cqtool_{__name__.removeprefix('cqtool_')}")
"""Replaces ``cqtool`` in names that are global to a process, such as those of torch ops."""

# The versions are those of cqtool's own dependencies; a test compares them.
NEEDED = ("torch>=2.11", "transformers>=5.16", "safetensors>=0.6")
_FILES, _MANIFEST = "files.json", "manifest.json"
_ROOT = Path(__file__).parent
_REMEDY = "Download the artifact again, from a source that you trust."

_sources: dict[str, bytes] = {}


class RuntimeDamaged(ImportError):
    """A file of the runtime is missing, changed or not listed; nothing of it was imported."""


def _refuse(sentence: str) -> RuntimeDamaged:
    return RuntimeDamaged(f"{sentence} {_REMEDY}")


def _listed() -> tuple[Path, dict[str, tuple[Any, Any] | None]]:
    """The list of digests that counts, and what it says of each file of this folder.

    That is the artifact's manifest where the folder lies in an artifact. A copy of the folder alone
    has only the list that lies in it.
    """
    manifest = _ROOT.parent.parent / _MANIFEST
    prefix, own = "", _ROOT / _FILES
    if _ROOT.parent.name == "build" and manifest.is_file():
        prefix, own = f"build/{_ROOT.name}/", manifest
    try:
        value = json.loads(own.read_bytes())
        if value["format_version"] != 1:
            raise ValueError(f"format version {value['format_version']}")
        files: dict[str, tuple[Any, Any] | None] = {
            path.removeprefix(prefix): (record["size"], record["sha256"])
            for path, record in value["files"].items()
            if path.startswith(prefix)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refuse(f"{own} is no list of digests ({error}).") from error
    if not prefix:
        files[_FILES] = None
    return own, files


def _present() -> set[str]:
    """Every file of this folder, relative to it and written with ``/``."""
    found = set()
    for folder, folders, names in os.walk(_ROOT):
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        found |= {(Path(folder) / name).relative_to(_ROOT).as_posix() for name in [*names, *linked]}
    return found


def _verify() -> None:
    """Compare all files with their digests, and keep the modules' sources."""
    own, listed = _listed()
    present = _present()
    if missing := sorted(listed.keys() - present):
        raise _refuse(f"{_ROOT} lacks {missing[0]}, which {own} lists.")
    if extra := sorted(present - listed.keys()):
        raise _refuse(f"{_ROOT / extra[0]} is not listed in {own}.")
    for name, record in sorted(listed.items()):
        try:
            data = (_ROOT / name).read_bytes()
        except OSError as error:
            raise _refuse(f"{_ROOT / name} cannot be read ({error.strerror}).") from error
        if record is not None and record != (len(data), hashlib.sha256(data).hexdigest()):
            raise _refuse(f"{_ROOT / name} does not have the digest that {own} lists.")
        if name.endswith(".py"):
            _sources[name] = data


class _Loader(SourceFileLoader):
    """Runs a module from the bytes that were compared."""

    def get_data(self, path: str) -> bytes:
        return _sources[Path(path).relative_to(_ROOT).as_posix()]

    def path_stats(self, path: str) -> dict[str, Any]:
        # Without them, Python neither reads nor writes bytecode.
        raise OSError("the bytecode cache is not used")


class _Finder:
    """Finds this package's modules, among what was compared only."""

    package = __name__

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(cls.package + "."):
            return None
        stem = fullname.removeprefix(cls.package + ".").replace(".", "/")
        for name, is_package in ((f"{stem}/__init__.py", True), (f"{stem}.py", False)):
            if name in _sources:
                file = _ROOT / name
                return importlib.util.spec_from_file_location(
                    fullname,
                    file,
                    loader=_Loader(fullname, str(file)),
                    submodule_search_locations=[str(file.parent)] if is_package else None,
                )
        raise ModuleNotFoundError(f"{fullname} is no part of this runtime", name=fullname)


def _install() -> None:
    """Put the finder before Python's own, in the place of one of an earlier attempt."""
    others = [f for f in sys.meta_path if getattr(f, "package", None) != __name__]
    sys.meta_path[:] = [_Finder, *others]


def _require() -> None:
    """Say which package is missing, all of them at once."""
    names = {need: re.split(r"\W", need)[0] for need in NEEDED}
    missing = [need for need, name in names.items() if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join(f"'{need}'" for need in missing)
        raise ImportError(
            f"This artifact's runtime needs {', '.join(names[need] for need in missing)}; run: "
            f"pip install {wanted}"
        )


def _start() -> Any:
    """Verify, import, and use the compiled kernels of this folder; the class `CQCache`."""
    _verify()
    _require()
    _install()
    load = importlib.import_module(".kernels.load", __name__)
    cache = importlib.import_module(".cache", __name__)
    if (_ROOT / "index.json").is_file():
        # Whoever imports this module runs this folder's code already: its kernels are no more.
        load.register_folder(_ROOT)
    return cache.CQCache


# In cqtool itself, the file is only read.
if not __name__.startswith("cqtool.artifact."):
    CQCache = _start()
    __version__: str = json.loads((_ROOT / _FILES).read_bytes())["cqtool"]
    __all__ = ["CQCache"]

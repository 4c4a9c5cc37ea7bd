"""The compiled variants of the kernels: one source file and the integers it is specialized with.

A variant's name tells it from the others; its digest also covers the sources, the architecture and
the compiler's options, so a binary with the right digest is the binary of exactly this code.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

KERNELS = Path(__file__).parent
"""The folder that the `source` of a variant is relative to."""

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""What an artifact ships: Ampere, Ada, Hopper and Blackwell, data centre and desktop."""

COMPILE_OPTIONS = ("-std=c++17", "-default-device", "--no-source-include")
"""The options that every variant is compiled with; they are a part of its digest."""

OLDEST = (8, 0)
"""The least compute capability the kernels are written for."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Variant:
    """One source, specialized by integer macros.

    Attributes:
        source: a ``.cu`` file relative to the kernels folder, with forward slashes.
        defines: macro names and values. Their order makes no difference; they are kept sorted.
    """

    source: str
    defines: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        """Sort the macros, and refuse what could not be a macro."""
        names = [name for name, _ in self.defines]
        path = PurePosixPath(self.source)
        if path.suffix != ".cu" or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{self.source!r} is not a .cu file inside the kernels folder")
        if len(set(names)) < len(names) or not all(map(_IDENTIFIER.fullmatch, names)):
            raise ValueError(f"not a set of macro names: {names}")
        object.__setattr__(self, "defines", tuple(sorted((n, int(v)) for n, v in self.defines)))

    @property
    def name(self) -> str:
        """A file-safe name, the same on every machine: ``decode-1f0c...`` (12 hex digits)."""
        text = json.dumps([self.source, self.defines])
        return f"{PurePosixPath(self.source).stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def __str__(self) -> str:
        """The source with its macros, for messages."""
        return " ".join([self.source, *(f"-D{name}={value}" for name, value in self.defines)])

    def digest(self, source_text: str, arch: str) -> str:
        """What identifies the compiled binary, as a SHA-256 in hex.

        Args:
            source_text: every source of the kernels folder, from :func:`read_sources`.
            arch: such as ``sm_90``.
        """
        value = [self.source, self.defines, arch, COMPILE_OPTIONS, source_text]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_sources(root: Path = KERNELS) -> str:
    """All ``.cu`` and ``.cuh`` files below `root`, by sorted relative path, as one text.

    A source may include any other, so all of them count in a digest: a binary too many is compiled
    again after an edit, and none is ever stale.
    """
    paths = [path for path in root.rglob("*") if path.suffix in (".cu", ".cuh")]
    named = {path.relative_to(root).as_posix(): path for path in paths}
    return json.dumps({name: named[name].read_text(encoding="utf-8") for name in sorted(named)})


def compatible_architectures(capability: tuple[int, int]) -> list[str]:
    """Architectures whose binaries run on a GPU, the best first.

    A binary runs on its own compute capability and on later minor versions of the same major one.
    For example (8, 9) gives ``sm_89``, ``sm_88``, ... ``sm_80``.
    """
    major, minor = capability
    return [f"sm_{major}{lower}" for lower in range(minor, -1, -1)]

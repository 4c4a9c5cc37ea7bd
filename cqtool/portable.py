"""Relative paths that name one file, and the same file, on every system.

An artifact is made on one machine and opened on others, by programs that join its paths to a folder
of theirs. A path that leads elsewhere on any of them is refused on all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_FORBIDDEN = re.compile(r"[\\:\x00-\x1f\x7f\ud800-\udfff]")
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.ASCII | re.IGNORECASE)


def is_portable(path: str) -> bool:
    """Whether `path` names one file below a folder, with ``/`` between its parts.

    No part is empty, ``.`` or ``..``, ends with a dot or space (which Windows drops), or is what
    Windows takes for a device, such as ``nul`` or ``com1.txt``. There is no backslash, colon,
    control character or half of a surrogate pair.
    """
    return _FORBIDDEN.search(path) is None and all(
        part and not part.endswith((".", " ")) and _DEVICE.fullmatch(part) is None
        for part in path.split("/")
    )


def alike(paths: Iterable[str]) -> tuple[str, str] | None:
    """The first two paths that are one where upper and lower case are, None without any."""
    seen: dict[str, str] = {}
    for path in paths:
        if (other := seen.setdefault(path.casefold(), path)) != path:
            return other, path
    return None

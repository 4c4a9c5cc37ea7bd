"""manifest.json: the size and SHA-256 of every file of an artifact, and the check against it.

The check fails closed: a file that is missing, changed, or not listed is an error, and so is
anything in the manifest that is not understood. What it says of where the files come from
(``provenance``) is for people, and nothing is decided by it. Only the standard library is needed,
because the runtime runs it before it opens anything else.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cqtool.errors import ArtifactError
from cqtool.files import sha256_file, write_json
from cqtool.portable import alike, is_portable
from cqtool.strictjson import parse_object, read_object

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 4 << 20

_REMEDY = "Download or export the artifact again."
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SIZE = 2**53 - 1
_PROVENANCE: dict[str, type | tuple[type, ...]] = {
    "tool_version": str,
    "tool_commit": (str, type(None)),
    "versions": dict,
    "recipe_digest": str,
    "data_digest": str,
    "base_model": str,
    "base_revision": (str, type(None)),
    "base_fingerprint": str,
}
"""Fields of ``provenance``, and the types that they may have."""
EVALUATION_NAME = ".eval_results/cqtool.yaml"
"""What an artifact itself says to the Hub of its scores on benchmarks."""
_HUB_METADATA = (".gitattributes", ".cache/huggingface", ".git")
"""What the Hub and its clients add to every repository; no part of an artifact."""
_EVALUATIONS = ".eval_results/"
"""Where anybody may propose scores on the Hub: a release is not damaged by their being taken."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file: `size` in bytes and `sha256` in hex."""

    size: int
    sha256: str


def build_manifest(folder: Path, provenance: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """List every file below `folder` (``manifest.json`` itself excepted) with size and digest.

    Args:
        folder: the artifact.
        provenance: what it was made of, see :func:`cqtool.artifact.provenance.provenance`.

    Raises:
        ArtifactError: something in it is neither a file nor a folder, leads out of `folder`, or has
            a name that not every system can hold.
    """
    files = {}
    for name, path in sorted(artifact_files(folder).items()):
        if not _is_plain_path(name):
            raise ArtifactError(f"{folder} holds {name!r}; rename it without special characters.")
        with _explain_unreadable(path):
            files[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    if (pair := alike([MANIFEST_NAME, *files])) is not None:
        raise ArtifactError(
            f"{folder} holds {_some([*pair])}, which differ in upper and lower case only; rename "
            "one of them."
        )
    value: dict[str, Any] = {"format_version": FORMAT_VERSION}
    if provenance is not None:
        value["provenance"] = dict(provenance)
    return value | {"files": files}


def write_manifest(folder: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write ``manifest.json`` for what is in `folder` now, see :func:`build_manifest`."""
    write_json(folder / MANIFEST_NAME, build_manifest(folder, provenance))


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The manifest's entries by path, relative to `folder` and written with ``/``.

    Raises:
        ArtifactError: there is none, or it is not a manifest of a version known here.
    """
    path = folder / MANIFEST_NAME
    return _entries(_read(folder), str(path))


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What the manifest says the artifact was made of, None where it says nothing.

    Raises:
        ArtifactError: as :func:`read_manifest`.
    """
    manifest = _read(folder)
    _entries(manifest, str(folder / MANIFEST_NAME))
    return manifest.get("provenance")


def parse_manifest(text: bytes, name: str) -> dict[str, FileRecord]:
    """Like :func:`read_manifest`, for the bytes of a manifest that errors call `name`.

    Raises:
        ArtifactError: it is not a manifest of a version known here.
    """
    return _entries(parse_object(text, name, _REMEDY), name)


def verify_folder(folder: Path) -> None:
    """Compare every file of `folder` with its manifest.

    Raises:
        ArtifactError: a file is missing, changed or not listed, a path or link leads out of
            `folder`, or the manifest itself is damaged or of an unknown version.
    """
    listed = read_manifest(folder)
    present = artifact_files(folder)
    if missing := sorted(listed.keys() - present.keys()):
        raise ArtifactError(f"{folder} lacks {_some(missing)}, which its manifest lists. {_REMEDY}")
    if extra := sorted(present.keys() - listed.keys()):
        raise ArtifactError(
            f"{folder} holds {_some(extra)}, which its manifest does not list; remove it from the "
            "folder, or download or export the artifact again."
        )
    # Sizes first: a truncated file is found without reading gigabytes.
    for name, record in listed.items():
        with _explain_unreadable(folder / name):
            size = present[name].stat().st_size
        if size != record.size:
            raise ArtifactError(
                f"{folder / name} has {size} bytes instead of {record.size}: it is damaged or was "
                f"changed. {_REMEDY}"
            )
    for name, record in listed.items():
        with _explain_unreadable(folder / name):
            digest = sha256_file(present[name])
        if digest != record.sha256:
            raise ArtifactError(
                f"{folder / name} does not have the digest its manifest lists: it is damaged or "
                f"was changed. {_REMEDY}"
            )


def artifact_files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by relative path, without the manifest and Hub client metadata.

    Raises:
        ArtifactError: `folder` is none, or holds a link that leads out of it, a link to a folder,
            or something that is neither file nor folder.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; give the folder of a cqtool artifact.")
    return {name: path for name, path in _walk(folder, PurePosixPath()) if name != MANIFEST_NAME}


def is_hub_metadata(name: str) -> bool:
    """Whether the relative path `name` belongs to the Hub or its client, not to the artifact."""
    if name.startswith(_EVALUATIONS):
        return name != EVALUATION_NAME
    return any(name == own or name.startswith(own + "/") for own in _HUB_METADATA)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {MANIFEST_NAME}, so it is not a complete cqtool artifact; "
            "make one with `cqtool export`, or download it again."
        )
    _resolve_inside(folder, path, MANIFEST_NAME)
    return read_object(path, _REMEDY, limit=MAX_MANIFEST_BYTES)


def _walk(folder: Path, below: PurePosixPath) -> Iterator[tuple[str, Path]]:
    with _explain_unreadable(folder / below):
        entries = sorted(os.scandir(folder / below), key=lambda entry: entry.name)
    for entry in entries:
        name = str(below / entry.name)
        if is_hub_metadata(name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder, below / entry.name)
            continue
        path = Path(entry.path)
        target = _resolve_inside(folder, path, name)
        if not stat.S_ISREG(target.stat().st_mode):
            raise ArtifactError(
                f"{path} is not a regular file; remove it, or export the artifact again."
            )
        yield name, path


def _resolve_inside(folder: Path, path: Path, name: str) -> Path:
    """Follow `path`, refusing to leave `folder`.

    The Hub client's cache keeps a snapshot as links into ``blobs/``, beside ``snapshots/`` in the
    same repository cache or shared by all of them; those two are its own and allowed.
    """
    if not path.is_symlink():
        return path
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"{path} is a link that leads nowhere. {_REMEDY}") from error
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed += [parent / "blobs" for parent in home.parents[1:3]]
    if not any(target.is_relative_to(root) for root in allowed):
        raise ArtifactError(
            f"{path} is a link that leads out of the artifact; replace it by the file itself, or "
            "download or export the artifact again."
        )
    return target


@contextmanager
def _explain_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"Cannot read {path} ({error.strerror}); make it readable and try again."
        ) from error


def _entries(manifest: dict[str, Any], name: str) -> dict[str, FileRecord]:
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ArtifactError(
            f"{name} has format version {version!r:.40} and this cqtool reads {FORMAT_VERSION}; "
            "upgrade cqtool (pip install -U cqtool), or use an artifact of this version."
        )
    if unknown := sorted(manifest.keys() - {"format_version", "files", "provenance"}):
        raise ArtifactError(f"{name} has unknown fields: {_some(unknown)}. {_REMEDY}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ArtifactError(f"{name} lists no files. {_REMEDY}")
    if "provenance" in manifest:
        _check_provenance(manifest["provenance"], name)
    records = {path: _record(path, entry, name) for path, entry in files.items()}
    if (pair := alike([MANIFEST_NAME, *files])) is not None:
        raise ArtifactError(
            f"{name} lists {_some([*pair])}, which differ in upper and lower case only; do not use "
            "this artifact, and get it from a source you trust."
        )
    return records


def _check_provenance(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise ArtifactError(f"{name}: 'provenance' must be an object. {_REMEDY}")
    # Fields that are not known here are let pass: a later cqtool may have more to tell.
    for field, types in _PROVENANCE.items():
        if field not in value or not isinstance(value[field], types):
            raise ArtifactError(f"{name} has no proper '{field}' in its provenance. {_REMEDY}")
    if not all(isinstance(version, str) for version in value["versions"].values()):
        raise ArtifactError(f"{name} has versions in its provenance that are no texts. {_REMEDY}")


def _record(path: str, entry: Any, name: str) -> FileRecord:
    if not _is_plain_path(path):
        raise ArtifactError(
            f"{name} lists {path!r:.120}, which is not a path inside the artifact; do not use "
            "this artifact, and get it from a source you trust."
        )
    size, sha256 = (
        (entry["size"], entry["sha256"])
        if isinstance(entry, dict) and entry.keys() == {"size", "sha256"}
        else (None, None)
    )
    if type(size) is not int or not 0 <= size <= _MAX_SIZE:
        raise ArtifactError(f"{name} has no proper size for {path:.120}. {_REMEDY}")
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        raise ArtifactError(f"{name} has no proper SHA-256 for {path:.120}. {_REMEDY}")
    return FileRecord(size, sha256)


def _is_plain_path(path: str) -> bool:
    return is_portable(path) and path != MANIFEST_NAME and not is_hub_metadata(path)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name)[1:-1][:80] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

"""What a release was made of, in the few lines that its manifest carries.

Whoever has the manifest alone, 1 KiB of a release, can tell which code made it from which recipe,
text and base model. All but the exporting cqtool comes from the files that the manifest lists, so
that the same files and the same cqtool give the same bytes.
"""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import cqtool
from cqtool.errors import ArtifactError
from cqtool.files import digest_json
from cqtool.layout.config import CALIBRATION_NAME, MAX_JSON_BYTES, REMEDY, read_config
from cqtool.layout.fields import Fields
from cqtool.strictjson import parse_object, read_object

_PACKAGE = Path(cqtool.__file__).parent
_GIT_SECONDS = 20


def provenance(folder: Path) -> dict[str, Any]:
    """What the files of `folder` say they were made of, and what exports them.

    Args:
        folder: holds ``cq_config.json`` and ``calibration.json`` as they are published.

    Returns:
        JSON-ready: ``tool_version`` and ``tool_commit`` of the exporting code; ``versions`` of what
        calibrated; ``recipe_digest`` and ``base_fingerprint``, SHA-256 over the canonical JSON of
        these parts of the configuration; ``data_digest`` over the token ids; ``base_model`` and
        ``base_revision``.

    Raises:
        ArtifactError: one of the files is damaged.
    """
    config = read_config(folder)
    return {
        "tool_version": cqtool.__version__,
        "tool_commit": cqtool_commit(),
        "versions": _versions(folder),
        "recipe_digest": digest_json(config.recipe),
        "data_digest": config.calibration.digest,
        "base_model": config.base_model.id,
        "base_revision": config.base_model.revision,
        "base_fingerprint": digest_json(config.base_model.fingerprint),
    }


def cqtool_commit(package: Path = _PACKAGE) -> str | None:
    """The git commit of the code in `package`, None where it is not known for certain.

    It is known of an installation from a git address, which pip records (PEP 610), and of a clone
    in which nothing of the package was changed.
    """
    if package == _PACKAGE and (commit := _installed_commit()) is not None:
        return commit
    top, _, commit = (_git(package, "rev-parse", "--show-toplevel", "HEAD") or "").partition("\n")
    # A virtual environment inside the clone of some other project is not that project.
    if not top or Path(top).resolve() != package.resolve().parent:
        return None
    return commit if _git(package, "status", "--porcelain", "--", ".") == "" else None


def _versions(folder: Path) -> dict[str, str]:
    path = folder / CALIBRATION_NAME
    record = Fields(read_object(path, REMEDY, limit=MAX_JSON_BYTES), str(path), REMEDY)
    # Nothing needs this file, and it may be shorter than cqtool writes it.
    if "versions" not in record.values:
        return {}
    versions = record.child("versions")
    return {package: versions.string(package) for package in versions.values}


def _installed_commit() -> str | None:
    try:
        text = distribution("cqtool").read_text("direct_url.json")
        origin = parse_object((text or "{}").encode(), "direct_url.json", "Install cqtool again.")
    except (PackageNotFoundError, ArtifactError):
        return None
    vcs = origin.get("vcs_info")
    commit = vcs.get("commit_id") if isinstance(vcs, dict) else None
    return commit if isinstance(commit, str) else None


def _git(package: Path, *command: str) -> str | None:
    """What git says of the clone that `package` lies in, None where it says nothing."""
    # A hook of some other repository sets GIT_DIR and the like.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(package), *command],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

"""An artifact on the Hub, fetched into the Hub client's cache and verified there.

What the manifest lists is fetched, and nothing else that somebody put into the repository. The
client's cache is used as it is: what lies there is not fetched again, offline mode and pinned
revisions work as for models. The client compares no digests, so a file that arrived damaged, or was
damaged since, would stay there for ever; here it is fetched once more.
"""

from __future__ import annotations

import errno
import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cqtool.errors import ArtifactError, CqtoolError, EnvironmentProblem, HubError
from cqtool.files import sha256_file
from cqtool.manifest import MANIFEST_NAME, FileRecord, read_manifest, verify_folder
from cqtool.retry import DamagedDownload, Retry
from cqtool.xet import own_cache_explained, xet_failure


def pull(repo: str, revision: str | None) -> Path:
    """The verified folder of the artifact in the repository `repo`.

    Requests that meet a passing trouble are repeated, see :class:`cqtool.retry.Retry`. Where the
    Hub cannot be reached, the client takes what its cache holds of `revision`, which is verified as
    well.

    Args:
        repo: ``ORG/NAME``.
        revision: branch, tag or commit; the main branch by default. A commit that is in the cache
            is used without asking the Hub.

    Raises:
        ArtifactError: it is no artifact, or damaged on the Hub.
        HubError: it cannot be fetched, and is not in the cache.
        EnvironmentProblem: the cache cannot be written.
    """
    with _explained(repo, revision):
        # The manifest alone first: a repository that is something else, a base model for example,
        # is not fetched. Its folder is named after the commit, which the rest is taken from.
        folder = _snapshot(repo, revision)
        if not (folder / MANIFEST_NAME).is_file():
            raise ArtifactError(
                f"{repo} has no {MANIFEST_NAME}, so it is no cqtool artifact; check the name and "
                "the revision."
            )
        listed = _read_again_if_damaged(repo, folder)
        if not _offline():
            _snapshot(repo, folder.name, listed)
        elif lacking := [name for name in listed if not (folder / name).is_file()]:
            raise _not_cached(repo, revision, lacking)
        try:
            verify_folder(folder)
        except ArtifactError:
            if _offline():
                raise
            _fetch_damaged(repo, folder)
        else:
            return folder
    try:
        verify_folder(folder)
    except ArtifactError as error:
        raise ArtifactError(
            f"{error} It was fetched twice here: if it stays so, check the proxy, or ask the "
            f"author of {repo} to push it again."
        ) from error
    return folder


def _snapshot(repo: str, revision: str | None, names: Iterable[str] = ()) -> Path:
    """Have the client fetch the manifest and the files `names`; the folder that they lie in."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class NoBar(tqdm):
        """One small file is nothing to wait for."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            settings = options | {"disable": True}
            super().__init__(*arguments, **settings)  # type: ignore[no-untyped-call]

    # Patterns to the client, of which a name may hold the signs.
    wanted = [MANIFEST_NAME, *map(glob.escape, names)]
    options: dict[str, Any] = {"revision": revision, "allow_patterns": wanted}
    if len(wanted) == 1:
        options["tqdm_class"] = NoBar

    def fetch() -> Path:
        with _sizes_compared(), own_cache_explained():
            return Path(snapshot_download(repo, **options))

    return Retry().call(fetch)


def _read_again_if_damaged(repo: str, folder: Path) -> dict[str, FileRecord]:
    """The manifest, fetched once more where the one in the cache cannot be read."""
    try:
        return read_manifest(folder)
    except ArtifactError:
        if _offline():
            raise
        _fetch(repo, folder, MANIFEST_NAME)
        return read_manifest(folder)


def _fetch_damaged(repo: str, folder: Path) -> None:
    """Fetch again what differs from the manifest, and the manifest itself before."""
    before = read_manifest(folder)
    _fetch(repo, folder, MANIFEST_NAME)
    listed = read_manifest(folder)
    if listed.keys() - before.keys():
        _snapshot(repo, folder.name, listed)
    for name, record in listed.items():
        path = folder / name
        # What the Hub lacks was not fetched either, and cannot be.
        if path.is_file() and (
            path.stat().st_size != record.size or sha256_file(path) != record.sha256
        ):
            _fetch(repo, folder, name)


def _fetch(repo: str, folder: Path, name: str) -> None:
    """Replace one file of a snapshot by what the Hub has at that commit."""
    from huggingface_hub import hf_hub_download

    def action() -> None:
        with _sizes_compared(), own_cache_explained():
            hf_hub_download(repo, name, revision=folder.name, force_download=True)

    Retry().call(action)


@contextmanager
def _sizes_compared() -> Iterator[None]:
    """The client's own check of a file's size, which only its text tells apart."""
    try:
        yield
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        raise DamagedDownload(
            "A file does not arrive as the Hub lists it; check the network and the proxy, then "
            "try again."
        ) from None


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub client raises into one sentence, without its own text or a token."""
    try:
        yield
    except CqtoolError:
        raise
    except Exception as error:
        found = _explain(error, repo, revision)
        if found is None:
            raise
        raise found from None


def _explain(error: BaseException, repo: str, revision: str | None) -> CqtoolError | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if isinstance(error, HFValidationError):
        return ArtifactError(
            f"{repo} is neither a folder nor a repository id; give a folder that cqtool wrote, or "
            "an id such as org/name."
        )
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if _offline() and kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return _not_cached(repo, revision)
    xet = xet_failure(error)
    if xet is not None and xet.number is not None:
        return _not_written(OSError(xet.number, os.strerror(xet.number)))
    if xet is not None:
        return HubError(xet.sentence(constants.ENDPOINT, "try again"))
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        return HubError(_explain_answer(error, repo, revision))
    if isinstance(error, (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)) and (
        not isinstance(error, LocalEntryNotFoundError)
    ):
        return HubError(
            f"There is no folder {repo} here, and the Hub at {constants.ENDPOINT} does not answer "
            f"({type(error).__name__}); check the network, the proxy and HF_ENDPOINT, then try "
            "again."
        )
    if isinstance(error, json.JSONDecodeError) or "FileMetadataError" in kinds:
        return HubError(f"What answers at {constants.ENDPOINT} is not the Hub; check HF_ENDPOINT.")
    if "OIDCError" in kinds:
        return HubError(
            "HF_OIDC_RESOURCE is set, but this job has no OIDC token to exchange; grant it the "
            "permission `id-token: write`, or unset HF_OIDC_RESOURCE."
        )
    if error.__cause__ is not None:
        return _explain(error.__cause__, repo, revision)
    if isinstance(error, OSError) and not isinstance(error, LocalEntryNotFoundError):
        return _not_written(error)
    return None


def _not_written(error: OSError) -> EnvironmentProblem:
    from huggingface_hub import constants

    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return EnvironmentProblem(
        f"The Hub client cannot write to its cache {constants.HF_HUB_CACHE} "
        f"({error.strerror or type(error).__name__}); "
        f"{'free some space' if full else 'make it writable'}, or set HF_HUB_CACHE to another "
        "folder."
    )


def _explain_answer(error: BaseException, repo: str, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return f"{_named(repo, revision)} does not exist on the Hub; check the revision."
    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is gated; ask for access on its page, then log in with `hf auth login` or set "
            "HF_TOKEN."
        )
    if status == 401 and error.response.request.headers.get("authorization"):
        return (
            "The Hub does not accept this token (401); log in with `hf auth login`, or set "
            "HF_TOKEN to one that may read (https://huggingface.co/settings/tokens)."
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return (
            f"There is no folder {repo} here, and the Hub does not show a repository of that name "
            f"({status}); check the name, and log in with `hf auth login` or set HF_TOKEN if it is "
            "private."
        )
    if status == 429:
        return "The Hub asks to slow down (429); wait a few minutes, then try again."
    if status >= 500:
        return f"The Hub has a problem of its own ({status}); wait a few minutes, then try again."
    return f"The Hub refused the request for {_named(repo, revision)} ({status}); check the name."


def _named(repo: str, revision: str | None) -> str:
    return repo if revision is None else f"{repo} at {revision}"


def _not_cached(repo: str, revision: str | None, lacking: Sequence[str] = ()) -> HubError:
    more = f" and {len(lacking) - 2} more" if len(lacking) > 2 else ""
    whole = f" as a whole (it lacks {', '.join(lacking[:2])}{more})" if lacking else ""
    return HubError(
        f"{_named(repo, revision)} is not in the Hub client's cache{whole}, and the Hub client is "
        "in offline mode; load it once with HF_HUB_OFFLINE=0, or give a folder."
    )

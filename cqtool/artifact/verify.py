"""An artifact checked from the outside, wherever it lies: every digest, then what the files say."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cqtool.artifact.describe import describe
from cqtool.artifact.hub_errors import explain_hub_errors
from cqtool.artifact.refnames import check_revision
from cqtool.artifact.remote import RemoteFile, RemoteRepo, hub_api, quiet_client, scratch_folder
from cqtool.errors import ArtifactError, HubError
from cqtool.files import sha256_file
from cqtool.manifest import MANIFEST_NAME, FileRecord, parse_manifest, read_manifest
from cqtool.models.names import is_hub_id
from cqtool.progress import SILENT, Progress
from cqtool.retry import Retry

_DOWNLOADS = 8


@dataclass(frozen=True)
class Verified:
    """An artifact that is whole.

    Attributes:
        place: folder or repository.
        commit: of the repository, None for a folder.
        format: name of the cache format.
        base_model: id of the base model.
        files: how many, the manifest included.
        size: of all of them, in bytes.
        manifest_sha256: digest of the manifest, which stands for all the others.
    """

    place: str
    commit: str | None
    format: str
    base_model: str
    files: int
    size: int
    manifest_sha256: str


def verify(
    place: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    retry: Retry | None = None,
    progress: Progress = SILENT,
) -> Verified:
    """Check the artifact in a folder or a repository, as :func:`whole_artifact` does."""
    with whole_artifact(place, revision=revision, token=token, retry=retry, progress=progress) as (
        _,
        found,
    ):
        return found


@contextmanager
def whole_artifact(
    place: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    retry: Retry | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[Path, Verified]]:
    """Check the artifact in a folder or a repository, and yield the folder that it lies in.

    Of a repository everything is downloaded anew, to a temporary folder: what the Hub sends now is
    checked, and not what a cache on this machine holds. That folder is gone afterwards.

    Args:
        place: a folder, or ``ORG/NAME``.
        revision: branch, tag or commit of the repository; the main branch by default.
        token: Hub token; by default the one that :func:`cqtool.artifact.remote.hub_api` finds, and
            none for public repositories.
        retry: how often a request is repeated that meets a passing trouble.
        progress: told what is going on.

    Raises:
        ArtifactError: it is no artifact, or damaged.
        HubError: the repository cannot be read.
        RecipeError: `revision` cannot be the name of one.
        EnvironmentProblem: the temporary folder is full.
    """
    folder = Path(place)
    if folder.exists() or "/" not in place or not is_hub_id(place):
        if not folder.is_dir():
            raise ArtifactError(
                f"{place} is neither a folder nor a repository; give an artifact folder, or "
                "ORG/NAME."
            )
        if revision is not None:
            raise ArtifactError(f"{place} is no repository of the Hub: drop --revision.")
        yield folder, _check(folder, place, None)
        return
    if revision is not None:
        check_revision(revision)
    with scratch_folder() as temporary:
        with explain_hub_errors(place), quiet_client():
            retry = retry or Retry()
            api = retry.call(lambda: hub_api(token, required=False), progress)
            remote = RemoteRepo(api, place, retry, progress)
            head = remote.head(revision)
            if head is None:
                raise HubError(
                    f"There is no folder {place} here, and the Hub does not show a repository of "
                    "that name; check the name, and log in with `hf auth login` if it is private."
                )
            found = _verify_remote(remote, head.commit, temporary)
        yield found


def _verify_remote(remote: RemoteRepo, commit: str, temporary: Path) -> tuple[Path, Verified]:
    name = f"{remote.repo_id} at {commit}"
    listed = remote.files(commit)
    if MANIFEST_NAME not in listed:
        raise ArtifactError(
            f"{name} has no {MANIFEST_NAME}, so it is no cqtool artifact; check the name and the "
            "revision."
        )
    text = remote.manifest(commit, listed[MANIFEST_NAME])
    _compare(name, listed, parse_manifest(text, f"{MANIFEST_NAME} of {name}"))
    remote.progress.note(f"Downloading {len(listed)} files of {name}")
    folder = _download(remote, commit, listed, temporary)
    try:
        return folder, _check(folder, remote.repo_id, commit)
    except ArtifactError as error:
        # The temporary folder means nothing to anybody.
        raise ArtifactError(str(error).replace(str(folder), name)) from None


def _download(
    remote: RemoteRepo, commit: str, listed: dict[str, RemoteFile], temporary: Path
) -> Path:
    """Fetch every file; the folder that they lie in, below `temporary`."""
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        arriving = {
            path: pool.submit(remote.download, path, commit, file, temporary)
            for path, file in listed.items()
        }
        try:
            arrived = {path: file.result() for path, file in arriving.items()}
        finally:
            pool.shutdown(cancel_futures=True)
    return arrived[MANIFEST_NAME].parent


def _compare(name: str, listed: dict[str, RemoteFile], manifest: dict[str, FileRecord]) -> None:
    """What the Hub lists against the manifest, before gigabytes of something else are fetched."""
    wrong = (listed.keys() - {MANIFEST_NAME}) ^ manifest.keys()
    wrong |= {path for path in manifest.keys() & listed.keys() if _differs(listed, manifest, path)}
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ArtifactError(
            f"{name} does not hold what its manifest lists ({min(wrong)}{more}); do not use this "
            "revision, and ask its author to push again."
        )


def _differs(listed: dict[str, RemoteFile], manifest: dict[str, FileRecord], path: str) -> bool:
    file, record = listed[path], manifest[path]
    return file.size != record.size or file.sha256 not in (None, record.sha256)


def _check(folder: Path, place: str, commit: str | None) -> Verified:
    records = read_manifest(folder)
    found = describe(folder)
    if found["problem"] is not None:
        raise ArtifactError(found["problem"])
    manifest = folder / MANIFEST_NAME
    return Verified(
        place=place,
        commit=commit,
        format=found["format"],
        base_model=found["base_model"]["id"],
        files=len(records) + 1,
        size=sum(record.size for record in records.values()) + manifest.stat().st_size,
        manifest_sha256=sha256_file(manifest),
    )

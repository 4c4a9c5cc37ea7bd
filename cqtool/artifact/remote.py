"""A repository on the Hub: what it holds at a commit, asked for again where the Hub falters."""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import logging as client_logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from cqtool import __version__
from cqtool.artifact.hub_errors import LOGIN
from cqtool.errors import EnvironmentProblem, HubError
from cqtool.files import explain_os_errors, sha256_file
from cqtool.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, is_hub_metadata
from cqtool.progress import SILENT, Progress
from cqtool.retry import DamagedDownload, Retry
from cqtool.xet import own_cache_explained

T = TypeVar("T")

_ELSEWHERE = "set TMPDIR to another folder"


def hub_api(token: str | None = None, *, required: bool = True) -> HfApi:
    """A client with `token`, by default that of the environment or of ``hf auth login``.

    In a CI job with ``HF_OIDC_RESOURCE``, that is a short-lived one in exchange for the job's
    identity (trusted publishing).

    Raises:
        HubError: there is no token although one is `required`, or it cannot be one.
    """
    secret = (token or get_token() or "").strip()
    if not secret and required:
        raise HubError(f"There is no Hub token. {LOGIN}")
    if not secret.isascii() or (secret and not secret.isprintable()) or " " in secret:
        # The HTTP client would refuse the header and quote it.
        raise HubError(f"The Hub token holds characters that no token has; copy it again. {LOGIN}")
    return HfApi(token=secret or False, library_name="cqtool", library_version=__version__)


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's warnings off stderr, and off a terminal its progress bars.

    The warnings quote upload addresses, which are signed; transfers over Xet draw bars into files.
    """
    before, bars = client_logging.get_verbosity(), not are_progress_bars_disabled()
    # Where HF_HUB_DISABLE_PROGRESS_BARS=0 asks for bars everywhere, the client would warn.
    hidden = bars and not sys.stderr.isatty() and HF_HUB_DISABLE_PROGRESS_BARS is not False
    client_logging.set_verbosity(logging.ERROR)
    if hidden:
        disable_progress_bars()
    try:
        yield
    finally:
        client_logging.set_verbosity(before)
        if hidden:
            enable_progress_bars()


@dataclass(frozen=True)
class LocalFile:
    """A file to publish: where it lies, its `size` in bytes and its `sha256` in hex."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub lists of a file.

    Attributes:
        size: bytes.
        git_oid: SHA-1 that git gives its content, or the pointer to it in large file storage.
        sha256: of the content in large file storage, None for a file that lies in git itself.
    """

    size: int
    git_oid: str
    sha256: str | None

    def equals(self, path: Path, sha256: str | None = None) -> bool:
        """Whether it has the content of `path`, whose SHA-256 a caller may know already."""
        size = path.stat().st_size
        if size != self.size:
            return False
        if self.sha256 is not None:
            return self.sha256 == (sha256 or sha256_file(path))
        content = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        content.update(path.read_bytes())
        return self.git_oid == content.hexdigest()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for downloads, gone afterwards.

    Raises:
        EnvironmentProblem: there is no place for it.
    """
    try:
        place = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise EnvironmentProblem(
            f"No temporary folder can be written; free some space, or {_ELSEWHERE}."
        ) from error
    with explain_os_errors(place, _ELSEWHERE):
        folder = tempfile.TemporaryDirectory(prefix="cqtool-", ignore_cleanup_errors=True)
    with folder as path:
        yield Path(path)


class Head(NamedTuple):
    """The commit that a revision stands at, and whether the repository is private."""

    commit: str
    private: bool


class Refs(NamedTuple):
    """The names in a repository, each with its commit."""

    branches: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True)
class RemoteRepo:
    """One model repository; every request that only reads is repeated as `retry` says."""

    api: HfApi
    repo_id: str
    retry: Retry = field(default_factory=Retry)
    progress: Progress = SILENT

    def again(self, action: Callable[[], T]) -> T:
        """The result of `action`, repeated as long as its failures may pass."""
        return self.retry.call(action, self.progress)

    def head(self, revision: str | None) -> Head | None:
        """Where `revision` (the main branch for None) stands; None without such a repository.

        Raises:
            RevisionNotFoundError: the repository has no such revision.
            HubError: the repository has no commit at all.
        """
        try:
            info = self.again(lambda: self.api.model_info(self.repo_id, revision=revision))
        except GatedRepoError:
            raise  # the client's kind of RepositoryNotFoundError, but the repository is there
        except RepositoryNotFoundError:
            return None
        if info.sha is None:
            raise HubError(
                f"{self.repo_id} has no commit yet; make one on its page, then push again."
            )
        return Head(info.sha, bool(info.private))

    def files(self, commit: str) -> dict[str, RemoteFile]:
        """The files at `commit` by path, without what the Hub adds by itself."""

        def listing() -> dict[str, RemoteFile]:
            tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
            return {
                entry.path: RemoteFile(
                    entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None
                )
                for entry in tree
                if isinstance(entry, RepoFile) and not is_hub_metadata(entry.path)
            }

        return self.again(listing)

    def holds(self, commit: str, wanted: dict[str, LocalFile]) -> bool:
        """Whether `commit` has exactly the files `wanted`."""
        present = self.files(commit)
        return present.keys() == wanted.keys() and all(
            present[name].equals(file.path, file.sha256) for name, file in wanted.items()
        )

    def refs(self) -> Refs:
        """The branches and tags."""
        refs = self.again(lambda: self.api.list_repo_refs(self.repo_id))
        return Refs(
            {branch.name: branch.target_commit for branch in refs.branches},
            {tag.name: tag.target_commit for tag in refs.tags},
        )

    def download(self, name: str, commit: str, listed: RemoteFile, folder: Path) -> Path:
        """Fetch one file and compare it with what the Hub lists.

        `folder` takes the part of the client's cache. Into a plain folder the client would copy
        what the cache of this machine holds, damaged or not.

        Returns:
            Where it lies: at `name` in a folder for this commit, below `folder`.

        Raises:
            DamagedDownload: it stays different however often it is fetched.
            EnvironmentProblem: `folder` is full, or the client's cache for Xet.
        """

        def fetch() -> Path:
            try:
                with explain_os_errors(folder.parent, _ELSEWHERE), own_cache_explained():
                    found = self.api.hf_hub_download(
                        self.repo_id, name, revision=commit, cache_dir=folder
                    )
                path = Path(found)
            except OSError as error:
                # The client's own check of the size; nothing but the text tells it apart.
                if "Consistency check failed" not in str(error):
                    raise
                raise self._damaged(name, commit) from None
            if not listed.equals(path):
                path.resolve().unlink()
                path.unlink(missing_ok=True)
                raise self._damaged(name, commit)
            return path

        return self.again(fetch)

    def manifest(self, commit: str, listed: RemoteFile) -> bytes:
        """The text of the manifest at `commit`, compared with what the Hub lists."""
        if listed.size > MAX_MANIFEST_BYTES:
            raise HubError(
                f"{MANIFEST_NAME} of {self.repo_id} has {listed.size} bytes, so it is none of "
                "cqtool's; use another repository."
            )
        with scratch_folder() as folder:
            return self.download(MANIFEST_NAME, commit, listed, folder).read_bytes()

    def _damaged(self, name: str, commit: str) -> DamagedDownload:
        return DamagedDownload(
            f"{name} of {self.repo_id} at {commit} does not arrive as the Hub lists it; check the "
            "network and the proxy, then run the same command again."
        )

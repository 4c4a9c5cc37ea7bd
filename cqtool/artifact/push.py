"""An artifact on the Hub: verified first, then one commit that holds all of it or nothing."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)

from cqtool import __version__
from cqtool.artifact.export import CARD_NAME
from cqtool.artifact.hub_errors import LOGIN, explain_hub_errors
from cqtool.artifact.names import check_repo_id, default_repo_name
from cqtool.errors import ArtifactError, HubError
from cqtool.layout.config import CONFIG_NAME, CQConfig, read_config
from cqtool.manifest import (
    MANIFEST_NAME,
    is_hub_metadata,
    parse_manifest,
    read_manifest,
    verify_folder,
)
from cqtool.progress import SILENT, Progress


@dataclass(frozen=True)
class PushResult:
    """Where the artifact is now.

    Attributes:
        repo_id: repository, ``ORG/NAME``.
        url: its page.
        commit_url: page of the commit.
        oid: the commit's hash; ``revision=oid`` loads exactly this artifact.
        changed: False when the repository held the same files already and no commit was made.
        deleted: files of the artifact that stood there before and are no longer part of it.
    """

    repo_id: str
    url: str
    commit_url: str
    oid: str
    changed: bool
    deleted: tuple[str, ...]


def resolve_repo_id(repo_id: str | None, config: CQConfig, *, token: str | None = None) -> str:
    """The full name to push to: `repo_id`, in the token's own namespace where it names none.

    Raises:
        HubError: there is no token, or the Hub cannot be asked whose it is.
        RecipeError: `repo_id` cannot be a repository.
    """
    name = default_repo_name(config) if repo_id is None else repo_id
    check_repo_id(name)
    if "/" in name:
        return name
    with explain_hub_errors(name):
        return f"{_api(token).whoami()['name']}/{name}"


def push(
    artifact: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> PushResult:
    """Make the repository `repo_id` hold the files of `artifact`, in one commit.

    The repository is created when it does not exist. The endpoint is ``HF_ENDPOINT``'s.

    Args:
        artifact: folder that :func:`cqtool.artifact.export.export` wrote.
        repo_id: ``ORG/NAME``.
        private: create the repository private (one that exists keeps its visibility).
        revision: branch to commit to, created when it does not exist; the main branch by default.
        commit_message: first line of the commit.
        token: Hub token; by default ``HF_TOKEN`` or the one of ``hf auth login``.
        progress: told what is going on.

    Raises:
        ArtifactError: `artifact` is damaged.
        HubError: no token, no permission, no connection, or the repository holds other files.
        RecipeError: `repo_id` cannot be a repository.
    """
    check_repo_id(repo_id)
    verify_folder(artifact)
    config = read_config(artifact)
    files = [*read_manifest(artifact), MANIFEST_NAME]
    message = commit_message or (
        f"{config.cache.name} codebooks for {config.base_model.id}, by cqtool {__version__}"
    )
    with explain_hub_errors(repo_id):
        api = _api(token)
        progress.note(f"Preparing {repo_id} on {api.endpoint}")
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        repo_id = url.repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        parent = api.model_info(repo_id, revision=revision).sha
        if parent is None:
            raise HubError(f"{repo_id} has no commit yet; make one on its page, then push again.")
        stale = _stale_files(api, repo_id, parent, files)
        size = sum((artifact / name).stat().st_size for name in files)
        progress.note(f"Uploading {len(files)} files, {size} bytes, to {repo_id}")
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, artifact / name) for name in files),
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
            ],
            commit_message=message,
            revision=revision,
            parent_commit=parent,
        )
    return PushResult(
        repo_id=repo_id,
        url=str(url),
        commit_url=commit.commit_url,
        oid=commit.oid,
        changed=commit.oid != parent,
        deleted=tuple(stale),
    )


def _api(token: str | None) -> HfApi:
    secret = token or get_token()
    if secret is None:
        raise HubError(f"There is no Hub token. {LOGIN}")
    secret = secret.strip()
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        # The HTTP client would refuse the header and quote it.
        raise HubError(f"The Hub token holds characters that no token has; copy it again. {LOGIN}")
    return HfApi(token=secret, library_name="cqtool", library_version=__version__)


def _stale_files(api: HfApi, repo_id: str, commit: str, files: list[str]) -> list[str]:
    """Files of the artifact that the repository holds now and that are not among `files`.

    Anything there that no cqtool manifest lists is somebody's, and would make every later
    verification of the download fail: it is neither deleted nor published together with.
    """
    present = {
        name for name in api.list_repo_files(repo_id, revision=commit) if not is_hub_metadata(name)
    }
    listed: set[str] = set()
    if {MANIFEST_NAME, CONFIG_NAME} <= present:
        with tempfile.TemporaryDirectory(prefix="cqtool-") as folder:
            path = api.hf_hub_download(repo_id, MANIFEST_NAME, revision=commit, local_dir=folder)
            text = Path(path).read_bytes()
        try:
            listed = {*parse_manifest(text, f"{MANIFEST_NAME} of {repo_id}"), MANIFEST_NAME}
        except ArtifactError as error:
            raise HubError(
                f"{repo_id} holds a damaged or newer {MANIFEST_NAME}, so cqtool cannot tell which "
                "files are its own; delete that file on the Hub, or push to another --repo-id."
            ) from error
    foreign = sorted(present - listed - {CARD_NAME})
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise HubError(
            f"{repo_id} holds {foreign[0]}{more}, which cqtool did not write; push to another "
            "--repo-id, or delete such files on the Hub first."
        )
    return sorted(present - set(files))

"""An artifact on the Hub: verified first, then one commit that holds all of it or nothing.

Nothing of a push is kept on this machine. A second one finds on the Hub what the first one got
done: uploaded content, a commit whose answer was lost, an open pull request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub.errors import RevisionNotFoundError

from cqtool import __version__
from cqtool.artifact.commit import Sent, confirm, send, set_tag
from cqtool.artifact.hub_errors import explain_hub_errors
from cqtool.artifact.names import check_repo_id, default_repo_name
from cqtool.artifact.plan import Plan, PushOptions, local_files
from cqtool.artifact.remote import Head, LocalFile, RemoteRepo, hub_api, quiet_client
from cqtool.artifact.survey import survey
from cqtool.errors import EnvironmentProblem, HubError
from cqtool.layout.config import CQConfig, read_config
from cqtool.manifest import verify_folder
from cqtool.progress import SILENT, Progress
from cqtool.retry import Retry

UNSEEN = "which is new, or private and not shown without a token that may read it"
"""What a preview says of a repository that the Hub does not show."""


@dataclass(frozen=True)
class PushResult:
    """Where the artifact is now, or would be.

    Attributes:
        repo_id: repository, ``ORG/NAME``.
        url: its page.
        commit_url: page of the commit, of its parent where nothing was sent; None where the Hub
            shows no such repository.
        oid: that commit's hash; ``revision=oid`` loads exactly this artifact.
        changed: False when the repository held the same files already and no commit was made.
        plan: what changes, file by file.
        pull_request: page of the pull request.
        tagged: whether the tag that was asked for is new.
    """

    repo_id: str
    url: str
    commit_url: str | None
    oid: str | None
    changed: bool
    plan: Plan
    pull_request: str | None = None
    tagged: bool = False


def resolve_repo_id(
    repo_id: str | None, config: CQConfig, *, token: str | None = None, retry: Retry | None = None
) -> str:
    """The full name to push to: `repo_id`, in the token's own namespace where it names none.

    Raises:
        HubError: there is no token, or the Hub cannot be asked whose it is.
        RecipeError: `repo_id` cannot be a repository.
    """
    name = default_repo_name(config) if repo_id is None else repo_id
    check_repo_id(name)
    if "/" in name:
        return name
    with explain_hub_errors(name), quiet_client():
        return f"{(retry or Retry()).call(lambda: hub_api(token).whoami()['name'])}/{name}"


def push(
    artifact: Path,
    repo_id: str,
    options: PushOptions | None = None,
    *,
    token: str | None = None,
    retry: Retry | None = None,
    progress: Progress = SILENT,
) -> PushResult:
    """Make the repository `repo_id` hold the files of `artifact`, in one commit.

    The repository is created when it does not exist. Files that are there already are not sent.
    Afterwards the manifest is downloaded and every digest of the new commit compared with it. The
    endpoint is ``HF_ENDPOINT``'s.

    Args:
        artifact: folder that :func:`cqtool.artifact.export.export` wrote.
        repo_id: ``ORG/NAME``.
        options: how it is published.
        token: Hub token; by default the one that :func:`cqtool.artifact.remote.hub_api` finds.
        retry: how often a request is repeated that meets a passing trouble.
        progress: told what is going on.

    Raises:
        ArtifactError: `artifact` is damaged.
        HubError: no token, no permission, no connection, the repository holds other files or has
            another visibility than asked for, the branch is none or the tag names something else,
            somebody else committed at the same moment, or the Hub does not hold what was sent.
        EnvironmentProblem: the temporary folder is full.
        RecipeError: `repo_id` cannot be a repository.
    """
    options = options or PushOptions()
    config, wanted = _read(artifact, repo_id)
    options = replace(options, commit_message=options.commit_message or _message(config))
    with explain_hub_errors(repo_id), quiet_client():
        remote = _open(repo_id, config, token, retry, progress)
        # All that can be refused is refused before anything is made.
        head, plan, _ = survey(remote, wanted, options)
        if _create_what_is_missing(remote, head, options):
            head, plan, _ = survey(remote, wanted, options)
        if head is None:
            raise HubError(
                f"The Hub does not show {remote.repo_id} to this token; use one that may read it, "
                "or another --repo-id."
            )
        sent = send(remote, head.commit, plan, wanted, options) if plan.changed else None
    sent = sent or Sent(head.commit, new=False)
    try:
        with explain_hub_errors(repo_id), quiet_client():
            confirm(remote, sent.commit, wanted)
            tagged = options.tag is not None and set_tag(remote, options.tag, sent.commit)
    except (HubError, EnvironmentProblem) as error:
        raise type(error)(
            f"Commit {sent.commit} of {remote.repo_id} holds the artifact, but what follows the "
            f"upload is not done. {error}"
        ) from None
    return replace(
        _result(remote, sent.commit, plan),
        changed=sent.new,
        pull_request=sent.pull_request,
        tagged=tagged,
    )


def preview(
    artifact: Path,
    repo_id: str,
    options: PushOptions | None = None,
    *,
    token: str | None = None,
    retry: Retry | None = None,
    progress: Progress = SILENT,
) -> PushResult:
    """What :func:`push` would do; nothing on the Hub is changed, and public ones need no token.

    Raises:
        As :func:`push`, as far as it can be known before.
    """
    options = options or PushOptions()
    config, wanted = _read(artifact, repo_id)
    with explain_hub_errors(repo_id), quiet_client():
        remote = _open(repo_id, config, token, retry, progress, required="/" not in repo_id)
        head, plan, tags = survey(remote, wanted, options)
        return replace(
            _result(remote, head.commit if head else None, plan),
            tagged=options.tag is not None and options.tag not in tags,
        )


def _read(artifact: Path, repo_id: str) -> tuple[CQConfig, dict[str, LocalFile]]:
    check_repo_id(repo_id)
    verify_folder(artifact)
    return read_config(artifact), local_files(artifact)


def _message(config: CQConfig) -> str:
    return f"{config.cache.name} codebooks for {config.base_model.id}, by cqtool {__version__}"


def _open(
    repo_id: str,
    config: CQConfig,
    token: str | None,
    retry: Retry | None,
    progress: Progress,
    *,
    required: bool = True,
) -> RemoteRepo:
    retry = retry or Retry()
    # An OIDC token is asked for over the network, so this too may have to be repeated.
    api = retry.call(lambda: hub_api(token, required=required), progress)
    progress.note(f"Looking at {repo_id} on {api.endpoint}")
    full = resolve_repo_id(repo_id, config, token=token, retry=retry)
    return RemoteRepo(api, full, retry, progress)


def _result(remote: RemoteRepo, commit: str | None, plan: Plan) -> PushResult:
    url = f"{remote.api.endpoint}/{remote.repo_id}"
    return PushResult(
        repo_id=remote.repo_id,
        url=url,
        commit_url=f"{url}/commit/{commit}" if commit else None,
        oid=commit,
        changed=plan.changed,
        plan=plan,
    )


def _create_what_is_missing(remote: RemoteRepo, head: Head | None, options: PushOptions) -> bool:
    """Make the repository and the branch; False where both were there."""
    api, repo_id, branch = remote.api, remote.repo_id, options.revision
    if head is None:
        remote.progress.note(f"Creating {repo_id}")
        remote.again(lambda: api.create_repo(repo_id, private=options.private, exist_ok=True))
    if branch is None or options.create_pr:
        return head is None
    try:
        remote.head(branch)
    except RevisionNotFoundError:
        remote.again(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        return True
    return head is None

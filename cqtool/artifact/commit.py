"""The commit of a push, made once however often its request is repeated, and what follows it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError

from cqtool.artifact.hub_errors import CONFLICTS, conflict
from cqtool.artifact.plan import Plan, PushOptions
from cqtool.artifact.remote import LocalFile, RemoteRepo
from cqtool.errors import HubError
from cqtool.manifest import MANIFEST_NAME
from cqtool.xet import own_cache_explained


@dataclass(frozen=True)
class Sent:
    """The commit that holds the artifact.

    Attributes:
        commit: its hash.
        pull_request: page of the pull request that it belongs to.
        new: False where it was there before this push.
    """

    commit: str
    pull_request: str | None = None
    new: bool = True


def send(
    remote: RemoteRepo,
    parent: str,
    plan: Plan,
    wanted: dict[str, LocalFile],
    options: PushOptions,
) -> Sent:
    """Commit the changes of `plan` on top of `parent`, or find that this has been done.

    When the answer to a commit is lost, nobody can tell whether it was made. The next try tells: it
    names the same parent, so the Hub refuses it where the branch has moved, and the branch then
    holds exactly the artifact, or what somebody else sent. Of pull requests there can be any
    number, so the open ones are looked at before each try.

    Raises:
        HubError: somebody else changed the branch.
        EnvironmentProblem: the client's cache for Xet is full.
    """
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, wanted[name].path) for name in plan.paths("add", "change")),
        *(CommitOperationDelete(name, is_folder=False) for name in plan.paths("delete")),
    ]
    remote.progress.note(
        f"Sending {len(plan.paths('add', 'change'))} files, {plan.sent_bytes} bytes, to "
        f"{remote.repo_id}; {len(plan.paths('same'))} are there already"
    )
    tried = False

    def commit() -> Sent:
        nonlocal tried
        if options.create_pr:
            done = _find_pull_request(remote, wanted)
            if done is not None:
                return replace(done, new=tried)
        tried = True
        try:
            with own_cache_explained():
                info = remote.api.create_commit(
                    remote.repo_id,
                    operations,
                    commit_message=options.commit_message or "",
                    revision=options.revision,
                    create_pr=options.create_pr,
                    parent_commit=parent,
                )
        except HfHubHTTPError as error:
            if error.response.status_code not in CONFLICTS:
                raise
            head = remote.head(options.revision)
            if head is None or options.create_pr or not remote.holds(head.commit, wanted):
                raise HubError(conflict(remote.repo_id)) from None
            return Sent(head.commit)
        return Sent(info.oid, info.pr_url)

    return remote.again(commit)


def _find_pull_request(remote: RemoteRepo, wanted: dict[str, LocalFile]) -> Sent | None:
    """An open pull request that holds exactly the artifact."""
    pulls = remote.again(
        lambda: list(
            remote.api.get_repo_discussions(
                remote.repo_id, discussion_type="pull_request", discussion_status="open"
            )
        )
    )
    for pull in pulls:
        head = remote.head(pull.git_reference)
        if head is not None and remote.holds(head.commit, wanted):
            return Sent(head.commit, pull.url)
    return None


def confirm(remote: RemoteRepo, commit: str, wanted: dict[str, LocalFile]) -> None:
    """Download the manifest of `commit` and compare every file there with it.

    The Hub lists a digest of each file, SHA-256 in large file storage and else git's: a file is
    compared by that of its own, without downloading it.

    Raises:
        HubError: a file differs, is missing, or is there without being part of the artifact.
    """
    present = remote.files(commit)
    wrong = present.keys() ^ wanted.keys()
    wrong |= {
        name
        for name in present.keys() & wanted.keys()
        if not present[name].equals(wanted[name].path, wanted[name].sha256)
    }
    if not wrong:
        text = remote.manifest(commit, present[MANIFEST_NAME])
        if text != wanted[MANIFEST_NAME].path.read_bytes():
            wrong = {MANIFEST_NAME}
    if wrong:
        raise HubError(
            f"{remote.repo_id} at {commit} does not hold what was sent ({min(wrong)}); do not use "
            "this revision, and push again."
        )


def set_tag(remote: RemoteRepo, tag: str, commit: str) -> bool:
    """Name `commit`; a tag that is there already stays, whatever commit of the same files it names.

    Returns:
        Whether the tag is new.

    Raises:
        HubError: somebody else took the name at the same moment.
    """
    if tag in remote.refs().tags:
        return False
    remote.again(
        lambda: remote.api.create_tag(remote.repo_id, tag=tag, revision=commit, exist_ok=True)
    )
    if remote.refs().tags.get(tag) != commit:
        raise HubError(conflict(remote.repo_id))
    return True

"""What a push finds on the Hub, and all that is refused before anything is made there."""

from __future__ import annotations

from typing import NamedTuple

from huggingface_hub.errors import RevisionNotFoundError

from cqtool.artifact.plan import Plan, PushOptions, make_plan, refuse_foreign_files
from cqtool.artifact.refnames import is_pull_request
from cqtool.artifact.remote import Head, LocalFile, Refs, RemoteRepo
from cqtool.errors import HubError

_MAIN = "main"


class Survey(NamedTuple):
    """What a push finds.

    Attributes:
        head: what the commit would go on top of, None without a repository.
        plan: what it would change.
        tags: commit by tag, as far as a tag is asked for.
    """

    head: Head | None
    plan: Plan
    tags: dict[str, str]


def survey(remote: RemoteRepo, wanted: dict[str, LocalFile], options: PushOptions) -> Survey:
    """Look at the repository, and refuse what can be refused before anything is made.

    Raises:
        HubError: the repository holds other files or has another visibility than asked for, the
            branch is none or has to be there and is not, or the tag names something else.
    """
    branch = options.revision
    try:
        head = remote.head(branch)
    except RevisionNotFoundError:
        if _must_exist(options):
            raise
        head, branch = remote.head(None), None  # where the branch will begin
    if head is None:
        if _must_exist(options):
            raise HubError(
                f"The Hub shows no repository {remote.repo_id}, so nothing can be added to "
                f"{options.revision} there; check --repo-id, or drop --revision."
            )
        return Survey(None, make_plan(wanted, {}), {})
    refs = Refs({}, {})
    if options.tag is not None or (branch is not None and not is_pull_request(branch)):
        refs = remote.refs()
    _check_branch(remote, refs, branch)
    _check_visibility(remote, head, options)
    present = remote.files(head.commit)
    if not options.overwrite:
        refuse_foreign_files(remote, head.commit, present)
    _check_tag(remote, refs, wanted, options)
    return Survey(head, make_plan(wanted, present), refs.tags)


def _must_exist(options: PushOptions) -> bool:
    """Whether the revision is none that a push makes; a new repository has the main branch."""
    name = options.revision or _MAIN
    return is_pull_request(name) or (options.create_pr and name != _MAIN)


def _check_visibility(remote: RemoteRepo, head: Head, options: PushOptions) -> None:
    if options.private is None or options.private == head.private:
        return
    found, asked = ("private", "--public") if head.private else ("public", "--private")
    raise HubError(
        f"{remote.repo_id} is {found}, and a push does not change that; change it in the "
        f"repository's settings, or drop {asked}."
    )


def _check_branch(remote: RemoteRepo, refs: Refs, name: str | None) -> None:
    """The Hub also finds a revision by a tag or a commit: neither can be added to."""
    if name is None or is_pull_request(name):
        return
    if name not in refs.branches:
        raise HubError(
            f"{name} is no branch of {remote.repo_id} but names a commit of it; push to a branch."
        )


def _check_tag(
    remote: RemoteRepo, refs: Refs, wanted: dict[str, LocalFile], options: PushOptions
) -> None:
    """Before anything is sent: a tag that others may have pinned is not moved."""
    if options.tag is None:
        return
    tagged = refs.tags.get(options.tag)
    if tagged is not None and not remote.holds(tagged, wanted):
        raise HubError(
            f"The tag {options.tag} of {remote.repo_id} already names another release; choose "
            "another --tag, or delete this one on the Hub."
        )

"""Names of branches and tags, held against git itself."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hub.endpoints import NO_REF
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cqtool.artifact.refnames import check_new_name, check_revision, is_pull_request
from cqtool.errors import RecipeError

GIT = shutil.which("git")
PIECES = [*"v1.-/@{~^:?*[\\ \t\x7fü", "..", ".lock", "lock", "HEAD", "refs/", "heads/"]


def refused(check: object, *words: str) -> bool:
    try:
        check(*words)  # type: ignore[operator]
    except RecipeError:
        return True
    return False


@pytest.mark.skipif(GIT is None, reason="needs git")
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join))
@example("v1.0")
@example("release/1.0")
@example("@")
@example("a.lock/b")
@settings(max_examples=150, deadline=None)
def test_what_git_takes_is_taken_and_nothing_else(name: str) -> None:
    command = [str(GIT), "check-ref-format", "--allow-onelevel", name]
    # `git tag` and `git branch` also refuse what looks like an option.
    wrong = subprocess.run(command).returncode != 0 or name.startswith("-")
    assert refused(check_revision, name) == wrong
    for kind in ("tag", "branch"):
        assert refused(check_new_name, name, kind) == (wrong or name == "HEAD")
    # The Hub of the tests is no milder.
    assert bool(NO_REF.search(name)) == (wrong or name == "HEAD")


def test_names_that_mean_something_else() -> None:
    assert refused(check_new_name, "0" * 40, "tag") and not refused(check_revision, "0" * 40)
    assert refused(check_revision, "") and refused(check_new_name, "", "tag")
    assert not refused(check_revision, "refs/pr/3") and is_pull_request("refs/pr/3")
    assert not is_pull_request("refs/pr/x") and not is_pull_request("my/refs/pr/3")


def test_the_hub_of_the_tests_is_as_strict(hub: HubServer) -> None:
    api, repo = HfApi(), hub.create("org/strict")
    api.create_tag("org/strict", tag="v1")
    for name in ("v 1", "v1.lock"):
        with pytest.raises(HfHubHTTPError, match="Invalid reference name"):
            api.create_tag("org/strict", tag=name)
        with pytest.raises(HfHubHTTPError, match="Invalid reference name"):
            api.create_branch("org/strict", branch=name)
    for revision in ("v1", repo.branches["main"]):
        with pytest.raises(HfHubHTTPError, match="is not a branch"):
            api.create_commit(
                "org/strict",
                [CommitOperationAdd("x", b"x")],
                commit_message="x",
                revision=revision,
            )
    assert (len(repo.commits), set(repo.branches), set(repo.tags)) == (1, {"main"}, {"v1"})

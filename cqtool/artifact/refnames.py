"""Names of branches, tags and commits, held to git's rules before anybody is asked about them.

The Hub keeps repositories in git, so it refuses what git refuses; but it looks at a tag's name only
when the commit is there already.
"""

from __future__ import annotations

import re

from cqtool.errors import RecipeError

# What `git check-ref-format` and `git tag` do not take, in the order of git's manual.
_REFUSED = re.compile(
    r"""
    (?:^|/)\.              # a part that begins with a dot
    | \.lock(?:/|$)        # or ends like git's own lock files
    | \.\.
    | [\x00-\x20\x7f~^:?*\[\\]
    | ^/ | // | /$
    | \.$
    | @\{
    | ^@$
    | ^-                   # an option
    """,
    re.VERBOSE,
)
_COMMIT = re.compile(r"HEAD|[0-9a-f]{40}")
_RULE = "use letters, digits, '-', '_', '/' and '.', as in v1.0"


def check_revision(name: str) -> None:
    """Refuse what can be neither a branch, a tag nor a commit.

    Raises:
        RecipeError: it cannot.
    """
    if not name or _REFUSED.search(name):
        raise RecipeError(f"'{name}' cannot be a branch, a tag or a commit; {_RULE}.")


def check_new_name(name: str, kind: str) -> None:
    """Refuse what cannot name a new `kind`, a branch or a tag.

    Raises:
        RecipeError: git does not take it, or it would be taken for a commit.
    """
    if not name or _REFUSED.search(name):
        raise RecipeError(f"'{name}' cannot name a {kind}; {_RULE}.")
    if _COMMIT.fullmatch(name):
        raise RecipeError(f"'{name}' would be taken for a commit; choose another name of a {kind}.")


def is_pull_request(name: str) -> bool:
    """Whether `name` is the Hub's own one for a pull request, such as ``refs/pr/3``."""
    return re.fullmatch(r"refs/pr/[0-9]+", name) is not None

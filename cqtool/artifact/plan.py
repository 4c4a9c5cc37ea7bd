"""How a push is wanted, and what it changes: the files of an artifact against a repository's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cqtool.artifact.export import CARD_NAME
from cqtool.artifact.refnames import check_new_name
from cqtool.artifact.remote import LocalFile, RemoteFile, RemoteRepo
from cqtool.errors import ArtifactError, HubError
from cqtool.files import sha256_file
from cqtool.layout.config import CONFIG_NAME
from cqtool.manifest import MANIFEST_NAME, parse_manifest, read_manifest

Action = Literal["add", "change", "delete", "same"]


@dataclass(frozen=True)
class PushOptions:
    """How an artifact is published.

    Attributes:
        private: visibility of a repository that is created; None for what its owner has set. One
            that exists must have it already.
        revision: branch to commit to, created when it does not exist; the main branch for None.
        commit_message: first line of the commit.
        create_pr: propose the commit as a pull request instead.
        tag: name to give the commit once it is verified.
        overwrite: replace also what cqtool did not write.

    Raises:
        RecipeError: a branch or a tag cannot have that name.
    """

    private: bool | None = None
    revision: str | None = None
    commit_message: str | None = None
    create_pr: bool = False
    tag: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.revision is not None:
            check_new_name(self.revision, "branch")
        if self.tag is not None:
            check_new_name(self.tag, "tag")


@dataclass(frozen=True)
class Change:
    """What happens to one file.

    Attributes:
        path: in the repository.
        action: ``same`` for a file that is there already and is not sent again.
        size: bytes, of the new content, or of the file that is deleted.
        sha256: of the same; None for a deleted file whose digest the Hub does not know.
    """

    path: str
    action: Action
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Plan:
    """The changes, sorted by path."""

    changes: tuple[Change, ...]

    def paths(self, *actions: Action) -> tuple[str, ...]:
        """The files to which one of `actions` happens."""
        return tuple(change.path for change in self.changes if change.action in actions)

    @property
    def changed(self) -> bool:
        """Whether there is anything to commit."""
        return any(change.action != "same" for change in self.changes)

    @property
    def sent_bytes(self) -> int:
        """Bytes of the files that are added or changed."""
        return sum(change.size for change in self.changes if change.action in ("add", "change"))


def local_files(artifact: Path) -> dict[str, LocalFile]:
    """Every file of a verified artifact, its manifest included."""
    manifest = artifact / MANIFEST_NAME
    own = LocalFile(manifest, manifest.stat().st_size, sha256_file(manifest))
    return {
        MANIFEST_NAME: own,
        **{
            name: LocalFile(artifact / name, record.size, record.sha256)
            for name, record in read_manifest(artifact).items()
        },
    }


def make_plan(wanted: dict[str, LocalFile], present: dict[str, RemoteFile]) -> Plan:
    """What makes a repository that holds `present` hold `wanted` and nothing else."""
    changes = [
        Change(name, _action(file, present.get(name)), file.size, file.sha256)
        for name, file in wanted.items()
    ]
    for name in present.keys() - wanted.keys():
        changes.append(Change(name, "delete", present[name].size, present[name].sha256))
    return Plan(tuple(sorted(changes, key=lambda change: change.path)))


def _action(file: LocalFile, present: RemoteFile | None) -> Action:
    if present is None:
        return "add"
    return "same" if present.equals(file.path, file.sha256) else "change"


def refuse_foreign_files(remote: RemoteRepo, commit: str, present: dict[str, RemoteFile]) -> None:
    """Refuse a repository that holds more than an artifact of cqtool.

    Anything there that no cqtool manifest lists is somebody's, and would make every later
    verification of the download fail: it is neither deleted nor published together with.

    Raises:
        HubError: it holds such files, or a manifest that says nothing about them.
    """
    listed: set[str] = set()
    if {MANIFEST_NAME, CONFIG_NAME} <= present.keys():
        text = remote.manifest(commit, present[MANIFEST_NAME])
        try:
            listed = {*parse_manifest(text, f"{MANIFEST_NAME} of {remote.repo_id}"), MANIFEST_NAME}
        except ArtifactError as error:
            raise HubError(
                f"{remote.repo_id} holds a damaged or newer {MANIFEST_NAME}, so cqtool cannot tell "
                "which files are its own; push to another --repo-id, or replace all that is there "
                "with --overwrite."
            ) from error
    foreign = sorted(present.keys() - listed - {CARD_NAME})
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise HubError(
            f"{remote.repo_id} holds {foreign[0]}{more}, which cqtool did not write; push to "
            "another --repo-id, or replace all that is there with --overwrite."
        )

"""What a Hub holds: repositories with commits, branches, tags and pull requests, all in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        content = self._pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def _pointer(self) -> bytes:
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {len(self.content)}\n"
        ).encode()

    def tree_entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(self.content),
            "oid": self.git_oid,
        }
        if self.lfs:
            entry["lfs"] = {
                "oid": self.sha256,
                "size": len(self.content),
                "pointerSize": len(self._pointer),
            }
        return entry


@dataclass(frozen=True)
class Commit:
    """A commit; `sent` names the files whose content or digest came with it."""

    oid: str
    message: str
    files: dict[str, Blob]
    sent: tuple[str, ...] = ()


@dataclass
class PullRequest:
    num: int
    title: str
    oid: str
    status: str = "open"

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"

    def describe(self, repo_id: str) -> dict[str, Any]:
        return {
            "num": self.num,
            "title": self.title,
            "status": self.status,
            "isPullRequest": True,
            "author": {"name": "tester"},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "repo": {"name": repo_id, "type": "model"},
        }


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[PullRequest] = field(default_factory=list)

    def find(self, revision: str) -> Commit | None:
        refs = {pull.ref: pull.oid for pull in self.pulls} | self.tags | self.branches
        oid = refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def add(
        self, branch: str, message: str, files: dict[str, Blob], sent: tuple[str, ...] = ()
    ) -> Commit:
        commit = self._store(message, files, sent)
        for pull in self.pulls:
            if pull.ref == branch:
                pull.oid = commit.oid
                return commit
        self.branches[branch] = commit.oid
        return commit

    def open_pull(
        self, message: str, files: dict[str, Blob], sent: tuple[str, ...] = ()
    ) -> tuple[PullRequest, Commit]:
        commit = self._store(message, files, sent)
        pull = PullRequest(len(self.pulls) + 1, message, commit.oid)
        self.pulls.append(pull)
        return pull, commit

    def _store(self, message: str, files: dict[str, Blob], sent: tuple[str, ...]) -> Commit:
        seed = f"{len(self.commits)} {message} {sorted((p, b.sha256) for p, b in files.items())}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), message, files, sent)
        self.commits.append(commit)
        return commit

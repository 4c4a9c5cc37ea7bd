"""A Hugging Face Hub on loopback, as far as the real `huggingface_hub` client needs one.

Repositories live in memory: commits, branches, regular and LFS files. What the client is told
follows what the Hub answers: status codes, ``X-Error-Code``, ``X-Repo-Commit``, ETags. There is no
Xet storage, so the client must run with ``HF_HUB_DISABLE_XET=1``.

Use the fixture ``hub`` for a client in this process; a child process gets ``hub.environment()``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_loopback-test-token"
USER = "tester"


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
    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    def add(self, branch: str, message: str, files: dict[str, Blob]) -> Commit:
        seed = f"{len(self.commits)} {message} {sorted((p, b.sha256) for p, b in files.items())}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), message, files)
        self.commits.append(commit)
        self.branches[branch] = commit.oid
        return commit


class HubServer:
    """The server; `repos` may be looked at and changed by a test at any time.

    Attributes:
        repos: repository by ``ORG/NAME``.
        tokens: user by accepted token.
        writable: namespaces the user may write to.
        requests: ``METHOD path`` of every request so far.
        before_commit: called with the repository before a commit is applied (a test's chance to
            commit first).
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {TOKEN: USER}
        self.writable = {USER, "org"}
        self.requests: list[str] = []
        self.before_commit: Any = None
        self.lock = threading.RLock()
        self.objects: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, token: str | None = TOKEN) -> dict[str, str]:
        """What a child process needs in its environment to use this Hub and nothing else."""
        values = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return values | ({"HF_TOKEN": token} if token else {})

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.add("main", "initial commit", {".gitattributes": Blob(b"*.png filter=lfs\n", False)})
        return repo

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Answer(Exception):
    """An answer other than 200, raised where it is found out."""

    def __init__(self, status: int, body: Any = None, code: str = "", **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.body = {"error": code or str(status)} if body is None else body
        self.headers = ({"X-Error-Code": code} if code else {}) | headers


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "create_branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<rev>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)", "tree"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {url.path}")
            try:
                for method, pattern, name in self.ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if method == self.command and match:
                        arguments = {k: unquote(v) for k, v in match.groupdict().items()}
                        getattr(self, name)(**arguments)
                        return
                raise _Answer(404)
            except _Answer as answer:
                self.send_json(answer.body, answer.status, answer.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send_json(
        self, value: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_bytes(
            json.dumps(value).encode(),
            status,
            {"Content-Type": "application/json", **(headers or {})},
        )

    def send_bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Who asks, and for what

    def user(self) -> str | None:
        header = self.headers.get("Authorization") or ""
        if not header:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            message = "Invalid credentials in Authorization header"
            raise _Answer(401, {"error": message}, **{"X-Error-Message": message})
        return user

    def writer(self, repo_id: str) -> None:
        if self.user() is None:
            raise _Answer(401, {"error": "Invalid username or password."})
        if repo_id.split("/")[0] not in self.hub.writable:
            raise _Answer(403, {"error": "You don't have the rights to write there."})

    def repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        user = self.user()
        if repo is None or (repo.private and user is None):
            # As on the Hub, a stranger is not told whether a private repository exists.
            raise _Answer(404 if user else 401, code="RepoNotFound")
        return repo

    def commit_at(self, repo_id: str, revision: str) -> Commit:
        commit = self.repo(repo_id).find(revision)
        if commit is None:
            raise _Answer(404, code="RevisionNotFound")
        return commit

    # The endpoints

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise _Answer(401, {"error": "Invalid username or password."})
        self.send_json({"type": "user", "name": user, "orgs": [{"name": "org"}]})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or self.user()}/{wanted['name']}"
        self.writer(repo_id)
        place = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", **place})
        self.hub.create(
            repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private"))
        )
        self.send_json(place)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            raise _Answer(400, {"errors": [{"message": "no metadata"}], "warnings": []})
        self.send_json({"errors": [], "warnings": []})

    def create_branch(self, repo: str, rev: str) -> None:
        self.writer(repo)
        branches = self.repo(repo).branches
        if rev in branches:
            raise _Answer(409, {"error": "Reference already exists"})
        branches[rev] = branches["main"]
        self.send_json({})

    def preupload(self, repo: str, rev: str) -> None:
        self.writer(repo)
        present = self.commit_at(repo, rev).files
        answers = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith((".safetensors", ".png"))
            blob = present.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": blob and (blob.sha256 if blob.lfs else blob.git_oid),
                }
            )
        self.send_json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.writer(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Answer(400, {"error": "digest mismatch"})
        self.hub.objects[oid] = self.body
        self.send_json({})

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Answer(404, {"error": "no such object"})
        self.send_json({})

    def commit(self, repo: str, rev: str) -> None:
        self.writer(repo)
        if self.hub.before_commit is not None:
            self.hub.before_commit(self.repo(repo))
        parent = self.commit_at(repo, rev)
        files = dict(parent.files)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise _Answer(412, {"error": "A commit has happened since. Please refresh."})
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif kind == "deletedFile" and files.pop(value["path"], None) is not None:
                pass
            else:
                raise _Answer(400, {"error": f"bad operation {kind} {value.get('path')}"})
        new = self.repo(repo).add(rev, header["summary"], files)
        self.send_json(
            {"commitUrl": f"{self.hub.url}/{repo}/commit/{new.oid}", "commitOid": new.oid}
        )

    def info(self, repo: str, rev: str = "main") -> None:
        commit = self.commit_at(repo, rev)
        self.send_json(
            {
                "id": repo,
                "sha": commit.oid,
                "private": self.repo(repo).private,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def tree(self, repo: str, rev: str) -> None:
        files = self.commit_at(repo, rev).files
        self.send_json([blob.tree_entry(path) for path, blob in sorted(files.items())])

    def resolve(self, repo: str, rev: str, path: str) -> None:
        commit = self.commit_at(repo, rev)
        blob = commit.files.get(path)
        if blob is None:
            raise _Answer(404, code="EntryNotFound", **{"X-Repo-Commit": commit.oid})
        content, status = blob.content, 200
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{blob.sha256 if blob.lfs else blob.git_oid}"',
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.send_bytes(content, status, headers)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> Iterator[HubServer]:
    """A running Hub; the client in this process talks to it, with a token and an own cache."""
    from huggingface_hub import constants

    server = HubServer()
    server.start()
    home = tmp_path_factory.mktemp("hf-home")
    # The client reads its environment when it is imported, which may be long past.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HOME", str(home))
    yield server
    server.stop()

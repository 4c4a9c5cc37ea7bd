"""The Hub's endpoints, as far as the real `huggingface_hub` client needs them for models.

What the client is told follows what the Hub answers: status codes, ``X-Error-Code``,
``X-Repo-Commit``, ETags, pages of a listing. Of Xet see :mod:`hub.xet`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any
from urllib.parse import quote

from hub.http import Answer, Refusal, as_json
from hub.state import Blob, Commit, Repo
from hub.xet import XetEndpoints

TREE_PAGE = 8
_REPO = r"(?P<repo>[^/]+/[^/]+)"
NO_REF = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|(?:^|/)\.|^[-/]|(?:/|\.|\.lock)$|\.lock/|^(?:@|HEAD)$"
)
_API, _REV = rf"/api/models/{_REPO}", r"(?P<rev>[^/]+)"


class Endpoints(XetEndpoints):
    routes = (
        *XetEndpoints.xet_routes,
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/oauth/token", "exchange_token"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", rf"{_API}/branch/{_REV}", "create_branch"),
        ("POST", rf"{_API}/tag/{_REV}", "create_tag"),
        ("GET", rf"{_API}/refs", "refs"),
        ("GET", rf"{_API}/discussions", "discussions"),
        ("POST", rf"{_API}/preupload/{_REV}", "preupload"),
        ("POST", rf"{_API}/commit/{_REV}", "commit"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", rf"{_API}/revision/{_REV}", "info"),
        ("GET", _API, "info"),
        ("GET", rf"{_API}/tree/{_REV}", "tree"),
        ("HEAD", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
        ("GET", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
    )

    # Who asks, and for what

    def user(self) -> str | None:
        header = self.headers.get("Authorization") or ""
        if not header:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            message = "Invalid credentials in Authorization header"
            raise Refusal(401, {"error": message}, **{"X-Error-Message": message})
        return user

    def writer(self, repo_id: str) -> None:
        if self.user() is None:
            raise Refusal(401, {"error": "Invalid username or password."})
        if repo_id.split("/")[0] not in self.hub.writable:
            raise Refusal(403, {"error": "You don't have the rights to write there."})

    def repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        user = self.user()
        if repo is None or (repo.private and user is None):
            # As on the Hub, a stranger is not told whether a private repository exists.
            raise Refusal(404 if user else 401, code="RepoNotFound")
        return repo

    def commit_at(self, repo_id: str, revision: str) -> Commit:
        commit = self.repo(repo_id).find(revision)
        if commit is None:
            raise Refusal(404, code="RevisionNotFound")
        return commit

    # Accounts

    def whoami(self) -> Answer:
        user = self.user()
        if user is None:
            raise Refusal(401, {"error": "Invalid username or password."})
        return as_json({"type": "user", "name": user, "orgs": [{"name": "org"}]})

    def exchange_token(self) -> Answer:
        wanted = json.loads(self.body)
        token = self.hub.publishers.get((wanted["subject_token"], wanted["resource"]))
        if token is None:
            raise Refusal(401, {"error": "invalid_grant"})
        return as_json({"access_token": token, "token_type": "bearer", "expires_in": 3600})

    # Repositories and what points into them

    def create_repo(self) -> Answer:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or self.user()}/{wanted['name']}"
        self.writer(repo_id)
        place = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            raise Refusal(409, {"error": "You already created this model repo", **place})
        self.hub.create(
            repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private"))
        )
        return as_json(place)

    def validate_yaml(self) -> Answer:
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            raise Refusal(400, {"errors": [{"message": "no metadata"}], "warnings": []})
        return as_json({"errors": [], "warnings": []})

    def create_branch(self, repo: str, rev: str) -> Answer:
        self.writer(repo)
        branches = self.repo(repo).branches
        self.new_ref(rev)
        if rev in branches:
            raise Refusal(409, {"error": "Reference already exists"})
        branches[rev] = branches["main"]
        return as_json({})

    def create_tag(self, repo: str, rev: str) -> Answer:
        self.writer(repo)
        tags, name = self.repo(repo).tags, json.loads(self.body)["tag"]
        self.new_ref(name)
        if name in tags:
            raise Refusal(409, {"error": "Tag reference exists already"})
        tags[name] = self.commit_at(repo, rev).oid
        return as_json({})

    def new_ref(self, name: str) -> None:
        """Only what git takes; the Hub asks git."""
        if NO_REF.search(name):
            raise Refusal(400, {"error": f"Invalid reference name: {name}"})

    def refs(self, repo: str) -> Answer:
        found = self.repo(repo)

        def entries(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid}
                for name, oid in refs.items()
            ]

        return as_json(
            {
                "branches": entries("heads", found.branches),
                "converts": [],
                "tags": entries("tags", found.tags),
            }
        )

    def discussions(self, repo: str) -> Answer:
        status = self.query.get("status")
        pulls = [p.describe(repo) for p in self.repo(repo).pulls if status in (None, p.status)]
        return as_json({"count": len(pulls), "start": 0, "discussions": pulls})

    # Uploads

    def preupload(self, repo: str, rev: str) -> Answer:
        self.may_change(repo)
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
        return as_json({"files": answers})

    def may_change(self, repo_id: str) -> None:
        """Everybody who is somebody may propose a change; only writers may make one."""
        if self.query.get("create_pr") is None:
            self.writer(repo_id)
        elif self.user() is None:
            raise Refusal(401, {"error": "Invalid username or password."})

    def lfs_batch(self, repo: str) -> Answer:
        if self.user() is None:
            raise Refusal(401, {"error": "Invalid username or password."})
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(entry)
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, {"error": "digest mismatch"})
        self.hub.objects[oid] = self.body
        return as_json({})

    def lfs_verify(self) -> Answer:
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, {"error": "no such object"})
        return as_json({})

    def commit(self, repo: str, rev: str) -> Answer:
        self.may_change(repo)
        if self.hub.before_commit is not None:
            self.hub.before_commit(self.repo(repo))
        parent, store = self.commit_at(repo, rev), self.repo(repo)
        if rev not in store.branches and rev not in {pull.ref for pull in store.pulls}:
            raise Refusal(400, {"error": f"{rev} is not a branch"})
        files, sent = dict(parent.files), []
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise Refusal(412, {"error": "A commit has happened since. Please refresh."})
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                sent.append(value["path"])
            elif kind == "lfsFile":
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
                sent.append(value["path"])
            elif kind == "deletedFile" and files.pop(value["path"], None) is not None:
                pass
            else:
                raise Refusal(400, {"error": f"bad operation {kind} {value.get('path')}"})
        place = f"{self.hub.url}/{repo}"
        if self.query.get("create_pr"):
            pull, new = store.open_pull(header["summary"], files, tuple(sent))
            extra: dict[str, Any] = {"pullRequestUrl": f"{place}/discussions/{pull.num}"}
        else:
            new, extra = store.add(rev, header["summary"], files, tuple(sent)), {}
        return as_json({"commitUrl": f"{place}/commit/{new.oid}", "commitOid": new.oid, **extra})

    # Reading

    def info(self, repo: str, rev: str = "main") -> Answer:
        commit = self.commit_at(repo, rev)
        return as_json(
            {
                "id": repo,
                "sha": commit.oid,
                "private": self.repo(repo).private,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def tree(self, repo: str, rev: str) -> Answer:
        files = self.commit_at(repo, rev).files
        entries = [blob.tree_entry(path) for path, blob in sorted(files.items())]
        folders = {path.rsplit("/", 1)[0] for path in files if "/" in path}
        entries += [{"type": "directory", "path": name, "oid": "0"} for name in sorted(folders)]
        start = int(self.query.get("cursor", 0))
        page, headers = entries[start : start + TREE_PAGE], {}
        if start + TREE_PAGE < len(entries):
            place = f"{self.hub.url}/api/models/{repo}/tree/{quote(rev, safe='')}"
            more = f"{place}?recursive=True&cursor={start + TREE_PAGE}"
            headers["Link"] = f'<{more}>; rel="next"'
        return as_json(page, **headers)

    def resolve(self, repo: str, rev: str, path: str) -> Answer:
        commit = self.commit_at(repo, rev)
        blob = commit.files.get(path)
        if blob is None:
            raise Refusal(404, code="EntryNotFound", **{"X-Repo-Commit": commit.oid})
        content, status = blob.content, 200
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{blob.sha256 if blob.lfs else blob.git_oid}"',
            "Accept-Ranges": "bytes",
            **self.xet_headers(repo, commit.oid, blob.sha256),
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        return Answer(content, status, headers)

"""A Hugging Face Hub on loopback, for the real `huggingface_hub` client.

Repositories live in memory: commits, branches, tags, pull requests, regular and LFS files. There is
no Xet storage, so the client must run with ``HF_HUB_DISABLE_XET=1``. What goes wrong on the way is
up to `faults`, see :mod:`hub.faults`.

Use the fixture ``hub`` for a client in this process; a child process gets ``hub.environment()``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
from hub.endpoints import Endpoints
from hub.faults import Faults
from hub.state import Blob, Commit, Repo

__all__ = ["TOKEN", "USER", "Blob", "Commit", "HubServer", "Repo", "hub"]

TOKEN = "hf_loopback-test-token"
USER = "tester"


class HubServer:
    """The server; `repos` may be looked at and changed by a test at any time.

    Attributes:
        repos: repository by ``ORG/NAME``.
        objects: content of LFS files by SHA-256.
        tokens: user by accepted token.
        publishers: token by the OIDC token and the repository that it is exchanged for.
        writable: namespaces the user may write to.
        requests: ``METHOD path`` of every request that arrived whole.
        faults: what goes wrong with a request; asked without holding `lock`.
        before_commit: called with the repository before a commit is applied (a test's chance to
            commit first).
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {TOKEN: USER}
        self.publishers: dict[tuple[str, str], str] = {}
        self.writable = {USER, "org"}
        self.requests: list[str] = []
        self.faults: Faults | None = None
        self.before_commit: Any = None
        self.lock = threading.RLock()
        handler = type("Handler", (Endpoints,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            # How long stopping it takes at most, in seconds.
            target=self._server.serve_forever,
            args=(0.05,),
            daemon=True,
        )

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

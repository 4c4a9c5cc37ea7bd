"""The loopback Hub itself: its state, and the thread that serves it."""

from __future__ import annotations

import threading
from http.server import ThreadingHTTPServer
from typing import Any

from hub.endpoints import Endpoints
from hub.faults import Faults
from hub.state import Blob, Repo
from hub.xet import PREFIX, Storage

TOKEN = "hf_loopback-test-token"
USER = "tester"


class HubServer:
    """The server; `repos` may be looked at and changed by a test at any time.

    Attributes:
        repos: repository by ``ORG/NAME``.
        objects: content of LFS files by SHA-256.
        xet: what lies in the Xet storage.
        cas_url: where that is, None for a Hub without one.
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
        self.xet = Storage()
        self.cas_url: str | None = None
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

    @property
    def xet_url(self) -> str:
        """Where its Xet storage can be reached, for `cas_url`."""
        return f"{self.url}{PREFIX}"

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

"""A Hugging Face Hub on loopback, for the real `huggingface_hub` client.

Repositories live in memory: commits, branches, tags, pull requests, regular and LFS files. The
client runs with ``HF_HUB_DISABLE_XET=1``, except with the fixture ``xet_hub``. What goes wrong on
the way is up to `faults`, see :mod:`hub.faults`.

Use the fixture ``hub`` for a client in this process; a child process gets ``hub.environment()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hub.server import TOKEN, USER, HubServer
from hub.state import Blob, Commit, Repo

__all__ = ["TOKEN", "USER", "Blob", "Commit", "HubServer", "Repo", "hub", "xet_hub"]


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


@pytest.fixture
def xet_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> HubServer:
    """`hub` with a Xet storage, which the client in this process uses for large files."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _xet

    cache = str(tmp_path_factory.mktemp("xet"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(constants, "HF_XET_CACHE", cache)
    # A session reads these when it begins. By itself it tries for minutes.
    monkeypatch.setenv("HF_XET_CACHE", cache)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")
    monkeypatch.setenv("HF_XET_XORB_COMPRESSION_POLICY", "none")
    monkeypatch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())
    # Another test's server may have had the same port.
    monkeypatch.setattr(_xet, "XET_CONNECTION_INFO_CACHE", {})
    hub.cas_url = hub.xet_url
    return hub

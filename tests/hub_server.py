"""A Hugging Face Hub on loopback, for the real `huggingface_hub` client.

Repositories live in memory: commits, branches, tags, pull requests, regular and LFS files. There is
no Xet storage, so the client must run with ``HF_HUB_DISABLE_XET=1``. What goes wrong on the way is
up to `faults`, see :mod:`hub.faults`.

Use the fixture ``hub`` for a client in this process; a child process gets ``hub.environment()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hub.server import TOKEN, USER, HubServer
from hub.state import Blob, Commit, Repo

__all__ = ["TOKEN", "USER", "Blob", "Commit", "HubServer", "Repo", "hub"]


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

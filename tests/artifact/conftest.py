"""Fixtures of pushing and pulling."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits before trying again; the seconds that cqtool would have waited, one after the
    other."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    waited: list[float] = []
    monkeypatch.setattr("cqtool.retry.sleep", waited.append)
    # The client waits by itself between its own tries.
    for module in (_http, file_download):
        never = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        monkeypatch.setattr(module, "time", never)
    return waited

"""Trying again what failed because of a passing trouble of the Hub or the network.

A Hub that accepts a request and stays silent is such a trouble, too: the Hub client would wait for
ever, so requests get a limit here where the client sets none.

The runtime of artifacts carries this module: the Hub client is imported only where it is used.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

from cqtool.errors import CqtoolError, HubError
from cqtool.progress import SILENT, Progress
from cqtool.xet import PASSING_STATUSES, xet_failure

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")

_PASSING_TRANSPORT = frozenset(
    {"TimeoutException", "NetworkError", "RemoteProtocolError", "ConnectionError", "TimeoutError"}
)
"""Names, not classes: huggingface_hub 1.x is built on httpx and 2.x on httpx2, and of the two only
one is installed."""

_CONNECT_SECONDS = 10.0
_hooks = threading.Lock()


class DamagedDownload(HubError):
    """What arrived does not have the digest or the size that the Hub itself lists for it."""


@dataclass(frozen=True)
class Trouble:
    """A failure that may pass.

    Attributes:
        what: the Hub as the subject of a sentence, and what it does.
        wait: seconds that it asked to wait, None where it did not say.
        doubtful: waiting long would be in vain, because it may also be that there is no Hub, or has
            been done already.
        silence: it may be one that the client has waited for by itself, time and again.
    """

    what: str
    wait: float | None = None
    doubtful: bool = False
    silence: bool = False


def passing_trouble(error: BaseException) -> Trouble | None:
    """What kind of passing trouble `error` is, None where trying again would not help."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, DamagedDownload):
        return Trouble("The Hub sent a damaged file")
    if isinstance(error, CqtoolError):
        return None
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        status = error.response.status_code
        if status not in PASSING_STATUSES:
            return None
        return Trouble(f"The Hub answers {status}", _asked_wait(error))
    if isinstance(error, json.JSONDecodeError):
        # A proxy's error page, or an endpoint that is no Hub.
        return Trouble("The Hub's answer cannot be read", doubtful=True)
    xet = xet_failure(error)
    if xet is not None:
        # Before it gives up Xet's client has tried for minutes by itself.
        silence = xet.status is None
        return Trouble(xet.what, doubtful=True, silence=silence) if xet.passing else None
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _PASSING_TRANSPORT and not isinstance(error, OfflineModeIsEnabled):
        # Each silence has lasted as long as a Hub can take for anything.
        absent = bool(kinds & {"ConnectError", "TimeoutException"})
        return Trouble(f"The Hub does not answer ({type(error).__name__})", doubtful=absent)
    # Uploads run in threads, and downloads begin with a look-up: the client wraps what went wrong.
    return passing_trouble(error.__cause__) if error.__cause__ is not None else None


def _asked_wait(error: HfHubHTTPError) -> float | None:
    """Seconds from ``Retry-After``, or from the ``RateLimit`` header (``"api";r=0;t=55``)."""
    headers = error.response.headers
    found = re.fullmatch(r"\s*(\d{1,6})\s*", headers.get("Retry-After") or "")
    found = found or re.search(r"\br=0;\s*t=(\d{1,6})\b", headers.get("RateLimit") or "")
    return float(found[1]) if found else None


@dataclass(frozen=True)
class Retry:
    """How often and how patiently.

    Attributes:
        attempts: tries in all.
        doubtful_attempts: tries where it may be that no Hub is there at all, or the client has
            tried for long by itself.
        first: seconds before the second try; they double from try to try.
        longest: the most they grow to.
        patience: the longest wait that the Hub may ask for, in seconds; the Hub counts requests in
            windows of 300. A try that ends in a silence, and lasted longer, is the last one.
        silence: the longest time in seconds without a byte to or from the Hub. A commit of many
            files can take it a minute.
    """

    attempts: int = 6
    doubtful_attempts: int = 3
    first: float = 1.0
    longest: float = 30.0
    patience: float = 330.0
    silence: float = 90.0

    def call(self, action: Callable[[], T], progress: Progress = SILENT) -> T:
        """The result of `action`, which must be safe to repeat.

        Raises:
            Exception: what `action` raised last, or first where trying again would not help.
        """
        done = 0
        while True:
            started = monotonic()
            try:
                with _limited(self.silence):
                    return action()
            except Exception as error:
                done += 1
                trouble = passing_trouble(error)
                if trouble is None:
                    raise
                wait = min(self.longest, self.first * 2 ** (done - 1))
                if trouble.wait is not None:
                    wait = max(wait, trouble.wait)
                limit = self.doubtful_attempts if trouble.doubtful else self.attempts
                # To a silent storage Xet's client sends six times, and waits for 300 s each time.
                endless = trouble.silence and monotonic() - started > self.patience
                if done >= limit or wait > self.patience or endless:
                    raise
                progress.note(f"{trouble.what}; trying again in {wait:.0f} s")
            sleep(wait)


@contextmanager
def _limited(silence: float) -> Iterator[None]:
    """Inside the block, end requests after `silence` seconds that the Hub client gave no limit.

    A default of the client would not do: some of its requests say themselves that they have no
    limit. So each is changed on its way. The client may be shared with the program that uses
    cqtool, and is neither closed nor replaced; afterwards it is as before.
    """
    from huggingface_hub import get_session

    limits = {"connect": min(silence, _CONNECT_SECONDS), "read": silence, "write": silence}

    def limit(request: Any) -> None:
        given = request.extensions.get("timeout") or {}
        own = {name: seconds for name, seconds in given.items() if seconds is not None}
        request.extensions = {**request.extensions, "timeout": {**given, **limits, **own}}

    client = get_session()
    _change_hooks(client, lambda hooks: [*hooks, limit])
    try:
        yield
    finally:
        _change_hooks(client, lambda hooks: [hook for hook in hooks if hook is not limit])


def _change_hooks(client: Any, change: Callable[[list[Any]], list[Any]]) -> None:
    # A new list each time: another thread may be walking through the old one.
    with _hooks:
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "request": change(hooks["request"])}

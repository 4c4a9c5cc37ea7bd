"""Trying again what failed because of a passing trouble of the Hub or the network.

The runtime of artifacts carries this module: the Hub client is imported only where it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from time import sleep
from typing import TYPE_CHECKING, TypeVar

from cqtool.errors import CqtoolError, HubError
from cqtool.progress import SILENT, Progress

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")

_PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_TRANSPORT = frozenset(
    {"TimeoutException", "NetworkError", "RemoteProtocolError", "ConnectionError", "TimeoutError"}
)
"""Names, not classes: huggingface_hub 1.x is built on httpx and 2.x on httpx2, and of the two only
one is installed."""


class DamagedDownload(HubError):
    """What arrived does not have the digest or the size that the Hub itself lists for it."""


@dataclass(frozen=True)
class Trouble:
    """A failure that may pass.

    Attributes:
        what: the Hub as the subject of a sentence, and what it does.
        wait: seconds that it asked to wait, None where it did not say.
        doubtful: it may also be that there is no Hub, so waiting long would be in vain.
    """

    what: str
    wait: float | None = None
    doubtful: bool = False


def passing_trouble(error: BaseException) -> Trouble | None:
    """What kind of passing trouble `error` is, None where trying again would not help."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, DamagedDownload):
        return Trouble("The Hub sent a damaged file")
    if isinstance(error, CqtoolError):
        return None
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        status = error.response.status_code
        if status not in _PASSING_STATUSES:
            return None
        return Trouble(f"The Hub answers {status}", _asked_wait(error))
    if isinstance(error, json.JSONDecodeError):
        # A proxy's error page, or an endpoint that is no Hub.
        return Trouble("The Hub's answer cannot be read", doubtful=True)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _PASSING_TRANSPORT and not isinstance(error, OfflineModeIsEnabled):
        unconnected = bool(kinds & {"ConnectError", "ConnectTimeout"})
        return Trouble(f"The Hub does not answer ({type(error).__name__})", doubtful=unconnected)
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
        doubtful_attempts: tries where it may be that no Hub is there at all.
        first: seconds before the second try; they double from try to try.
        longest: the most they grow to.
        patience: the longest wait that the Hub may ask for, in seconds; the Hub counts requests in
            windows of 300.
    """

    attempts: int = 6
    doubtful_attempts: int = 3
    first: float = 1.0
    longest: float = 30.0
    patience: float = 330.0

    def call(self, action: Callable[[], T], progress: Progress = SILENT) -> T:
        """The result of `action`, which must be safe to repeat.

        Raises:
            Exception: what `action` raised last, or first where trying again would not help.
        """
        done = 0
        while True:
            try:
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
                if done >= limit or wait > self.patience:
                    raise
                progress.note(f"{trouble.what}; trying again in {wait:.0f} s")
            sleep(wait)

"""What fails in a transfer over Xet, the Hub client's own way for large files.

Its part in Rust (hf_xet) raises errors of general kinds (RuntimeError, ConnectionError, OSError, by
version and direction), with what happened in their text. They are told from any others by where
they were raised: in the function of the Hub client that calls it, with no Python below.

The runtime of artifacts carries this module: the Hub client is imported only where it is used.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cqtool.files import explain_os_errors

WITHOUT = "set HF_HUB_DISABLE_XET=1 to do without Xet"
PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
_OS_ERROR = re.compile(r"\bI/?O error\b.*\(os error (\d{1,5})\)", re.IGNORECASE)
_DROPPED = re.compile(
    r"error (?:sending request|decoding)|timed? ?out|connection|size mismatch", re.IGNORECASE
)
_NO_ROUTE = frozenset({404, 405, 501})
_TOKEN_ROUTE = re.compile(r"/xet-(?:read|write)-token/")
_NETWORK = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN})


@dataclass(frozen=True)
class XetFailure:
    """Why a transfer failed.

    Attributes:
        passing: it may pass.
        status: what the storage, or the Hub that hands out its tokens, answers.
        number: errno of a file of this machine that cannot be written.
        missing: the server is a Hub without Xet.
    """

    passing: bool
    status: int | None = None
    number: int | None = None
    missing: bool = False

    @property
    def what(self) -> str:
        """The storage as the subject of a sentence, and what it does."""
        if self.status is not None:
            return f"The Hub's Xet storage answers {self.status}"
        if self.passing:
            return "The Hub's Xet storage does not answer, or hangs up"
        return "The Hub client cannot transfer files over Xet"

    def sentence(self, endpoint: str, again: str) -> str:
        """What is wrong and what to do; `again` says how to try again."""
        if self.missing:
            return f"The server at {endpoint} has no Xet storage; {WITHOUT}, then {again}."
        if self.number is not None:
            return (
                f"The Hub client cannot write on this machine ({os.strerror(self.number)}); make "
                f"room for its files, then {again}, or {WITHOUT}."
            )
        if self.passing:
            first = "wait a few minutes" if self.status else "check the network and the proxy"
            return f"{self.what}; {first}, then {again}, or {WITHOUT}."
        return f"{self.what}; {WITHOUT}, then {again}."


def xet_failure(error: BaseException) -> XetFailure | None:
    """What `error` says of a transfer over Xet, None where it is none of its errors."""
    if _refuses_tokens(error):
        return XetFailure(False, missing=True)
    if not _raised_by_xet(error):
        return None
    text = str(error)
    if found := _STATUS.search(text):
        status = int(found[1])
        missing = status in _NO_ROUTE and _TOKEN_ROUTE.search(text) is not None
        return XetFailure(status in PASSING_STATUSES, status, missing=missing)
    if found := _OS_ERROR.search(text):
        number = int(found[1])
        if not _is_of_network(number):
            return XetFailure(False, number=number)
    transport = isinstance(error, (ConnectionError, TimeoutError))
    return XetFailure(transport or _DROPPED.search(text) is not None)


def _refuses_tokens(error: BaseException) -> bool:
    """Whether `error` is the answer of a Hub that knows nothing of Xet.

    For downloads the client asks for the storage's token itself, for uploads hf_xet does.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    others = (LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)
    return (
        isinstance(error, HfHubHTTPError)
        and not isinstance(error, others)
        and error.response.status_code in _NO_ROUTE
        and _TOKEN_ROUTE.search(str(error.response.request.url)) is not None
    )


def _is_of_network(number: int) -> bool:
    return number in _NETWORK or isinstance(OSError(number, ""), (ConnectionError, TimeoutError))


def _raised_by_xet(error: BaseException) -> bool:
    """Whether the innermost Python frame is one of the client's that call into hf_xet."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, Exception):
        return False
    package = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
    return package == "huggingface_hub" and "xet" in trace.tb_frame.f_code.co_name


@contextmanager
def own_cache_explained() -> Iterator[None]:
    """Turn what says that Xet cannot write to its own cache into a sentence with its fix.

    Of the file that it fetches it says so with another kind of error.

    Raises:
        EnvironmentProblem: the disk is full, or the cache cannot be written.
    """
    from huggingface_hub import constants

    try:
        yield
    except OSError as error:
        failure = xet_failure(error)
        if failure is None or failure.number is None:
            raise
        place = Path(constants.HF_XET_CACHE)
        with explain_os_errors(place, "set HF_XET_CACHE to another folder"):
            raise

"""What the Hub client raises, turned into one sentence with its fix.

The token is in none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cqtool.errors import CqtoolError, HubError
from cqtool.xet import xet_failure

LOGIN = (
    "Log in with `hf auth login`, or set HF_TOKEN to a token that may write "
    "(https://huggingface.co/settings/tokens)."
)

# huggingface_hub 1.x is built on httpx and 2.x on httpx2; its own error tells which one is in use.
_TRANSPORT_ERRORS = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)
_BAD_METADATA = "Invalid metadata in README.md."
CONFLICTS = frozenset({409, 412})


@contextmanager
def explain_hub_errors(repo_id: str) -> Iterator[None]:
    """Turn the Hub client's errors about `repo_id` into :class:`HubError`.

    Errors that are none of the Hub's, a full disk for example, pass through.
    """
    try:
        yield
    except Exception as error:
        sentence = _explain(error, repo_id)
        if sentence is None:
            raise
        # The client's own text can quote request headers and server answers: it is left out.
        raise HubError(sentence) from None


def _explain(error: BaseException, repo_id: str) -> str | None:
    if isinstance(error, CqtoolError):
        return None
    if isinstance(error, LocalTokenNotFoundError):
        return f"There is no Hub token. {LOGIN}"
    if isinstance(error, OIDCError):
        return (
            "HF_OIDC_RESOURCE is set, but this job has no OIDC token to exchange; grant it the "
            "permission `id-token: write`, or unset HF_OIDC_RESOURCE and set HF_TOKEN."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub client is in offline mode; unset HF_HUB_OFFLINE to reach the Hub."
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__, repo_id)
    xet = xet_failure(error)
    if xet is not None:
        return xet.sentence(constants.ENDPOINT, "run the same command again")
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, repo_id)
    if isinstance(error, _TRANSPORT_ERRORS):
        return (
            f"Cannot reach the Hub at {constants.ENDPOINT} ({type(error).__name__}); check the "
            "network, the proxy and HF_ENDPOINT, then run the same command again."
        )
    if isinstance(error, json.JSONDecodeError):
        return f"What answers at {constants.ENDPOINT} is not the Hub; check HF_ENDPOINT."
    if isinstance(error, ValueError) and str(error).startswith(_BAD_METADATA):
        details = " ".join(str(error).removeprefix(_BAD_METADATA).split())
        return (
            f"The Hub refuses the model card's metadata ({details}); correct base_model.license "
            "in the calibration's cq_config.json, then export and push again."
        )
    # Uploads run in threads, and the client wraps what went wrong there.
    return _explain(error.__cause__, repo_id) if error.__cause__ is not None else None


def _explain_answer(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code
    again = "then run the same command again."
    if error.response.request.url.path == "/oauth/token":
        return (
            f"The Hub does not exchange this job's OIDC token for HF_OIDC_RESOURCE ({status}); add "
            "this workflow to the trusted publishers in the repository's settings, or unset "
            "HF_OIDC_RESOURCE and set HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision; check --revision, {again}"
    if status == 401 and error.response.request.headers.get("authorization"):
        return f"The Hub does not accept this token (401). {LOGIN}"
    if status == 401:
        return f"The Hub wants a token (401). {LOGIN}"
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated, and this token has no access ({status}); ask for it at "
            f"{constants.ENDPOINT}/{repo_id}, or use another token. {LOGIN}"
        )
    if status == 403 and error.response.request.method in ("GET", "HEAD"):
        return (
            f"This token may not read {repo_id} (403); use one that may, or check the name. {LOGIN}"
        )
    if status == 403:
        return (
            f"This token may not write to {repo_id} (403); use a token with write access to that "
            f"namespace, or another --repo-id. {LOGIN}"
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return (
            f"The Hub does not know {repo_id} ({status}), or this token may not see it; check the "
            f"name and the token, {again}"
        )
    if status in CONFLICTS:
        return conflict(repo_id)
    if status == 429:
        return f"The Hub asks to slow down (429); wait a few minutes, {again}"
    if status >= 500:
        return f"The Hub has a problem of its own ({status}); wait a few minutes, {again}"
    return f"The Hub refused the request for {repo_id} ({status}); check the name, {again}"


def conflict(repo_id: str) -> str:
    """The sentence about a commit that came in between."""
    return (
        f"Somebody else changed {repo_id} at the same moment; look at what is there now, then run "
        "the same command again."
    )

"""Runs cqtool's command line in processes that may be killed, without the seconds of its imports.

They are forks of one process that has imported everything (multiprocessing's fork server) and runs
no threads.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

IMPORTED = (
    "cqtool.artifact.export",
    "cqtool.artifact.push",
    "cqtool.cli.app",
    "cqtool.codebooks.calibrate",
    "cqtool.models.load",
    "faiss",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.encoder_decoder",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended: `code` is negative for a signal, `seconds` as `kill_after` has them."""

    code: int
    output: str
    seconds: float


def _work(words: Sequence[str], hub_url: str, token: str, home: Path) -> None:
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    import torch
    from huggingface_hub import constants

    from cqtool.cli.app import app

    torch.set_num_threads(1)
    os.environ["HF_TOKEN"] = token
    # The client read the environment of the process that this is a fork of.
    constants.ENDPOINT = hub_url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub_url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_DISABLE_XET = True
    constants.HF_HUB_OFFLINE = False
    constants.HF_HUB_CACHE = str(home / "hub")
    (home / "started").touch()
    app(list(words))


def run(
    *words: object,
    hub_url: str,
    token: str,
    home: Path,
    kill_after: float | None = None,
    since: Callable[[], bool] = lambda: True,
) -> Ended:
    """Run a command in a fork, to its end or until SIGKILL ends it.

    Args:
        words: of the command line, without ``cqtool``.
        hub_url: the Hub that it talks to.
        token: its token there.
        home: a folder for the Hub client's cache and for what the command prints.
        kill_after: seconds from its beginning.
        since: whether what the seconds are counted from has begun.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    started = home / "started"
    started.unlink(missing_ok=True)
    process = context.Process(target=_work, args=([*map(str, words)], hub_url, token, home))
    process.start()
    while not (started.exists() and since()) and process.is_alive():
        time.sleep(0.001)
    begin = time.monotonic()
    process.join(kill_after)
    process.kill()
    process.join()
    seconds = time.monotonic() - begin
    assert process.exitcode is not None
    return Ended(process.exitcode, (home / "log").read_text(), seconds)

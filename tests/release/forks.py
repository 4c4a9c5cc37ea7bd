"""Runs cqtool's command line in forks of a process that has imported everything already.

Each line of standard input is a list of runs to do at the same time: `words` of the command line,
the working `folder`, and what goes wrong as `kill`: it is killed, by SIGKILL or another `signal`,
after `seconds` of work, or at the first `call` of a function (`module:name`, with an `argument` if
one is given), before or `after` it; or no file of it gets larger than `file_bytes`. The answer is
one line: for each run exit code (negative for a signal), output, and seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from matplotlib.font_manager import findfont
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import cqtool.release.chain
import cqtool.release.rebuild  # noqa: F401
from cqtool.cli import main


def arm(kill: dict[str, Any]) -> None:
    def die() -> None:
        os.kill(os.getpid(), kill.get("signal", signal.SIGKILL))

    if "file_bytes" in kill:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill["file_bytes"],) * 2)
        return
    if "seconds" in kill:
        threading.Timer(kill["seconds"], die).start()
        return
    place, _, name = kill["call"].partition(":")
    owner: Any = importlib.import_module(place)
    *parents, name = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, wanted = getattr(owner, name), kill.get("argument")

    def wrapped(*args: Any, **options: Any) -> Any:
        chosen = wanted is None or wanted in args
        if chosen and not kill.get("after"):
            die()
        result = original(*args, **options)
        if chosen:
            die()
        return result

    setattr(owner, name, wrapped)


def child(words: list[str], kill: dict[str, Any] | None, folder: str, files: list[Path]) -> None:
    code = 70
    try:
        for number, path in enumerate(files, start=1):
            os.dup2(os.open(path, os.O_WRONLY), number)
        sys.argv = ["cqtool", *words]
        os.chdir(folder)
        if kill:
            arm(kill)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    findfont("DejaVu Sans")  # read once, not in every fork
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            asked = json.loads(line)
            started, running = time.monotonic(), []
            for number, one in enumerate(asked):
                files = [Path(folder) / f"{name}-{number}" for name in ("stdout", "stderr")]
                for path in files:
                    path.write_text("")
                if (pid := os.fork()) == 0:
                    child(one["words"], one["kill"], one["folder"], files)
                running.append((pid, files))
            answers = [
                {
                    "code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]),
                    "seconds": time.monotonic() - started,
                    **{path.name.split("-")[0]: path.read_text() for path in files},
                }
                for pid, files in running
            ]
            print(json.dumps(answers), flush=True)

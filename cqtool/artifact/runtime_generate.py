"""Generation over an artifact's coded cache, as transformers runs it from a repository.

`cqtool export` writes this file as ``custom_generate/generate.py``. Nothing of it runs before the
user allows it, in the call that names the repository::

    model.generate(**inputs, custom_generate="org/name", trust_remote_code=True)

transformers then runs a copy of this file that lies in its cache of modules, in a folder that is
named after the commit. What the manifest lists is fetched at the same commit, and nothing else that
lies in the repository; every file is compared with it before it is used. cqtool need not be
installed.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from huggingface_hub import constants, hf_hub_download, snapshot_download

_OWN, _RUNTIME = "custom_generate/generate.py", "build/torch-cuda"
_MANIFEST = "manifest.json"
_REMEDY = "Download the artifact again (force_download=True does), from a source that you trust."

# What transformers asks the Hub by, which the model knows nothing of; the first are for here too.
_FETCHING = ("cache_dir", "force_download", "local_files_only", "token")
_HUB_OPTIONS = (*_FETCHING, "code_revision", "proxies", "repo_type", "revision", "subfolder")

# transformers takes their code from further repositories, which have not been trusted here.
_ELSEWHERE = {
    "constraints": "Constrained beam search",
    "force_words_ids": "Constrained beam search",
    "dola_layers": "DoLa",
    "penalty_alpha": "Contrastive search",
}

_fetched: set[Path] = set()
_formats: WeakKeyDictionary[Any, dict[tuple[object, ...], tuple[Any, Any]]] = WeakKeyDictionary()
"""For each model the class `CQCache` and the format of what it was used with, so that digests,
fingerprint and codebooks are read once and not at every call."""


def generate(
    model: Any,
    *,
    cq_artifact: str | os.PathLike[str] | None = None,
    allow_other_base: bool = False,
    **options: Any,
) -> Any:
    """Generate as `model.generate` does, over a new coded cache.

    Greedy search, sampling, beam search and assisted generation are those of transformers.

    Args:
        model: the artifact's base model.
        cq_artifact: folder of the artifact, where `custom_generate` names a folder: transformers
            does not say which one this code came from. Not needed for a repository.
        allow_other_base: accept a model whose weights differ, for fine-tunes.
        options: all that `model.generate` takes but a cache; and those by which the Hub is asked,
            such as `revision` and `token`.

    Returns:
        What `model.generate` returns. With ``return_dict_in_generate=True`` the cache is its
        `past_key_values`.

    Raises:
        ValueError: the options leave no place for the cache, or name a mode that is not supported.
        OSError: the artifact cannot be fetched.
        ImportError: the code in it is damaged, or a package is missing.
        Exception: the runtime's own errors, each one sentence: a damaged file, or another model.
    """
    asked = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    _check_options(model, options)
    fetching = {name: asked[name] for name in _FETCHING if asked.get(name) is not None}
    folder = _snapshot(fetching) if cq_artifact is None else Path(cq_artifact)
    cache = _new_cache(folder, model, allow_other_base)
    return model.generate(**options, past_key_values=cache)


def _check_options(model: Any, options: dict[str, Any]) -> None:
    """Refuse what cannot be done over a cache that is made here, and drop an empty one."""
    if options.pop("past_key_values", None) is not None:
        raise ValueError(
            "custom_generate makes the coded cache itself: leave past_key_values out, or, to go on "
            "with a cache that you have, leave custom_generate out."
        )
    config = options.get("generation_config") or model.generation_config

    def given(name: str) -> Any:
        value = options.get(name)
        return getattr(config, name, None) if value is None else value

    if given("use_cache") is False:
        raise ValueError("Generation over a coded cache needs a cache: give use_cache=True.")
    if given("cache_implementation") is not None:
        raise ValueError(
            "The coded cache takes the place of transformers' own caches: leave "
            "cache_implementation out, and set it to None in the generation configuration."
        )
    names = [name for name in _ELSEWHERE if given(name) is not None]
    mode = _ELSEWHERE[names[0]] if names else "Group beam search"
    if names or (given("num_beam_groups") or 1) > 1:
        raise ValueError(
            f"{mode} is not supported over a coded cache: leave "
            f"{names[0] if names else 'num_beam_groups'} out, or leave custom_generate out."
        )


def _snapshot(fetching: dict[str, Any]) -> Path:
    """The folder of the Hub client's cache that holds the artifact at this file's own commit."""
    here = Path(__file__).parent
    commit, place = here.parent.name, here.parent.parent.as_posix()
    if re.fullmatch("[0-9a-f]{40}", commit) is None:
        raise ValueError(
            "transformers does not say which folder this code came from: give the folder of "
            "custom_generate as cq_artifact too."
        )
    cache = Path(fetching.get("cache_dir", constants.HF_HUB_CACHE)).expanduser()
    for own in sorted(cache.glob(f"models--*/snapshots/{commit}/{_OWN}")):
        folder = own.parent.parent
        # Never ambiguous: a repository's name has no two hyphens in a row.
        repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        if not place.endswith(f"/{_module_path(repo)}"):
            continue
        if folder not in _fetched or fetching.get("force_download"):
            _fetch(repo, commit, folder, fetching)
            _fetched.add(folder)
        return folder
    raise OSError(
        f"{cache} does not hold the repository that this code came from; give its cache_dir, or "
        "the artifact's folder as cq_artifact."
    )


def _fetch(repo: str, commit: str, folder: Path, fetching: dict[str, Any]) -> None:
    """Let the Hub client complete `folder`; what its cache holds is not fetched again."""
    cause: Exception | None = None
    try:
        manifest = Path(hf_hub_download(repo, _MANIFEST, revision=commit, **fetching))
        names = list(_records(folder, manifest.read_bytes()))
        # Patterns to the client, of which a name may hold the signs.
        wanted = [glob.escape(name) for name in names]
        snapshot_download(repo, revision=commit, allow_patterns=wanted, **fetching)
    except ImportError:
        raise
    except Exception as error:
        reason, cause = (str(error) or type(error).__name__).splitlines()[0], error
    else:
        # Without a network the client is content with a part of what it never saw a list of.
        lacking = [name for name in names if not (folder / name).is_file()]
        if not lacking:
            return
        reason = f"the Hub client's cache lacks {lacking[0]}"
    raise OSError(
        f"{repo} at {commit} cannot be fetched as a whole ({reason}); check the network, or load "
        "it once where there is one."
    ) from cause


def _module_path(repo: str) -> str:
    """What transformers makes of a repository's name in its folder of modules."""
    plain = repo.replace(".", "_dot_").replace("-", "_hyphen_")
    return "/".join(f"_{part}" if part[0].isdigit() else part for part in plain.split("/"))


def _new_cache(folder: Path, model: Any, allow_other_base: bool) -> Any:
    """An empty `CQCache` of the artifact in `folder`."""
    try:
        manifest = (folder / _MANIFEST).read_bytes()
    except OSError as error:
        raise OSError(
            f"{folder} has no manifest.json that can be read, so it is no artifact of cqtool; give "
            "the folder of one."
        ) from error
    known = _formats.setdefault(model, {})
    key = (hashlib.sha256(manifest).digest(), allow_other_base, str(model.device))
    if key not in known:
        runtime = _load_runtime(folder, manifest).CQCache
        first = runtime.from_pretrained(folder, model, allow_other_base=allow_other_base)
        known[key] = runtime, first.format
    runtime, codebooks = known[key]
    return runtime(codebooks, model)


def _load_runtime(folder: Path, manifest: bytes) -> Any:
    """The runtime's package, which compares its other files before it imports them."""
    records = _records(folder, manifest)
    runtime = {name: one for name, one in records.items() if name.startswith(f"{_RUNTIME}/")}
    if not _is_listed(records.get(_OWN), Path(__file__).read_bytes()):
        raise ImportError(
            f"{__file__} is not the {_OWN} that {folder} lists; remove that copy, and give as "
            "cq_artifact, if at all, the folder that custom_generate names."
        )
    file = folder / _RUNTIME / "__init__.py"
    data = file.read_bytes() if file.is_file() else b""
    if not _is_listed(runtime.get(f"{_RUNTIME}/__init__.py"), data):
        raise ImportError(f"{file} does not have the digest that the manifest lists. {_REMEDY}")
    # Runtimes with other contents do not meet in one process, nor with one that was imported by
    # other means: what they register with torch is named after the module.
    digest = hashlib.sha256(json.dumps(runtime, sort_keys=True).encode()).hexdigest()
    name = f"cqtool_generate_{digest[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, file, submodule_search_locations=[str(file.parent)]
        )
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            # The bytes that were compared, whatever lies on the disk by now.
            exec(compile(data, str(file), "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _records(folder: Path, manifest: bytes) -> dict[str, Any]:
    """What the manifest of `folder` says of each file, by its name."""
    try:
        return dict(json.loads(manifest)["files"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImportError(f"{folder}/{_MANIFEST} is no list of digests. {_REMEDY}") from error


def _is_listed(record: Any, data: bytes) -> bool:
    return bool(
        isinstance(record, dict)
        and record.get("size") == len(data)
        and record.get("sha256") == hashlib.sha256(data).hexdigest()
    )

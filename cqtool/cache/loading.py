"""Reads a calibration folder or artifact into a :class:`CacheFormat`, and refuses what is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from cqtool.cache.codec import CQCodec
from cqtool.cache.format import CacheFormat, LayerCodecs
from cqtool.errors import ArtifactError, CqtoolError, HubError
from cqtool.manifest import MANIFEST_NAME, verify_folder
from cqtool.models.fingerprint import compare_fingerprints, fingerprint
from cqtool.models.geometry import ModelGeometry, read_geometry
from cqtool.spec import KINDS, CacheSpec, Kind

FORMAT_VERSION = 1
CONFIG_NAME = "cq_config.json"
CODEBOOKS_NAME = "codebooks.safetensors"


@dataclass(frozen=True)
class LoadedConfig:
    """The part of cq_config.json that the runtime acts on."""

    base_model: str
    fingerprint: dict[str, Any]
    spec: CacheSpec
    geometry: ModelGeometry


def codebook_name(layer: int, kind: Kind) -> str:
    """Name of a codebook tensor in codebooks.safetensors."""
    return f"layers.{layer}.{kind}.codebook"


def load_format(
    path: str | PathLike[str],
    model: PreTrainedModel,
    *,
    revision: str | None = None,
    allow_other_base: bool = False,
) -> CacheFormat:
    """Load codebooks and bind them to `model`; see :meth:`CQCache.from_pretrained`."""
    folder = resolve(path, revision)
    config = load_config(folder)
    difference = compare_fingerprints(config.fingerprint, fingerprint(model))
    if difference is not None and not allow_other_base:
        raise ArtifactError(
            f"{path} was made for {config.base_model}, not for this model ({difference}); load "
            "that base model, or pass allow_other_base=True for a fine-tune of it."
        )
    if read_geometry(model) != config.geometry:
        raise ArtifactError(
            f"{path} was made for {config.base_model}, whose cache has other shapes than this "
            "model's; load that base model."
        )
    return CacheFormat(
        name=config.spec.name,
        geometry=config.geometry,
        layers=load_codecs(folder / CODEBOOKS_NAME, config),
        window=config.spec.window,
        sinks=config.spec.sinks,
    )


def resolve(path: str | PathLike[str], revision: str | None) -> Path:
    """The verified local folder of an artifact, downloaded first when `path` is a repository.

    Raises:
        ArtifactError: no such folder, or its files do not match its manifest.
        HubError: the repository cannot be reached.
    """
    folder = Path(path)
    if not folder.is_dir():
        text = str(path)
        if folder.exists() or text.count("/") > 1 or text.startswith((".", "~", "/")):
            raise ArtifactError(
                f"{path} is not a folder; give a folder that cqtool wrote, or a repository id "
                "such as org/name."
            )
        folder = _download(text, revision)
    if (folder / MANIFEST_NAME).exists():
        verify_folder(folder)
    return folder


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision))
    except HFValidationError as error:
        raise ArtifactError(
            f"{repo} is neither a folder nor a repository id; give a folder that cqtool wrote, or "
            "an id such as org/name."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubError(
            f"Cannot fetch {repo} ({type(error).__name__}); check the name, the revision, the "
            "network, and for private repositories `hf auth login`."
        ) from error


def load_config(folder: Path) -> LoadedConfig:
    """Read cq_config.json.

    Raises:
        ArtifactError: missing, damaged, or of a version this cqtool does not know.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise ArtifactError(
            f"{folder} holds no {CONFIG_NAME}; give a folder that `cqtool calibrate` or "
            "`cqtool export` wrote."
        )
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        version = value["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged; download or export it again.") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {version}, this cqtool reads {FORMAT_VERSION}; upgrade "
            "cqtool."
        )
    try:
        return LoadedConfig(
            base_model=str(value["base_model"]["id"]),
            fingerprint=dict(value["base_model"]["fingerprint"]),
            spec=CacheSpec.from_json(value["cache"]),
            geometry=ModelGeometry.from_json(value["geometry"]),
        )
    except (KeyError, TypeError, ValueError, CqtoolError) as error:
        raise ArtifactError(
            f"{file} lacks a field or has a wrong one ({error}); download or export it again."
        ) from error


def load_codecs(file: Path, config: LoadedConfig) -> tuple[LayerCodecs, ...]:
    """Read the codebooks; every shape is checked in the header before its data is read.

    Raises:
        ArtifactError: the file is missing, damaged, or does not fit the configuration.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            names = set(opened.keys())

            def read(layer: int, kind: Kind) -> Tensor:
                name, code = codebook_name(layer, kind), config.spec.code(kind)
                geometry = config.geometry.layers[layer]
                groups = geometry.dim(kind) // code.channels
                expected = [geometry.kv_heads, groups, code.centroids, code.channels]
                if name not in names or opened.get_slice(name).get_shape() != expected:
                    raise ArtifactError(
                        f"{file} has no codebook {name} of shape {expected}; download or export "
                        "it again."
                    )
                tensor = opened.get_tensor(name)
                if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
                    raise ArtifactError(
                        f"{file}: {name} is not made of finite numbers; download or export it "
                        "again."
                    )
                assert isinstance(tensor, Tensor)
                return tensor

            return tuple(
                LayerCodecs(*(CQCodec(read(layer, kind)) for kind in KINDS))
                for layer in range(len(config.geometry.layers))
            )
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); download or export it again.") from error

"""Reads a calibration folder or artifact into a :class:`CacheFormat`, and refuses what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from cqtool.cache.codec import CQCodec, HeadsCodec
from cqtool.cache.format import CacheFormat, LayerCodecs
from cqtool.cache.pull import pull
from cqtool.cache.shipped import trust_shipped_kernels
from cqtool.errors import ArtifactError
from cqtool.geometry import ModelGeometry
from cqtool.layout.codebook_file import check_codebooks
from cqtool.layout.config import (
    CODEBOOKS_NAME,
    EXTRAS,
    CQConfig,
    channels_name,
    codebook_name,
    extra_name,
    owner_name,
    read_config,
)
from cqtool.manifest import MANIFEST_NAME, verify_folder
from cqtool.models.fingerprint import compare_fingerprints, fingerprint
from cqtool.models.probe import read_geometry
from cqtool.spec import KINDS, CacheSpec, Kind


def load_format(
    path: str | PathLike[str],
    model: PreTrainedModel,
    *,
    revision: str | None = None,
    allow_other_base: bool = False,
    trust_kernels: bool = False,
) -> CacheFormat:
    """Load codebooks and bind them to `model`; see :meth:`CQCache.from_pretrained`."""
    folder = resolve(path, revision)
    config = read_config(folder)
    difference = compare_fingerprints(dict(config.base_model.fingerprint), fingerprint(model))
    if difference is not None and not allow_other_base:
        raise ArtifactError(
            f"{path} was made for {config.base_model.id}, not for this model ({difference}); load "
            "that base model. For a fine-tune of it, give --allow-other-base, or in Python "
            "allow_other_base=True."
        )
    geometry = read_geometry(model)
    if geometry != config.geometry:
        raise ArtifactError(
            f"{path} was made for {config.base_model.id}, whose cache has other shapes than this "
            "model's; load that base model."
        )
    codecs = _load_codecs(folder, config)
    if trust_kernels:
        trust_shipped_kernels(folder)
    return CacheFormat(
        name=config.cache.name,
        geometry=geometry,
        layers=codecs,
        window=config.cache.window,
        sinks=config.cache.sinks,
    )


def resolve(path: str | PathLike[str], revision: str | None) -> Path:
    """The verified local folder of an artifact, downloaded first when `path` is a repository.

    Raises:
        ArtifactError: no such folder, or its files do not match its manifest.
        HubError: the repository cannot be fetched.
        EnvironmentProblem: the Hub client's cache cannot be written.
    """
    folder = Path(path)
    if not folder.is_dir():
        text = str(path)
        if folder.exists() or text.count("/") > 1 or text.startswith((".", "~", "/")):
            raise ArtifactError(
                f"{path} is not a folder; give a folder that cqtool wrote, or a repository id "
                "such as org/name."
            )
        return pull(text, revision)
    if (folder / MANIFEST_NAME).exists():
        verify_folder(folder)
    return folder


def _load_codecs(folder: Path, config: CQConfig) -> tuple[LayerCodecs, ...]:
    check_codebooks(folder, config)
    tensors = load_file(folder / CODEBOOKS_NAME)

    def tables(layer: int, owner: str) -> CodecTables:
        # check_codebooks made sure that these are the tensors that the format asks for.
        name = owner_name(layer, owner)
        extras = {part: tensors.get(extra_name(name, part)) for part in EXTRAS}
        return tensors[codebook_name(name)], tensors.get(channels_name(name)), extras

    return make_codecs(config.cache, config.geometry, tables)


CodecTables = tuple[Tensor, Tensor | None, Mapping[str, Tensor | None]]
"""Codebook, channels and further arguments of a :class:`CQCodec`."""


def make_codecs(
    spec: CacheSpec, geometry: ModelGeometry, tables: Callable[[int, str], CodecTables]
) -> tuple[LayerCodecs, ...]:
    """The codecs of all layers.

    Args:
        spec: the format.
        geometry: the model's cache geometry.
        tables: gives what an owner of codebooks in a layer has; see
            :meth:`cqtool.spec.CacheSpec.owners`.
    """

    def codec(layer: int, kind: Kind) -> CQCodec | HeadsCodec:
        parts = []
        for owner, _, head in spec.owners(layer, kind):
            codebook, channels, extras = tables(layer, owner)
            heads = geometry.layers[layer].kv_heads if head is None else 1
            parts.append(CQCodec(codebook, channels, **extras, heads=heads))
        return parts[0] if len(parts) == 1 else HeadsCodec(parts)

    return tuple(
        LayerCodecs(*(codec(layer, kind) for kind in KINDS))
        for layer in range(len(geometry.layers))
    )

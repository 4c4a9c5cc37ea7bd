"""Fitted codebooks as files: those of a calibration, and each layer's while it is being made."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cqtool.codebooks.fit import LayerFit
from cqtool.files import atomic_file
from cqtool.layout.config import (
    EXTRAS,
    channels_name,
    codebook_name,
    extra_name,
    owner_name,
)


def write_codebooks(path: Path, fits: list[LayerFit]) -> None:
    """Write codebooks.safetensors for the fitted layers, in order."""
    tensors: dict[str, Tensor] = {}
    for layer, fit in enumerate(fits):
        for owner, codebook in fit.codebooks.items():
            name = owner_name(layer, owner)
            tensors[codebook_name(name)] = codebook
            channels = fit.channels[owner]
            if channels is not None:
                tensors[channels_name(name)] = channels.to(torch.int16)
            for part, extra in fit.extras[owner].items():
                tensors[extra_name(name, part)] = extra.contiguous()
    with atomic_file(path) as temporary:
        save_file(tensors, temporary)


def write_fit(path: Path, fit: LayerFit) -> None:
    """Write one layer's codebooks, and its errors as metadata."""
    tensors: dict[str, Tensor] = dict(fit.codebooks)
    for owner, channels in fit.channels.items():
        if channels is not None:
            tensors[f"{owner}.channels"] = channels.contiguous()
    for owner, extras in fit.extras.items():
        tensors |= {f"{owner}.{part}": extra.contiguous() for part, extra in extras.items()}
    errors = {owner: repr(error) for owner, error in fit.errors.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, errors)


def read_fit(file: Path) -> LayerFit | None:
    """What :func:`write_fit` wrote, None where there is no such file or it is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            # Metadata come in any order, and a resumed calibration is to write the same bytes.
            found = opened.metadata() or {}
            errors = {owner: float(found[owner]) for owner in sorted(found, key=_place)}
            names = set(opened.keys())
            codebooks = {owner: opened.get_tensor(owner) for owner in errors}
            channels = {
                owner: opened.get_tensor(name) if (name := f"{owner}.channels") in names else None
                for owner in errors
            }
            extras = {
                owner: {
                    part: opened.get_tensor(name)
                    for part in EXTRAS
                    if (name := f"{owner}.{part}") in names
                }
                for owner in errors
            }
            return LayerFit(codebooks, errors, channels, extras) if errors else None
    except (SafetensorError, OSError, KeyError, ValueError):
        # Fitting a layer again takes less than finding out what happened to the file.
        return None


def _place(owner: str) -> tuple[str, int]:
    """Where an owner such as ``key.heads.10`` stands: keys first, then by heads."""
    kind, _, head = owner.partition(".heads.")
    return kind, int(head or 0)

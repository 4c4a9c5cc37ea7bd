"""The sample store: keys, values and their gradients on disk, one file per layer and sequence.

A file is written once, complete, and never changed, so an interrupted collection continues with
the first sequence that lacks a file, and a reader needs memory for one layer at a time.

    samples/meta.json
    samples/layer-000/seq-00000.safetensors     key, value [tokens, kv_heads, head_dim]
                                                key_grad, value_grad (same shapes, bfloat16)
                                                key_moment, value_moment (float32
                                                [kv_heads, head_dim, head_dim])
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cqtool.errors import SampleError
from cqtool.files import atomic_file, write_json
from cqtool.spec import Kind

# 2: with the fingerprint of sums of weights. A fingerprint of before cannot be compared with one.
FORMAT_VERSION = 2
_FLOAT16_MAX = 6e4


class SampleStore:
    """Read access to a complete store, and the writer's view of one in the making.

    Attributes:
        path: the folder.
        meta: what was sampled: model, fingerprint, data, sequences, layers, gradients, moments.
    """

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path = path
        self.meta = meta

    @classmethod
    def open(cls, path: Path) -> SampleStore:
        """Open a complete store: the folder itself, or a calibration folder that holds one.

        Raises:
            SampleError: there is none at `path`, or its collection did not finish.
        """
        path = Path(path)
        if not (path / "meta.json").is_file() and (path / "samples" / "meta.json").is_file():
            path = path / "samples"
        if not (path / "meta.json").is_file():
            raise SampleError(
                f"{path} holds no sample store; calibrate with --keep-samples, or give a folder "
                "that has one (--samples)."
            )
        store = cls(path, read_meta(path))
        missing = [i for i in range(store.sequences) if not store.has_sequence(i)]
        if missing:
            raise SampleError(
                f"The sample store {path} is incomplete ({len(missing)} of {store.sequences} "
                "sequences missing); finish it with `cqtool calibrate ... --resume`."
            )
        return store

    @classmethod
    def create(cls, path: Path, meta: dict[str, Any]) -> SampleStore:
        """Start a store, or continue the one that `path` holds for the very same `meta`.

        Raises:
            SampleError: `path` holds samples of something else.
        """
        meta = {"format_version": FORMAT_VERSION, **meta}
        if (path / "meta.json").is_file():
            found = read_meta(path)
            changed = sorted(
                key for key in meta.keys() | found.keys() if meta.get(key) != found.get(key)
            )
            if changed:
                raise SampleError(
                    f"The samples in {path} were taken with other settings ({', '.join(changed)} "
                    "differ); choose another --out, or start over with --force."
                )
        else:
            write_json(path / "meta.json", meta)
        return cls(path, meta)

    @property
    def layers(self) -> int:
        """How many layers were sampled."""
        return int(self.meta["layers"])

    @property
    def sequences(self) -> int:
        """How many token windows were sampled."""
        return int(self.meta["sequences"])

    @property
    def tokens(self) -> int:
        """How many tokens were sampled in all."""
        return self.sequences * int(self.meta["sequence_length"])

    @property
    def has_gradients(self) -> bool:
        """Whether gradients of the loss were kept beside the activations."""
        return bool(self.meta["gradients"])

    @property
    def has_moments(self) -> bool:
        """Whether it was kept how keys and values are read; older stores do not say."""
        return bool(self.meta.get("moments"))

    def file(self, layer: int, sequence: int) -> Path:
        """The file of one layer and sequence."""
        return self.path / f"layer-{layer:03d}" / f"seq-{sequence:05d}.safetensors"

    def has_sequence(self, sequence: int) -> bool:
        """Whether every layer of a sequence is on disk."""
        return all(self.file(layer, sequence).is_file() for layer in range(self.layers))

    def write(
        self,
        layer: int,
        sequence: int,
        activations: dict[Kind, Tensor],
        gradients: dict[Kind, Tensor] | None,
        moments: dict[Kind, Tensor] | None = None,
    ) -> None:
        """Write one layer's share of one sequence in one step.

        Args:
            layer: the layer's index.
            sequence: the sequence's index.
            activations: float32 ``[tokens, kv_heads, head_dim]``; kept as float16 unless the model
                computes in float32 or a value would overflow.
            gradients: same shapes, or None; kept as bfloat16, whose range no gradient leaves.
            moments: ``[kv_heads, head_dim, head_dim]``, or None; kept as float32.

        Raises:
            SampleError: a value is NaN or infinite.
            EnvironmentProblem: the disk is full.
        """
        tensors: dict[str, Tensor] = {}
        for kind, value in activations.items():
            self._require_finite(value, layer, kind)
            wide = self.meta["dtype"] == "float32" or float(value.abs().max()) > _FLOAT16_MAX
            tensors[kind] = value.to(torch.float32 if wide else torch.float16).contiguous()
        for kind, value in (gradients or {}).items():
            self._require_finite(value, layer, f"{kind} gradient")
            tensors[f"{kind}_grad"] = value.to(torch.bfloat16).contiguous()
        for kind, value in (moments or {}).items():
            self._require_finite(value, layer, f"what reads its {kind}s")
            tensors[f"{kind}_moment"] = value.float().contiguous()
        with atomic_file(self.file(layer, sequence)) as temporary:
            save_file(tensors, temporary)

    def load(self, layer: int, kind: Kind) -> Tensor:
        """All samples of a layer: float32 ``[tokens, kv_heads, head_dim]``, keys before RoPE."""
        return torch.cat(self._load(layer, kind))

    def load_gradients(self, layer: int, kind: Kind) -> Tensor:
        """Gradients of the summed loss with respect to :meth:`load`'s entries, same shape.

        Raises:
            SampleError: the store has none.
        """
        if not self.has_gradients:
            raise SampleError(
                f"The sample store {self.path} has no gradients, which the Fisher objective "
                "needs; calibrate with --objective fisher, or use --objective uniform."
            )
        return torch.cat(self._load(layer, f"{kind}_grad"))

    def load_moment(self, layer: int, kind: Kind) -> Tensor:
        """How a layer's keys or values are read: float32 ``[kv_heads, head_dim, head_dim]``.

        An error e in a key changes its scores by ``e M e^T`` in the mean square, one in a value the
        output of attention; see :mod:`cqtool.sampling.readers`. The mean over the sequences.

        Raises:
            SampleError: the store has none.
        """
        if not self.has_moments:
            raise SampleError(
                f"The sample store {self.path} does not say how keys and values are read, which "
                "the query objective needs; calibrate with --objective query, or use --objective "
                "fisher."
            )
        return torch.stack(self._load(layer, f"{kind}_moment")).mean(dim=0)

    def _load(self, layer: int, name: str) -> list[Tensor]:
        parts = []
        for sequence in range(self.sequences):
            file = self.file(layer, sequence)
            try:
                with safe_open(file, framework="pt") as opened:
                    parts.append(opened.get_tensor(name).float())
            except (SafetensorError, OSError) as error:
                raise SampleError(
                    f"The sample file {file} is damaged ({error}); delete it and continue with "
                    "`cqtool calibrate ... --resume`."
                ) from error
        return parts

    @staticmethod
    def _require_finite(value: Tensor, layer: int, what: str) -> None:
        if not torch.isfinite(value).all():
            raise SampleError(
                f"Layer {layer} produced NaN or infinite values ({what}); run the model in "
                "another --dtype (bfloat16 or float32) or check its weights."
            )


def read_meta(path: Path) -> dict[str, Any]:
    """Read a store's meta.json.

    Raises:
        SampleError: it is damaged or of an unknown version.
    """
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        version = meta["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SampleError(
            f"The sample store {path} has a damaged meta.json; start over with --force."
        ) from error
    if version != FORMAT_VERSION:
        raise SampleError(
            f"The sample store {path} has format version {version}, this cqtool reads "
            f"{FORMAT_VERSION}; collect the samples again with --force."
        )
    assert isinstance(meta, dict)
    return meta

"""Groups of channels that a file lists, instead of ones that are chosen from samples."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cqtool.errors import RecipeError
from cqtool.geometry import ModelGeometry
from cqtool.layout.config import channels_name, owner_name
from cqtool.spec import KINDS, CacheSpec, Kind


def read_groups(
    file: str | None, spec: CacheSpec, geometry: ModelGeometry
) -> dict[int, dict[Kind, Tensor]]:
    """Read the groups of all layers and kinds whose grouping is ``file``.

    Names and shapes are those of an artifact's codebooks, so that such a file can be given; what
    else it holds is ignored.

    Args:
        file: a safetensors file with the integer tensors ``layers.{i}.{kind}.channels``,
            ``[kv_heads, head_dim]``: place p of head h's grouped order holds model channel [h, p];
            or with ``layers.{i}.{kind}.heads.{h}.channels``, ``[1, head_dim]``, for each head.
            A path from the current folder, or an absolute one; None where no groups are of a file.
        spec: the format.
        geometry: the model's cache geometry.

    Returns:
        Layer -> kind -> int64 ``[kv_heads, head_dim]``, in the order that the file has.

    Raises:
        RecipeError: the file is missing or damaged, or lacks a layer, or what it lists is not every
            channel of a head once.
    """
    found: dict[int, dict[Kind, Tensor]] = {}
    if file is None:
        return found
    path = Path(file).expanduser()
    if not path.is_file():
        raise RecipeError(
            f"There is no file {path} for the grouping; give its path from the current folder, or "
            "an absolute one."
        )
    try:
        with safe_open(path, framework="pt") as opened:
            names = set(opened.keys())
            for index, layer in enumerate(geometry.layers):
                kinds: list[Kind] = [
                    kind for kind in KINDS if spec.codes_of(index, kind)[0].grouping == "file"
                ]
                for kind in kinds:
                    name = channels_name(owner_name(index, kind))
                    # Codebooks of heads with codes of their own have a row each.
                    rows = [
                        channels_name(owner_name(index, f"{kind}.heads.{head}"))
                        for head in range(layer.kv_heads)
                    ]
                    by_head = name not in names and names.issuperset(rows)
                    parts = rows if by_head else [name]
                    shape = 1 if by_head else layer.kv_heads, layer.dim(kind)
                    if not names.issuperset(parts):
                        raise RecipeError(
                            f"{path} has no tensor {name}; add it, integers {list(shape)}. A file "
                            "of groups lists every layer of the model."
                        )
                    found.setdefault(index, {})[kind] = torch.cat(
                        [_order(opened.get_tensor(one), shape, f"{path}: {one}") for one in parts]
                    )
    except (SafetensorError, OSError) as error:
        raise RecipeError(
            f"{path} cannot be read as a safetensors file ({error}); write the groups with "
            "safetensors' save_file."
        ) from error
    return found


def _order(tensor: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """A tensor of the file as int64, when it is a permutation for each head."""
    if tuple(tensor.shape) != shape or tensor.is_floating_point() or tensor.is_complex():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise RecipeError(
            f"{name} is {dtype} {list(tensor.shape)}; for this model give integers "
            f"{list(shape)}, a row of channels for each kv head."
        )
    order = tensor.long()
    wrong = (order.sort(dim=1).values != torch.arange(shape[1])).any(dim=1)
    if wrong.any():
        head = int(wrong.nonzero()[0])
        raise RecipeError(
            f"{name}: the row of kv head {head} is not every channel from 0 to {shape[1] - 1} "
            "once; list each channel of a head exactly once, group by group."
        )
    return order

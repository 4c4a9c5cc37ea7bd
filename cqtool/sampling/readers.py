"""What reads a cache: the queries that meet its keys, and the projections its values end up in.

Both are seen from outside, whatever a model calls its modules: queries where transformers'
attention functions receive them, and the output projection as the module that is given what such a
function returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from cqtool.errors import ModelError
from cqtool.geometry import LayerGeometry, ModelGeometry
from cqtool.models.rotation import unrotate_gradient
from cqtool.models.tap import AttentionTap, RopeStep

OnAttention = Callable[[int, Tensor, Tensor], None]
"""Called with a layer's index, its queries ``[batch, heads, tokens, head_dim]`` after RoPE, and
what attention returned, ``[batch, tokens, heads, value_dim]``."""

KEYS = 128
"""Key positions of a sequence at which its queries are turned, at most."""
_PROBE_TOKENS = 8
# Of the largest output: what a projection does beyond a matrix is far more than bfloat16 rounding.
_TOLERANCE = 0.03


@contextmanager
def observed_attention(tap: AttentionTap, report: OnAttention) -> Iterator[None]:
    """Report what the attention layers of one model compute in the passes inside the block.

    Args:
        tap: the model's, which knows its attention modules from :func:`read_geometry`.
        report: called after each of them.
    """
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        own = original(self, *args, **kwargs)

        def observing(module: nn.Module, query: Tensor, *more: Any, **named: Any) -> Any:
            output = own(module, query, *more, **named)
            layer = getattr(module, "layer_idx", None)
            if isinstance(layer, int) and tap.attention.get(layer) is module:
                report(layer, query.detach(), output[0].detach())
            return output

        return observing

    # The one place where every attention layer asks for its function, eager ones included; the
    # configuration, by which models also choose their masks, stays as it is.
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]


def query_moment(
    queries: Tensor, step: RopeStep | None, geometry: LayerGeometry, seed: int
) -> Tensor:
    """Second moment of the queries that meet a key, in the frame of keys before RoPE.

    A key k at position t is turned by the matrix R_t, so its score with the turned query q_s is
    ``q_s . R_t k = (R_t^T q_s) . k``: an error e in k changes it by ``(R_t^T q_s) . e``. The mean
    M of ``(R_t^T q_s)(R_t^T q_s)^T`` over all query heads that read the kv head, and over all pairs
    of a position t and a query s that sees it (s >= t, within the sliding window if there is one),
    therefore gives the mean squared change of a score, ``e M e^T``. Positions t are all, or
    :data:`KEYS` random ones of a longer sequence; the queries of each are all.

    Args:
        queries: ``[heads, tokens, head_dim]`` after RoPE, of one sequence.
        step: the angles of its tokens, None without RoPE.
        geometry: the layer's.
        seed: of the choice of positions.

    Returns:
        float32 ``[kv_heads, head_dim, head_dim]``.
    """
    tokens, dim = queries.shape[1:]
    rows = queries.double().view(geometry.kv_heads, -1, tokens, dim)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(tokens, generator=generator)[:KEYS].sort().values
    ends = (places + (geometry.sliding_window or tokens)).clamp(max=tokens)
    edges = torch.unique(torch.cat((places, ends)))
    after = _grams_from(rows, edges.tolist())
    first, stop = (torch.searchsorted(edges, at).to(rows.device) for at in (places, ends))
    moments = [
        # Head by head: those of all places and heads at once would be large.
        _turned_back(own[first] - own[stop], step, places, geometry).sum(dim=0)
        for own in after.unbind(dim=1)
    ]
    pairs = int((ends - places).sum())
    return (torch.stack(moments) / (pairs * rows.shape[1])).float()


def _grams_from(rows: Tensor, edges: list[int]) -> Tensor:
    """Products of the rows from each edge up to the last one.

    Args:
        rows: float64 ``[kv_heads, query heads of each, tokens, head_dim]``.
        edges: ascending positions.

    Returns:
        Of each edge ``rows^T rows`` over the tokens between: float64
        ``[edges, kv_heads, head_dim, head_dim]``, zero for the last.
    """
    kv_heads, _, _, dim = rows.shape
    found = rows.new_zeros(len(edges), kv_heads, dim, dim)
    for index in reversed(range(len(edges) - 1)):
        part = rows[:, :, edges[index] : edges[index + 1]].flatten(1, 2)
        torch.baddbmm(found[index + 1], part.mT, part, out=found[index])
    return found


def _turned_back(
    moments: Tensor, step: RopeStep | None, places: Tensor, geometry: LayerGeometry
) -> Tensor:
    """``R_t^T S R_t`` of one head's ``[places, head_dim, head_dim]`` with each place's rotation."""
    if geometry.rotation.style == "none":
        return moments
    assert step is not None
    at = places.to(step.cos.device)
    angles = step.cos[:1, at], step.sin[:1, at]
    for _ in range(2):
        # Each row as the key of a head of its own: `[1, rows, places, head_dim]`.
        turned = unrotate_gradient(moments.transpose(0, 1)[None], *angles, geometry.rotation)
        moments = turned[0].permute(1, 2, 0)
    return moments.double()


def output_moments(model: PreTrainedModel, geometry: ModelGeometry, ids: Tensor) -> list[Tensor]:
    """How much each layer's output reacts to an error in a value.

    A value's error e reaches the output of query head j as ``a W_j e`` with the attention weight a
    and the columns W_j of the output projection that take this head. ``sum_j W_j^T W_j`` over the
    query heads that read the kv head is its squared length, were all weights equal. Norms or
    other layers after the projection are not in it.

    Args:
        model: after :func:`read_geometry`.
        geometry: its cache.
        ids: int64 ``[tokens]``, a few tokens of text to find the projections with.

    Returns:
        For each layer float32 ``[kv_heads, value_dim, value_dim]`` on the CPU.

    Raises:
        ModelError: the queries or the projection of a layer cannot be seen.
    """
    tap = AttentionTap.of(model)
    outputs: dict[int, Tensor] = {}
    found: dict[int, tuple[nn.Module, Tensor]] = {}

    def on_attention(layer: int, query: Tensor, output: Tensor) -> None:
        fits = query.dim() == 4 and query.shape[1] % geometry.layers[layer].kv_heads == 0
        if fits and query.shape[3] == geometry.layers[layer].key_dim:
            outputs[layer] = output

    def watch(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            given, output = args[0] if args else None, outputs.get(layer)
            if layer not in found and isinstance(given, Tensor) and output is not None:
                flat = given.detach().flatten(0, -2)
                if flat.numel() == output.numel() and torch.equal(flat.flatten(), output.flatten()):
                    found[layer] = module, flat

        return look

    handles = [
        child.register_forward_pre_hook(watch(layer))
        for layer, module in tap.attention.items()
        for child in module.modules()
        if child is not module
    ]
    batch = ids[None, :_PROBE_TOKENS].to(model.device)
    try:
        with torch.no_grad(), observed_attention(tap, on_attention):
            model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    moments = []
    with torch.no_grad():
        for index, layer in enumerate(geometry.layers):
            moment = None
            if index in found:
                moment = _projection_moment(*found[index], layer)
            if moment is None:
                what = "output projection" if index in outputs else "queries"
                raise ModelError(
                    f"The objective 'query' needs the {what} of layer {index}, which "
                    f"{type(model).__name__} does not show; use --objective fisher."
                )
            moments.append(moment)
    return moments


def _projection_moment(module: nn.Module, given: Tensor, layer: LayerGeometry) -> Tensor | None:
    """The moment of one projection, None for a module that does more than multiply and add."""
    width = given.shape[-1]
    if width % (layer.kv_heads * layer.value_dim):
        return None
    # The module itself is asked for its columns, whatever it keeps them as.
    unit = torch.eye(width, dtype=given.dtype, device=given.device)
    offset = module(torch.zeros_like(unit[:1]))
    rows = (module(unit) - offset).float()
    output, expected = module(given).float(), offset.float() + given.float() @ rows
    if not bool((output - expected).abs().max() <= _TOLERANCE * output.abs().max()):
        return None
    columns = rows.view(layer.kv_heads, -1, layer.value_dim, rows.shape[-1])
    moment: Tensor = (columns @ columns.mT).sum(dim=1)
    return moment.cpu()

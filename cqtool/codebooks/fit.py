"""Fits all codebooks of one layer from its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cqtool.codebooks.codes import split_groups
from cqtool.codebooks.gains import gain_table, sample_gains
from cqtool.codebooks.grouping import check_grouping, choose_groups, is_balanced
from cqtool.codebooks.kmeans import Engine
from cqtool.codebooks.metric import (
    block_ldl,
    group_metrics,
    head_metric,
    shared_metric,
    unit_trace,
    unwhitened,
    whitened,
)
from cqtool.errors import RecipeError, SampleError
from cqtool.geometry import NO_ROTATION, KeyRotation, LayerGeometry, ModelGeometry
from cqtool.progress import Task
from cqtool.sampling.store import SampleStore
from cqtool.spec import KINDS, CacheSpec, CQSpec, Kind, Objective

_FLOAT16_MAX = 6.5e4


@dataclass(frozen=True)
class LayerFit:
    """The codebooks of one layer, by their owners: ``key`` and ``value``, or ``key.heads.0`` and so
    on where heads have codes of their own (:meth:`cqtool.spec.CacheSpec.owners`).

    Attributes:
        codebooks: ``[kv_heads, groups, centroids, channels]`` as stored (float16, or bfloat16 where
            float16 would overflow); one head for all where they share, and where it is that of one.
        errors: mean weighted squared error a group, averaged over the owner's codebooks.
        channels: int64 ``[kv_heads, head_dim]``, the model channel of each codebook channel; None
            for contiguous groups.
        extras: what else encoding and decoding need, named as the arguments of
            :class:`cqtool.cache.codec.CQCodec`, float32; empty for most formats.
    """

    codebooks: dict[str, Tensor]
    errors: dict[str, float]
    channels: dict[str, Tensor | None]
    extras: dict[str, dict[str, Tensor]]


def check_fits_geometry(spec: CacheSpec, geometry: ModelGeometry) -> None:
    """Refuse a format whose groups do not fill the model's heads.

    Raises:
        RecipeError: a head's channels are not a multiple of the group's, groups are to be of RoPE
            pairs and cannot, or the model lacks layers that have codes of their own.
    """
    check_grouping(spec, geometry)
    count = len(geometry.layers)
    for codes in spec.layers:
        if codes.last >= count:
            raise RecipeError(
                f"The recipe has codes for {codes.place}, but this model has {count} layers, "
                f"0 to {count - 1}."
            )
    for index, layer in enumerate(geometry.layers):
        for kind in KINDS:
            own, dim = spec.codes_of(index, kind), layer.dim(kind)
            if len(own) not in (1, layer.kv_heads):
                raise RecipeError(
                    f"The recipe has {len(own)} codes for the {kind}s of layer {index}, but this "
                    f"model's layer has {layer.kv_heads} key/value "
                    f"{'head' if layer.kv_heads == 1 else 'heads'}; name one for each, or one for "
                    "all."
                )
            for code in own:
                _check_divides(code, kind, dim)


def _check_divides(code: CQSpec, kind: Kind, dim: int) -> None:
    if dim % code.channels:
        divisors = [str(c) for c in range(1, min(dim, 16) + 1) if dim % c == 0]
        raise RecipeError(
            f"{code.name} couples {code.channels} channels, but this model's {kind} heads have "
            f"{dim}, which is not a multiple; couple {', '.join(divisors)} channels instead."
        )


def count_codebooks(spec: CacheSpec, index: int, layer: LayerGeometry) -> int:
    """How many codebooks the layer of an index needs."""
    return sum(
        (code.codebook_heads(layer.kv_heads) if head is None else 1)
        * (layer.dim(kind) // code.channels)
        for kind in KINDS
        for _, code, head in spec.owners(index, kind)
    )


def check_enough_samples(spec: CacheSpec, tokens: int) -> None:
    """Refuse more centroids than samples, before hours of sampling.

    Raises:
        SampleError: with the number needed.
    """
    for code in (code for kind in KINDS for code in spec.codes(kind)):
        if tokens < code.centroids:
            raise SampleError(
                f"{code.name} has {code.centroids} centroids per codebook, but only {tokens} "
                "tokens would be sampled; use more --sequences, a longer --sequence-length, or "
                "fewer bits."
            )


def codebook_seed(seed: int, layer: int, kind: Kind, head: int, group: int) -> int:
    """A seed of its own for each codebook, independent of the order in which they are fitted."""
    digest = hashlib.sha256(f"{seed}/{layer}/{kind}/{head}/{group}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def fisher_weights(gradients: Tensor, channels: int) -> Tensor:
    """The weight of each sample of each group: its squared gradients, summed over the group.

    The diagonal of the Fisher information, approximated by the squared gradient of the loss with
    respect to the activation (CQ, section 3.3).

    Args:
        gradients: float32 ``[tokens, kv_heads, head_dim]``.
        channels: channels of a group.

    Returns:
        float32 ``[tokens, kv_heads, groups]``.
    """
    return split_groups(gradients.square(), channels).sum(dim=-1)


def fit_layer(
    store: SampleStore,
    layer: int,
    spec: CacheSpec,
    objective: Objective,
    engine: Engine,
    seed: int,
    task: Task,
    rotation: KeyRotation = NO_ROTATION,
    given: Mapping[Kind, Tensor] | None = None,
) -> LayerFit:
    """Fit keys and values of one layer, all heads and groups.

    A head with a code of its own gets what it would get if all heads had that code. Groups are
    chosen from the samples first, as the format says. Where heads share their codebooks, these are
    fitted to the samples of all of them, under one metric: k-means knows one metric for a codebook.
    Encoding keeps that of each head.

    Args:
        store: the samples; only this layer's are read.
        layer: its index.
        spec: the format; its encoding is ``metric`` or ``ldlq`` under ``query``, else
            ``nearest``.
        objective: ``uniform`` for plain k-means, ``fisher`` for gradient-weighted k-means,
            ``query`` for the latter under the metric by which the layer reads its cache.
        engine: the k-means engine.
        seed: the recipe's seed.
        task: where to report, in codebooks.
        rotation: how the layer turns its keys.
        given: the channels of groups that a file lists, int64 ``[kv_heads, head_dim]``, by the
            kinds whose grouping is ``file``.

    Raises:
        SampleError: the store lacks what the objective needs, or k-means cannot work with it.
    """
    found = LayerFit({}, {}, {}, {})
    for kind in KINDS:
        samples = store.load(layer, kind)
        gradients = None if objective == "uniform" else store.load_gradients(layer, kind)
        moment = None if objective != "query" else store.load_moment(layer, kind)
        turned = rotation if kind == "key" else NO_ROTATION
        # Of all heads for each code: groups of pairs begin alike in heads that a kernel serves
        # together.
        orders: dict[CQSpec, Tensor | None] = {}
        for owner, code, head in spec.owners(layer, kind):
            own = slice(None) if head is None else slice(head, head + 1)
            if code.grouping == "file":
                assert given is not None
                orders[code] = given[kind]
            elif code not in orders:
                orders[code] = _groups(code, samples, gradients, moment, turned)
            order = orders[code]
            _fit_owner(
                found,
                owner,
                code,
                samples[:, own],
                None if gradients is None else gradients[:, own],
                None if moment is None else moment[own],
                None if order is None else order[own],
                partial(_fit_groups, engine, seed, layer, kind, head or 0, task),
            )
    return found


def _groups(
    code: CQSpec,
    samples: Tensor,
    gradients: Tensor | None,
    moment: Tensor | None,
    rotation: KeyRotation,
) -> Tensor | None:
    cost = moment
    if is_balanced(code.grouping) and cost is None and gradients is not None:
        cost = gradients.square().mean(dim=0).diag_embed()
    return choose_groups(samples, code.grouping, code.channels, rotation, cost)


def _fit_owner(
    found: LayerFit,
    owner: str,
    code: CQSpec,
    samples: Tensor,
    gradients: Tensor | None,
    moment: Tensor | None,
    order: Tensor | None,
    fit: Callable[[Tensor, Tensor | None, Tensor | None, int], tuple[Tensor, float]],
) -> None:
    """Fit the codebooks of the heads that `samples` ``[tokens, heads, head_dim]`` are of."""
    extras: dict[str, Tensor] = {}
    weights = None
    if gradients is not None:
        weights = fisher_weights(_in_order(gradients, order), code.channels)
    if code.gain == "token":
        extras["gains"] = gain_table(samples)
        gains = sample_gains(samples, extras["gains"])
        samples = samples / gains
        # An error in what is coded is multiplied by the gain when it is decoded.
        by_gain = gains.square().expand(-1, -1, samples.shape[2] // code.channels)
        weights = by_gain if weights is None else weights * by_gain
    metric = None
    if code.encoding != "nearest":
        assert moment is not None
        whole = head_metric(moment, order)
        metric = unit_trace(group_metrics(whole, code.channels))
        extras |= _encoder(whole, metric, code)
    points = split_groups(_in_order(samples, order), code.channels)
    if code.sharing == "heads":
        if metric is not None and weights is not None:
            metric = shared_metric(metric, weights)
        points = _pooled(points)
        weights = None if weights is None else _pooled(weights)
    found.channels[owner], found.extras[owner] = order, extras
    found.codebooks[owner], found.errors[owner] = fit(points, weights, metric, code.centroids)


def _encoder(whole: Tensor, metric: Tensor, code: CQSpec) -> dict[str, Tensor]:
    """What encoding needs: the metric that k-means had, or feedback and the metric it asks for."""
    if code.encoding == "metric":
        return {"metric": metric}
    blocks, feedback = block_ldl(whole, code.channels)
    return {"metric": unit_trace(blocks), "feedback": feedback.float()}


def _in_order(samples: Tensor, channels: Tensor | None) -> Tensor:
    """``[tokens, kv_heads, head_dim]`` with each head's channels in its order of groups."""
    return samples if channels is None else samples.gather(2, channels.expand_as(samples))


def _pooled(samples: Tensor) -> Tensor:
    """``[tokens, kv_heads, ...]`` as the ``[tokens * kv_heads, 1, ...]`` of a single head."""
    return samples.flatten(0, 1).unsqueeze(1)


def _fit_groups(
    engine: Engine,
    seed: int,
    layer: int,
    kind: Kind,
    first: int,
    task: Task,
    samples: Tensor,
    weights: Tensor | None,
    metric: Tensor | None,
    centroids: int,
) -> tuple[Tensor, float]:
    _, heads, groups, channels = samples.shape
    seeds = [
        codebook_seed(seed, layer, kind, head, group)
        for head in range(first, first + heads)
        for group in range(groups)
    ]
    if metric is not None:
        samples = whitened(samples, metric)
    points = samples.flatten(1, 2).transpose(0, 1)
    owned = None if weights is None else weights.flatten(1, 2).transpose(0, 1)
    fits = []
    for one in engine.fit_many(points, owned, centroids, seeds):
        fits.append(one)
        task.advance()
    table = torch.from_numpy(np.stack([one.centroids for one in fits]))
    if not torch.isfinite(table).all():
        raise SampleError(
            f"k-means ended in NaN for the {kind}s of layer {layer}; check the samples with "
            "`cqtool analyze-entropy`, or use --objective uniform."
        )
    table = table.reshape(heads, groups, centroids, channels)
    if metric is not None:
        table = unwhitened(table, metric)
    dtype = torch.float16 if float(table.abs().max()) < _FLOAT16_MAX else torch.bfloat16
    return table.to(dtype), float(np.mean([one.error for one in fits]))

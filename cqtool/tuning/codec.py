"""Coupled quantization whose centroids can be trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from cqtool.cache.codec import CQCodec, HeadsCodec, Stored, TokenCodec
from cqtool.cache.format import CacheFormat, LayerCodecs
from cqtool.codebooks.codes import lookup
from cqtool.codebooks.start import FIXED_ONE, fixed_point
from cqtool.tuning import fused

# Spread of a codebook whose centroids all coincide, so that it can move at all.
_LEAST_SPREAD = 1e-4
# Weights of at most so many (vector, centroid) pairs are held at once, in float32: 1 GiB.
_HELD = 1 << 28


class _SoftLookup(torch.autograd.Function):
    """The nearest centroid forwards; backwards, the mean of all of them by how near they are.

    Forwards the output is the centroid taken. The gradient is that centroid's, plus that of the
    weights p = softmax(-|x - c|^2 / temperature) with which a soft choice would have mixed the
    centroids: it tells a centroid, and the vector, what another choice would have been worth
    (soft-to-hard vector quantization, Agustsson et al. 2017, arXiv 1704.00648, its temperature
    fixed and its forward pass hard).

    Gradients of the vectors of a centroid are summed in fixed point, so that every run gives the
    same bytes; what torch has for it sorts the codes first, and takes most of a step's time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        codebook: Tensor,
        codes: Tensor,
        vectors: Tensor,
        factor: Tensor | None,
        softness: float,
    ) -> Tensor:
        ctx.save_for_backward(codebook, codes, vectors, factor)
        ctx.softness = softness
        return lookup(codes, codebook).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codebook, codes, vectors, factor = ctx.saved_tensors
        heads, groups, _, channels = codebook.shape
        tables = codebook.flatten(0, 1)
        codes = codes.permute(1, 3, 0, 2).reshape(heads * groups, -1)
        upstream = _by_table(gradients[0], groups, channels)
        to_tables = _summed(upstream, codes, tables.shape[1])
        if not ctx.softness:
            return to_tables.view_as(codebook), None, None, None, None
        points = _by_table(vectors, groups, channels)
        if factor is not None:
            # Nearness under a metric is nearness of what its factor makes of both.
            factor = factor.flatten(0, 1)
        to_points = torch.empty_like(points)
        step = max(1, _HELD // (points.shape[1] * tables.shape[1]))
        if fused.usable(points, channels):
            step = len(tables)
        for start in range(0, len(tables), step):
            part = slice(start, start + step)
            near = None if factor is None else factor[part]
            table, own = _soft(
                tables[part], codes[part], points[part], upstream[part], near, ctx.softness
            )
            to_tables[part] += table
            to_points[part] = own
        batch, _, tokens, _ = vectors.shape
        turned = to_points.view(heads, groups, batch, tokens, channels).permute(2, 0, 3, 1, 4)
        to_vectors = turned.flatten(3).to(vectors.dtype)
        return to_tables.view_as(codebook), None, to_vectors, None, None


def _nearest(codec: CQCodec, grouped: Tensor) -> Tensor:
    """:meth:`CQCodec.nearest`, at once where a GPU can do that."""
    heads, groups, _, channels = codec.codebook.shape
    if codec.feedback is not None or not fused.usable(grouped, channels):
        return codec.nearest(grouped)
    metric = None if codec.metric is None else codec.metric.flatten(0, 1)
    points = _by_table(grouped, groups, channels)
    codes = fused.nearest(points, codec.codebook.flatten(0, 1), metric)
    return codes.view(heads, groups, grouped.shape[0], -1).permute(2, 0, 3, 1)


def _by_table(vectors: Tensor, groups: int, channels: int) -> Tensor:
    """``[batch, kv_heads, tokens, head_dim]`` to float32 ``[kv_heads * groups, batch * tokens,
    channels]``."""
    batch, heads, tokens, _ = vectors.shape
    parts = vectors.float().reshape(batch, heads, tokens, groups, channels)
    return parts.permute(1, 3, 0, 2, 4).reshape(heads * groups, batch * tokens, channels)


def _summed(parts: Tensor, codes: Tensor, centroids: int) -> Tensor:
    """Sums ``[tables, centroids, channels]`` of ``[tables, vectors, channels]`` by their code."""
    tables, count, channels = parts.shape
    bound = parts.abs().amax(dim=(1, 2)).double() * count
    rows = codes + centroids * torch.arange(tables, device=codes.device)[:, None]
    sums = torch.zeros(tables * centroids, channels, dtype=torch.long, device=codes.device)
    sums.index_add_(0, rows.flatten(), fixed_point(parts, bound).flatten(0, 1))
    return (sums.view(tables, centroids, channels) * (bound / FIXED_ONE)[:, None, None]).float()


def _soft(
    tables: Tensor,
    codes: Tensor,
    points: Tensor,
    upstream: Tensor,
    factor: Tensor | None,
    softness: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the soft choice's weights.

    With weights p, centroids c and the gradient g of the output, that of the logits is
    s = p (g.c - sum p (g.c)); logits are (2 x.c - |c|^2) / temperature but for a constant.

    Args:
        tables: ``[tables, centroids, channels]``.
        codes: ``[tables, vectors]``, the nearest centroids.
        points: ``[tables, vectors, channels]``.
        upstream: gradients of what was looked up, the same shape.
        factor: L of the metric L L^T, ``[tables, channels, channels]``; None for the Euclidean one.
        softness: the temperature, in mean squared distances to the nearest centroid.

    Returns:
        Gradients of `tables` and of `points`.
    """
    near, places = (tables, points) if factor is None else (tables @ factor, points @ factor)
    taken = near.gather(1, codes[..., None].expand_as(points))
    error = (places - taken).square().sum(dim=-1).mean(dim=1)[:, None, None]
    scale = 1 / (softness * error).clamp_min(_LEAST_SPREAD**2)
    gradients = fused.soft_gradients if fused.usable(points, points.shape[-1]) else _soft_gradients
    to_near, to_places = gradients(tables, near, places, upstream, scale)
    if factor is None:
        return to_near, to_places
    return to_near @ factor.mT, to_places @ factor.mT


def _soft_gradients(
    tables: Tensor, near: Tensor, places: Tensor, upstream: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`cqtool.tuning.fused.soft_gradients`, anywhere: what it has to agree with."""
    offset = -scale * near.square().sum(dim=-1).unsqueeze(1)
    weights = torch.baddbmm(offset, places, 2 * scale * near.transpose(1, 2)).softmax(dim=-1)
    mean = (upstream * torch.bmm(weights, tables)).sum(dim=-1, keepdim=True)
    # One product gives g.c - mean, another both sums over vectors.
    slopes = torch.bmm(_beside(upstream, -mean), _beside(tables, 1).transpose(1, 2)).mul_(weights)
    sums = torch.bmm(slopes.transpose(1, 2), _beside(places, 1))
    to_near = 2 * scale * (sums[..., :-1] - sums[..., -1:] * near)
    return to_near, 2 * scale * torch.bmm(slopes, near)


def _beside(rows: Tensor, last: Tensor | float) -> Tensor:
    """`rows` with one more column."""
    column = last if isinstance(last, Tensor) else torch.full_like(rows[..., :1], last)
    return torch.cat((rows, column), dim=-1)


class TrainedCodec:
    """A :class:`CQCodec` as a function of its centroids.

    Each vector takes the nearest centroid of the moment. Gradients reach that centroid, and through
    a soft choice the others and the vector (:class:`_SoftLookup`). The soft choice knows nothing of
    the errors that an encoder with feedback makes up for. A codebook is
    ``start + distance * delta``: one step of `delta` means as much in a codebook of large centroids
    as in one of small ones, and in one of many centroids as in one of few. The distance is what
    rate-distortion theory makes of the error of b bits for c channels, the centroids' spread times
    2^(-b/c).

    Args:
        start: the codec to start from.
        softness: temperature of the soft choice, in mean squared distances of a vector to its
            centroid; 0 for gradients to the centroid taken and nothing else.

    Attributes:
        delta: the parameter, ``[kv_heads, groups, centroids, channels]``, zero at the start; of one
            head, whose gradient is the sum over all, where they share the codebook.
    """

    before_rope = True
    block = 1

    def __init__(self, start: CQCodec, softness: float) -> None:
        self.start = start
        self.softness = softness
        self.bits_per_channel = start.bits_per_channel
        self._base = start.stored_codebook.float()
        spread = self._base.std(dim=2, correction=0).square().mean(dim=-1).sqrt()
        spread = spread.clamp_min(_LEAST_SPREAD)[:, :, None, None]
        self._distance = spread * 2.0 ** (-start.bits / start.codebook.shape[-1])
        self._factor = start.factor
        self.delta = nn.Parameter(torch.zeros_like(self._base))

    @property
    def codebook(self) -> Tensor:
        """float32 ``[kv_heads, groups, centroids, channels]``."""
        codebook: Tensor = self._base + self._distance * self.delta
        return codebook.expand_as(self.start.codebook)

    def encode(self, vectors: Tensor) -> Stored:
        """The codes, not packed, int64 ``[batch, kv_heads, tokens, groups]``, and the vectors that
        they were chosen for."""
        grouped, stored = self.start.prepare(vectors)
        with torch.no_grad():
            codes = _nearest(self.start.with_codebook(self.codebook), grouped)
        return {"codes": codes, "vectors": grouped, **stored}

    def decode(self, stored: Stored) -> Tensor:
        """See :meth:`cqtool.cache.codec.TokenCodec.decode`; differentiable in `delta`, and in the
        vectors unless `softness` is 0."""
        found: Tensor = _SoftLookup.apply(  # type: ignore[no-untyped-call]
            self.codebook, stored["codes"], stored["vectors"], self._factor, self.softness
        )
        return self.start.restore(found, stored)

    def to(self, device: torch.device) -> Self:
        """See :meth:`cqtool.cache.codec.TokenCodec.to`; starts from the beginning there."""
        return type(self)(self.start.to(device), self.softness)

    def trained(self) -> CQCodec:
        """The codec with the centroids of the moment, in the dtype of those it started from."""
        return self.start.with_codebook(self.codebook.detach().to(self.start.codebook.dtype))


def trainable(format: CacheFormat, softness: float) -> tuple[CacheFormat, list[TrainedCodec]]:
    """`format` with codebooks that can be trained, and those of all layers: key, value, key, ...,
    one after the other where heads have their own."""
    codecs: list[TrainedCodec] = []

    def start(codec: TokenCodec) -> TrainedCodec:
        assert isinstance(codec, CQCodec)
        codecs.append(TrainedCodec(codec, softness))
        return codecs[-1]

    return _changed(format, start), codecs


def trained(format: CacheFormat) -> CacheFormat:
    """What :func:`trainable` made, with the centroids of the moment."""
    return _changed(format, TrainedCodec.trained)


def _changed(format: CacheFormat, change: Callable[[Any], TokenCodec]) -> CacheFormat:
    def changed(codec: TokenCodec) -> TokenCodec:
        if isinstance(codec, HeadsCodec):
            return HeadsCodec([changed(part) for part in codec.parts])
        return change(codec)

    layers = (LayerCodecs(changed(layer.key), changed(layer.value)) for layer in format.layers)
    return replace(format, layers=tuple(layers))

"""What :mod:`cqtool.tuning.fused` runs, in Triton; imported only where Triton is.

A thread keeps whole vectors, or whole centroids, in registers and walks through the others, each of
which is the same for all threads and so costs one load. With 2 to 16 channels a product is a chain
of as many multiply-adds in float32: tensor cores would round to TF32, which is too coarse for
logits in the hundreds, and are made for longer rows.
"""

# Triton is not everywhere where types are checked, and its tuples grow as Python's do not.
# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row(start: tl.tensor, CHANNELS: tl.constexpr) -> tl.tuple:
    """A tuple: what lies at `start` and the places after it."""
    row = ()
    for channel in tl.static_range(CHANNELS):
        row = row + (tl.load(start + channel),)  # noqa: RUF005 (Triton has no unpacking)
    return row


@triton.jit
def _rows(start: tl.tensor, here: tl.tensor, CHANNELS: tl.constexpr) -> tl.tuple:
    """:func:`_row` where some lie beyond the end."""
    rows = ()
    for channel in tl.static_range(CHANNELS):
        rows = rows + (tl.load(start + channel, mask=here, other=0.0),)  # noqa: RUF005
    return rows


@triton.jit
def _plus(sums: tl.tuple, factor: tl.tensor, row: tl.tuple, CHANNELS: tl.constexpr) -> tl.tuple:
    """``sums + factor * row``."""
    total = ()
    for channel in tl.static_range(CHANNELS):
        total = total + (sums[channel] + factor * row[channel],)  # noqa: RUF005
    return total


@triton.jit
def _zeros(BLOCK: tl.constexpr, CHANNELS: tl.constexpr) -> tl.tuple:
    row = ()
    for _ in tl.static_range(CHANNELS):
        row = row + (tl.zeros([BLOCK], tl.float32),)  # noqa: RUF005
    return row


@triton.jit
def _product(first: tl.tensor, one: tl.tuple, other: tl.tuple, CHANNELS: tl.constexpr) -> tl.tensor:
    """``first + one . other``, with the same bits wherever it is computed."""
    for channel in tl.static_range(CHANNELS):
        first = tl.fma(one[channel], other[channel], first)
    return first


@triton.jit
def nearest(
    points: tl.tensor,
    heavy: tl.tensor,
    offsets: tl.tensor,
    codes: tl.tensor,
    vectors: tl.tensor,
    centroids: tl.tensor,
    CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """For each vector x the first k of the least ``offset_k - 2 x . heavy_k``.

    Programs ``[ceil(vectors / BLOCK), tables]``; UNROLL divides `centroids`.
    """
    table = tl.program_id(1).to(tl.int64)
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = vector < vectors
    x = _rows(points + (table * vectors + vector) * CHANNELS, here, CHANNELS)
    x = _plus(_zeros(BLOCK, CHANNELS), -2.0, x, CHANNELS)
    heavy += table * centroids * CHANNELS
    offsets += table * centroids
    least = tl.full([BLOCK], float("inf"), tl.float32)
    best = tl.zeros([BLOCK], tl.int32)
    for start in range(0, centroids, UNROLL):
        for ahead in tl.static_range(UNROLL):
            k = start + ahead
            row = _row(heavy + k * CHANNELS, CHANNELS)
            distance = _product(tl.load(offsets + k), x, row, CHANNELS)
            best = tl.where(distance < least, k, best)
            least = tl.minimum(distance, least)
    tl.store(codes + table * vectors + vector, best.to(tl.int64), mask=here)


@triton.jit
def over_centroids(
    places: tl.tensor,
    upstream: tl.tensor,
    near: tl.tensor,
    tables: tl.tensor,
    offsets: tl.tensor,
    rates: tl.tensor,
    to_places: tl.tensor,
    scaled: tl.tensor,
    shares: tl.tensor,
    greatest: tl.tensor,
    means: tl.tensor,
    vectors: tl.tensor,
    centroids: tl.tensor,
    CHANNELS: tl.constexpr,
    METRIC: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """For each vector ``rate * sum_k s_k near_k``, and what :func:`over_vectors` needs of it.

    Logits are of base 2, the one that the hardware has an exponential for. With the greatest of
    them m, ``p_k = 2^(logit_k - m) / total``. Left are ``scaled``, the place times rate / ln 2, so
    that ``logit_k = offset_k + scaled . near_k``; ``shares``, g / total; ``greatest``, m; and
    ``means``, the mean of g.c over total.

    Without METRIC `near` is `tables`. Programs ``[ceil(vectors / BLOCK), tables]``; UNROLL divides
    `centroids`.
    """
    table = tl.program_id(1).to(tl.int64)
    vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = vector < vectors
    own = table * vectors + vector
    rate = tl.load(rates + table)
    g = _rows(upstream + own * CHANNELS, here, CHANNELS)
    x = _rows(places + own * CHANNELS, here, CHANNELS)
    x = _plus(_zeros(BLOCK, CHANNELS), rate * 1.4426950408889634, x, CHANNELS)
    near += table * centroids * CHANNELS
    tables += table * centroids * CHANNELS
    offsets += table * centroids

    # Weights relative to the greatest so far, which changes at most once in UNROLL centroids.
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    worth = tl.zeros([BLOCK], tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    for start in range(0, centroids, UNROLL):
        logits, slopes, before = (), (), most
        for ahead in tl.static_range(UNROLL):
            k = start + ahead
            c = _row(near + k * CHANNELS, CHANNELS)
            logit = _product(tl.load(offsets + k), x, c, CHANNELS)
            if METRIC:
                c = _row(tables + k * CHANNELS, CHANNELS)
            logits = logits + (logit,)  # noqa: RUF005
            slopes = slopes + (_product(zero, g, c, CHANNELS),)  # noqa: RUF005
            most = tl.maximum(most, logit)
        fade = tl.exp2(before - most)
        total *= fade
        worth *= fade
        for ahead in tl.static_range(UNROLL):
            weight = tl.exp2(logits[ahead] - most)
            total += weight
            worth += weight * slopes[ahead]
    share = 1.0 / total
    mean = worth * share

    sums = _zeros(BLOCK, CHANNELS)
    for start in range(0, centroids, UNROLL):
        for ahead in tl.static_range(UNROLL):
            k = start + ahead
            c = _row(near + k * CHANNELS, CHANNELS)
            weight = tl.exp2(_product(tl.load(offsets + k), x, c, CHANNELS) - most)
            worths = c
            if METRIC:
                worths = _row(tables + k * CHANNELS, CHANNELS)
            slope = weight * _product(-mean, g, worths, CHANNELS)
            sums = _plus(sums, slope, c, CHANNELS)
    for channel in tl.static_range(CHANNELS):
        at = own * CHANNELS + channel
        tl.store(to_places + at, rate * share * sums[channel], mask=here)
        tl.store(scaled + at, x[channel], mask=here)
        tl.store(shares + at, share * g[channel], mask=here)
    tl.store(greatest + own, most, mask=here)
    tl.store(means + own, share * mean, mask=here)


@triton.jit
def over_vectors(
    scaled: tl.tensor,
    shares: tl.tensor,
    greatest: tl.tensor,
    means: tl.tensor,
    near: tl.tensor,
    tables: tl.tensor,
    offsets: tl.tensor,
    sums: tl.tensor,
    vectors: tl.tensor,
    centroids: tl.tensor,
    span: tl.tensor,
    CHANNELS: tl.constexpr,
    METRIC: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """For each centroid the sums of ``s * scaled`` and of s over `span` vectors.

    Sums are ``[tables, parts, CHANNELS + 1, centroids]``. Programs ``[ceil(centroids / BLOCK),
    parts, tables]``; UNROLL divides `vectors` and `span`.
    """
    part = tl.program_id(1)
    table = tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = k < centroids
    own = table * centroids + k
    c = _rows(near + own * CHANNELS, here, CHANNELS)
    worths = c
    if METRIC:
        worths = _rows(tables + own * CHANNELS, here, CHANNELS)
    offset = tl.load(offsets + own, mask=here, other=float("-inf"))
    scaled += table * vectors * CHANNELS
    shares += table * vectors * CHANNELS
    greatest += table * vectors
    means += table * vectors
    total = tl.zeros([BLOCK], tl.float32)
    moments = _zeros(BLOCK, CHANNELS)
    for start in range(part * span, min((part + 1) * span, vectors), UNROLL):
        for ahead in tl.static_range(UNROLL):
            vector = start + ahead
            x = _row(scaled + vector * CHANNELS, CHANNELS)
            g = _row(shares + vector * CHANNELS, CHANNELS)
            # The logit's bits are those that the greatest was found among: weights are at most 1,
            # however great the logits.
            weight = tl.exp2(_product(offset, x, c, CHANNELS) - tl.load(greatest + vector))
            slope = weight * _product(-tl.load(means + vector), g, worths, CHANNELS)
            total += slope
            moments = _plus(moments, slope, x, CHANNELS)
    sums += (table * tl.num_programs(1) + part) * (CHANNELS + 1) * centroids + k
    for channel in tl.static_range(CHANNELS):
        tl.store(sums + channel * centroids, moments[channel], mask=here)
    tl.store(sums + CHANNELS * centroids, total, mask=here)

"""The fused kernels of tuning agree with torch in float64, with its codes, and with themselves."""

from __future__ import annotations

import pytest
import torch

from cqtool.cache import CQCodec
from cqtool.codebooks.codes import assign
from cqtool.tuning import fused
from cqtool.tuning.codec import TrainedCodec, _soft_gradients

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = "cuda"

# Tables, vectors, centroids, channels; most are no multiples of what a program takes.
SHAPES = [
    (3, 1000, 256, 8),
    (2, 513, 16, 4),
    (5, 77, 1024, 2),
    (1, 2048, 128, 6),
    (2, 301, 7, 3),
    (2, 255, 32, 16),
    (4, 1, 4, 1),
]
metrics = pytest.mark.parametrize("metric", [False, True], ids=["euclidean", "metric"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def forms(tables: int, channels: int) -> torch.Tensor:
    root = draw(tables, channels, channels, seed=7)
    return root @ root.mT + 0.3 * torch.eye(channels, device=DEVICE)


def problem(shape: tuple[int, ...], metric: bool) -> tuple[torch.Tensor, ...]:
    """Arguments of soft_gradients: choices softer and harder than the default, tiny gradients."""
    count, vectors, centroids, channels = shape
    table, points = (
        draw(count, rows, channels, seed=seed) for seed, rows in enumerate((centroids, vectors))
    )
    near, places = table, points
    if metric:
        factor = torch.linalg.cholesky(forms(count, channels))
        near, places = table @ factor, points @ factor
    error = torch.cdist(places, near).amin(dim=-1).square().mean(dim=1)
    softness = torch.logspace(0.5, -0.5, count, device=DEVICE)
    scale = 1 / (softness * error).clamp_min(1e-3)[:, None, None]
    return table, near, places, 1e-6 * draw(count, vectors, channels, seed=2), scale


@shapes
@metrics
def test_gradients_are_those_of_the_definition(shape, metric):
    given = problem(shape, metric)
    exact = [tensor.double() for tensor in given]
    for found, expected in zip(fused.soft_gradients(*given), _soft_gradients(*exact), strict=True):
        for table, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(
                table.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())
            )


@metrics
def test_gradients_are_the_same_bytes_every_time(metric):
    given = problem((3, 5000, 256, 8), metric)
    once = fused.soft_gradients(*given)
    for _ in range(5):
        for first, again in zip(once, fused.soft_gradients(*given), strict=True):
            assert torch.equal(first, again)


def test_a_choice_that_is_all_but_hard_has_finite_gradients():
    table, _, places, upstream, _ = problem((1, 700, 64, 4), False)
    scale = torch.full((1, 1, 1), 1e8, device=DEVICE)
    for found in fused.soft_gradients(table, table, 10 * places, upstream, scale):
        assert found.isfinite().all()


@shapes
@metrics
def test_codes_are_the_references_except_where_two_centroids_are_as_near(shape, metric):
    count, vectors, _, channels = shape
    table, *_ = problem(shape, metric)
    points = draw(count, vectors, channels, seed=1)
    form = forms(count, channels) if metric else None
    found = fused.nearest(points, table, form)
    rows = points.transpose(0, 1).reshape(1, 1, vectors, count * channels)
    wanted = assign(rows, table[None], None if form is None else form[None])[0, 0].T
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    weigh = torch.eye(channels, device=DEVICE).expand(count, -1, -1) if form is None else form
    distances = []
    for codes in (found, wanted):
        away = points.double() - table.double().gather(1, codes[..., None].expand_as(points))
        distances.append(torch.einsum("tni,tij,tnj->tn", away, weigh.double(), away))
    size = torch.einsum("tni,tij,tnj->tn", points.double(), weigh.double(), points.double())
    assert ((distances[0] - distances[1]).abs() <= 1e-5 * (1 + size)).all()
    assert (found == wanted).float().mean() > 0.99


def test_ties_go_to_the_lower_centroid():
    table = draw(2, 16, 4, seed=0)[:, torch.arange(32, device=DEVICE) % 16]
    found = fused.nearest(draw(2, 600, 4, seed=1), table, None)
    assert found.max() < 16


@metrics
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_a_codec_learns_from_them_what_it_learns_from_torch(metric, shared, monkeypatch):
    heads, groups, channels = 2, 3, 4
    form = forms(heads * groups, channels).view(heads, groups, channels, channels)
    book = draw(1 if shared else heads, groups, 64, channels, seed=3)
    start = CQCodec(book, metric=form if metric else None, heads=heads)
    upstream = draw(2, heads, 300, groups * channels, seed=5)
    seen = []
    assert fused.usable(upstream, channels)
    for use in (True, False):
        monkeypatch.setattr(fused, "usable", lambda *_, use=use: use)
        codec = TrainedCodec(start, softness=1.0)
        vectors = draw(2, heads, 300, groups * channels, seed=4).requires_grad_()
        stored = codec.encode(vectors)
        torch.autograd.backward((codec.decode(stored) * upstream).sum())
        seen.append((stored["codes"], codec.delta.grad, vectors.grad))
    assert torch.equal(seen[0][0], seen[1][0])
    for one, other in zip(seen[0][1:], seen[1][1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))

"""Where tuning uses its kernels, and how it hands them their tensors; tests/gpu runs them."""

from __future__ import annotations

import pytest
import torch

from cqtool.cache import CQCodec
from cqtool.tuning import codec as tuning
from cqtool.tuning import fused


def test_vectors_on_a_cpu_do_not_need_triton():
    assert not fused.usable(torch.zeros(1, 1, 2), 2)


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'triton'"), RuntimeError("no C compiler")], ids=str
)
def test_a_triton_that_does_not_work_is_not_used(error, monkeypatch):
    def fails(*_):
        raise error

    device = torch.device("cpu")
    monkeypatch.setattr(fused, "nearest", lambda *_: torch.zeros(1, 1))
    assert fused._works.__wrapped__(device)
    monkeypatch.setattr(fused, "nearest", fails)
    assert not fused._works.__wrapped__(device)


def brute_force(points, tables, metric):
    away = points[:, :, None] - tables[:, None]
    form = torch.eye(points.shape[-1]) if metric is None else metric[:, None]
    return ((away @ form) * away).sum(dim=-1).argmin(dim=-1)


@pytest.mark.parametrize("metric", [False, True], ids=["euclidean", "metric"])
def test_with_and_without_kernels_codes_and_gradients_lie_in_the_same_places(metric, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    heads, groups, channels = 2, 3, 4
    root = torch.randn(heads, groups, channels, channels, generator=generator)
    form = root @ root.mT + 0.3 * torch.eye(channels)
    book = torch.randn(heads, groups, 16, channels, generator=generator)
    start = CQCodec(book, metric=form if metric else None)
    x = torch.randn(2, heads, 21, groups * channels, generator=generator)
    calls = []

    def gradients(*given):
        calls.append(len(given[0]))
        return tuning._soft_gradients(*given)

    monkeypatch.setattr(tuning, "_HELD", 1)
    monkeypatch.setattr(fused, "nearest", brute_force)
    monkeypatch.setattr(fused, "soft_gradients", gradients)
    seen = []
    for use in (False, True):
        monkeypatch.setattr(fused, "usable", lambda *_, use=use: use)
        codec = tuning.TrainedCodec(start, softness=1.0)
        vectors = x.clone().requires_grad_()
        stored = codec.encode(vectors)
        torch.autograd.backward((codec.decode(stored) ** 3).sum())
        seen.append((stored["codes"], codec.delta.grad, vectors.grad))
    # All codebooks at once: kernels hold no matrix that would have to be split.
    assert calls == [heads * groups]
    assert torch.equal(seen[0][0], seen[1][0])
    for one, other in zip(seen[0][1:], seen[1][1:], strict=True):
        torch.testing.assert_close(one, other)


def test_an_encoder_with_feedback_keeps_its_own_way(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(1, 2, 8, 2, generator=generator)
    start = CQCodec(
        book, metric=torch.eye(2).expand(1, 2, 2, 2), feedback=0.5 * torch.ones(1, 4, 4).triu(2)
    )
    monkeypatch.setattr(fused, "usable", lambda *_: True)
    x = torch.randn(1, 1, 9, 4, generator=generator)
    codes = tuning.TrainedCodec(start, softness=1.0).encode(x)["codes"]
    assert torch.equal(codes, start.nearest(x))

"""On the real demo model, fused and reference paths have the same text and perplexity."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from formats import RecordingCache

from cqtool.cache import CacheFormat, CQCache, CQCodec, LayerCodecs
from cqtool.models.demo import demo_gguf
from cqtool.models.load import open_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.model,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(demo_gguf() is None, reason="needs the demo model (the demo extra)"),
    pytest.mark.filterwarnings("error:.*torch reference.*"),
]
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def opened():
    opened = open_model("demo", dtype="float32", device="cuda")
    opened.model.eval()
    return opened


def _ids(opened, name: str, tokens: int) -> torch.Tensor:
    text = (DOCS / name).read_text(encoding="utf-8")
    return opened.tokenizer(text, return_tensors="pt").input_ids[:, :tokens].to("cuda")


def _k_means(samples: torch.Tensor, channels: int, bits: int) -> torch.Tensor:
    """Codebooks ``[heads, groups, 2**bits, channels]`` of samples ``[tokens, heads, dim]``."""
    tokens, heads, dim = samples.shape
    points = samples.float().reshape(tokens, heads * dim // channels, channels).transpose(0, 1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randperm(tokens, generator=generator)[: 1 << bits].to(points.device)
    centroids = points[:, start].clone()
    for _ in range(8):
        nearest = torch.cdist(points, centroids).argmin(dim=2)
        total = torch.zeros_like(centroids).scatter_add_(
            1, nearest[..., None].expand_as(points), points
        )
        count = torch.zeros(centroids.shape[:2], device=points.device)
        count.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=count.dtype))
        centroids = torch.where(
            count[..., None] > 0, total / count[..., None].clamp(min=1), centroids
        )
    return centroids.half().float().view(heads, dim // channels, 1 << bits, channels)


@pytest.fixture(scope="module")
def make_format(opened):
    recorded = RecordingCache(opened.model)
    with torch.no_grad():
        opened.model(_ids(opened, "guide.md", 2048), past_key_values=recorded)
    samples = [recorded.samples(index) for index in range(len(recorded.geometry.layers))]

    def make(channels: int, window: int, sinks: int) -> CacheFormat:
        layers = tuple(
            LayerCodecs(*(CQCodec(_k_means(part, channels, 8)) for part in (keys, values)))
            for keys, values in samples
        )
        return CacheFormat(f"cq-{channels}c8b", recorded.geometry, layers, window, sinks)

    return make


def _perplexity(opened, cache: CQCache, ids: torch.Tensor) -> float:
    """Of the second half of the text, fed token by token after the first."""
    half, total = ids.shape[1] // 2, 0.0
    with torch.no_grad():
        logits = opened.model(ids[:, :half], past_key_values=cache).logits[:, -1:]
        for at in range(half, ids.shape[1]):
            token = ids[:, at : at + 1]
            total -= float(logits[0, -1].log_softmax(dim=-1)[token[0, 0]])
            logits = opened.model(token, past_key_values=cache).logits
    return math.exp(total / (ids.shape[1] - half))


@pytest.fixture(params=[(8, 128, 4), (4, 128, 4), (8, 0, 0), (4, 0, 0)], ids=str)
def caches(request, opened, make_format) -> dict[str, CQCache]:
    format = make_format(*request.param)
    return {kind: CQCache(format, opened.model, kind) for kind in ("reference", "fused")}


def test_same_perplexity(opened, caches) -> None:
    held_out = _ids(opened, "method.md", 512)
    found = {kind: _perplexity(opened, cache, held_out) for kind, cache in caches.items()}
    print(f"\n{caches['fused']}: {found}")
    # Without a window every key, the newest too, is a code, and rounding moves some to a neighbour:
    # with codebooks off by 1e-6 of themselves the reference differs from itself by 5 %.
    rel = 1e-3 if caches["fused"].format.window else 0.2
    assert found["fused"] == pytest.approx(found["reference"], rel=rel)


def test_same_text(opened, caches) -> None:
    if caches["fused"].format.window == 0:
        # Rounding shows at once: 64 greedy tokens of this small model part after 15 to 30.
        pytest.skip("text is compared as released, with a window")
    prompt = _ids(opened, "demo-prompt.txt", 400)
    texts = []
    for cache in caches.values():
        made = opened.model.generate(
            prompt, past_key_values=cache, max_new_tokens=64, do_sample=False
        )
        texts.append(opened.tokenizer.decode(made[0, prompt.shape[1] :]))
    assert texts[0] == texts[1]

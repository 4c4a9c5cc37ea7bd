"""The encode kernel on a GPU against a brute force search in float64."""

from __future__ import annotations

import pytest
import torch

from cqtool.geometry import KeyRotation
from cqtool.kernels.encode import Encoder, Rope
from cqtool.kernels.layout import (
    CodeFormat,
    phase_steps,
    plan_keys,
    unpack_keys,
    unpack_values,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
FORMATS = [(8, 8), (4, 8), (2, 8), (8, 10), (8, 6)]
CASES = [
    *((8, 8, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
    (4, 8, torch.bfloat16),
    (2, 8, torch.float16),
    (8, 10, torch.bfloat16),
    (8, 6, torch.bfloat16),
    (8, 6, torch.float32),
]
# Scores are held to 2**-19 of the longest centroid's square, and the tensor cores truncate.
SLACK = 2.0**-15


def make_codebook(format, heads, seed=0):
    """Normal centroids that float16 holds exactly, groups of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, format.groups, format.centroids, format.channels)
    sizes = 2.0 ** torch.randint(-3, 3, shape[:2], generator=generator)[:, :, None, None]
    return (torch.randn(shape, generator=generator) * sizes).half().float().cuda()


def make_vectors(codebook, batch, tokens, dtype, seed=1):
    """Vectors spread as the centroids are, a few of them twelve times as long."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    heads, groups, _, c = codebook.shape
    size = codebook.square().mean(dim=(2, 3)).sqrt().repeat_interleave(c, dim=1)
    shape = (batch, heads, tokens, groups * c)
    x = torch.randn(shape, generator=generator, device="cuda") * size[:, None]
    x[:, :, 11::13] *= 12
    return x.to(dtype)


def full_storage(format, pages, heads, tiles):
    """Tiles full of other tokens' codes."""
    shape = (pages, heads, tiles, format.tile_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def assert_nearest(codes, vectors, codebook, transform=None, relative=1e-4):
    """No centroid is nearer than the chosen one, by more than rounding.

    Args:
        codes: ``[batch, kv_heads, tokens, groups]``.
        vectors: float64 ``[batch, kv_heads, tokens, head_dim]`` in codebook order.
        codebook: ``[kv_heads, groups, centroids, channels]``.
        transform: ``[kv_heads, groups, channels, channels]``, or None.
    """
    heads = vectors.shape[1]
    c = codebook.shape[3]
    exact = []
    for head in range(heads):
        for group in range(codebook.shape[1]):
            table = codebook[head, group].double()
            x = vectors[:, head, :, group * c : (group + 1) * c].reshape(-1, c)
            if transform is not None:
                matrix = transform[head, group].double()
                table, x = table @ matrix, x @ matrix
            least, chosen = [], []
            picked = codes[:, head, :, group].reshape(-1)
            for start in range(0, x.shape[0], 4096):
                part = x[start : start + 4096]
                apart = (part[:, None] - table).square().sum(dim=2)
                least.append(apart.amin(dim=1))
                chosen.append(apart.gather(1, picked[start : start + 4096, None])[:, 0])
            least, chosen = torch.cat(least), torch.cat(chosen)
            limit = least * (1 + relative) + SLACK * table.square().sum(dim=1).max()
            worst = (chosen - limit).max()
            assert worst <= 0, f"head {head} group {group}: {float(worst)} too far"
            exact.append(chosen <= least * (1 + 1e-9))
    # Nearly all are the very nearest.
    assert torch.cat(exact).double().mean() > 0.97


def unpack(storage, plan):
    return (
        unpack_values(storage, plan) if isinstance(plan, CodeFormat) else unpack_keys(storage, plan)
    )


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("channels, bits, dtype", CASES, ids=str)
@pytest.mark.parametrize("batch, tokens", [(1, 1), (3, 15), (1, 17), (2, 515)])
def test_codes_are_the_nearest_centroids(batch, tokens, channels, bits, dtype, kind):
    format, heads = CodeFormat(128, channels, bits), 2
    codebook = make_codebook(format, heads)
    plan = plan_keys(format, KeyRotation("half", 128)) if kind == "key" else format
    x = make_vectors(codebook, batch, tokens, dtype)
    starts = [7 + 5 * b for b in range(batch)]
    storage = full_storage(format, batch, heads, (tokens + 60) // 16)
    before = storage.clone()
    Encoder(codebook, plan).encode(x, storage, int32(*starts))
    now, was = unpack(storage, plan), unpack(before, plan)
    rows = range(batch)
    codes = torch.stack([now[b, :, starts[b] : starts[b] + tokens] for b in rows])
    assert_nearest(codes, x.double(), codebook)
    for b, start in enumerate(starts):
        assert torch.equal(now[b, :, :start], was[b, :, :start])
        assert torch.equal(now[b, :, start + tokens :], was[b, :, start + tokens :])


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 192, 256])
def test_every_head_dim_and_strided_vectors(dim, bits, kind):
    format = CodeFormat(dim, 8, bits)
    codebook = make_codebook(format, 3)
    plan = plan_keys(format, KeyRotation("half", dim)) if kind == "key" else format
    # As a projection leaves them: tokens before heads, and other channels in between.
    wide = torch.zeros(2, 100, 3, 2 * dim + 2, dtype=torch.bfloat16, device="cuda")
    for offset in (0, 1):  # from an odd address, channels are loaded one by one
        x = wide[..., offset : offset + dim].transpose(1, 2)
        x.copy_(make_vectors(codebook, 2, 100, torch.bfloat16))
        storage = full_storage(format, 2, 3, 7)
        Encoder(codebook, plan).encode(x, storage, int32(0, 12))
        now = unpack(storage, plan)
        codes = torch.stack((now[0, :, :100], now[1, :, 12:]))
        assert_nearest(codes, x.double(), codebook)


@pytest.mark.parametrize("channels, bits", FORMATS)
def test_one_token_of_two_thousand_rows_and_all_at_once_agree(channels, bits):
    format = CodeFormat(64, channels, bits)
    codebook = make_codebook(format, 2)
    plan = plan_keys(format, KeyRotation("half", 64))
    x = make_vectors(codebook, 2000, 18, torch.bfloat16)
    for layout in (plan, format):
        encoder = Encoder(codebook, layout)
        whole = full_storage(format, 2000, 2, 3)
        single, few = whole.clone(), whole.clone()
        column = torch.arange(2000, dtype=torch.int32, device="cuda") % 29
        encoder.encode(x, whole, column)
        for n in range(18):
            encoder.encode(x[:, :, n : n + 1], single, column + n)
        for n in range(0, 18, 6):
            encoder.encode(x[:, :, n : n + 6], few, column + n)
        assert torch.equal(whole, single) and torch.equal(whole, few)


def test_many_tokens_and_a_batch_of_prefills():
    format = CodeFormat(128, 8, 8)
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 16, 4097, torch.bfloat16)
    storage = full_storage(format, 16, 2, 258)
    Encoder(codebook, format).encode(x, storage, int32(*range(16)))
    codes = unpack_values(storage, format)
    got = torch.stack([codes[b, :, b : b + 4097] for b in range(16)])
    assert_nearest(got, x.double(), codebook)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("channels, bits", FORMATS)
def test_metric(channels, bits, kind):
    format = CodeFormat(64, channels, bits)
    codebook = make_codebook(format, 2)
    generator = torch.Generator().manual_seed(4)
    shape = (2, format.groups, channels, channels)
    transform = torch.randn(shape, generator=generator).cuda()
    plan = plan_keys(format, KeyRotation("half", 64)) if kind == "key" else format
    x = make_vectors(codebook, 1, 300, torch.bfloat16)
    storage = full_storage(format, 1, 2, 19)
    Encoder(codebook, plan, transform=transform).encode(x, storage, int32(0))
    assert_nearest(unpack(storage, plan)[:, :, :300], x.double(), codebook, transform)


@pytest.mark.parametrize("order", ["identity", "closed", "scatter"])
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("start", [0, 1_000_003])
@pytest.mark.parametrize("tokens", [3, 200])
def test_unrotation(tokens, start, style, order):
    format, rotation = CodeFormat(128, 8, 8), KeyRotation(style, 128)
    generator = torch.Generator().manual_seed(6)
    permutation = None
    if order == "closed":
        first = torch.randperm(64, generator=generator)
        second = first + 64 if style == "half" else 2 * first + 1
        first = first if style == "half" else 2 * first
        permutation = tuple(torch.stack((first, second), dim=1).flatten().tolist())
    if order == "scatter":
        permutation = tuple(torch.randperm(128, generator=generator).tolist())
    plan = plan_keys(format, rotation, permutation)
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 1, tokens, torch.float32)
    inv_freq = 5e5 ** (-torch.arange(64).double() / 64)
    position = start + torch.arange(tokens).double()
    angle = (position[:, None] * inv_freq).cuda()
    # Halves or neighbours, by the definition of RoPE, in float64.
    channel = torch.arange(64)
    a, b = (channel, channel + 64) if style == "half" else (2 * channel, 2 * channel + 1)
    turned = x.double().clone()
    turned[..., a] = 1.5 * (x[..., a] * angle.cos() - x[..., b] * angle.sin())
    turned[..., b] = 1.5 * (x[..., b] * angle.cos() + x[..., a] * angle.sin())
    turned = turned.float()
    exact = turned.double().clone()
    exact[..., a] = (turned[..., a] * angle.cos() + turned[..., b] * angle.sin()) / 1.5
    exact[..., b] = (turned[..., b] * angle.cos() - turned[..., a] * angle.sin()) / 1.5
    storage = full_storage(format, 1, 2, 14)
    rope = Rope(phase_steps(inv_freq, plan).cuda(), 1.5)
    encoder = Encoder(codebook, plan, rotation=rotation)
    encoder.encode(turned, storage, int32(5), position=int32(start), rope=rope)
    codes = unpack_keys(storage, plan)[:, :, 5 : 5 + tokens]
    ordered = exact if permutation is None else exact[..., list(permutation)]
    assert_nearest(codes, ordered, codebook)


@pytest.mark.parametrize("tokens", [5, 70])
def test_gains_and_pages(tokens):
    format = CodeFormat(128, 8, 10)
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 2, tokens, torch.float16) * 3
    plan = plan_keys(format, KeyRotation("half", 128))
    table = torch.randperm(16, device="cuda").int().view(2, 8)
    table[1, 7] = -1
    storage = full_storage(format, 16, 2, 1)
    gains = torch.zeros(16, 2, 16, dtype=torch.float16, device="cuda")
    encoder = Encoder(codebook, plan)
    encoder.encode(x, storage, int32(9, 30), block_table=table, gains=gains)
    pages = table.long().clamp(min=0)
    rows = storage[pages].squeeze(3).transpose(1, 2).contiguous()
    stored = gains[pages].transpose(1, 2).flatten(2)  # [batch, heads, 128]
    codes = unpack_keys(rows, plan)
    for b, start in enumerate((9, 30)):
        gain = stored[b, :, start : start + tokens].double()
        rms = x[b].double().square().mean(dim=2).sqrt()
        torch.testing.assert_close(gain, rms, rtol=1e-3, atol=0)
        scaled = (x[b].double() / gain[..., None]).unsqueeze(0)
        assert_nearest(codes[b : b + 1, :, start : start + tokens], scaled, codebook)


def test_outliers_infinities_and_ends_do_no_harm():
    format = CodeFormat(64, 8, 8)
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 2, 40, torch.bfloat16)
    x[0, :, 3] = torch.inf
    x[0, :, 4] = torch.nan
    x[0, :, 5] = -3e38
    x[0, :, 6] = 0
    storage = full_storage(format, 3, 2, 2)
    before = storage.clone()
    Encoder(codebook, format).encode(x, storage[:2], int32(0, -4))
    assert torch.equal(storage[1:], before[1:])  # a skipped row, and what lies behind the storage
    codes = unpack_values(storage[:1], format)[:, :, :32]
    keep = [n for n in range(32) if n not in (3, 4, 5)]
    assert_nearest(codes[:, :, keep], x[:1, :, keep].double(), codebook)


@pytest.mark.parametrize("batch", [4, 1500])
def test_a_captured_step_follows_its_tensors(batch):
    format = CodeFormat(64, 8, 8)
    codebook = make_codebook(format, 2)
    encoder = Encoder(codebook, format)
    x = torch.zeros(batch, 2, 1, 64, dtype=torch.bfloat16, device="cuda")
    column = torch.zeros(batch, dtype=torch.int32, device="cuda")
    replayed, direct = (torch.zeros(batch, 2, 2, format.tile_bytes).byte().cuda() for _ in range(2))
    encoder.encode(x, replayed, column)  # loads the kernel
    replayed.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encoder.encode(x, replayed, column)
    for n in range(20):
        x.copy_(make_vectors(codebook, batch, 1, torch.bfloat16, seed=n))
        column.fill_(n)
        graph.replay()
        encoder.encode(x, direct, column)
    assert torch.equal(replayed, direct) and bool(direct.any())

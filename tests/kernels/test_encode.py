"""Encoding writes the bytes that the layout and the codebook's own reference define."""

from __future__ import annotations

import pytest
import torch

from cqtool.codebooks.codes import assign
from cqtool.geometry import KeyRotation
from cqtool.kernels import operators
from cqtool.kernels.encode import Encoder, Rope, op
from cqtool.kernels.encode.config import launch_shape
from cqtool.kernels.encode.tables import read_entries
from cqtool.kernels.layout import (
    TILE,
    CodeFormat,
    pack_keys,
    pack_values,
    phase_steps,
    plan_keys,
    unpack_keys,
    unpack_values,
)
from cqtool.models.rotation import rotate, unrotate

FORMATS = [(8, 8), (4, 8), (2, 8), (8, 10), (8, 6)]
SHAPES = [
    (64, 8, 8),
    (80, 4, 8),
    (96, 2, 8),
    (128, 8, 10),
    (192, 8, 8),
    (256, 8, 10),
    (80, 8, 10),
    (192, 8, 6),
]


def make_codebook(format: CodeFormat, heads: int, seed: int = 0) -> torch.Tensor:
    """Normal centroids that float16 holds exactly, groups of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, format.groups, format.centroids, format.channels)
    sizes = 2.0 ** torch.randint(-3, 3, shape[:2], generator=generator)[:, :, None, None]
    return (torch.randn(shape, generator=generator) * sizes).half().float()


def make_vectors(codebook: torch.Tensor, batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    heads, groups, _, c = codebook.shape
    size = codebook.square().mean(dim=(2, 3)).sqrt().repeat_interleave(c, dim=1)
    return torch.randn(batch, heads, tokens, groups * c, generator=generator) * size[:, None]


def full_storage(format: CodeFormat, pages: int, heads: int, tiles: int) -> torch.Tensor:
    """Tiles full of other tokens' codes."""
    generator = torch.Generator().manual_seed(2)
    shape = (pages, heads, tiles, format.tile_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("dim, channels, bits", SHAPES)
def test_whole_tiles_are_the_packed_codes_of_the_reference(dim, channels, bits, kind):
    format, heads = CodeFormat(dim, channels, bits), 2
    codebook = make_codebook(format, heads)
    x = make_vectors(codebook, 2, 32)
    plan = plan_keys(format, KeyRotation("half", dim))
    encoder = Encoder(codebook, plan if kind == "key" else format)
    storage = full_storage(format, 2, heads, 3)
    before = storage.clone()
    encoder.encode(x, storage, int32(0, 16))
    codes = assign(x, codebook)
    packed = pack_keys(codes, plan) if kind == "key" else pack_values(codes, format)
    assert torch.equal(storage[0, :, :2], packed[0])
    assert torch.equal(storage[1, :, 1:], packed[1])
    assert torch.equal(storage[0, :, 2], before[0, :, 2])
    assert torch.equal(storage[1, :, 0], before[1, :, 0])


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("channels, bits", FORMATS)
def test_token_by_token_is_all_at_once_and_leaves_neighbours(channels, bits, kind):
    format = CodeFormat(64, channels, bits)
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 2, 21)
    plan = plan_keys(format, KeyRotation("half", 64))
    encoder = Encoder(codebook, plan if kind == "key" else format)
    whole, single = (full_storage(format, 2, 2, 3) for _ in range(2))
    before = whole.clone()
    encoder.encode(x, whole, int32(5, 13))
    for n in range(21):
        encoder.encode(x[:, :, n : n + 1], single, int32(5 + n, 13 + n))
    assert torch.equal(whole, single)

    def unpack(tiles):
        return unpack_keys(tiles, plan) if kind == "key" else unpack_values(tiles, format)

    was, now, codes = unpack(before), unpack(whole), assign(x, codebook)
    for row, start in enumerate((5, 13)):
        assert torch.equal(now[row, :, start : start + 21], codes[row])
        assert torch.equal(now[row, :, :start], was[row, :, :start])
        assert torch.equal(now[row, :, start + 21 :], was[row, :, start + 21 :])


def test_pages_are_those_of_the_block_table_and_the_rest_is_left_out():
    format = CodeFormat(64, 8, 10)
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 3, 40)
    encoder = Encoder(codebook, format)
    paged, rows = full_storage(format, 6, 2, 1), full_storage(format, 3, 2, 4)
    before = paged.clone()
    table = torch.tensor([[4, 1, 5], [2, -1, 0], [3, 3, 3]], dtype=torch.int32)
    encoder.encode(x, rows, int32(0, 0, 0))
    encoder.encode(x, paged, int32(0, 0, -1), block_table=table)
    assert torch.equal(paged[[4, 1]], rows[0, :, :2].transpose(0, 1).unsqueeze(2))
    assert torch.equal(paged[2, :, 0], rows[1, :, 0])
    assert torch.equal(paged[3], before[3])  # a row with a negative column
    encoder.encode(x, paged, int32(40, 40, -1), block_table=table)  # only 8 columns are left
    codes = assign(x, codebook)
    assert torch.equal(unpack_values(paged[5:], format)[0, :, 8:], codes[0, :, :8])


ROTATIONS = {
    "half": KeyRotation("half", 64),
    "interleaved": KeyRotation("interleaved", 64),
    "partial": KeyRotation("half", 32),
    "offset": KeyRotation("interleaved", 32, offset=32),
}


@pytest.mark.parametrize("order", ["identity", "closed", "scatter"])
@pytest.mark.parametrize("name", list(ROTATIONS))
def test_keys_are_unrotated_as_the_model_rotated_them(name, order):
    format, rotation = CodeFormat(64, 8, 8), ROTATIONS[name]
    generator = torch.Generator().manual_seed(7)
    permutation = None
    if order == "closed":
        permutation = tuple(c for p in torch.randperm(32, generator=generator) for c in (p, p + 32))
        permutation = tuple(int(channel) for channel in permutation)
    if order == "scatter":
        permutation = tuple(torch.randperm(64, generator=generator).tolist())
    plan = plan_keys(format, rotation, permutation)
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 2, 20)
    inv_freq = 1e4 ** (-torch.arange(rotation.dim // 2).double() / (rotation.dim // 2))
    position = torch.tensor([999_983, 17])
    angle = (position[:, None, None] + torch.arange(20)[:, None]).double() * inv_freq
    cos, sin = (1.25 * angle.cos()).float(), (1.25 * angle.sin()).float()
    turned = rotate(x, cos, sin, rotation)
    storage = full_storage(format, 2, 2, 2)
    Encoder(codebook, plan, rotation=rotation).encode(
        turned,
        storage,
        int32(0, 0),
        position=position.int(),
        rope=Rope(phase_steps(inv_freq, plan), 1.25),
    )
    ordered = unrotate(turned, cos, sin, rotation)[..., list(permutation or range(64))]
    got = unpack_keys(storage, plan)[:, :, :20]
    # Angles of a million radians in float64 differ from exact ones in the last digits only.
    assert (got == assign(ordered, codebook)).float().mean() > 0.999


def test_heads_may_have_plans_of_their_own():
    format, rotation = CodeFormat(64, 4, 8), KeyRotation("half", 64)
    generator = torch.Generator().manual_seed(5)
    orders = [tuple(torch.randperm(64, generator=generator).tolist()) for _ in range(2)]
    plans = [plan_keys(format, rotation, order) for order in orders]
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 1, 16)
    inv_freq = 1e4 ** (-torch.arange(32).double() / 32)
    angle = (torch.arange(16) + 1000).double()[None, :, None] * inv_freq
    turned = rotate(x, angle.cos().float(), angle.sin().float(), rotation)
    storage = full_storage(format, 1, 2, 1)
    steps = torch.stack([phase_steps(inv_freq, plan) for plan in plans])
    encoder = Encoder(codebook, plans, rotation=rotation)
    encoder.encode(turned, storage, int32(0), position=int32(1000), rope=Rope(steps))
    for head, order in enumerate(orders):
        want = assign(x[:, head : head + 1, :, list(order)], codebook[head : head + 1])
        got = unpack_keys(storage[:, head : head + 1], plans[head])
        assert (got == want).float().mean() > 0.999


@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_metric_is_the_distance_after_its_transform(kind):
    format, heads = CodeFormat(64, 8, 8), 2
    codebook = make_codebook(format, heads)
    generator = torch.Generator().manual_seed(3)
    transform = torch.randn(heads, format.groups, 8, 8, generator=generator)
    x = make_vectors(codebook, 1, 16)
    plan = plan_keys(format, KeyRotation("half", 64))
    encoder = Encoder(codebook, plan if kind == "key" else format, transform=transform)
    storage = full_storage(format, 1, heads, 1)
    encoder.encode(x, storage, int32(0))
    grouped = x.double().view(1, heads, 16, format.groups, 1, 8)
    apart = (grouped - codebook.double()[:, None]) @ transform.double()[:, None]
    codes = apart.square().sum(dim=5).argmin(dim=4)
    packed = pack_keys(codes, plan) if kind == "key" else pack_values(codes, format)
    assert torch.equal(storage, packed)


def test_gains_are_the_root_mean_square_and_divide_the_vectors():
    format = CodeFormat(64, 8, 8)
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 2, 5) * torch.tensor([1e-2, 1.0, 30.0, 0.0, 5.0])[:, None]
    storage = full_storage(format, 2, 2, 2)
    gains = torch.full((2, 2, 32), -1.0, dtype=torch.float16)
    Encoder(codebook, format).encode(x, storage, int32(3, 14), gains=gains)
    rms = x.double().square().mean(dim=3).sqrt()
    for row, start in enumerate((3, 14)):
        torch.testing.assert_close(
            gains[row, :, start : start + 5].double(), rms[row], rtol=1e-3, atol=1e-7
        )
        assert int((gains[row] >= 0).sum()) == 10
        stored = gains[row, :, start : start + 5].float()[None, :, :, None]
        scaled = torch.where(stored > 0, x[row : row + 1] / stored, 0)
        got = unpack_values(storage[row : row + 1], format)[:, :, start : start + 5]
        assert torch.equal(got, assign(scaled, codebook))


@pytest.mark.parametrize("dim, channels, bits", SHAPES)
def test_the_kernels_tables_hold_the_centroids_exactly_and_keep_scores_in_reach(
    dim, channels, bits
):
    format = CodeFormat(dim, channels, bits)
    codebook = make_codebook(format, 2) * 1e-3
    encoder = Encoder(codebook, format)
    entries = read_entries(encoder._image, encoder._scaling, channels)
    assert torch.equal(entries, codebook.half().float())
    # The longest vector of the fast path, along any centroid: scores stay within 128..256, and
    # it is at least three times as long as the longest centroid.
    scale, limit, table_scale, _ = encoder._scaling.double().unbind(dim=2)
    length = entries.double().square().sum(dim=3).sqrt()
    product = (scale * table_scale)[:, :, None] * length
    worst = (limit.sqrt() / scale)[:, :, None] * product + product * length / 2
    assert float(worst.max()) < 63
    assert bool((limit.sqrt() > 3 * scale * length.amax(dim=2)).all())


@pytest.mark.parametrize("bits", [6, 8, 10])
def test_columns_of_a_table_are_codes_with_their_own_offsets(bits):
    format = CodeFormat(64, 8, bits)
    codebook = make_codebook(format, 1)
    encoder = Encoder(codebook, format)
    scale, _, table_scale, _ = encoder._scaling[0, 3].double().tolist()
    book, size = codebook[0, 3].double(), min(256, 1 << bits)
    assert encoder._image.shape == (1, 8, (1 << bits) // size, 20 * size)
    for start, table in zip(range(0, 1 << bits, size), encoder._image[0, 3], strict=True):
        halves = table[: 16 * size].view(torch.float16).double().view(-1, 32, 4, 2)
        offsets = table[16 * size :].view(torch.float32).double().view(-1, 4, 2)
        for n in range(size):
            block, i, lane = n // 8, n // 4 % 2, n % 4
            column = 2 * lane + i  # of a product: four lanes hold its channels
            entry = halves[block // 4, 4 * column : 4 * column + 4, block % 4].flatten()
            assert torch.equal(entry, book[start + n] * table_scale)
            least = 192 - scale * table_scale * book[start + n].square().sum() / 2
            assert abs(offsets[block, lane, i] - least) < 1e-4


def test_permuted_values_and_a_wrong_storage():
    format = CodeFormat(64, 4, 8)
    codebook = make_codebook(format, 2)
    x = make_vectors(codebook, 1, 16)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    storage = full_storage(format, 1, 2, 1)
    Encoder(codebook, format, permutation=order).encode(x, storage, int32(0))
    assert torch.equal(storage, pack_values(assign(x[..., order], codebook), format))
    with pytest.raises(ValueError, match="storage must be uint8"):
        Encoder(codebook, format).encode(x, storage[..., 4:], int32(0))


@pytest.mark.parametrize(
    "batch, tokens", [(1, 1), (2000, 1), (3, 15), (1, 16), (16, 4096), (5, 33)]
)
@pytest.mark.parametrize("groups", [8, 10, 12, 128])
def test_a_launch_covers_every_row_and_group(batch, tokens, groups):
    shape = launch_shape(batch, 8, tokens, groups, 132)
    rows, heads, ranges = shape.grid
    assert heads == 8 and ranges * shape.span >= groups > (ranges - 1) * shape.span
    if shape.flat:
        assert rows * shape.warps * shape.tiles * TILE >= batch * tokens
    else:
        # Any column may start a row: 15 columns into a tile at worst.
        touched = -(-(tokens + 15) // TILE)
        quads = -(-touched // 4)
        assert shape.tiles == 4 and rows * shape.warps >= batch * quads and shape.span % 2 == 0


@pytest.mark.parametrize("gained", [False, True])
def test_the_operator_tells_torch_what_it_does(monkeypatch, gained):
    """That it writes to storage and gains, and to nothing else, also in a compiled graph."""
    codebook = make_codebook(CodeFormat(64, 8, 8), 2)
    encoder = Encoder(codebook, CodeFormat(64, 8, 8))
    storage = full_storage(encoder.format, 1, 2, 4)
    gains = torch.zeros(1, 2, 64).half() if gained else None
    calls = []
    monkeypatch.setattr(op, "encode_op", lambda *args: calls.append(args))
    encoder.encode(make_vectors(codebook, 1, 20), storage, int32(5), gains=gains)
    monkeypatch.undo()
    torch.library.opcheck(torch.ops.cqtool.encode.default, calls[0])


def test_calls_go_past_torch_only_where_nothing_looks_on():
    from torch._subclasses.fake_tensor import FakeTensorMode

    went = []

    def own(x: torch.Tensor) -> torch.Tensor:
        went.append("own")
        return x.clone()

    call = operators.define_operator("looked_on", cpu=own, cuda=own, fake=torch.empty_like)
    x = torch.ones(3)
    assert torch.equal(call(x), x) and went == ["own"]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert type(call(x)) is type(call(fake)) is type(fake)
    assert call(x.to("meta")).device.type == "meta"
    assert went == ["own"]
    compiled = torch.compile(lambda each: call(each) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x + 1)

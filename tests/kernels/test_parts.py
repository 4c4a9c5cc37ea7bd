"""A layer in parts: which heads they have, and that its answer is that of whole layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from cqtool.geometry import KeyRotation
from cqtool.kernels import lanes
from cqtool.kernels.decode.arguments import CodedTokens, Columns, DenseTokens
from cqtool.kernels.decode.op import decode_attention
from cqtool.kernels.decode.parts import CodedPart, HeadOrder, decode_parts, divide_dense
from cqtool.kernels.decode.tables import LayerTables
from cqtool.kernels.lanes import side_by_side

DIVISIONS = [
    [(0, 1, 2, 3, 4)],
    [(0, 1), (2, 3, 4)],
    [(0, 2, 4), (1, 3)],
    [(0, 1, 4), (2,), (3,)],
    [(1, 2, 4), (0, 3)],
]


@pytest.mark.parametrize("parts", DIVISIONS)
@pytest.mark.parametrize("readers", [1, 3])
def test_heads_go_apart_and_come_back_in_order(parts, readers):
    states = torch.arange(2 * 5 * readers * 4.0).view(2, 5 * readers, 2, 2)
    order = HeadOrder(parts)
    divided = order.divide(states)
    for own, heads in zip(divided, parts, strict=True):
        mine = [head * readers + reader for head in heads for reader in range(readers)]
        assert torch.equal(own, states[:, mine])
    assert torch.equal(order.join(divided), states)


def test_evenly_spaced_heads_are_read_in_place():
    states = torch.zeros(2, 5, 8, 4)
    for parts, copied in ((DIVISIONS[1], []), (DIVISIONS[2], []), (DIVISIONS[3], [0])):
        divided = HeadOrder(parts).divide(states)
        here = states.untyped_storage().data_ptr()
        found = [at for at, own in enumerate(divided) if own.untyped_storage().data_ptr() != here]
        assert found == copied


@pytest.mark.parametrize("parts", DIVISIONS[1:])
def test_parts_answer_as_whole_layers_of_their_codes_do(parts):
    """Each part's heads of a layer that has the part's codes in all heads."""
    torch.manual_seed(0)
    kv_heads, readers, tokens = 5, 2, 40
    query = torch.randn(2, kv_heads * readers, 1, 64)
    dense = DenseTokens(*(torch.randn(2, kv_heads, size, 64) for size in (8, 8, 2, 2)))
    count = torch.full((2,), tokens, dtype=torch.int32)
    columns = Columns(count * 0, count, count + 5, count * 0)
    coded, expected = [], []
    for heads, channels in zip(parts, itertools.cycle((8, 4)), strict=False):
        book = torch.randn(kv_heads, 64 // channels, 256, channels)
        whole = LayerTables(book, book.flip(0), KeyRotation("none"))
        size = (whole.key_format.tile_bytes, whole.value_format.tile_bytes)
        tiles = [
            torch.randint(0, 256, (2, kv_heads, 3, bytes), dtype=torch.uint8) for bytes in size
        ]
        expected.append(
            decode_attention(
                query,
                CodedTokens(*tiles, tokens),
                whole,
                whole.no_rope,
                columns,
                scale=0.1,
                dense=dense,
            )
        )
        own = LayerTables(book[list(heads)], book.flip(0)[list(heads)], KeyRotation("none"))
        mine = [each[:, list(heads)].contiguous() for each in tiles]
        recent = divide_dense(dense, HeadOrder(parts))[len(coded)]
        coded.append(CodedPart(CodedTokens(*mine, tokens), own, own.no_rope, recent))
    found = decode_parts(query, coded, HeadOrder(parts), columns, scale=0.1)
    for heads, answer in zip(parts, expected, strict=True):
        mine = [head * readers + reader for head in heads for reader in range(readers)]
        torch.testing.assert_close(found[:, mine], answer[:, mine])


def test_on_a_cpu_the_calls_come_one_after_the_other():
    log: list[int] = []
    calls = [lambda index=index: log.append(index) or index for index in range(3)]
    assert side_by_side(torch.device("cpu"), calls) == [0, 1, 2]
    assert log == [0, 1, 2]


class _Gpu:
    """torch.cuda's streams and events as a log of what is queued where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self
        self.log: list[str] = []
        self.current = "main"
        made = itertools.count(1)

        class Event:
            def record(self, stream: Stream) -> None:
                self.after = stream.name

        class Stream:
            def __init__(self, device: torch.device | None = None, name: str = "") -> None:
                self.name = name or f"side{next(made)}"

            @property
            def cuda_stream(self) -> int:
                return hash(self.name)

            def wait_event(self, event: Event) -> None:
                gpu.log.append(f"{self.name} waits for {event.after}")

        @contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, gpu.current = gpu.current, chosen.name
            yield
            gpu.current = before

        monkeypatch.setattr(lanes, "_known", lanes._Known())
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(name=gpu.current))

    def call(self, name: str) -> str:
        self.log.append(f"{name} on {self.current}")
        return name


def test_on_a_gpu_they_part_after_what_is_queued_and_meet_before_what_follows(monkeypatch):
    gpu, device = _Gpu(monkeypatch), torch.device("cuda", 0)
    calls = [partial(gpu.call, name) for name in "abc"]
    for _ in range(2):
        gpu.log.clear()
        assert side_by_side(device, calls) == ["a", "b", "c"]
        assert gpu.log == [
            "side1 waits for main", "b on side1", "side2 waits for main", "c on side2",
            "a on main", "main waits for side1", "main waits for side2",
        ]  # fmt: skip
    # Another stream has others beside it: these may be writing where that one still reads.
    gpu.current = "other"
    gpu.log.clear()
    side_by_side(device, calls[:2])
    assert gpu.log[1] == "b on side3" and gpu.log[-1] == "other waits for side3"


def test_on_a_gpu_a_failure_leaves_nothing_under_way(monkeypatch):
    gpu, device = _Gpu(monkeypatch), torch.device("cuda", 0)

    def fail() -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        side_by_side(device, [fail, partial(gpu.call, "b")])
    assert gpu.log[-1] == "main waits for side1"

"""Heads with codes of their own on a GPU: side by side, and what follows waits for all of them."""

from __future__ import annotations

import pytest
import torch
from mixed_bench import mixed_format

from cqtool.bench.layers import LayerProblem
from cqtool.bench.problem import AttentionLoad
from cqtool.kernels.lanes import side_by_side

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("error:.*torch reference.*"),
]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _problem(device: torch.device, batch: int, tokens: int) -> LayerProblem:
    load = AttentionLoad("a case", batch, 12, 4, 64, tokens)
    return LayerProblem(load, mixed_format(), 0, torch.float16, device)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 50), (1, 9000), (16, 3000), (70, 700)])
def test_every_head_s_answer_is_that_of_float64(device, batch, tokens):
    assert max(_problem(device, batch, tokens).errors()) < 2e-3


def test_what_follows_waits_for_all_parts(device):
    """Each answer is used and let go of at once, so that its memory goes around."""
    problem = _problem(device, 8, 4000)
    torch.cuda.synchronize()
    first = problem.attend().clone()
    torch.cuda.synchronize()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(300):
        found = problem.attend()
        wrong += (found != first).sum()
        found.fill_(float("nan"))
        del found
    assert int(wrong) == 0


def test_the_parts_start_after_what_the_stream_holds(device):
    problem = _problem(device, 2, 500)
    expected = problem.attend().clone()
    query = problem.queries[0].clone()
    for _ in range(20):
        problem.queries[0].fill_(0)
        torch.cuda.synchronize()
        torch.cuda._sleep(3_000_000)  # type: ignore[no-untyped-call]
        problem.queries[0].copy_(query)
        assert torch.equal(problem.attend(), expected)


def test_a_graph_holds_all_parts_and_is_played_again(device):
    problem = _problem(device, 4, 2000)
    expected = problem.attend().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = problem.attend() + 0
    query = problem.queries[0].clone()
    for scale in (2, 1):
        problem.queries[0].copy_(query * scale)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, problem.attend())
    assert torch.equal(found, expected)


def test_parts_of_a_graph_run_at_the_same_time(device):
    def sleep() -> None:
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]

    def seconds(calls: int) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            side_by_side(device, [sleep] * calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    assert seconds(3) < 1.5 * seconds(1)


def test_a_call_that_fails_leaves_the_streams_in_order(device):
    other = torch.zeros(1 << 20, device=device)

    def slow() -> None:
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        other.fill_(1)

    def fail() -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        side_by_side(device, [fail, slow])
    assert float(other.sum()) == 1 << 20

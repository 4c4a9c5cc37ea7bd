"""Compiled kernels load and launch in torch's context, on its streams and in its graphs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from cqtool.errors import KernelError
from cqtool.kernels import cubins, load
from cqtool.kernels.module import LoadedModule
from cqtool.kernels.variants import Variant

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SOURCE = """
#include <cuda_fp16.h>
extern "C" __global__ void saxpy(const float* x, float* y, long long n, int k, float a) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] += a * x[i] * k * K;
}
extern "C" __global__ void reversed(const float* x, float* y, int n) {
    extern __shared__ float shared[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) shared[i] = x[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = shared[n - 1 - i];
}
"""
VARIANT = Variant("op/saxpy.cu", (("K", 3),))
N = 1000


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernels folder, with nothing loaded, cached or registered."""
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cubins, "_folders", [])
    monkeypatch.setattr(load, "_results", {})
    (tmp_path / "kernels" / "op").mkdir(parents=True)
    (tmp_path / "kernels" / "op" / "saxpy.cu").write_text(SOURCE)
    return tmp_path / "kernels"


def saxpy(module: LoadedModule, x: torch.Tensor, y: torch.Tensor, k: int, a: float) -> None:
    stream = torch.cuda.current_stream(x.device).cuda_stream
    grid = ((N + 127) // 128, 1, 1)
    args = (x.data_ptr(), y.data_ptr(), N, k, a)
    module.launch("saxpy", grid, (128, 1, 1), 0, stream, *args)


def vectors(device: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(2, N, device=f"cuda:{device}")
    return x, y


def check(x: torch.Tensor, before: torch.Tensor, after: torch.Tensor, factor: float) -> None:
    expected = before.double() + factor * x.double()
    torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-5)


def test_compiles_launches_and_is_cached(root: Path) -> None:
    module = load.load(VARIANT, 0, root)
    major, minor = torch.cuda.get_device_capability(0)
    assert module.arch == f"sm_{major}{minor}" and module.origin.startswith("NVRTC")
    assert module.entries == ("reversed", "saxpy")
    assert load.load(VARIANT, 0, root) is module
    x, y = vectors()
    before = y.clone()
    saxpy(module, x, y, -2, 0.5)
    check(x, before, y, -2 * 0.5 * 3)
    load.forget()
    again = load.load(VARIANT, 0, root)
    assert again is not module and again.origin.startswith("the cache")
    saxpy(again, x, y, 2, 0.5)
    torch.testing.assert_close(y, before, rtol=1e-5, atol=1e-5)


def test_shipped_cubin_of_an_earlier_minor_version_or_the_same_runs(
    root: Path, tmp_path: Path
) -> None:
    major, _ = torch.cuda.get_device_capability(0)
    cubins.ship(tmp_path / "package", [VARIANT], [f"sm_{major}0"], root)
    load.register_folder(tmp_path / "package")
    module = load.load(VARIANT, 0, root)
    assert module.arch == f"sm_{major}0" and module.origin.endswith(str(tmp_path / "package"))
    x, y = vectors()
    before = y.clone()
    saxpy(module, x, y, 1, 1.0)
    check(x, before, y, 3)


def test_cached_image_that_the_driver_refuses_is_compiled_again(root: Path) -> None:
    module = load.load(VARIANT, 0, root)
    (path,) = cubins.cache_folder().glob("*.cubin")
    cubins.write_cached(path.stem, b"\x7fELF" + bytes(64))
    load.forget()
    assert load.load(VARIANT, 0, root).origin == module.origin
    assert load.load(VARIANT, 0, root).entries == module.entries


def test_runs_on_torchs_current_stream(root: Path) -> None:
    module = load.load(VARIANT, 0, root)
    x, y = vectors()
    y.add_(0)  # so that no code is loaded below, which may wait for the whole GPU
    before = y.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        y.add_(1)  # queued behind the sleep: the kernel must come after both
        saxpy(module, x, y, 1, 1.0)
        assert not stream.query()  # neither waited for the sleep nor ran beside it
    stream.synchronize()
    check(x, before + 1, y, 3)


def test_graph_captures_the_first_launch_and_replays_it(root: Path) -> None:
    module = load.load(VARIANT, 0, root)
    x, y = vectors()
    before = y.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        saxpy(module, x, y, 1, 1.0)
        saxpy(module, x, y, 2, 0.25)  # other arguments from the same buffer
    check(x, before, y, 0)
    for _ in range(4):
        graph.replay()
    check(x, before, y, 4 * (3 + 1.5))


def test_graph_captures_a_launch_with_much_shared_memory(root: Path) -> None:
    module = load.load(VARIANT, 0, root)
    n = 24_000  # 96,000 bytes
    x = torch.randn(n, device="cuda")
    y = torch.full_like(x, torch.nan)
    graph = torch.cuda.CUDAGraph()
    args = (x.data_ptr(), y.data_ptr(), n)
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        module.launch("reversed", (1, 1, 1), (256, 1, 1), 4 * n, stream, *args)
    graph.replay()
    assert torch.equal(y, x.flip(0))


def test_too_much_shared_memory_is_told(root: Path) -> None:
    module = load.load(VARIANT, 0, root)
    with pytest.raises(KernelError, match="4000000 bytes of shared memory"):
        module.launch("reversed", (1, 1, 1), (256, 1, 1), 4_000_000, 0, 0, 0, 0)
    assert torch.ones(1, device="cuda").item() == 1  # nothing sticks


def test_thread_that_has_not_used_cuda(root: Path) -> None:
    module = load.load(VARIANT, 0, root)
    x, y = vectors()
    before = y.clone()
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            module.launch("saxpy", (8, 1, 1), (128, 1, 1), 0, 0, *args)
        except BaseException as error:
            failures.append(error)

    args = (x.data_ptr(), y.data_ptr(), N, 1, 1.0)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failures
    check(x, before, y, 3)


def test_many_threads_do_not_mix_their_arguments(root: Path) -> None:
    module = load.load(VARIANT, 0, root)
    pairs = [vectors() for _ in range(8)]
    before = [y.clone() for _, y in pairs]
    torch.cuda.synchronize()

    def work(index: int) -> None:
        for _ in range(200):
            saxpy(module, *pairs[index], index, 0.01)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for index, (x, y) in enumerate(pairs):
        expected = before[index].double() + 200 * index * 0.01 * 3 * x.double()
        torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current(root: Path) -> None:
    module = load.load(VARIANT, 1, root)
    x, y = vectors(1)
    before = y.clone()
    torch.cuda.synchronize(1)
    assert torch.cuda.current_device() == 0
    saxpy(module, x, y, 1, 1.0)
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    check(x, before, y, 3)


def test_launch_is_cheap(root: Path) -> None:
    module = load.load(VARIANT, 0, root)
    x, y = vectors()
    stream = torch.cuda.current_stream().cuda_stream
    args = (x.data_ptr(), y.data_ptr(), N, 1, 0.0)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):  # fewer than fit into the driver's queue
            module.launch("saxpy", (8, 1, 1), (128, 1, 1), 0, stream, *args)
        best = min(best, (time.perf_counter() - start) / 500)
    print(f"one launch takes {best * 1e6:.1f} us of the host's time")
    assert best < 50e-6  # far above what it takes, below what a mistake would

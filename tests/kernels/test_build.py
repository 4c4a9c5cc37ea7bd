"""Kernels compile for every architecture without a GPU, and every failure says what to do."""

from __future__ import annotations

import importlib
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from cqtool.errors import KernelError
from cqtool.kernels import build
from cqtool.kernels.build import compile_variant, parse_usage, toolchain
from cqtool.kernels.variants import ARCHITECTURES, Variant

SAXPY = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include "scale.cuh"
#include "near.cuh"
extern "C" __global__ void __launch_bounds__(128)
saxpy(const float* x, float* y, long long n, int k, float a) {
    __shared__ float shared[32];
    long long i = blockIdx.x * 128LL + threadIdx.x;
    shared[threadIdx.x & 31] = a;
    __syncthreads();
    if (i < n) y[i] += scale(a) * x[i] * K + shared[(threadIdx.x + 1) & 31] + NEAR;
}
extern "C" __global__ void __launch_bounds__(512, 3) spilling(const float* x, float* y, int n) {
    float v[64];
    #pragma unroll
    for (int i = 0; i < 64; i++) v[i] = x[i * n + threadIdx.x];
    #pragma unroll
    for (int r = 0; r < 4; r++)
        #pragma unroll
        for (int i = 0; i < 64; i++) v[i] = v[i] * v[(i * 7 + r) & 63] + v[(i + 13) & 63];
    #pragma unroll
    for (int i = 0; i < 64; i++) y[i * n + threadIdx.x] = v[i];
}
__noinline__ __device__ float far(float* v, int n) {
    float t[8];
    for (int i = 0; i < 8; i++) t[i] = v[i * n];
    return t[n & 7];
}
extern "C" __global__ void calling(float* y, int n) { y[threadIdx.x] = far(y, n) + far(y + n, n); }
"""
VARIANT = Variant("op/saxpy.cu", (("K", 3),))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A kernels folder."""
    folder = tmp_path / "kernels"
    (folder / "op").mkdir(parents=True)
    (folder / "op" / "saxpy.cu").write_text(SAXPY)
    (folder / "op" / "near.cuh").write_text("#define NEAR 1\n")
    (folder / "scale.cuh").write_text("__device__ float scale(float a) { return 2 * a; }\n")
    return folder


def elf_architecture(cubin: bytes) -> int:
    """The SM number in the flags of a cubin's ELF header."""
    machine, flags = struct.unpack_from("<H", cubin, 18)[0], struct.unpack_from("<I", cubin, 48)[0]
    assert cubin[:4] == b"\x7fELF" and machine == 190
    return (flags >> 8) & 0xFF


def elf_registers(cubin: bytes) -> dict[str, int]:
    """Registers by kernel, from the sections' headers; sm_90 and later keep them elsewhere."""
    table, count, names = (
        *struct.unpack_from("<Q", cubin, 40),
        *struct.unpack_from("<HH", cubin, 60),
    )
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(count)]
    found = {}
    for section in sections:
        start = sections[names][4] + section[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = section[7] >> 24
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_compiles_without_a_gpu(root: Path, arch: str) -> None:
    kernel = compile_variant(VARIANT, arch, root)
    assert f"sm_{elf_architecture(kernel.cubin)}" == arch
    assert set(kernel.usage) == {"saxpy", "spilling", "calling"}
    if arch in ("sm_80", "sm_86", "sm_89"):
        assert {k: u.registers for k, u in kernel.usage.items()} == elf_registers(kernel.cubin)
    assert kernel.usage["saxpy"].shared == 32 * 4
    assert kernel.usage["saxpy"].spill_stores == kernel.usage["saxpy"].stack == 0
    # 3 x 512 threads share 65536 registers: at most 42 for each, and 64 values to keep.
    spilling = kernel.usage["spilling"]
    assert spilling.registers <= 42
    assert min(spilling.spill_stores, spilling.spill_loads, spilling.stack) >= 4 * (64 - 42)
    assert kernel.usage["calling"].stack >= 8 * 4


def test_same_bytes_from_the_same_source_and_others_from_other_macros(root: Path) -> None:
    first = compile_variant(VARIANT, "sm_90", root).cubin
    assert compile_variant(VARIANT, "sm_90", root).cubin == first
    assert compile_variant(Variant(VARIANT.source, (("K", 4),)), "sm_90", root).cubin != first


def test_headers_of_the_working_directory_are_not_used(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "op").mkdir()
    for folder in (tmp_path, tmp_path / "op"):
        for name in ("near.cuh", "scale.cuh", "stray.cuh"):
            (folder / name).write_text("#error stray header\n")
    monkeypatch.chdir(tmp_path)
    compile_variant(VARIANT, "sm_90", root)
    (root / "op" / "saxpy.cu").write_text('#include "stray.cuh"\n')
    with pytest.raises(KernelError, match="cannot open source file"):
        compile_variant(VARIANT, "sm_90", root)


def test_wrong_source_shows_the_compilers_lines(root: Path) -> None:
    (root / "op" / "saxpy.cu").write_text(
        '__device__ int unused_one;\nextern "C" __global__ void f() { nonsense(K); }\n'
    )
    with pytest.raises(KernelError) as raised:
        compile_variant(VARIANT, "sm_90", root)
    assert raised.value.exit_code == 1
    first, second = str(raised.value).splitlines()[:2]
    assert "op/saxpy.cu -DK=3 for sm_90" in first
    assert second == 'op/saxpy.cu(2): error: identifier "nonsense" is undefined'


def test_what_only_the_assembler_refuses_is_shown(root: Path) -> None:
    (root / "op" / "saxpy.cu").write_text(
        'extern "C" __global__ void f(int* y) { __shared__ int big[99999]; big[*y] = 1;'
        " __syncthreads(); *y = big[y[1]]; }\n"
    )
    with pytest.raises(KernelError, match="too much shared data"):
        compile_variant(VARIANT, "sm_90", root)


def test_missing_source_and_unknown_architecture(root: Path) -> None:
    with pytest.raises(KernelError, match=r"gone\.cu is missing"):
        compile_variant(Variant("gone.cu"), "sm_90", root)
    with pytest.raises(KernelError, match=r"cannot compile for sm_999.*pip install -U"):
        compile_variant(VARIANT, "sm_999", root)


@pytest.mark.parametrize(
    ("module", "package"), [("cuda.core", "cuda-core"), ("cuda.bindings.nvrtc", "cuda-bindings")]
)
def test_missing_binding_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    real = importlib.import_module

    def load(name: str, package: str | None = None) -> object:
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, package)

    monkeypatch.setattr(build.importlib, "import_module", load)
    with pytest.raises(KernelError, match=rf"package {package},.*pip install .*{package}>="):
        toolchain()


def test_missing_nvrtc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so.13"')

    nvrtc = SimpleNamespace(nvrtcVersion=missing)
    monkeypatch.setattr(build, "_nvrtc", lambda: nvrtc)
    with pytest.raises(KernelError, match="pip install 'nvidia-cuda-nvrtc>=13"):
        toolchain()


def test_headers_are_found_in_packages_and_in_a_toolkit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def folder(name: str, *headers: str) -> Path:
        for header in headers:
            (tmp_path / name / header).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / header).touch()
        return tmp_path / name

    both = ("cuda_fp16.h", "crt/host_defines.h")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(build, "_TOOLKIT", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(KernelError, match=r"cuda_fp16\.h is in no.*nvidia-cuda-runtime>=13"):
        toolchain()
    wheel = folder("nvidia/cu13/include", both[0])
    with pytest.raises(KernelError, match=r"crt/host_defines\.h is in no.*nvidia-cuda-crt>=13"):
        toolchain()
    other = folder("nvidia/cuda_crt/include", both[1])
    assert toolchain().headers == (wheel, other)
    toolkit = folder("toolkit/include", *both)
    assert toolchain().headers == (toolkit,)
    home = folder("home/include", *both)
    monkeypatch.setenv("CUDA_HOME", str(home.parent))
    assert toolchain().headers == (home,)
    folder("nvidia/cu13/include", both[1])
    assert toolchain().headers == (wheel,)


def test_usage_of_a_log_without_kernels_is_empty() -> None:
    assert parse_usage("ptxas info    : 0 bytes gmem\n") == {}

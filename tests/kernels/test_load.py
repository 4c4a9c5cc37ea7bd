"""A kernel comes from where it should, is never stale or damaged, and is launched as asked."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import re
import struct
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cqtool.errors import KernelError, KernelsUnavailable
from cqtool.kernels import cubins, load, module
from cqtool.kernels.build import CompiledKernel, Toolchain
from cqtool.kernels.load import Cubin, candidates, outlook
from cqtool.kernels.variants import Variant, compatible_architectures, read_sources

VARIANT = Variant("op/tiny.cu", (("K", 3),))
HOPPER = (9, 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A kernels folder."""
    (tmp_path / "kernels" / "op").mkdir(parents=True)
    source = 'extern "C" __global__ void tiny(float* y, int n, float a) { y[n] = K * a; }\n'
    (tmp_path / "kernels" / "op" / "tiny.cu").write_text(source)
    return tmp_path / "kernels"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has loaded nothing, with an empty cache."""
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cubins, "_folders", [])
    monkeypatch.setattr(cubins, "_told_unwritable", False)
    monkeypatch.setattr(load, "_warned", False)
    monkeypatch.setattr(load, "_results", {})


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The architectures that the compiler ran for. It is a quick one, true to its input."""
    runs: list[str] = []

    def compile_variant(variant: Variant, arch: str, root: Path) -> CompiledKernel:
        runs.append(arch)
        text = f"{variant.defines} {arch} {read_sources(root)}"
        return CompiledKernel(hashlib.sha256(text.encode()).digest(), "", {})

    monkeypatch.setattr(load, "compile_variant", compile_variant)
    monkeypatch.setattr(cubins, "compile_variant", compile_variant)
    return runs


def first(
    root: Path, capability: tuple[int, int] = HOPPER, variant: Variant = VARIANT
) -> tuple[Cubin, list[str]]:
    """The preferred binary, and why the ways before it had none."""
    reasons: list[str] = []
    return next(candidates(variant, capability, root, reasons)), reasons


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").glob("*.cubin"))


# --- variants


def test_name_is_safe_stable_and_of_one_variant_only() -> None:
    variant = Variant("decode/decode.cu", (("B", 2), ("A", 1)))
    assert variant == Variant("decode/decode.cu", (("A", 1), ("B", 2)))
    assert variant.name == Variant("decode/decode.cu", (("A", 1), ("B", 2))).name
    expected = hashlib.sha256(b'["decode/decode.cu", [["A", 1], ["B", 2]]]').hexdigest()[:12]
    assert variant.name == f"decode-{expected}"
    others = [
        Variant("encode/decode.cu", variant.defines),
        Variant("decode/decode.cu", (("A", 1), ("B", 3))),
        Variant("decode/decode.cu", (("A", 1), ("C", 2))),
        Variant("decode/decode.cu", (("A", 1),)),
    ]
    names = {other.name for other in [variant, *others]}
    assert len(names) == 5
    assert all(re.fullmatch(r"[a-z0-9_-]+", name) for name in names)


@pytest.mark.parametrize("source", ["../x.cu", "/x.cu", "x.cuh", "a/../../x.cu"])
def test_source_outside_the_folder_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="inside the kernels folder"):
        Variant(source)


@pytest.mark.parametrize("defines", [(("A", 1), ("A", 2)), (("A B", 1),), (("A=1 -DB", 1),)])
def test_what_is_no_set_of_macros_is_refused(defines: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(ValueError, match="macro names"):
        Variant("x.cu", defines)


def test_digest_covers_sources_macros_and_architecture(root: Path) -> None:
    digests = [VARIANT.digest(read_sources(root), "sm_90")]
    digests.append(VARIANT.digest(read_sources(root), "sm_80"))
    digests.append(Variant(VARIANT.source, (("K", 4),)).digest(read_sources(root), "sm_90"))
    (root / "common.cuh").write_text("#define A 1\n")
    digests.append(VARIANT.digest(read_sources(root), "sm_90"))
    (root / "common.cuh").write_text("#define A 2\n")
    digests.append(VARIANT.digest(read_sources(root), "sm_90"))
    (root / "common.cuh").rename(root / "other.cuh")
    digests.append(VARIANT.digest(read_sources(root), "sm_90"))
    assert len(set(digests)) == len(digests)
    (root / "notes.txt").write_text("not a source")
    assert VARIANT.digest(read_sources(root), "sm_90") == digests[-1]


def test_compatible_architectures() -> None:
    assert compatible_architectures((8, 9))[:2] == ["sm_89", "sm_88"]
    assert compatible_architectures((8, 9))[-1] == "sm_80"
    assert compatible_architectures((12, 1)) == ["sm_121", "sm_120"]


# --- the cache and the compiler


def test_second_process_uses_the_cache(root: Path, compiled: list[str], tmp_path: Path) -> None:
    made, _ = first(root)
    assert made.origin.startswith("NVRTC")
    kept, reasons = first(root)
    assert (kept.data, kept.arch, reasons) == (made.data, "sm_90", [])
    assert kept.origin == f"the cache {tmp_path / 'cache' / 'kernels'}"
    assert compiled == ["sm_90"]
    digest = VARIANT.digest(read_sources(root), "sm_90")
    assert [path.name for path in cache_files(tmp_path)] == [f"{digest}.cubin"]
    assert cubins.cache_content() == (1, cache_files(tmp_path)[0].stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_cache_entry_is_compiled_again(
    root: Path, compiled: list[str], tmp_path: Path, damage: str
) -> None:
    made, _ = first(root)
    (path,) = cache_files(tmp_path)
    data = path.read_bytes()
    flipped = bytes([data[0] ^ 1]) + data[1:]
    path.write_bytes({"flip": flipped, "truncate": data[:-1], "empty": b""}[damage])
    again, _ = first(root)
    assert again.data == made.data and again.origin.startswith("NVRTC")
    assert compiled == ["sm_90", "sm_90"]
    assert path.read_bytes() == data


def test_changed_source_is_compiled_again(root: Path, compiled: list[str]) -> None:
    made, _ = first(root)
    (root / "common.cuh").write_text("#define SOMETHING 1\n")
    changed, _ = first(root)
    assert changed.data != made.data
    assert compiled == ["sm_90", "sm_90"]


def test_cache_that_cannot_be_written_costs_only_time(
    root: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="set CQTOOL_CACHE to a folder you may write"):
        made, _ = first(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning comes once in a process
        again, _ = first(root)
    assert made.data == again.data
    assert len(compiled) == 2
    assert cubins.cache_content() == (0, 0)


def test_read_only_cache_without_locks_costs_only_time(
    root: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("cqtool.files.tempfile.mkstemp", refuse)
    monkeypatch.setattr(cubins.fcntl, "flock", refuse)
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        first(root)
    assert compiled == ["sm_90"]


_COMPETITOR = """
import sys, time
from pathlib import Path
from cqtool.kernels import build, load
from cqtool.kernels.variants import Variant
root, log, number = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
real = build.compile_variant
def slow(*args):
    time.sleep(0.5)
    with log.open("a") as file:
        file.write("compiled\\n")
    return real(*args)
load.compile_variant = slow
log.with_suffix("." + number).touch()
while not all(log.with_suffix("." + n).exists() for n in "01"):
    time.sleep(0.01)
cubin = next(load.candidates(Variant("op/tiny.cu", (("K", 3),)), (9, 0), root, []))
import hashlib
print(hashlib.sha256(cubin.data).hexdigest())
"""


def test_of_two_processes_at_once_one_compiles(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = [[sys.executable, "-c", _COMPETITOR, str(root), str(log), n] for n in "01"]
    runs = [subprocess.Popen(c, stdout=subprocess.PIPE, text=True) for c in commands]
    printed = {run.communicate(timeout=120)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(printed) == 1 and len(printed.pop().strip()) == 64
    assert log.read_text() == "compiled\n"


def test_gpu_newer_than_nvrtc_runs_an_earlier_binary_of_its_kind(
    root: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = Toolchain("13.0", ("sm_80", "sm_90", "sm_100"), ())
    monkeypatch.setattr(load, "toolchain", lambda: tools)
    assert first(root, (10, 3))[0].arch == "sm_100"
    assert first(root, (10, 3))[0].origin.startswith("the cache")
    assert compiled == ["sm_100"]


def test_gpu_that_is_too_old_gets_nothing(root: Path, compiled: list[str]) -> None:
    reasons: list[str] = []
    assert list(candidates(VARIANT, (7, 5), root, reasons)) == []
    assert reasons == ["The GPU has compute capability 7.5; the kernels need 8.0 or later."]


# --- shipped


@pytest.fixture
def shipped(root: Path, compiled: list[str], tmp_path: Path) -> Path:
    """A registered folder with the variant for two architectures."""
    folder = tmp_path / "package"
    written = cubins.ship(folder, [VARIANT], ["sm_80", "sm_86", "sm_90"], root)
    assert [path.relative_to(folder).as_posix() for path in written] == [
        *(f"cubin/{VARIANT.name}.{arch}.cubin" for arch in ("sm_80", "sm_86", "sm_90")),
        "index.json",
    ]
    cubins.register_folder(folder)
    compiled.clear()
    return folder


def test_shipped_binary_comes_before_cache_and_compiler(
    root: Path, shipped: Path, compiled: list[str]
) -> None:
    found, _ = first(root)
    assert found.origin == f"the compiled kernels in {shipped}"
    assert found.data == (shipped / "cubin" / f"{VARIANT.name}.sm_90.cubin").read_bytes()
    assert compiled == []


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86")]
)
def test_best_shipped_architecture_not_above_the_gpu(
    root: Path, shipped: Path, capability: tuple[int, int], arch: str
) -> None:
    found, _ = first(root, capability)
    assert (found.arch, found.origin) == (arch, f"the compiled kernels in {shipped}")


def test_other_major_version_is_not_taken(root: Path, shipped: Path, compiled: list[str]) -> None:
    found, reasons = first(root, (10, 0))
    assert (found.arch, compiled) == ("sm_100", ["sm_100"])
    assert "ships no" in reasons[0]


def test_shipped_binary_of_other_sources_is_rejected(
    root: Path, shipped: Path, compiled: list[str]
) -> None:
    (root / "op" / "new.cuh").write_text("#define NEW\n")
    found, reasons = first(root)
    assert found.origin.startswith("NVRTC") and compiled == ["sm_90"]
    assert "compiled from other sources" in reasons[0]


def test_damaged_shipped_binary_is_rejected(root: Path, shipped: Path, compiled: list[str]) -> None:
    path = shipped / "cubin" / f"{VARIANT.name}.sm_90.cubin"
    path.write_bytes(path.read_bytes() + b"\0")
    found, reasons = first(root)
    assert found.origin.startswith("NVRTC") and "is damaged" in reasons[0]
    path.unlink()
    assert "cannot be read" in first(root)[1][0]


@pytest.mark.parametrize("index", ["", "[]", '{"format": 9, "cubins": []}', '{"format": 1}'])
def test_unreadable_index_is_rejected(root: Path, shipped: Path, index: str) -> None:
    (shipped / "index.json").write_text(index)
    found, reasons = first(root)
    assert found.origin.startswith("NVRTC") and "export the artifact again" in reasons[0]


def test_newest_registered_folder_comes_first(root: Path, shipped: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    cubins.ship(other, [VARIANT], ["sm_90"], root)
    cubins.register_folder(other)
    assert first(root)[0].origin.endswith(str(other))
    cubins.register_folder(shipped)
    assert cubins.registered_folders() == (shipped, other)


def test_index_names_the_macros_and_holds_the_digests(root: Path, shipped: Path) -> None:
    entry = json.loads((shipped / "index.json").read_text())["cubins"][2]
    data = (shipped / "cubin" / f"{VARIANT.name}.sm_90.cubin").read_bytes()
    assert entry == {
        "name": VARIANT.name,
        "arch": "sm_90",
        "source": "op/tiny.cu",
        "defines": {"K": 3},
        "source_digest": VARIANT.digest(read_sources(root), "sm_90"),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


# --- the driver


class FakeDriver:
    """The driver's calls that loading and launching need, with one kernel ``tiny``.

    Attributes:
        current: the calling thread's context; GPU i has context 100 + i.
        launches: (context, grid, block, shared, stream, argument bytes) of each launch.
        refused: images that the driver will not load.
    """

    PARAMETERS = ((0, 8), (8, 4), (12, 4), (16, 8))
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1,
    )
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=9,
    )

    def __init__(self) -> None:
        self.current = 0
        self.launches: list[tuple[Any, ...]] = []
        self.loaded_in: list[int] = []
        self.attributes: list[tuple[int, int]] = []
        self.refused: set[bytes] = set()
        self.launch_code = 0

    def cuDeviceGet(self, index: int) -> tuple[int, int | None]:
        return (0, index) if index < 2 else (101, None)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, HOPPER[attribute]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return 0, 100 + device

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.current

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.current = context
        return (0,)

    def cuGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, b"the driver's word"

    def cuModuleLoadData(self, image: bytes) -> tuple[int, int | None]:
        self.loaded_in.append(self.current)
        return (0, 7) if image not in self.refused else (209, None)

    def cuModuleGetFunctionCount(self, module: int) -> tuple[int, int]:
        return 0, 1

    def cuModuleEnumerateFunctions(self, count: int, module: int) -> tuple[int, list[int]]:
        return 0, [5]

    def cuFuncGetName(self, function: int) -> tuple[int, bytes]:
        return 0, b"tiny"

    def cuFuncLoad(self, function: int) -> tuple[int]:
        return (0,)

    def cuFuncGetParamInfo(self, function: int, index: int) -> tuple[int, Any, Any]:
        return (0, *self.PARAMETERS[index]) if index < len(self.PARAMETERS) else (1, None, None)

    def cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> tuple[int]:
        self.attributes.append((attribute, value))
        return (0,)

    def cuLaunchKernel(self, function: int, *args: Any) -> tuple[int]:
        *shape, shared, stream, pointers, extra = args
        assert (function, extra) == (5, 0)
        addresses = (ctypes.c_void_p * len(self.PARAMETERS)).from_address(pointers)
        data = [
            ctypes.string_at(address, size)
            for address, (_, size) in zip(addresses, self.PARAMETERS, strict=True)
        ]
        grid, block = tuple(shape[:3]), tuple(shape[3:])
        self.launches.append((self.current, grid, block, shared, stream, data))
        return (self.launch_code,)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Two H100s."""
    driver = FakeDriver()
    monkeypatch.setattr(module, "driver", lambda: driver)
    monkeypatch.setattr(load, "driver", lambda: driver)
    module.open_device.cache_clear()
    return driver


@pytest.fixture(autouse=True)
def no_device_is_left() -> Any:
    yield
    module.open_device.cache_clear()


GRID, BLOCK = (7, 2, 1), (128, 1, 1)


def test_launch_passes_every_kind_of_argument(
    root: Path, compiled: list[str], fake: FakeDriver
) -> None:
    loaded = load.load(VARIANT, 0, root)
    assert (loaded.entries, loaded.arch, loaded.device_index) == (("tiny",), "sm_90", 0)
    pointer, large = 0x7F12_3456_789A, -(1 << 40)
    loaded.launch("tiny", GRID, BLOCK, 16, 0x99, pointer, -5, 0.1, large)
    ((context, grid, block, shared, stream, data),) = fake.launches
    assert (context, grid, block, shared, stream) == (100, GRID, BLOCK, 16, 0x99)
    assert data == [
        struct.pack("<Q", pointer),
        struct.pack("<i", -5),
        struct.pack("<f", 0.1),
        struct.pack("<q", large),
    ]
    loaded.launch("tiny", GRID, BLOCK, 0, 0, 1, 2, 3, 4)  # the third parameter may be an int32
    assert fake.launches[1][5][2] == struct.pack("<i", 3)


def test_wrong_arguments_are_refused_before_the_launch(
    root: Path, compiled: list[str], fake: FakeDriver
) -> None:
    loaded = load.load(VARIANT, 0, root)
    with pytest.raises(TypeError, match="takes 4 arguments, not 3"):
        loaded.launch("tiny", GRID, BLOCK, 0, 0, 1, 2, 3.0)
    with pytest.raises(TypeError, match="argument 0 of tiny has 8 bytes"):
        loaded.launch("tiny", GRID, BLOCK, 0, 0, 1.0, 2, 3.0, 4)
    with pytest.raises(TypeError, match=r"argument 1 .* given as str"):
        loaded.launch("tiny", GRID, BLOCK, 0, 0, 1, "2", 3.0, 4)  # type: ignore[arg-type]
    with pytest.raises(struct.error):
        loaded.launch("tiny", GRID, BLOCK, 0, 0, 1, 1 << 31, 3.0, 4)
    with pytest.raises(KernelError, match=r"no kernel 'huge', only \('tiny',\)"):
        loaded.launch("huge", GRID, BLOCK, 0, 0)
    assert fake.launches == []


def test_failed_launch_tells_the_drivers_word(
    root: Path, compiled: list[str], fake: FakeDriver
) -> None:
    loaded = load.load(VARIANT, 0, root)
    fake.launch_code = 701
    with pytest.raises(KernelError, match=r"Launching tiny with grid \(7, 2, 1\).*driver's word"):
        loaded.launch("tiny", GRID, BLOCK, 0, 0, 1, 2, 3.0, 4)


def test_large_shared_memory_is_asked_for_once(
    root: Path, compiled: list[str], fake: FakeDriver
) -> None:
    loaded = load.load(VARIANT, 0, root)
    for shared in (49152, 49153, 60000, 50000, 49153, 60000):
        loaded.launch("tiny", GRID, BLOCK, shared, 0, 1, 2, 3.0, 4)
    asked = [each for each in fake.attributes if each[0] == 8]
    assert asked == [(8, 49153), (8, 60000)]


@pytest.mark.parametrize("current", [0, 100, 101])
def test_context_of_the_gpu_is_used_and_the_threads_own_comes_back(
    root: Path, compiled: list[str], fake: FakeDriver, current: int
) -> None:
    fake.current = current
    loaded = load.load(VARIANT, 1, root)
    assert fake.loaded_in == [101]
    assert fake.current == current
    loaded.launch("tiny", GRID, BLOCK, 0, 0, 1, 2, 3.0, 4)
    fake.launch_code = 1
    with pytest.raises(KernelError):
        loaded.launch("tiny", GRID, BLOCK, 0, 0, 1, 2, 3.0, 4)
    assert [launch[0] for launch in fake.launches] == [101, 101]
    assert fake.current == current


def test_threads_get_one_module_and_a_gpu_each_its_own(
    root: Path, compiled: list[str], fake: FakeDriver
) -> None:
    barrier = threading.Barrier(8)

    def get(index: int) -> object:
        barrier.wait()
        return load.load(VARIANT, index % 2, root)

    with ThreadPoolExecutor(8) as pool:
        modules = list(pool.map(get, range(8)))
    assert len(set(map(id, modules))) == 2
    assert len(fake.loaded_in) == 2
    assert len(compiled) <= 2


def test_cached_binary_that_the_driver_refuses_is_replaced(
    root: Path, compiled: list[str], fake: FakeDriver, tmp_path: Path
) -> None:
    digest = VARIANT.digest(read_sources(root), "sm_90")
    cubins.write_cached(digest, b"of a newer toolkit")
    fake.refused.add(b"of a newer toolkit")
    assert load.load(VARIANT, 0, root).origin.startswith("NVRTC")
    assert compiled == ["sm_90"]
    assert cubins.read_cached(digest) not in (None, b"of a newer toolkit")


def test_why_there_is_no_kernel_is_told_and_not_tried_again(
    root: Path,
    compiled: list[str],
    shipped: Path,
    fake: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[int] = []

    def missing() -> Toolchain:
        tries.append(1)
        raise KernelError("NVRTC is missing; run: pip install it.")

    monkeypatch.setattr(load, "toolchain", missing)
    (shipped / "index.json").unlink()
    for _ in range(3):
        with pytest.raises(KernelsUnavailable) as raised:
            load.load(VARIANT, 0, root)
        assert "no readable index.json" in str(raised.value)
        assert "pip install it" in str(raised.value)
    assert len(tries) == 1
    good = shipped.with_name("good")
    cubins.ship(good, [VARIANT], ["sm_90"], root)
    load.register_folder(good)
    assert load.load(VARIANT, 0, root).origin.endswith(str(good))


def test_missing_gpu_and_missing_driver(
    root: Path, compiled: list[str], fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KernelsUnavailable, match="Opening GPU 5 failed"):
        load.load(VARIANT, 5, root)

    def missing() -> None:
        raise KernelsUnavailable("The CUDA driver cannot be loaded.")

    monkeypatch.setattr(module, "driver", missing)
    monkeypatch.setattr(load, "driver", missing)
    module.open_device.cache_clear()
    with pytest.raises(KernelsUnavailable, match="CUDA driver cannot be loaded"):
        load.load(VARIANT, 0, root)
    assert outlook(HOPPER).source == "reference"


def test_outlook_follows_what_is_there(
    root: Path, compiled: list[str], fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outlook(HOPPER).source == "nvrtc"
    assert "7.5; the kernels need 8.0" in outlook((7, 5)).detail
    tools = Toolchain("13.0", ("sm_90",), ())
    monkeypatch.setattr(load, "toolchain", lambda: tools)
    assert outlook((9, 3)).source == "nvrtc"
    assert outlook((13, 0)).source == "reference"

    def missing() -> Toolchain:
        raise KernelError("NVRTC is missing.")

    monkeypatch.setattr(load, "toolchain", missing)
    assert outlook(HOPPER) == load.Outlook("reference", "NVRTC is missing.")
    cubins.write_cached("0" * 64, b"binary")
    assert outlook(HOPPER).source == "cache"
    folder = root.parent / "package"
    cubins.ship(folder, [VARIANT], ["sm_80"], root)
    cubins.register_folder(folder)
    assert outlook((8, 6)) == load.Outlook("shipped", f"compiled for sm_80 in {folder}")
    assert outlook(HOPPER).source == "cache"


def test_fallback_is_warned_about_once() -> None:
    with pytest.warns(RuntimeWarning, match=r"many times slower\. No compiler\."):
        load.warn_fallback("No compiler.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load.warn_fallback("Something else.")


def test_needs_no_torch_and_no_cuda_to_be_imported() -> None:
    code = (
        "import sys, cqtool.kernels.load; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'cuda', 'numpy')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

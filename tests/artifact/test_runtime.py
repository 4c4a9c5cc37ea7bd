"""An artifact carries a runtime that works without cqtool and refuses to run when it is damaged."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from runtime_artifact import generate, tiny_model, write_tiny_calibration

from cqtool import CQCache
from cqtool.artifact import runtime_init, runtime_kernels
from cqtool.artifact.describe import describe
from cqtool.artifact.export import export
from cqtool.artifact.runtime import DATA_ONLY, RuntimeChoice, choose_runtime
from cqtool.errors import ArtifactError, KernelError, RecipeError
from cqtool.kernels import cubins, load
from cqtool.kernels.build import toolchain
from cqtool.kernels.variants import ARCHITECTURES, Variant, read_sources
from cqtool.manifest import verify_folder, write_manifest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90")
RUNTIME = "build/torch-cuda"
FEW = ("decode/finish.cu", "encode/encode.cu")

needs_nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None, reason="needs NVRTC: pip install 'cqtool[kernels]'"
)
all_variants = runtime_kernels.artifact_variants


def few_variants(config: Any, arch: str, channels: Any) -> list[Variant]:
    """Two of an artifact's kernels, so that no test waits for all."""
    every = all_variants(config, arch, channels)
    return [next(variant for variant in every if variant.source == source) for source in FEW]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    return write_tiny_calibration(tmp_path_factory.mktemp("runtime") / "calibration", model)


@pytest.fixture(scope="module")
def built(calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with its runtime and few kernels; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CQTOOL_CACHE", str(folder / "cache"))
        patch.setattr(runtime_kernels, "artifact_variants", few_variants)
        export(calibration, folder / "artifact", runtime=RuntimeChoice(architectures=ARCHS))
    return folder / "artifact"


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


@pytest.fixture
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "_folders", [])


@needs_nvrtc
def test_sources_modules_and_kernels_are_in_it(built: Path) -> None:
    verify_folder(built)
    files = contents(built / RUNTIME)
    compiled = {name for name in files if name.startswith("cubin/")}
    assert len(compiled) == len(FEW) * len(ARCHS)
    assert all(files[name].startswith(b"\x7fELF") for name in compiled)
    assert read_sources(built / RUNTIME / "kernels") == read_sources()
    assert {"__init__.py", "cache/cache.py", "metadata.json", "files.json"} < files.keys()
    listed = json.loads((built / "manifest.json").read_text())["files"]
    assert {f"{RUNTIME}/{name}" for name in files} < listed.keys()
    metadata = json.loads(files["metadata.json"])
    assert metadata["backend"] == {"type": "cuda", "archs": ["8.0", "9.0"]}
    kernels = describe(built)["kernels"]
    assert kernels["architectures"] == list(ARCHS)
    assert sorted(v["source"] for v in kernels["variants"].values()) == list(FEW)
    assert kernels["compiler"] == f"NVRTC {toolchain().nvrtc}"


@needs_nvrtc
def test_the_same_bytes_with_and_without_the_kernel_cache(
    calibration: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_kernels, "artifact_variants", few_variants)
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path / "cold"))
    choice = RuntimeChoice(architectures=ARCHS)
    export(calibration, tmp_path / "cold-artifact", runtime=choice)
    assert contents(tmp_path / "cold-artifact") == contents(built)

    def compiled_again(*arguments: Any) -> Any:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(runtime_kernels, "compile_variant", compiled_again)
    export(calibration, tmp_path / "warm-artifact", runtime=choice)
    assert contents(tmp_path / "warm-artifact") == contents(built)


def run(
    code: str, *flags: str, arguments: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
        **options,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


USE = """
import importlib, json, sys
from pathlib import Path
sys.path.insert(0, TESTS)
artifact = Path(sys.argv[1])
before = {path for path in artifact.rglob("*")}
LOAD
def said(module, model, **options):
    return generate(model, module.CQCache.from_pretrained(artifact, model, **options))
from transformers import LlamaForCausalLM
from runtime_artifact import NEW_TOKENS, PROMPT, generate
model = LlamaForCausalLM.from_pretrained(sys.argv[2])
result = {"texts": [said(runtime, model), said(runtime, model, implementation="fused")]}
MORE
result["unchanged"] = {path for path in artifact.rglob("*")} == before
result["cqtool"] = sorted(name for name in sys.modules if name.split(".")[0] == "cqtool")
result["folders"] = [
    str(folder)
    for folder in importlib.import_module(runtime.__name__ + ".kernels.cubins").registered_folders()
]
print(json.dumps(result))
"""
WITHOUT_CQTOOL = """
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "cqtool":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker)
sys.path.insert(0, f"{artifact}/build")
runtime = importlib.import_module("torch-cuda")
"""
THROUGH_KERNELS = """
from kernels import get_local_kernel
runtime = get_local_kernel(artifact / "build" / "torch-cuda")
"""
BESIDE_CQTOOL = """
import cqtool
for implementation in ("reference", "fused"):
    result["texts"].append(said(cqtool, model, implementation=implementation))
    result["texts"].append(said(runtime, model, implementation=implementation))
"""


@needs_nvrtc
@pytest.mark.parametrize("way", ["without cqtool", "kernels package, beside cqtool"])
def test_the_runtime_says_what_the_installed_cqtool_says(
    built: Path, model: Any, tmp_path: Path, way: str
) -> None:
    load, more = WITHOUT_CQTOOL, ""
    if way != "without cqtool":
        pytest.importorskip("kernels")
        load, more = THROUGH_KERNELS, BESIDE_CQTOOL
    code = USE.replace("LOAD", load).replace("MORE", more)
    code = code.replace("TESTS", repr(str(ROOT / "tests")))
    model.save_pretrained(tmp_path / "model")
    done = run(code, arguments=(str(built), str(tmp_path / "model")), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    expected = generate(model, CQCache.from_pretrained(built, model))
    assert len(set(expected)) > 3
    assert result["texts"] == [expected] * len(result["texts"])
    assert result["unchanged"], "importing must not write into the artifact"
    assert result["folders"] == [str(built / RUNTIME)]
    assert bool(result["cqtool"]) == (way != "without cqtool")


def test_the_runtime_reads_groups_of_any_channels(model: Any, tmp_path: Path) -> None:
    said = {}
    for grouped in (False, True):
        folder = tmp_path / str(grouped)
        write_tiny_calibration(folder, model, grouped=grouped)
        export(folder, tmp_path / f"artifact-{grouped}", runtime=RuntimeChoice(architectures=()))
        artifact = tmp_path / f"artifact-{grouped}"
        said[grouped] = generate(model, CQCache.from_pretrained(artifact, model))
    assert said[True] != said[False]
    code = USE.replace("LOAD", WITHOUT_CQTOOL).replace("MORE", "")
    code = code.replace("TESTS", repr(str(ROOT / "tests")))
    model.save_pretrained(tmp_path / "model")
    arguments = (str(tmp_path / "artifact-True"), str(tmp_path / "model"))
    done = run(code, arguments=arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # In plain torch and on the kernels' reference.
    assert result["texts"] == [said[True]] * 2
    assert result["cqtool"] == []


def start(folder: Path, name: str = "cq_runtime_under_test") -> Any:
    """Import a runtime as the `kernels` package does."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.fixture
def nothing_imported() -> Iterator[None]:
    """Nothing but the runtime's own `__init__` runs."""
    finders = list(sys.meta_path)
    yield
    assert sys.meta_path == finders
    assert not [name for name in sys.modules if name.startswith("cq_runtime_under_test.")]


@needs_nvrtc
@pytest.mark.parametrize("place", ["in an artifact", "copied out of it"])
def test_a_flipped_byte_in_any_file_is_refused_before_an_import(
    artifact: Path, tmp_path: Path, place: str, nothing_imported: None
) -> None:
    folder = artifact / RUNTIME
    if place != "in an artifact":
        folder = Path(shutil.copytree(folder, tmp_path / "alone"))
    names = sorted(contents(folder))
    assert len(names) > 50
    for name in names:
        path = folder / name
        good = path.read_bytes()
        # __init__.py itself has to run before it can look at anything.
        bad = good + b"#" if name == "__init__.py" or not good else flip(good)
        path.write_bytes(bad)
        with pytest.raises(ImportError, match="again") as refused:
            start(folder)
        assert name in str(refused.value) or name == "files.json"
        path.write_bytes(good)


@needs_nvrtc
def test_missing_added_and_unlisted_files_are_refused(
    artifact: Path, nothing_imported: None
) -> None:
    folder = artifact / RUNTIME
    (folder / "cache" / "extra.py").write_text("")
    with pytest.raises(ImportError, match=r"extra\.py is not listed"):
        start(folder)
    (folder / "cache" / "extra.py").unlink()
    (folder / "spec.py").rename(artifact / "spec.py")
    with pytest.raises(ImportError, match=r"lacks spec\.py"):
        start(folder)
    (artifact / "spec.py").rename(folder / "spec.py")
    # Bytecode that somebody put beside the sources would run in their place.
    (folder / "__pycache__").unlink()
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "spec.cpython-311.pyc").write_bytes(b"x")
    with pytest.raises(ImportError, match="__pycache__"):
        start(folder)
    for text in ("{}", "[]", '{"format_version": 2, "files": {}', "not JSON"):
        (artifact / "manifest.json").write_text(text)
        with pytest.raises(ImportError, match=r"manifest\.json is no list of digests"):
            start(folder)


def test_missing_packages_are_named_all_at_once(built: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(built / 'build')!r}); __import__('torch-cuda')"
    done = run(code, "-I", "-S")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == (
        "ImportError: This artifact's runtime needs torch, transformers, safetensors; run: pip "
        "install 'torch>=2.11' 'transformers>=5.16' 'safetensors>=0.6'"
    )


def test_the_versions_it_asks_for_are_those_of_cqtool() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {need.name: need for need in map(Requirement, project["dependencies"])}
    for need in map(Requirement, runtime_init.NEEDED):
        assert need.specifier and set(need.specifier) <= set(own[need.name].specifier)


@needs_nvrtc
def test_a_link_into_the_hub_cache_is_followed(artifact: Path, tmp_path: Path) -> None:
    """As snapshot_download leaves an artifact: links into ``blobs``."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    for index, (name, data) in enumerate(contents(artifact).items()):
        (blobs / str(index)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(index))
    verify_folder(snapshot)
    listed = set(contents(snapshot / RUNTIME))
    code = (
        f"import sys; sys.path.insert(0, {str(snapshot / 'build')!r})\n"
        "try: __import__('torch-cuda')\n"
        "except ImportError as error: assert 'needs torch' in str(error), error\n"
        "else: raise SystemExit('imported without torch')"
    )
    assert run(code, "-I", "-S").returncode == 0
    assert set(contents(snapshot / RUNTIME)) == listed


@needs_nvrtc
def test_shipped_kernels_are_used_only_when_trusted(
    artifact: Path, model: Any, unregistered: None
) -> None:
    CQCache.from_pretrained(artifact, model)
    assert cubins.registered_folders() == ()
    CQCache.from_pretrained(artifact, model, trust_kernels=True)
    assert cubins.registered_folders() == (artifact / RUNTIME,)
    config = json.loads((artifact / RUNTIME / "index.json").read_text())["cubins"]
    entry = next(entry for entry in config if entry["arch"] == "sm_90")
    variant = Variant(entry["source"], tuple(entry["defines"].items()))
    found = next(load.candidates(variant, (9, 0), load.KERNELS, []))
    shipped = (artifact / RUNTIME / "cubin" / f"{variant.name}.sm_90.cubin").read_bytes()
    assert (found.arch, found.data) == ("sm_90", shipped)


@needs_nvrtc
def test_trusting_does_not_skip_the_digests(artifact: Path, model: Any, unregistered: None) -> None:
    cubin = next((artifact / RUNTIME / "cubin").iterdir())
    good = cubin.read_bytes()
    cubin.write_bytes(flip(good))
    with pytest.raises(ArtifactError, match="digest"):
        CQCache.from_pretrained(artifact, model, trust_kernels=True)
    cubin.write_bytes(good)
    (artifact / "manifest.json").rename(artifact.parent / "manifest.json")
    with pytest.raises(ArtifactError, match="cannot be verified"):
        CQCache.from_pretrained(artifact, model, trust_kernels=True)
    assert cubins.registered_folders() == ()
    (artifact / RUNTIME / "index.json").write_text("{}")
    write_manifest(artifact)
    with pytest.raises(KernelError, match=r"no readable index\.json"):
        CQCache.from_pretrained(artifact, model, trust_kernels=True)
    assert cubins.registered_folders() == ()


def test_an_artifact_without_kernels_may_be_trusted_too(
    calibration: Path, model: Any, tmp_path: Path, unregistered: None
) -> None:
    export(calibration, tmp_path / "data")
    assert not (tmp_path / "data" / "build").exists()
    for folder in (tmp_path / "data", calibration):
        CQCache.from_pretrained(folder, model, trust_kernels=True)
    assert cubins.registered_folders() == ()


@needs_nvrtc
def test_what_an_export_carries_is_chosen_by_options_and_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_runtime(None, None) == RuntimeChoice(architectures=ARCHITECTURES)
    assert choose_runtime(True, ["sm_87"]) == RuntimeChoice(architectures=("sm_87",))
    assert choose_runtime(False, None) == DATA_ONLY
    for wrong in ("sm_75", "sm_999", "90", "sm_90a", "sm_90 "):
        with pytest.raises(RecipeError, match=f"'{wrong}'; give some of sm_80, "):
            choose_runtime(None, ["sm_90", wrong])

    def missing() -> Any:
        raise KernelError("The compiler NVRTC is missing; run: pip install nvrtc.")

    monkeypatch.setattr(runtime_kernels, "toolchain", missing)
    choice = choose_runtime(None, None)
    assert (choice.package, choice.architectures) == (True, ())
    assert choice.note is not None and "pip install" in choice.note
    for kernels, architectures in ((True, None), (None, ["sm_90"])):
        with pytest.raises(KernelError, match="NVRTC is missing"):
            choose_runtime(kernels, architectures)


def test_without_a_compiler_the_runtime_is_there_and_the_card_says_what_is_not(
    calibration: Path, tmp_path: Path
) -> None:
    choice = RuntimeChoice(architectures=(), note="There is no NVRTC.")
    result = export(calibration, tmp_path / "a", runtime=choice)
    assert result.kernels is not None and result.kernels.note == "There is no NVRTC."
    assert (tmp_path / "a" / RUNTIME / "cache" / "cache.py").is_file()
    assert not (tmp_path / "a" / RUNTIME / "index.json").exists()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "There is no NVRTC" in card and "trust_kernels" not in card
    assert describe(tmp_path / "a")["kernels"]["variants"] == {}


@needs_nvrtc
def test_the_card_says_how_to_run_it_and_what_trusting_means(built: Path) -> None:
    card = (built / "README.md").read_text()
    section = card.split("\n## Kernels\n")[1].split("\n## ")[0]
    assert "CUDA kernels for sm_80, sm_90" in section
    assert "model, trust_kernels=True)" in section
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        compile(block, "README.md", "exec")
    assert 'importlib.import_module("torch-cuda").CQCache' in section
    assert "get_local_kernel" in section
    assert "trust its author" in section and "not who wrote them" in section


@needs_nvrtc
def test_inspect_lists_architectures_and_variants(built: Path) -> None:
    done = run("from cqtool.cli import main; main()", arguments=("inspect", str(built)))
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(kernels for|kernel variants) +(.*?) *$", done.stdout, re.MULTILINE))
    assert rows == {
        "kernels for": "sm_80, sm_90",
        "kernel variants": "1 of encode.cu, 1 of finish.cu",
    }

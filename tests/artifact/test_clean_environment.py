"""An artifact on the Hub runs where only torch, transformers and safetensors are installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from hub_server import Blob, HubServer
from packaging.requirements import Requirement
from runtime_artifact import NEW_TOKENS, PROMPT, generate, tiny_model, write_tiny_calibration

from cqtool import CQCache
from cqtool.artifact.export import export
from cqtool.artifact.push import push
from cqtool.artifact.runtime import RuntimeChoice

REPO = "org/tiny-cq"
INSTALLED = ("torch", "transformers", "safetensors")


def with_requirements(names: tuple[str, ...]) -> dict[str, Distribution]:
    """The distributions `names` and all that they require, by name, without extras."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower()
        if name in found:
            continue
        found[name] = distribution(name)
        needs = [Requirement(text) for text in found[name].requires or ()]
        waiting += [
            need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})
        ]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with INSTALLED and what they require, by links to what is here."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for one in with_requirements(INSTALLED).values():
        tops = {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}
        for top in tops:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(one.locate_file(top))).resolve())
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A model, its folder, and an artifact of it with the runtime."""
    folder, model = tmp_path_factory.mktemp("tiny"), tiny_model()
    model.save_pretrained(folder / "model")
    calibration = write_tiny_calibration(folder / "calibration", model)
    choice = RuntimeChoice(architectures=())
    artifact = export(calibration, folder / "artifact", repo_id=REPO, runtime=choice).folder
    return model, folder / "model", artifact


def run(python: Path, hub: HubServer, home: Path, code: str, *arguments: object) -> Any:
    """Run code as somebody who is not logged in; what it prints in its last line, as JSON."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [python, "-I", "-c", code, *map(str, arguments)],
        env=kept | hub.environment(None) | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MISSING = """
import importlib.util, json, sys
names = ("cqtool", "cuda", "datasets", "faiss", "gguf", "kernels", "matplotlib", "pytest")
print(json.dumps([name for name in names if importlib.util.find_spec(name)]))
"""
PULL = """
import json, sys
from pathlib import Path
from huggingface_hub import snapshot_download
folder = Path(snapshot_download(sys.argv[1]))
code = sorted(name for name, module in sys.modules.items()
              if str(getattr(module, "__file__", "")).startswith(str(folder)))
print(json.dumps({"ran": code, "card": (folder / "README.md").read_text()}))
"""
USE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
def said(cache):
    output = model.generate(
        torch.tensor([PROMPT]), past_key_values=cache, max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False,
    )
    return output[0, len(PROMPT):].tolist()
PROMPT, NEW = json.loads(sys.argv[2]), int(sys.argv[3])
CARD
from huggingface_hub import constants
texts = [said(cache), said(CQCache.from_pretrained(sys.argv[4], model))]
constants.HF_HUB_OFFLINE = True
texts.append(said(CQCache.from_pretrained(sys.argv[4], model)))
missing = ""
try:
    CQCache.from_pretrained("org/other", model)
except Exception as error:
    missing = f"{type(error).__name__}: {error}"
own = sorted(name for name in sys.modules if name.split(".")[0] == "cqtool")
print(json.dumps({"texts": texts, "cqtool": own, "missing": missing}))
"""


def test_pulling_runs_nothing_and_the_cards_own_lines_generate(
    hub: HubServer, python: Path, tiny: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    model, folder, artifact = tiny
    push(artifact, REPO)
    home = tmp_path / "home"
    assert run(python, hub, home, MISSING) == []

    pulled = run(python, hub, home, PULL, REPO)
    assert pulled["ran"] == []
    # What to do is said in one sentence, before anything of the repository runs.
    assert (
        "All of this runs code of this repository, so do it only where you trust its author."
        in (pulled["card"])
    )
    blocks = re.findall(r"```python\n(.*?)```", pulled["card"], re.DOTALL)
    (lines,) = [block for block in blocks if "snapshot_download" in block]

    code = USE.replace("CARD", lines)
    result = run(python, hub, home, code, folder, json.dumps(PROMPT), NEW_TOKENS, REPO)
    expected = generate(model, CQCache.from_pretrained(artifact, model))
    assert len(set(expected)) > 3
    # As the card says; by the repository's name; and without a network.
    assert result["texts"] == [expected] * 3
    assert result["cqtool"] == []
    assert re.match(r"HubError: org/other is not in the Hub client's cache, and", result["missing"])


GENERATE = """
import json, os, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from huggingface_hub import constants, hf_hub_download
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
PROMPT, NEW, first = json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
inputs = {"input_ids": torch.tensor([PROMPT]), "max_new_tokens": NEW, "min_new_tokens": NEW}
inputs["do_sample"] = False
def said(output):
    return output[0, len(PROMPT):].tolist()
def refusal(**options):
    try:
        model.generate(**inputs, custom_generate="REPO", **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
refused = [refusal(), refusal(trust_remote_code=False)]
home = Path(constants.HF_HOME)
def held():
    return sorted({path.name for path in home.rglob("*")} & {"generate.py", "manifest.json"})
fetched = [held()]
CARD
fetched.append(held())
texts = [said(output)]
def other(**options):
    return said(model.generate(
        **inputs, custom_generate="REPO", trust_remote_code=True, **options))
texts += [other(revision=first), other(num_beams=2), other(revision=first, cache_dir="elsewhere")]
hf_hub_download("REPO", "custom_generate/generate.py", revision=first, cache_dir="part")
constants.HF_HUB_OFFLINE = True
texts += [other(), other(revision=first)]
refused.append(refusal(revision=first, cache_dir="part", trust_remote_code=True))
own = sorted(name for name in sys.modules if name.split(".")[0] == "cqtool")
# transformers' question has no end of line.
print()
print(json.dumps({"texts": texts, "refused": refused, "fetched": fetched, "cqtool": own}))
"""


def test_transformers_runs_it_after_trust_and_takes_all_of_one_commit(
    hub: HubServer, python: Path, tiny: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    model, folder, artifact = tiny
    first = push(artifact, REPO).oid
    # Other codebooks on the main branch since: what is fetched must be of the commit asked for.
    write_tiny_calibration(tmp_path / "calibration", model, grouped=True)
    choice = RuntimeChoice(architectures=())
    later = export(
        tmp_path / "calibration", tmp_path / "later", repo_id=REPO, runtime=choice
    ).folder
    push(later, REPO)
    # Somebody put more beside the artifact: no part of it, and nothing to be fetched.
    repo = hub.repos[REPO]
    more = {"model.safetensors": Blob(b"weights", True), "reports/more.png": Blob(b"PNG", False)}
    repo.add("main", "by hand", repo.commits[-1].files | more)
    hub.requests.clear()
    card = (later / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (lines,) = [block for block in blocks if "custom_generate" in block]

    home = tmp_path / "home"
    code = GENERATE.replace("REPO", REPO).replace("CARD", lines)
    result = run(python, hub, home, code, folder, json.dumps(PROMPT), NEW_TOKENS, first)
    assert result["cqtool"] == []
    asked = [request for request in hub.requests if "/resolve/" in request]
    assert any(request.endswith("/codebooks.safetensors") for request in asked)
    assert not [request for request in asked if request.endswith(tuple(more))]
    # Nobody is there to answer the question; nothing was fetched, let alone run.
    for refused in result["refused"][:2]:
        assert refused.startswith("ValueError: The repository `org/tiny-cq` contains custom")
        assert "trust_remote_code=True" in refused
    assert result["fetched"] == [[], ["generate.py", "manifest.json"]]
    whole = f"OSError: {REPO} at {first} cannot be fetched as a whole ("
    assert result["refused"][2].startswith(whole)

    def expected(place: Path, **options: Any) -> list[int]:
        return generate(model, CQCache.from_pretrained(place, model), **options)

    old, new = expected(artifact), expected(later)
    assert old != new
    beams = expected(later, num_beams=2)
    assert result["texts"] == [new, old, beams, old, new, old]

"""What an artifact ships is all that a GPU needs: no cqtool, no compiler, nothing in a cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runtime_artifact import generate, tiny_model, write_tiny_calibration

from cqtool import CQCache
from cqtool.artifact.export import export
from cqtool.artifact.runtime import RuntimeChoice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

USE = """
import importlib, json, sys, warnings
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "cqtool" or name in ("cuda.core", "cuda.bindings.nvrtc"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker)
artifact, tests, folder, dtype = sys.argv[1:]
sys.path[:0] = [f"{artifact}/build", tests]
import torch
from transformers import LlamaForCausalLM
from runtime_artifact import PROMPT, generate
runtime = importlib.import_module("torch-cuda")
warnings.simplefilter("error", RuntimeWarning)  # the fallback to plain torch
model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).cuda()
def cache():
    return runtime.CQCache.from_pretrained(artifact, model, implementation="fused")
text = generate(model, cache())
# A few tokens at once, as speculative decoding asks; then a token for each of many rows.
ids = torch.tensor([PROMPT], device="cuda")
with torch.no_grad():
    for few in range(2, 9):
        several = cache()
        model(ids, past_key_values=several)
        model(ids[:, :few], past_key_values=several)
    many = cache()
    model(ids.expand(1100, -1), past_key_values=many)
    for token in PROMPT[:6]:
        model(ids[:, :1].expand(1100, -1), past_key_values=many)
load = importlib.import_module(runtime.__name__ + ".kernels.load")
origins = {module.origin for module in load._results.values()}
print(json.dumps({"text": text, "origins": sorted(origins), "loaded": len(load._results)}))
"""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_shipped_kernels_suffice(tmp_path: Path, dtype: str) -> None:
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    model = tiny_model()
    calibration = write_tiny_calibration(tmp_path / "calibration", model)
    artifact = export(
        calibration, tmp_path / "artifact", runtime=RuntimeChoice(architectures=(arch,))
    ).folder
    model.save_pretrained(tmp_path / "model")
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", USE, str(artifact), str(tests), str(tmp_path / "model"), dtype],
        env=os.environ | {"CQTOOL_CACHE": str(tmp_path / "empty")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["origins"] == [f"the compiled kernels in {artifact / 'build' / 'torch-cuda'}"]
    # Scores and values, the merge, and encoders of keys and values, at the least.
    assert result["loaded"] >= 6
    model = model.to("cuda", getattr(torch, dtype))
    reference = CQCache.from_pretrained(artifact, model, implementation="reference")
    same = sum(a == b for a, b in zip(result["text"], generate(model, reference), strict=True))
    # 16 bits may turn a near tie of this random model, and with it the text from there on.
    assert same >= {"float16": 9, "bfloat16": 3}[dtype]

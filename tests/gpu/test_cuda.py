"""The same facts on a GPU. Run with `pytest tests/gpu` where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from formats import RecordingCache, exact_format, random_format
from zoo import random_ids, tiny

from cqtool.cache import CQCache
from cqtool.codebooks.engines import FaissEngine
from cqtool.data.windows import TokenWindows
from cqtool.models.load import OpenedModel
from cqtool.models.probe import read_geometry
from cqtool.quality.measure import quantized_logits
from cqtool.sampling import collect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
NAMES = ["llama", "yarn", "dynamic", "gemma3", "glm", "gpt-oss", "gptj", "gpt2", "falcon", "phi"]


@pytest.mark.parametrize("name", NAMES)
def test_exact_codebooks_reproduce_the_full_precision_cache(name):
    model = tiny(name).cuda()
    prompt = random_ids(2, 24).cuda()
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 24,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    recorded = RecordingCache(model)
    full = model.generate(prompt, past_key_values=recorded, **options)
    cache = CQCache(exact_format(recorded, window=5, sinks=2), model)
    coded = model.generate(prompt, past_key_values=cache, **options)
    assert torch.equal(coded.sequences, full.sequences)
    torch.testing.assert_close(
        torch.stack(coded.logits), torch.stack(full.logits), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_codes_and_geometry_are_those_of_the_cpu(name, dtype):
    ids = random_ids(1, 60)
    model = tiny(name)
    format = random_format(model, window=4, sinks=2)
    codes = []
    for device in ("cpu", "cuda"):
        moved = tiny(name, dtype=dtype).to(device)
        assert read_geometry(moved) == format.geometry
        cache = CQCache(format.to(torch.device(device)), moved)
        with torch.no_grad():
            moved(input_ids=ids.to(device), past_key_values=cache)
        stored = [layer.coded["key"]["codes"].cpu().flatten() for layer in cache.layers]
        codes.append(torch.cat(stored))
    # Sums run in another order: a few vectors near a boundary fall on its other side.
    agreement = (codes[0] == codes[1]).float().mean()
    assert agreement > (0.995 if dtype == torch.float32 else 0.8)


def test_teacher_mode_equals_decode_mode():
    model = tiny("gemma3").cuda()
    ids = random_ids(1, 40)[0]
    format = random_format(tiny("gemma3"), window=7, sinks=3).to(torch.device("cuda"))
    torch.testing.assert_close(
        quantized_logits(model, format, ids, "teacher"),
        quantized_logits(model, format, ids, "decode"),
        rtol=1e-2,
        atol=1e-2,
    )


def test_samples_and_gradients_are_those_of_the_cpu(tmp_path):
    windows = TokenWindows(random_ids(2, 30), "digest", {"dataset": "zoo"})
    stores = []
    for device in ("cpu", "cuda"):
        model = tiny("llama").to(device)
        opened = OpenedModel(model, None, "llama", "llama", None, None)
        path = tmp_path / device
        stores.append(collect(opened, read_geometry(model), windows, path, gradients=True))
    for layer in range(3):
        for kind in ("key", "value"):
            for read in ("load", "load_gradients"):
                cpu, cuda = (getattr(store, read)(layer, kind) for store in stores)
                assert float((cpu - cuda).norm() / cpu.norm()) < 1e-2


def test_faiss_runs_its_gpu_kmeans_and_reaches_the_cpus_objective():
    faiss = pytest.importorskip("faiss")
    if not getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("this faiss was built without a GPU or sees none")
    rng = np.random.default_rng(0)
    points = rng.standard_normal((8192, 8)).astype(np.float32)
    weights = rng.random(8192).astype(np.float32) ** 3
    cpu, gpu = (FaissEngine(100, "kmeans++", gpu=gpu) for gpu in (False, True))
    assert cpu.detail.endswith("on CPU") and gpu.detail.endswith("on GPU")
    errors = [
        np.mean([engine.fit(points, weights, 256, seed).error for seed in range(4)])
        for engine in (cpu, gpu)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=5e-3)

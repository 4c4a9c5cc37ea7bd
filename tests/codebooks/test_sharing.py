"""Codebooks that all heads of a layer share: fitted to all, stored once, the same for each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from two_heads import Store
from typer.testing import CliRunner

from cqtool.artifact.export import export
from cqtool.bench.formats import open_artifact
from cqtool.cache import CQCache, CQCodec
from cqtool.cli.app import app
from cqtool.codebooks import calibrate as module
from cqtool.codebooks.batched import BatchedEngine
from cqtool.codebooks.calibrate import calibrate
from cqtool.codebooks.engines import FaissEngine
from cqtool.codebooks.fit import codebook_seed, count_codebooks, fit_layer
from cqtool.codebooks.kmeans import usable_weights
from cqtool.codebooks.metric import shared_metric
from cqtool.models.load import open_model
from cqtool.models.probe import read_geometry
from cqtool.progress import SILENT
from cqtool.quality import CheckSettings, check
from cqtool.recipe import load_recipe
from cqtool.spec import CacheSpec, CQSpec


def fitted(code, objective, engine):
    with SILENT.task("fit", 1) as task:
        return fit_layer(Store(), 3, CacheSpec(code, code), objective, engine, 1, task)


@pytest.mark.parametrize("objective", ["uniform", "fisher"])
@pytest.mark.parametrize("grouping", ["contiguous", "correlation"])
def test_a_shared_codebook_is_fitted_to_the_samples_of_all_heads(grouping, objective):
    engine, store = FaissEngine(20, "kmeans++"), Store()
    fit = fitted(CQSpec(4, 3, grouping, sharing="heads"), objective, engine)
    order = fit.channels["key"]
    if order is None:
        order = torch.arange(8).expand(2, -1)
    errors = []
    for group in range(2):
        members = [row[4 * group : 4 * group + 4] for row in order]
        points, weights = (
            torch.stack([tensor[:, head, members[head]] for head in (0, 1)], dim=1).flatten(0, 1)
            for tensor in (store.samples, store.gradients)
        )
        alone = engine.fit(
            points.numpy(),
            weights.square().sum(1).numpy() if objective == "fisher" else None,
            8,
            codebook_seed(1, 3, "key", 0, group),
        )
        errors.append(alone.error)
        np.testing.assert_allclose(
            fit.codebooks["key"][0, group].numpy(), alone.centroids, rtol=2e-3, atol=1e-4
        )
    assert fit.codebooks["key"].shape == (1, 2, 8, 4)
    assert fit.errors["key"] == pytest.approx(np.mean(errors))


def test_under_a_metric_k_means_takes_the_heads_mean_and_encoding_that_of_each():
    code = CQSpec(4, 3, encoding="metric", sharing="heads")
    fit, store = fitted(code, "query", BatchedEngine(200, "kmeans++", "cpu")), Store()
    own = fit.extras["key"]["metric"]
    assert own.shape == (2, 2, 4, 4) and not torch.allclose(own[0], own[1], atol=0.1)
    for group in range(2):
        part = slice(4 * group, 4 * group + 4)
        squares = store.gradients[:, :, part].square().sum(2)
        share = (squares.sum(0) / squares.sum()).double()
        assert share[1] > 0.8
        m = (share[:, None, None] * own[:, group]).sum(0).numpy()
        x = store.samples[:, :, part].reshape(600, 4).double().numpy()
        w = usable_weights(store.samples[None, :, :, part].reshape(1, 600, 4), squares.view(1, 600))
        w = w[0].double().numpy()
        table = fit.codebooks["key"][0, group].double().numpy()
        apart = x[:, None] - table[None]
        nearest = np.einsum("tki,ij,tkj->tk", apart, m, apart).argmin(1)
        means = [np.average(x[nearest == k], axis=0, weights=w[nearest == k]) for k in range(8)]
        # A few samples may change sides with the rounding of centroids to float16.
        np.testing.assert_allclose(table, means, atol=0.05)


def test_heads_without_any_weight_count_alike_in_the_mean():
    metrics = torch.stack([torch.eye(2), 3 * torch.eye(2)])[:, None]
    assert torch.equal(shared_metric(metrics, torch.zeros(5, 2, 1)), 2 * torch.eye(2)[None, None])


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    return open_model(str(tiny_model_dir), device="cpu")


def recipe(text: Path, **overrides):
    values = {
        "calibration.dataset": str(text),
        "calibration.sequences": 4,
        "calibration.sequence_length": 64,
        "kmeans.iterations": 5,
        "format": "cq-8c4b",
        "window": 8,
        "sinks": 2,
        "sharing": "heads",
    }
    return load_recipe("cq-8c8b", values | overrides)


@pytest.fixture(scope="module")
def shared(opened, tiny_text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("shared") / "cal"
    more = {"objective": "query", "feedback": "ldlq", "gain": "token", "grouping": "correlation"}
    calibrate(opened, recipe(tiny_text_file, **more), out)
    return out


def test_a_shared_codebook_is_stored_once_and_every_head_has_it(shared, opened):
    tensors = load_file(shared / "codebooks.safetensors")
    codec = CQCache.from_pretrained(shared, opened.model).layers[1].codecs.key
    stored = tensors["layers.1.key.codebook"]
    assert stored.shape == (1, 2, 16, 8)
    # The rest is that of each head.
    for part in ("channels", "metric", "feedback", "gains"):
        assert len(tensors[f"layers.1.key.{part}"]) == 2
    assert json.loads((shared / "cq_config.json").read_text())["cache"]["key"]["sharing"] == "heads"
    assert torch.equal(codec.codebook, stored.expand(2, -1, -1, -1))
    assert torch.equal(codec.stored_codebook, stored)
    given = {part: tensors[f"layers.1.key.{part}"] for part in ("metric", "feedback", "gains")}
    apart = CQCodec(torch.cat((stored, stored)), tensors["layers.1.key.channels"], **given)
    vectors = torch.randn(1, 2, 20, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.encode(vectors)["codes"], apart.encode(vectors)["codes"])
    assert torch.equal(codec.decode(codec.encode(vectors)), apart.decode(apart.encode(vectors)))
    ids = opened.tokenizer("Some words to begin with", return_tensors="pt")
    cache = CQCache.from_pretrained(shared, opened.model)
    made = opened.model.generate(**ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert made.shape[1] > ids["input_ids"].shape[1]
    key, _ = open_artifact(str(shared)).layer_codebooks(1, 2, 16, torch.Generator())
    assert torch.equal(key, codec.codebook)


def test_it_is_resumed_to_the_same_bytes(shared, opened, tiny_text_file, tmp_path, monkeypatch):
    settings = json.loads((shared / "cq_config.json").read_text())["recipe"]
    names = ("objective", "feedback", "gain", "grouping")
    own = recipe(tiny_text_file, **{name: settings[name] for name in names})
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_codebooks", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(opened, own, tmp_path / "cal")
    with monkeypatch.context() as patched:
        patched.setattr(module, "fit_layer", lambda *a: pytest.fail("fitted again"))
        calibrate(opened, own, tmp_path / "cal", resume=True)
    name = "codebooks.safetensors"
    assert (tmp_path / "cal" / name).read_bytes() == (shared / name).read_bytes()


def test_a_fit_for_comparison_is_the_calibrations_own(shared, opened, tiny_text_file):
    settings = CheckSettings(
        dataset=str(tiny_text_file), windows=1, window_length=48, compare=("cq-8c4b:query",)
    )
    _, own, again = check(opened, shared, settings).rows
    assert own.label != again.label and own.kl == again.kl > 0


def test_inspect_and_the_card_say_that_heads_share(shared, tmp_path):
    told = CliRunner().invoke(app, ["inspect", str(shared)])
    assert told.exit_code == 0, told.output
    assert "keys of 8 correlated channels, one codebook for all heads" in " ".join(
        told.stdout.split()
    )
    export(shared, tmp_path / "artifact")
    card = (tmp_path / "artifact" / "README.md").read_text()
    assert "one of 16 learned centroids, the same for all heads of a layer" in card
    kilobytes = (shared / "codebooks.safetensors").stat().st_size / 1000
    assert f"The codebooks take {kilobytes:.3g} kB, once" in card


def test_progress_counts_a_shared_codebook_once(opened, tiny_text_file):
    layer = read_geometry(opened.model).layers[0]
    counts = [
        count_codebooks(recipe(tiny_text_file, sharing=how).spec, 0, layer)
        for how in ("none", "heads")
    ]
    assert counts == [8, 4]

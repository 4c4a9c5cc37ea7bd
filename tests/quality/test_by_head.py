"""What single heads cost, against a cache whose heads are coded one token after the other."""

from __future__ import annotations

import json
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from slow_cache import nearest, turn
from small_checks import calibrated, settings
from transformers import DynamicCache

from cqtool.cache.codec import CQCodec
from cqtool.data import load_windows, resolve_source
from cqtool.models.load import open_model
from cqtool.quality import check
from cqtool.quality.layers import OneHeadCodec

LENGTH = 32
MIXED = {"layers": {"1": {"key": ["cq-4c5b", "cq-8c4b"], "value": ["cq-8c4b", "cq-2c2b"]}}}
ALIKE = {"layers": {}}


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    return open_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def calibrations(opened, tiny_text_file, tmp_path_factory):
    """One with the same code for all heads, and one whose second layer has codes by head."""
    folder = tmp_path_factory.mktemp("heads")
    return {
        name: calibrated(opened, tiny_text_file, folder / name, format="cq-4c4b", **fields)
        for name, fields in (("alike", ALIKE), ("mixed", MIXED))
    }


class OneHeadCoded(DynamicCache):
    """All is exact but the keys or values of one head; they may be given instead of computed."""

    def __init__(self, layer, kind, head, codebook, theta, given=None):
        super().__init__()
        self.coded, self.head, self.codebook = (layer, kind), head, codebook
        self.theta, self.given = theta, given
        self.seen = {}

    def update(self, keys, values, layer, *args, **kwargs):
        super().update(keys, values, layer, *args, **kwargs)
        self.seen[layer] = keys, values
        if self.given is not None:
            keys, values = self.given[layer]
        if self.coded == (layer, "key"):
            keys = keys.clone()
            for position, key in enumerate(keys[0, self.head].double()):
                plain = nearest(turn(key, position, self.theta, -1), self.codebook)
                keys[0, self.head, position] = turn(plain, position, self.theta, 1)
        if self.coded == (layer, "value"):
            values = values.clone()
            for position, value in enumerate(values[0, self.head].double()):
                values[0, self.head, position] = nearest(value, self.codebook)
        return keys, values


def logs(opened, cache, ids):
    with torch.no_grad():
        logits = opened.model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits
    return logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("mode", ["teacher", "prefill"])
@pytest.mark.parametrize("name", ["alike", "mixed"])
def test_a_heads_cost_is_that_of_its_codes_alone(calibrations, opened, tiny_text_file, name, mode):
    folder = calibrations[name]
    wanted = settings(
        tiny_text_file,
        windows=2,
        window_length=LENGTH,
        window=0,
        sinks=0,
        by_layer=True,
        by_head=True,
        mode=mode,
    )
    report = check(opened, folder, wanted)
    parts = [
        (layer, kind, head) for layer in (0, 1) for kind in ("key", "value") for head in (0, 1)
    ]
    assert [(one.layer, one.kind, one.head) for one in report.by_head] == parts
    # 4 codes of 5 bits take 3 bytes, for 16 channels.
    rates = [1.5, 0.5, 0.5, 1.0] if name == "mixed" else [1.0] * 4
    assert [one.bits_per_channel for one in report.by_head] == [1.0] * 4 + rates
    source = resolve_source(str(tiny_text_file), "test", model="tiny", role="evaluation")
    windows = load_windows(source, opened.tokenizer, sequences=2, length=LENGTH, order="sequential")
    tensors = load_file(folder / "codebooks.safetensors")
    config = opened.model.config
    theta = config.rope_parameters["rope_theta"]
    for cost in report.by_head:
        layer, kind, head = cost.layer, cost.kind, cost.head
        own = tensors.get(f"layers.{layer}.{kind}.heads.{head}.codebook")
        table = tensors[f"layers.{layer}.{kind}.codebook"][head] if own is None else own[0]
        assert (own is not None) == (name == "mixed" and layer == 1)
        expected = []
        for ids in windows.ids:
            plain = OneHeadCoded(-1, kind, head, None, theta)
            full = logs(opened, plain, ids)
            given = plain.seen if mode == "prefill" else None
            coded = OneHeadCoded(layer, kind, head, table.double(), theta, given)
            found = logs(opened, coded, ids)
            expected.append(float((full.exp() * (full - found)).sum(-1).mean()))
        assert cost.kl == pytest.approx(fmean(expected), rel=0.01)
        assert cost.kl > 0 and cost.kl_se is not None
    # The file says it too, and what layers cost stands beside it as always.
    special = "-window0-sinks0" + "-prefill" * (mode == "prefill")
    kept = json.loads((folder / "reports" / f"quality{special}.json").read_text())
    assert [(one["layer"], one["kind"], one["head"]) for one in kept["by_head"]] == parts
    assert [one["kl"] for one in kept["by_head"]] == [one.kl for one in report.by_head]
    assert len(kept["by_layer"]) == 4 and "head" not in kept["by_layer"][0]


def test_with_a_window_decoding_token_by_token_says_the_same(calibrations, opened, tiny_text_file):
    def heads(mode):
        asked = settings(tiny_text_file, windows=1, window_length=40, by_head=True, mode=mode)
        return [one.kl for one in check(opened, calibrations["mixed"], asked).by_head]

    assert heads("teacher") == pytest.approx(heads("decode"), rel=0.01)


def test_heads_are_not_measured_unasked(calibrations, opened, tiny_text_file):
    assert check(opened, calibrations["alike"], settings(tiny_text_file)).by_head == ()


def test_the_other_heads_stay_as_they_are_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(3, 4, 16, 4, generator=generator)
    vectors = torch.randn(2, 3, 5, 16, generator=generator).bfloat16()
    whole = CQCodec(codebook)
    for head in range(3):
        codec = OneHeadCodec(whole, head)
        decoded = codec.decode(codec.encode(vectors))
        others = [one for one in range(3) if one != head]
        assert torch.equal(decoded[:, others], vectors[:, others].float())
        coded = whole.decode(whole.encode(vectors))[:, head]
        assert torch.equal(decoded[:, head], coded) and bool((coded != vectors[:, head]).all())

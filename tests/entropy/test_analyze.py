"""The analysis of a whole sample store, on stores small enough to check by hand."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from cqtool.entropy import EntropyReport, analyze
from cqtool.entropy.estimators import joint_entropy, marginal_entropies
from cqtool.entropy.report import GroupEntropy
from cqtool.errors import CqtoolError, SampleError


@dataclass
class MemoryStore:
    """A sample store in memory that counts how many layers are in use at once."""

    tensors: dict[tuple[int, str], torch.Tensor]
    meta: dict[str, Any] = field(default_factory=lambda: {"model": "tiny"})
    loads: list[tuple[int, str]] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.tensors) // 2

    @property
    def tokens(self) -> int:
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0

    def load(self, layer: int, kind: str) -> torch.Tensor:
        self.loads.append((layer, kind))
        return self.tensors[layer, kind]


def make_store(
    layers: int = 3, tokens: int = 500, heads: int = 2, dim: int = 8, seed: int = 0
) -> MemoryStore:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return MemoryStore(
        {
            (layer, kind): torch.randn(tokens, heads, dim, generator=generator) @ mix
            for layer in range(layers)
            for kind in ("key", "value")
        }
    )


def entry(report: EntropyReport, layer: int, kind: str, channels: int) -> GroupEntropy:
    (found,) = [
        e for e in report.entries if (e.layer, e.kind, e.channels) == (layer, kind, channels)
    ]
    return found


def test_every_entry_equals_the_mean_over_contiguous_groups_of_a_head() -> None:
    store = make_store(dim=8)
    report = analyze(store, max_coupled=8, bins=5)
    assert len(report.entries) == 3 * 2 * 8
    for (layer, kind), samples in store.tensors.items():
        for channels in range(1, 9):
            groups = [
                samples[:, head, start : start + channels]
                for head in range(2)
                for start in range(0, 8 - channels + 1, channels)
            ]
            joint = [float(joint_entropy(group, 5).bits[0]) for group in groups]
            sums = [float(marginal_entropies(group, 5).bits.sum()) for group in groups]
            found = entry(report, layer, kind, channels)
            assert found.groups == len(groups)
            assert found.joint == pytest.approx(np.mean(joint))
            assert found.joint_std == pytest.approx(np.std(joint), abs=1e-9)
            assert found.marginal_sum == pytest.approx(np.mean(sums))
            assert found.marginal_sum_std == pytest.approx(np.std(sums), abs=1e-9)
            assert found.cells == 5**channels


def test_the_summary_pools_every_group_of_every_layer() -> None:
    store = make_store()
    report = analyze(store, max_coupled=2, bins=4)
    joint = [
        float(joint_entropy(store.tensors[layer, "value"][:, head, start : start + 2], 4).bits[0])
        for layer in range(3)
        for head in range(2)
        for start in range(0, 8, 2)
    ]
    (pooled,) = [e for e in report.summary if e.kind == "value" and e.channels == 2]
    assert pooled.layer is None and pooled.groups == 24
    assert pooled.joint == pytest.approx(np.mean(joint))
    assert pooled.joint_std == pytest.approx(np.std(joint))
    assert pooled.saving == pytest.approx(1 - pooled.joint / pooled.marginal_sum)


def test_one_channel_saves_nothing_and_dependent_channels_save() -> None:
    store = make_store(tokens=20_000, layers=1)
    key = store.tensors[0, "key"]
    key[:, :, 1::2] = key[:, :, ::2] * 2 + 0.01 * key[:, :, 1::2]
    report = analyze(store, max_coupled=2)
    assert entry(report, 0, "key", 1).saving == pytest.approx(0)
    assert entry(report, 0, "key", 2).saving > 0.35


def test_small_samples_are_flagged_per_number_of_channels() -> None:
    report = analyze(make_store(tokens=5000), max_coupled=5, bins=16)
    flags = [e.small_sample for e in report.summary if e.kind == "key"]
    assert flags[:2] == [False, False]
    assert flags[3:] == [True, True]  # 16**4 = 65536 cells for 5000 samples
    assert report.ceiling == pytest.approx(math.log2(5000))
    assert all(e.joint <= report.ceiling for e in report.entries)


def test_large_heads_are_thinned_evenly() -> None:
    store = make_store(layers=1, heads=4, dim=16)
    report = analyze(store, max_coupled=2, max_groups=8)
    assert [e.groups for e in report.entries] == [8, 8, 8, 8]
    every_eighth = store.tensors[0, "key"].flatten(1)[:, ::8]
    expected = marginal_entropies(every_eighth).bits.mean()
    assert entry(report, 0, "key", 1).joint == pytest.approx(float(expected))


def test_max_tokens_takes_evenly_spread_samples() -> None:
    store = make_store(layers=1, tokens=600)
    report = analyze(store, max_coupled=1, max_tokens=200)
    expected = marginal_entropies(store.tensors[0, "key"][::3].flatten(1)).bits.mean()
    assert report.tokens == 200
    assert entry(report, 0, "key", 1).joint == pytest.approx(float(expected))


def test_keys_and_values_of_different_widths() -> None:
    store = make_store(layers=1, dim=6)
    store.tensors[0, "value"] = store.tensors[0, "value"][:, :, :3].contiguous()
    report = analyze(store, max_coupled=8)
    assert [e.channels for e in report.entries if e.kind == "key"] == [1, 2, 3, 4, 5, 6]
    assert [e.channels for e in report.entries if e.kind == "value"] == [1, 2, 3]
    assert entry(report, 0, "key", 4).groups == 2  # one of 4 per head, the rest of 2 left out


def test_each_layer_is_loaded_once() -> None:
    store = make_store()
    analyze(store, max_coupled=2)
    assert store.loads == [(layer, kind) for layer in range(3) for kind in ("key", "value")]


def test_correlations_agree_with_numpy() -> None:
    store = make_store(layers=4, dim=40)
    report = analyze(store, max_coupled=1)
    assert sorted({m.layer for m in report.matrices}) == [0, 2, 3]
    samples = store.tensors[2, "value"].double().numpy()
    (shown,) = [m for m in report.matrices if (m.layer, m.kind) == (2, "value")]
    first = np.corrcoef(samples[:, 0, :32], rowvar=False)
    np.testing.assert_allclose(np.array(shown.matrix, dtype=float), first, atol=1e-4)
    off = [
        np.abs(np.corrcoef(samples[:, head], rowvar=False))[~np.eye(40, dtype=bool)].mean()
        for head in range(2)
    ]
    (found,) = [c for c in report.correlations if (c.layer, c.kind) == (2, "value")]
    assert found.mean_absolute == pytest.approx(np.mean(off))


def test_constant_channels_become_null_in_json() -> None:
    store = make_store(layers=1, heads=1, dim=4)
    store.tensors[0, "key"][:, :, 1:] = 2.0
    value = analyze(store, max_coupled=4).to_json()
    assert value["correlations"][0]["mean_absolute"] is None
    assert value["matrices"][0]["matrix"][1] == (None, None, None, None)
    text = json.dumps(value, allow_nan=False)
    assert json.loads(text)["source"] == {"model": "tiny"}


def test_nan_names_layer_and_kind() -> None:
    store = make_store()
    store.tensors[1, "value"][3, 0, 2] = math.nan
    with pytest.raises(SampleError, match="layer 1, values"):
        analyze(store)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_coupled": 0}, "--max-coupled 0"),
        ({"max_groups": 0}, "--max-groups 0"),
        ({"max_tokens": 0}, "1 or more"),
        ({"bins": 256, "max_coupled": 8}, "--max-coupled 7"),
        ({"bins": 1}, "2 to 32768"),
    ],
)
def test_options_out_of_range_say_what_is_allowed(options: dict[str, int], words: str) -> None:
    with pytest.raises(CqtoolError, match=words):
        analyze(make_store(), **options)


def test_an_empty_store_is_an_error() -> None:
    with pytest.raises(SampleError, match="at least one sequence"):
        analyze(MemoryStore({}))

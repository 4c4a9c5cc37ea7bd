"""`check` end to end on a tiny model: rows, where reports go, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from small_checks import calibrated, settings

from cqtool.artifact.export import export
from cqtool.cache import CQCache, LayerCodecs
from cqtool.cache.loading import load_format
from cqtool.data import load_windows, resolve_source
from cqtool.errors import ArtifactError, RecipeError, SampleError
from cqtool.manifest import verify_folder
from cqtool.models.load import open_model
from cqtool.quality import Gates, check
from cqtool.quality.measure import WindowFigures, add_window, full_logits, quantized_logits
from cqtool.schemes.scalar import HalfCodec


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    return open_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def folder(opened, tiny_text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("check") / "cal"
    return calibrated(opened, tiny_text_file, out, **{"kmeans.iterations": 10})


def test_rows_gates_and_report(folder, opened, tiny_text_file):
    compare = ("cq-8c4b", "cq-4c6b:uniform", "int4", "fp16", str(folder))
    gates = Gates(max_kl=1e9, max_ppl_increase=-1.0)
    report = check(opened, folder, settings(tiny_text_file, compare=compare, gates=gates))
    rows = {row.label: row for row in report.rows}
    assert [row.label for row in report.rows] == [
        "fp32 (full)",
        "cq-4c6b fisher",
        "cq-8c4b fisher",
        "cq-4c6b uniform",
        "int4",
        "fp16",
        "cq-4c6b fisher (cal)",
    ]
    assert rows["fp32 (full)"].kl == 0 and rows["fp32 (full)"].top1 == 1
    assert rows["cq-4c6b fisher"].kl == rows["cq-4c6b fisher (cal)"].kl
    assert 0 < rows["fp16"].kl < rows["int4"].kl < rows["cq-8c4b fisher"].kl
    assert rows["cq-4c6b fisher"].kl < rows["cq-8c4b fisher"].kl
    assert [(gate.name, gate.passed) for gate in report.gates] == [
        ("max_ppl_increase", False),
        ("max_kl", True),
    ]
    assert not report.passed
    kept = json.loads((folder / "reports" / "quality.json").read_text())
    assert kept == json.loads(json.dumps(report.to_json()))


def test_bits_count_everything_that_is_stored(folder, opened, tiny_text_file):
    plain = settings(tiny_text_file, window=0, sinks=0, compare=("int4", "fp16"))
    rows = check(opened, folder, plain).rows
    # Heads of 16 channels: 4 groups x 6 bits; int4 has a float16 minimum and step every 16.
    assert [row.bits_per_channel for row in rows] == [32, 1.5, 4 + 32 / 16, 16]
    channels = 2 * 2 * 2 * 16
    positions, frequencies = 4, 4 * 8 / 96
    for row in rows[1:]:
        codes = channels * row.bits_per_channel / 8
        # int and fp16 caches keep keys as they came, after RoPE; angles are noted all the same.
        assert row.cache_bytes_per_token == pytest.approx(codes + positions + frequencies)
        assert row.effective_bits == pytest.approx(8 * row.cache_bytes_per_token / channels)
    plain = settings(tiny_text_file, window=0, sinks=0, compare=("kivi-2",), context=80)
    full, _, row = check(opened, folder, plain).rows
    # At 80 of 96 tokens, where half a block of 32 waits in full precision.
    stored = channels * (64 * row.bits_per_channel + 16 * 32) / 80 / 8 + positions + 4 * 8 / 80
    assert row.cache_bytes_per_token == pytest.approx(stored)
    assert row.effective_bits == pytest.approx(8 * stored / channels)
    # Computed with the mean of the waiting tokens, 15.5, and without the table of frequencies.
    computed = channels * (64.5 * row.bits_per_channel + 15.5 * 32) / 80 / 8 + positions
    assert row.context_bits == pytest.approx(8 * computed / channels)
    assert full.cache_bytes_per_token == 4 * channels
    windowed = check(opened, folder, settings(tiny_text_file)).rows[1]
    ids = torch.arange(3, 99)[None]
    cache = CQCache.from_pretrained(folder, opened.model)
    with torch.no_grad():
        opened.model(input_ids=ids, past_key_values=cache)
    assert windowed.cache_bytes_per_token == cache.nbytes / 96


def test_another_window_gets_a_report_of_its_own(folder, opened, tiny_text_file):
    own = folder / "reports" / "quality.json"
    check(opened, folder, settings(tiny_text_file))
    before = own.read_bytes()
    check(opened, folder, settings(tiny_text_file, window=0, sinks=0))
    other = json.loads((folder / "reports" / "quality-window0-sinks0.json").read_text())
    assert (other["rows"][1]["window"], other["rows"][1]["sinks"]) == (0, 0)
    assert own.read_bytes() == before


def test_what_is_lost_after_prompts_is_less_and_in_a_report_of_its_own(
    folder, opened, tiny_text_file
):
    decoded = check(opened, folder, settings(tiny_text_file)).rows[1]
    own = folder / "reports" / "quality.json"
    before = own.read_bytes()
    prefilled = check(opened, folder, settings(tiny_text_file, mode="prefill")).rows[1]
    assert 0 < prefilled.kl < decoded.kl
    report = json.loads((folder / "reports" / "quality-prefill.json").read_text())
    assert (report["mode"], report["rows"][1]["kl"]) == ("prefill", prefilled.kl)
    check(opened, folder, settings(tiny_text_file, mode="prefill", window=0, sinks=0))
    assert (folder / "reports" / "quality-window0-sinks0-prefill.json").exists()
    assert own.read_bytes() == before


def test_an_artifact_can_be_checked_and_stays_whole(folder, opened, tiny_text_file, tmp_path):
    check(opened, folder, settings(tiny_text_file))
    artifact = export(folder, tmp_path / "artifact").folder
    report = check(opened, artifact, settings(tiny_text_file))
    verify_folder(artifact)
    assert report.rows[1].kl == check(opened, folder, settings(tiny_text_file)).rows[1].kl


def test_checking_on_calibration_text_is_pointed_out(folder, opened, tiny_text_file):
    from contextlib import contextmanager

    class Notes:
        said: list[str] = []  # noqa: RUF012

        def note(self, message):
            self.said.append(message)

        @contextmanager
        def task(self, label, total, done=0):
            class Task:
                def advance(self, amount=1):
                    pass

            yield Task()

    notes = Notes()
    check(opened, folder, settings(tiny_text_file), notes)
    assert notes.said == []
    check(opened, folder, settings(tiny_text_file, split="train"), notes)
    assert "also calibrated on" in notes.said[0]


def test_what_cannot_be_compared_is_refused(folder, opened, tiny_text_file, tmp_path):
    cases = [
        (RecipeError, "no format 'int5'. Did you mean int", "int5"),
        (RecipeError, "one of uniform, fisher, query", "cq-4c6b:best"),
        (RecipeError, "not a coupled format|cq-<channels>", "cq-banana"),
        (RecipeError, "couple", "cq-3c6b"),
        (SampleError, "1024 centroids", "cq-8c10b"),
    ]
    for error, words, name in cases:
        with pytest.raises(error, match=words):
            check(opened, folder, settings(tiny_text_file, compare=(name,)))
    bare = export(folder, tmp_path / "artifact").folder
    with pytest.raises(SampleError, match="--keep-samples"):
        check(opened, bare, settings(tiny_text_file, compare=("cq-8c4b",)))


def test_a_window_that_leaves_nothing_to_measure_is_refused(folder, opened, tiny_text_file):
    with pytest.raises(RecipeError, match="nothing would be measured"):
        check(opened, folder, settings(tiny_text_file, window=96))


def test_another_model_is_refused_in_one_sentence(folder, tiny_model_dir):
    other = open_model(str(tiny_model_dir), device="cpu")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ArtifactError, match="not for this model"):
        CQCache.from_pretrained(folder, other.model)
    assert CQCache.from_pretrained(folder, other.model, allow_other_base=True).nbytes == 0
    deeper = other.model.config.__class__(**{**other.model.config.to_dict(), "head_dim": 32})
    wrong = type(other.model)(deeper)
    with pytest.raises(ArtifactError, match="other shapes"):
        CQCache.from_pretrained(folder, wrong, allow_other_base=True)


def test_a_fine_tune_is_measured_on_an_artifact_and_leaves_no_figures_in_it(
    folder, tiny_model_dir, tiny_text_file, tmp_path
):
    other = open_model(str(tiny_model_dir), device="cpu")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.1)
    asked = settings(tiny_text_file, allow_other_base=True)
    before = sorted(folder.rglob("*"))
    with pytest.raises(ArtifactError, match=r"run `cqtool export .* and check the artifact with"):
        check(other, folder, asked)
    artifact = export(folder, tmp_path / "artifact").folder
    with pytest.raises(ArtifactError, match="give --allow-other-base"):
        check(other, artifact, settings(tiny_text_file))
    report = check(other, artifact, asked)
    assert report.rows[1].kl > 0
    verify_folder(artifact)
    assert sorted(folder.rglob("*")) == before


def test_a_path_that_is_no_artifact_is_refused(opened, tmp_path):
    for path, words in (
        (tmp_path, "cq_config.json"),
        (tmp_path / "nowhere", "not a folder"),
        ("../no/such/place", "not a folder"),
    ):
        with pytest.raises(ArtifactError, match=words):
            CQCache.from_pretrained(path, opened.model)


def test_a_format_to_compare_has_groups_as_the_calibration(opened, tiny_text_file, tmp_path):
    changes = {"kmeans.iterations": 10, "format": "cq-4c4b", "grouping": "pairs", "sinks": 4}
    out = calibrated(opened, tiny_text_file, tmp_path / "cal", **changes)
    again = settings(tiny_text_file, compare=("cq-4c4b:fisher",))
    _, own, fitted = check(opened, out, again).rows
    assert own.kl == fitted.kl > 0
    with pytest.raises(RecipeError, match="an even number of channels"):
        check(opened, out, settings(tiny_text_file, compare=("cq-1c4b",)))


def test_a_layers_cost_is_that_of_its_codes_alone(folder, opened, tiny_text_file):
    wanted = settings(tiny_text_file, by_layer=True)
    report = check(opened, folder, wanted)
    format = load_format(folder, opened.model)
    parts = [(index, kind) for index in range(len(format.layers)) for kind in ("key", "value")]
    assert [(one.layer, one.kind) for one in report.by_layer] == parts
    source = resolve_source(str(tiny_text_file), "test", model="tiny", role="evaluation")
    windows = load_windows(source, opened.tokenizer, sequences=3, length=96, order="sequential")
    exact = HalfCodec(torch.float32)
    for cost in report.by_layer[2:4]:
        own = format.layers[1]
        pair = (own.key, exact) if cost.kind == "key" else (exact, own.value)
        layers = [LayerCodecs(exact, exact)] * len(format.layers)
        layers[1] = LayerCodecs(*pair)
        alone, figures = replace(format, layers=tuple(layers)), WindowFigures()
        for ids in windows.ids:
            found = quantized_logits(opened.model, alone, ids, "decode")
            add_window(figures, full_logits(opened.model, ids), found, ids)
        assert cost.kl == pytest.approx(fmean(figures.kl), rel=0.01)
        assert cost.kl_se is not None and cost.bits_per_channel == 1.5
    assert all(0 < one.kl < report.rows[1].kl for one in report.by_layer)
    assert check(opened, folder, settings(tiny_text_file)).by_layer == ()

"""Budgets of bits over layers, and the command that makes a recipe of them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cqtool.cache.codec import CQCodec
from cqtool.cli.app import app
from cqtool.errors import ArtifactError, RecipeError
from cqtool.quality.allocate import (
    CODES as USUAL_CODES,
)
from cqtool.quality.allocate import (
    Size,
    allocate,
    modelled_kl,
    recipe_fields,
    usable_codes,
)
from cqtool.quality.costs import PER_BIT, Curve, Part, measured_costs
from cqtool.recipe import load_recipe
from cqtool.spec import KINDS, CQSpec
from tests.synthetic_artifact import LAYERS, edit_json, write_calibration

KL = (0.01, 0.3, 0.02, 0.02)
REPORT = {
    "model": "some-org/Tiny-Model",
    "evaluation": {"digest": "cd" * 32},
    "rows": [{"window": 0, "sinks": 0}, {"window": 5, "sinks": 3}],
}
REPORTS = Path(__file__).parents[2] / "docs" / "results" / "quality"
ONE_HEAD = Size(1, 64)
CODES = [CQSpec.parse(name) for name in ("cq-8c6b", "cq-8c8b", "cq-4c8b")]


def _parts(*kl: float) -> dict[Part, Curve]:
    places = [Part(layer, kind) for layer in range(4) for kind in KINDS]
    return {part: Curve(((1.0, one),)) for part, one in zip(places, kl, strict=False)}


def _spent(chosen: dict[Part, CQSpec]) -> float:
    return sum(code.bits_per_channel for code in chosen.values()) / len(chosen)


def test_no_other_choice_within_the_budget_is_modelled_to_cost_less() -> None:
    costs = _parts(0.01, 0.2, 0.03, 0.05, 0.002, 0.07)
    sizes = dict.fromkeys(costs, ONE_HEAD)
    for bits in (0.75, 1.0, 1.375, 2.0):
        chosen = allocate(costs, sizes, CODES, bits)
        assert _spent(chosen) <= bits
        within = (
            dict(zip(costs, codes, strict=True)) for codes in product(CODES, repeat=len(costs))
        )
        least = min(
            modelled_kl(costs, other, sizes) for other in within if _spent(other) <= bits + 1e-9
        )
        assert modelled_kl(costs, chosen, sizes) == pytest.approx(least)


def test_all_of_a_budget_that_comes_out_even_is_spent() -> None:
    costs = _parts(0.5, 0.001, 0.001, 0.001, 0.001)
    sizes = dict.fromkeys(costs, ONE_HEAD)
    chosen = allocate(costs, sizes, CODES, 1.0)
    assert [code.name for code in chosen.values()] == ["cq-4c8b"] + ["cq-8c6b"] * 4
    assert _spent(chosen) == 1.0


def test_a_part_of_more_channels_takes_more_of_the_budget() -> None:
    costs = _parts(0.1, 0.1)
    (small, large) = costs
    chosen = allocate(
        costs, {small: Size(1, 64), large: Size(2, 64)}, CODES, (64 * 2 + 128 * 0.75) / 192
    )
    assert chosen[small].name == "cq-4c8b"
    assert chosen[large].name == "cq-8c6b"


def test_costs_measured_at_other_rates_are_compared_at_the_same_one() -> None:
    first, second = _parts(0.1, 0.1)
    # The first costs as much with twice the bits.
    costs = {first: Curve(((2.0, 0.1),)), second: Curve(((1.0, 0.1),))}
    chosen = allocate(costs, dict.fromkeys(costs, ONE_HEAD), CODES, 1.375)
    assert (chosen[first].name, chosen[second].name) == ("cq-4c8b", "cq-8c6b")


def test_what_more_bits_bring_goes_by_both_rates_where_both_were_measured() -> None:
    first, second = _parts(0.1, 0.1)
    # The second costs more at 1 bit, and more bits hardly help it.
    costs = {
        first: Curve.through([(2.0, 0.01), (1.0, 0.08)]),
        second: Curve.through([(1.0, 0.1), (2.0, 0.09)]),
    }
    chosen = allocate(costs, dict.fromkeys(costs, ONE_HEAD), CODES, 1.375)
    assert (chosen[first].name, chosen[second].name) == ("cq-4c8b", "cq-8c6b")


def test_a_curve_goes_through_what_was_measured_and_on() -> None:
    curve = Curve.through([(4.0, 0.01), (1.0, 0.64), (2.0, 0.16)])
    assert [curve.kl(bits) for bits in (1.0, 2.0, 4.0)] == pytest.approx([0.64, 0.16, 0.01])
    assert [curve.kl(bits) for bits in (0.5, 1.5, 3.0)] == pytest.approx([1.28, 0.32, 0.04])
    assert curve.kl(5.0) == pytest.approx(0.0025)
    assert Curve(((1.0, 0.32),)).kl(2.0) == pytest.approx(0.1)


def test_noise_does_not_make_more_bits_cost_more() -> None:
    curve = Curve.through([(1.0, 0.1), (1.0, 0.3), (2.0, 0.4)])
    assert curve.points == ((1.0, 0.2), (2.0, 0.2))
    assert curve.kl(4.0) == pytest.approx(0.2)
    # A part that costs nothing at all still has a curve.
    assert Curve.through([(1.0, 0.0), (2.0, 0.0)]).kl(1.5) == 0.0


def test_a_cost_of_nothing_says_little_about_other_rates() -> None:
    curve = Curve.through([(1.0, 0.01), (2.0, 0.0), (4.0, 0.0)])
    assert 0.01 < curve.kl(0.75) < 0.02
    assert [curve.kl(bits) for bits in (2.0, 4.0, 5.0)] == pytest.approx(
        [0.01 / 8, 0.01 / 8**3, 0.01 / 8**4]
    )


def test_points_that_are_close_together_say_little_about_other_rates() -> None:
    curve = Curve.through([(1.0, 0.01), (1.0001, 1e-9)])
    # What was measured holds between them; beyond them a bit divides by 8 at most.
    assert curve.kl(1.0001) == pytest.approx(1e-9)
    assert [curve.kl(0.0001), curve.kl(2.0001)] == pytest.approx([0.01 * 8**0.9999, 1e-9 / 8])


def test_a_budget_that_was_rounded_down_is_spent_all_the_same() -> None:
    costs = _parts(0.1, 0.2, 0.3)
    chosen = allocate(costs, dict.fromkeys(costs, ONE_HEAD), CODES[:2], 0.833333333)
    assert [code.name for code in chosen.values()] == ["cq-8c6b", "cq-8c6b", "cq-8c8b"]


def test_the_order_of_the_codes_makes_no_difference() -> None:
    costs = _parts(0.01, 0.2, 0.03, 0.05)
    sizes = dict.fromkeys(costs, ONE_HEAD)
    for bits in (0.75, 1.0, 1.375):
        assert allocate(costs, sizes, CODES[::-1], bits) == allocate(costs, sizes, CODES, bits)
    with pytest.raises(RecipeError, match="what cq-8c6b takes"):
        allocate(costs, sizes, CODES[::-1], 0.5)


def test_gains_and_whole_bytes_are_part_of_the_budget() -> None:
    costs = _parts(0.1, 0.2)
    gains = usable_codes("cq-8c6b, cq-8c8b,cq-8c8b", {64}, "token")
    assert [ONE_HEAD.rate(code) for code in gains] == [0.875, 1.125]
    # With 1 bit for both there would be no room for gains.
    chosen = allocate(costs, dict.fromkeys(costs, ONE_HEAD), gains, 1.0)
    assert [code.name for code in chosen.values()] == ["cq-8c6b", "cq-8c8b"]
    # 12 bits of codes take 2 bytes, so that 16 cost nothing more.
    small = Size(2, 16)
    assert small.rate(CODES[0]) == small.rate(CODES[1]) == 1.0
    for codes in (CODES, CODES[::-1]):
        chosen = allocate(costs, dict.fromkeys(costs, small), codes, 1.0)
        assert {code.name for code in chosen.values()} == {"cq-8c8b"}


@pytest.mark.parametrize("code", ["cq-8c6b", "cq-4c8b", "cq-8c10b", "cq-2c3b"])
@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_sizes_are_on_the_scale_of_codecs(code: str, gained: bool, dim: int) -> None:
    (spec,) = usable_codes(code, {dim}, "token" if gained else "none")
    table = torch.zeros(2, dim // spec.channels, spec.centroids, spec.channels)
    codec = CQCodec(table, gains=torch.ones(2, 256) if gained else None)
    assert Size(2, dim).rate(spec) == codec.bits_per_channel


def test_a_budget_is_a_number_and_more_than_the_largest_codes_is_as_much() -> None:
    costs = _parts(0.1, 0.1)
    sizes = dict.fromkeys(costs, ONE_HEAD)
    for bits in (float("inf"), float("nan")):
        with pytest.raises(RecipeError, match="give a number"):
            allocate(costs, sizes, CODES, bits)
    for bits in (1e12, 1e308):
        assert _spent(allocate(costs, sizes, CODES, bits)) == 2.0


def test_codes_that_do_not_divide_a_head_are_left_out_or_refused_by_name() -> None:
    assert [code.name for code in usable_codes(None, {64, 12})] == ["cq-4c8b", "cq-2c8b"]
    with pytest.raises(RecipeError, match="cq-5c5b does not fit: heads of 16 channels"):
        usable_codes("cq-8c8b,cq-5c5b", {16})
    with pytest.raises(RecipeError, match="No code fits all heads"):
        usable_codes(None, {9})


def test_a_budget_below_the_smallest_code_is_refused() -> None:
    costs = _parts(0.1, 0.1)
    sizes = dict.fromkeys(costs, ONE_HEAD)
    with pytest.raises(RecipeError, match=r"below 0\.75, what cq-8c6b takes"):
        allocate(costs, sizes, CODES, 0.5)


def test_the_fields_name_only_what_differs_neighbours_together() -> None:
    low, middle, high = CODES
    names = [(low, low), (low, high), (low, high), *[(low, low)] * 2, (middle, middle)]
    chosen: dict[Part, CQSpec] = {}
    for layer, (key, value) in enumerate(names):
        chosen[Part(layer, "key")], chosen[Part(layer, "value")] = key, value
    fields = recipe_fields(chosen)
    assert fields == {
        "format": "cq-8c6b",
        "layers": {"1-2": {"key": "cq-8c6b", "value": "cq-4c8b"}, "5": "cq-8c8b"},
    }
    spec = load_recipe("cq-8c8b", fields).spec
    for (layer, kind, _), code in chosen.items():
        assert [one.name for one in spec.codes_of(layer, kind)] == [code.name]


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    folder = write_calibration(tmp_path / "calibration")
    config = json.loads((folder / "cq_config.json").read_text())
    config["recipe"] = load_recipe("cq-8c8b").model_dump(mode="json")
    (folder / "cq_config.json").write_text(json.dumps(config))
    rows = [
        {"layer": layer, "kind": kind, "bits_per_channel": 0.625, "kl": kl, "kl_se": None}
        for (layer, kind, _), kl in zip(_parts(*KL), KL, strict=True)
        if layer < LAYERS
    ]
    (folder / "reports").mkdir(exist_ok=True)
    (folder / "reports" / "quality.json").write_text(json.dumps(REPORT | {"by_layer": rows}))
    return folder


def _refused(calibration: Path, *words: str) -> str:
    """What the command says when it ends with wrong input."""
    done = CliRunner().invoke(app, ["allocate", str(calibration), *words])
    assert isinstance(done.exception, SystemExit) and done.exit_code == 2, done.output
    return " ".join(done.output.split())


def _result(calibration: Path, *words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["allocate", str(calibration), "--json", *words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_command_writes_a_recipe_that_spends_the_budget(calibration: Path) -> None:
    out = calibration.parent / "mixed.yaml"
    words = ["allocate", str(calibration), "--bits", "1.25", "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--codes", "cq-8c6b,cq-4c8b"])
    assert done.exit_code == 0, done.output
    spec = load_recipe(str(out)).spec
    codes = [spec.codes_of(layer, kind)[0].name for layer in (0, 1) for kind in ("key", "value")]
    assert codes == ["cq-8c6b", "cq-4c8b", "cq-8c6b", "cq-8c6b"]
    printed = CliRunner().invoke(app, [*words[:4], "--codes", "cq-8c6b,cq-4c8b"])
    assert printed.stdout == out.read_text()
    assert "1.25" in done.stdout


def test_a_report_without_costs_says_what_to_run(calibration: Path) -> None:
    report = calibration / "reports" / "quality.json"
    report.write_text(json.dumps({"by_layer": []}))
    with pytest.raises(ArtifactError, match="with --by-layer"):
        measured_costs([report])
    report.write_text(json.dumps({"by_layer": [{"layer": 0, "kind": "query"}]}))
    with pytest.raises(ArtifactError, match="'kind' must be one of key, value"):
        measured_costs([report])


def test_a_report_of_another_model_is_refused(calibration: Path) -> None:
    report = calibration / "reports" / "quality.json"
    edit_json(report, lambda values: values.update(model="some-org/Other"))
    said = _refused(calibration, "--bits", "1")
    assert "is of some-org/Other, and the calibration of some-org/Tiny-Model" in said
    # A local folder or file may have any name.
    for local in ("./Other", "/models/Other", "Other.gguf"):
        edit_json(report, lambda values, local=local: values.update(model=local))
        assert _result(calibration, "--bits", "1")["bits_per_channel"] == 1.0
    edit_json(report, lambda values: values.update(by_layer=values["by_layer"][:-1]))
    assert "other layers" in _refused(calibration, "--bits", "1")


def test_reports_of_two_rates_go_together(calibration: Path) -> None:
    first = calibration / "reports" / "quality.json"
    rows = json.loads(first.read_text())["by_layer"]
    # With twice the bits the loud part costs as much as before, and the others nothing.
    higher = [
        {**row, "bits_per_channel": 1.25, "kl": row["kl"] if row["kl"] > 0.1 else 0.0}
        for row in rows
    ]
    second = calibration.parent / "higher.json"
    second.write_text(json.dumps(REPORT | {"by_layer": higher}))
    words = ["allocate", str(calibration), "--bits", "1.25", "--codes", "cq-8c6b,cq-4c8b"]
    done = CliRunner().invoke(
        app, [*words, "--json", "--report", str(first), "--report", str(second)]
    )
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    # With the first report alone it is the loud part that gets more.
    assert made["recipe"]["format"] == {"key": "cq-4c8b", "value": "cq-8c6b"}
    assert made["recipe"]["layers"] == {"0": "cq-8c6b"}
    # A bit divides what costs nothing at the higher rate by 8; codes take 1 bit and 2.
    quiet = 0.03 * 8 ** (0.625 - 1) + 0.02 * 8 ** (0.625 - 2)
    assert made["kl_expected"] == pytest.approx(0.3 + quiet)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"evaluation": {"digest": "another"}}, "different text"),
        ({"evaluation": {}}, "do not say on which"),
        ({"evaluation": None}, "do not say on which"),
        ({"model": "some-org/Other"}, "give reports of one model"),
        ({"rows": [{}, {"window": 0, "sinks": 3}]}, "different windows or sinks"),
        ({"rows": [{}, {"window": 5, "sinks": 4}]}, "different windows or sinks"),
        ({"mode": "prefill"}, "with the same --mode for both"),
    ],
)
def test_reports_that_do_not_go_together(
    calibration: Path, change: dict[str, Any], sentence: str
) -> None:
    first = calibration / "reports" / "quality.json"
    report = json.loads(first.read_text())
    # The last of three, and the other two are alike.
    second, third = calibration.parent / "second.json", calibration.parent / "third.json"
    second.write_text(json.dumps(report))
    assert measured_costs([first, second]) == measured_costs([first])
    third.write_text(json.dumps(report | change))
    measured_costs([third])
    for files in ([first, second, third], [third, first, second]):
        with pytest.raises(ArtifactError, match=sentence):
            measured_costs(files)


def test_reports_that_do_not_say_their_text_do_not_go_together(calibration: Path) -> None:
    report = calibration / "reports" / "quality.json"
    edit_json(report, lambda values: values.pop("evaluation"))
    with pytest.raises(ArtifactError, match="do not say on which"):
        measured_costs([report, report])


def test_reports_of_other_layers_do_not_go_together(calibration: Path) -> None:
    first = calibration / "reports" / "quality.json"
    second = calibration.parent / "other.json"
    report = json.loads(first.read_text())
    second.write_text(json.dumps(report | {"by_layer": report["by_layer"][:2]}))
    with pytest.raises(ArtifactError, match="other layers"):
        measured_costs([first, second])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"evaluation": "x"}, "'evaluation' must be an object"),
        ({"evaluation": 1}, "'evaluation' must be an object"),
        ({"evaluation": [1]}, "'evaluation' must be an object"),
        ({"evaluation": {"digest": [1]}}, "'digest' must be a text"),
        ({"rows": 1}, "'rows' must be a list"),
        ({"model": 1}, "'model' must be a text"),
        ({"bits_per_channel": 2000}, "figures that cannot be"),
        ({"bits_per_channel": -1e300}, "'bits_per_channel' must be a number above 0"),
        ({"kl": 1e300}, "figures that cannot be"),
        ({"layer": 0, "kind": "key"}, "the key of layer 0 stands there twice"),
    ],
)
def test_a_damaged_report_is_refused(
    calibration: Path, change: dict[str, Any], sentence: str
) -> None:
    report = calibration / "reports" / "quality.json"
    values = json.loads(report.read_text())
    place = values if change.keys() <= REPORT.keys() else values["by_layer"][-1]
    place.update(change)
    report.write_text(json.dumps(values))
    said = _refused(calibration, "--bits", "1")
    assert sentence in said and "Run `cqtool check` with --by-layer or --by-head." in said


def test_costs_below_nothing_and_below_their_error(calibration: Path) -> None:
    report = calibration / "reports" / "quality.json"
    rows = json.loads(report.read_text())["by_layer"]
    figures = [(-0.01, None), (-0.01, -0.005), (0.001, 0.002), (0.3, 0.002)]
    for row, (kl, error) in zip(rows, figures, strict=True):
        row.update(kl=kl, kl_se=error)
    report.write_text(json.dumps({"by_layer": rows}))
    curves = measured_costs([report]).values()
    assert [curve.points for curve in curves] == [((0.625, kl),) for kl in (0.0, 0.0, 0.002, 0.3)]


def test_the_command_refuses_a_budget_without_end(calibration: Path) -> None:
    assert "give a number such as --bits 1.25" in _refused(calibration, "--bits", "inf")


def test_rates_close_together_and_a_huge_budget_make_a_recipe(calibration: Path) -> None:
    first = calibration / "reports" / "quality.json"
    report = json.loads(first.read_text())
    for row in report["by_layer"]:
        row.update(bits_per_channel=row["bits_per_channel"] + 1e-4, kl=0.0)
    second = calibration.parent / "close.json"
    second.write_text(json.dumps(report))
    words = ["--bits", "1e12", "--report", str(first), "--report", str(second)]
    made = _result(calibration, *words)
    assert made["bits_per_channel"] == 4.0 and made["recipe"]["format"] == "cq-2c8b"


def test_gains_are_counted_where_the_recipe_has_them(calibration: Path) -> None:
    edit_json(calibration / "cq_config.json", lambda values: values["recipe"].update(gain="token"))
    # 8 bits for a head of 16 channels.
    assert "below 1.5, what cq-8c6b takes" in _refused(calibration, "--bits", "1")
    made = _result(calibration, "--bits", "1.5", "--codes", "cq-8c8b, cq-4c8b")
    assert made["bits_per_channel"] == 1.5 and made["recipe"]["gain"] == "token"
    assert made["recipe"]["description"] == "1.5 bits per channel, gains counted, by layer."


def test_layers_count_with_the_channels_of_their_heads(calibration: Path) -> None:
    edit_json(
        calibration / "cq_config.json",
        lambda values: values["geometry"]["layers"][1].update(kv_heads=6),
    )
    # Of 16 heads in all, 2 have the loud values.
    words = ["--codes", "cq-8c8b,cq-4c8b", "--bits", "1.125"]
    made = _result(calibration, *words)
    assert made["bits_per_channel"] == 1.125
    assert made["recipe"]["format"] == {"key": "cq-8c8b", "value": "cq-4c8b"}
    assert made["recipe"]["layers"] == {"1": "cq-8c8b"}
    after = 0.3 * PER_BIT ** (0.625 - 2) + 0.05 * PER_BIT ** (0.625 - 1)
    assert made["kl_expected"] == pytest.approx(after)
    assert made["kl_even"] == pytest.approx(0.35 * PER_BIT ** (0.625 - 1.125))


def test_by_default_codes_are_those_that_divide_the_heads(calibration: Path) -> None:
    def smaller(values: dict[str, Any]) -> None:
        values["cache"]["value"]["channels"] = 4
        for layer in values["geometry"]["layers"]:
            layer.update(key_dim=12, value_dim=12, rotation=layer["rotation"] | {"dim": 12})

    edit_json(calibration / "cq_config.json", smaller)
    made = _result(calibration, "--bits", "2")
    assert made["recipe"]["format"] == "cq-4c8b" and made["bits_per_channel"] == 2.0
    assert "cq-8c8b does not fit" in _refused(calibration, "--bits", "2", "--codes", "cq-8c8b")


def test_a_recipe_is_not_written_over_a_folder(calibration: Path) -> None:
    words = ["allocate", str(calibration), "--bits", "1", "--out", str(calibration)]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, SystemExit) and done.exit_code == 1
    assert "a folder stands" in " ".join(done.output.split())


@pytest.mark.parametrize("bits", [1, 1.25, 2, 2.5])
def test_the_demo_model_s_recipes_have_the_bits_that_the_measured_costs_give(bits: float) -> None:
    costs = measured_costs([REPORTS / f"by-layer{at}.json" for at in ("", "-at-2", "-at-4")])
    codes = [CQSpec.parse(name) for name in USUAL_CODES]
    chosen = allocate(costs, dict.fromkeys(costs, Size(3, 64)), codes, bits)
    spec = load_recipe(f"smollm2-135m-{bits:g}bit").spec
    for (layer, kind, _), code in chosen.items():
        assert [one.name for one in spec.codes_of(layer, kind)] == [code.name]

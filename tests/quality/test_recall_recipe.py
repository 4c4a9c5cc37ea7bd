"""The recipe for recall spends its bits by the committed costs of single heads."""

from __future__ import annotations

from pathlib import Path

from cqtool.quality.allocate import Size, allocate, recipe_fields, usable_codes
from cqtool.quality.costs import measured_costs
from cqtool.recipe import load_recipe

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "quality"


def test_the_recipe_for_recall_is_what_allocate_makes_of_the_committed_costs() -> None:
    costs = measured_costs([RESULTS / f"by-head-recall-at-{bits}.json" for bits in (1, 2, 4)])
    assert len(costs) == 30 * 2 * 3
    sizes = dict.fromkeys(costs, Size(1, 64))
    fields = recipe_fields(allocate(costs, sizes, usable_codes(None, {64}), 1.25))
    recipe = load_recipe("smollm2-135m-1.25bit-recall")
    assert load_recipe(recipe.name, fields).spec == recipe.spec

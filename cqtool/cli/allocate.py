"""`cqtool allocate`: a recipe whose layers, or heads, have the bits that they need."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from cqtool.cli import options
from cqtool.cli.output import Output
from cqtool.errors import ArtifactError, RecipeError
from cqtool.spec import KINDS

EXAMPLES = (
    "cqtool check demo calibration --by-layer --dataset train.txt",
    "cqtool allocate calibration --bits 1 --out mixed.yaml",
    "cqtool calibrate demo --recipe mixed.yaml --out mixed",
    "cqtool check demo calibration --by-head --dataset train.txt",
    "cqtool allocate calibration --bits 1.25 --report at-1-bit.json --report at-2-bits.json",
)


def allocate(
    calibration: options.CalibrationArgument,
    bits: Annotated[
        float,
        typer.Option(
            "--bits",
            min=0.1,
            metavar="B",
            help="Bits a channel, a mean over all keys and values.",
            show_default=False,
        ),
    ],
    codes: Annotated[
        str | None,
        typer.Option(
            "--codes",
            metavar="NAMES",
            help="Codes to choose from, with commas; by default those that the kernels decode.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            "--report",
            metavar="FILE",
            help="What `cqtool check` wrote with --by-layer or --by-head; by default the "
            "calibration's quality.json. Several, of codes of several sizes on the same text, say "
            "what more bits bring.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Recipe to write; else it is printed.", show_default=False
        ),
    ] = None,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Spend a budget of bits on the layers, or heads, whose keys or values cost the most.

    Goes by what `cqtool check` measured with --by-layer, or with --by-head where all reports know
    that, and writes the calibration's recipe with `format` and `layers` for that budget. Measure on
    text that is not for evaluation: the choice suits it.
    """
    sink = Output(json=json, quiet=quiet)
    import yaml

    from cqtool.files import atomic_file
    from cqtool.layout.config import QUALITY_NAME, REPORTS_NAME, read_config
    from cqtool.quality import allocate as choice
    from cqtool.quality.costs import measured_costs
    from cqtool.recipe import recipe_from, recipe_of

    config = read_config(calibration)
    costs = measured_costs(
        report or [calibration / REPORTS_NAME / QUALITY_NAME], config.base_model.id
    )
    by_head = any(part.head is not None for part in costs)
    unit = "head" if by_head else "layer"
    sizes = choice.part_sizes(config.geometry, by_head)
    if costs.keys() != sizes.keys():
        raise ArtifactError(
            f"The report is of a model with other layers or heads than {calibration} is for; run "
            f"`cqtool check` with --by-{unit} on this calibration."
        )
    old = recipe_of(calibration)
    if by_head and old.sharing != "none":
        raise RecipeError(
            "The heads of a layer share their codebooks in this recipe, so they cannot have codes "
            "of their own; give reports of --by-layer, or calibrate with sharing: none."
        )
    usable = choice.usable_codes(codes, {size.dim for size in sizes.values()}, old.gain)
    chosen = choice.allocate(costs, sizes, usable, bits)
    stored = sum(sizes[part].bits(code) for part, code in chosen.items())
    spent = stored / sum(size.channels for size in sizes.values())
    counted = "" if old.gain == "none" else ", gains counted"
    base = old.model_dump(mode="json") | choice.recipe_fields(chosen)
    base |= {
        "name": f"cq-{spent:.3g}b-mixed",
        "description": (
            f"{spent:.4g} {'bit' if spent == 1 else 'bits'} per channel{counted}, by {unit}."
        ),
    }
    recipe = recipe_from(base, {}, origin="the new recipe").model_dump(mode="json")
    even, after = (
        sum(curve.kl(spent) for curve in costs.values()),
        choice.modelled_kl(costs, chosen, sizes),
    )
    counts = {
        kind: Counter(chosen[part].name for part in chosen if part.kind == kind) for kind in KINDS
    }
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    if out is not None:
        with atomic_file(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
        sink.table(
            ["code", "bits", f"{unit}s' keys", f"{unit}s' values"],
            [
                [
                    code.name,
                    f"{code.bits_per_channel:g}",
                    *(str(counts[kind][code.name]) for kind in KINDS),
                ]
                for code in usable
            ],
        )
        sink.text(
            f"{spent:.3f} bits a channel{counted}; KL of all parts alone, summed: {after:.4f} "
            f"expected, {even:.4f} with as many bits for each part."
        )
        sink.text(str(out))
    else:
        sink.raw(text)
    sink.result(
        {"bits_per_channel": spent, "kl_even": even, "kl_expected": after, "recipe": recipe}
    )

"""`cqtool check`: what a calibration costs in quality and saves in bytes, with gates for CI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cqtool.cli import options
from cqtool.cli.output import Output, write_stderr

if TYPE_CHECKING:
    from cqtool import quality

EXAMPLES = (
    "cqtool check demo calibration --compare cq-4c8b,int4 --max-ppl-increase 3% --max-kl 0.05",
    "cqtool check demo calibration --generation passkey,copy --items 10",
)
GATE_MISSED = 3
"""Exit code: everything ran, but the quality is not there."""

COLUMNS = [
    "format",
    "bits",
    "eff. bits",
    "perplexity",
    "increase",
    "KL",
    "top-1",
    "bytes/token",
    "ratio",
]
GENERATION_COLUMNS = ["task", "measure", "format", "items", "score", "difference"]


def check(
    model: options.ModelArgument,
    calibration: options.CalibrationArgument,
    dataset: options.DatasetOption = None,
    dataset_config: options.DatasetConfigOption = None,
    split: options.SplitOption = None,
    text_column: options.TextColumnOption = None,
    windows: Annotated[
        int | None,
        typer.Option("--windows", min=1, help="Evaluation windows.", show_default=False),
    ] = None,
    window_length: Annotated[
        int | None,
        typer.Option("--window-length", min=2, help="Tokens in each.", show_default=False),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="FORMAT",
            help="Also measure: int4, int2, nf4, fp16 ..., a coupled format fitted to the same "
            "samples (cq-4c8b, cq-8c8b:uniform), or another calibration folder. Repeat the option, "
            "or separate with commas.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        Literal["teacher", "decode"],
        typer.Option(
            "--mode",
            help="teacher: one forward pass per window over the quantized cache; "
            "decode: token by token, as generation does.",
        ),
    ] = "teacher",
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            "--max-ppl-increase",
            metavar="X%",
            help="Gate: largest relative increase of perplexity, such as 3% or 0.03.",
            show_default=False,
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl", min=0.0, help="Gate: largest mean KL per token, nats.", show_default=False
        ),
    ] = None,
    min_top1: Annotated[
        str | None,
        typer.Option(
            "--min-top1",
            metavar="X%",
            help="Gate: smallest agreement of the most likely token, such as 90% or 0.9.",
            show_default=False,
        ),
    ] = None,
    generation: Annotated[
        list[str] | None,
        typer.Option(
            "--generation",
            metavar="TASK",
            help="Also answer built-in tasks over the cache: passkey, multi-key, copy, arithmetic, "
            "divergence, or all. Repeat the option, or separate with commas.",
            show_default=False,
        ),
    ] = None,
    items: Annotated[
        int, typer.Option("--items", min=1, help="Items of each task; 20 are minutes on a CPU.")
    ] = 20,
    window: options.WindowOption = None,
    sinks: options.SinksOption = None,
    samples: options.SamplesOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustRemoteCodeFlag = False,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Measure perplexity, KL and top-1 agreement of the quantized cache on held-out text.

    Each figure carries its standard error; cache bytes are measured on the stored tensors. What no
    option says comes from the recipe of the calibration. Exit code 3 when a gate is missed.
    """
    sink = Output(json=json, quiet=quiet)
    from cqtool.recipe import recipe_of, text_overrides

    overrides = text_overrides("evaluation", dataset, dataset_config, split, text_column) | {
        "evaluation.windows": windows,
        "evaluation.window_length": window_length,
        "gates.max_ppl_increase": max_ppl_increase,
        "gates.max_kl": max_kl,
        "gates.min_top1": min_top1,
    }
    recipe = recipe_of(calibration, {key: v for key, v in overrides.items() if v is not None})

    from cqtool import quality
    from cqtool.models.load import open_model

    text, gates = recipe.evaluation, recipe.gates
    settings = quality.CheckSettings(
        dataset=text.dataset,
        config=text.config,
        split=text.split,
        column=text.column,
        text_revision=text.revision,
        windows=text.windows,
        window_length=text.window_length,
        compare=_names(compare),
        mode=mode,
        gates=quality.Gates(
            max_ppl_increase=gates.max_ppl_increase, max_kl=gates.max_kl, min_top1=gates.min_top1
        ),
        samples=samples,
        window=window,
        sinks=sinks,
        generation=_names(generation),
        items=items,
    )
    opened = open_model(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=sink.progress(),
    )
    measured = quality.check(opened, calibration, settings, sink.progress())
    files, report = _draw(calibration, measured), measured.to_json()
    sink.result(report | {"files": files})
    sink.table(COLUMNS, table_rows(report["rows"]))
    checked, text = report["rows"][1], report["evaluation"]
    sink.text(
        f"First {checked['sinks']} and last {checked['window']} tokens in full precision; "
        f"{text['windows']} x {text['window_length']} tokens; ± standard error over windows."
    )
    if report["generation"] is not None:
        sink.table(GENERATION_COLUMNS, generation_rows(report["generation"]["scores"]))
        sink.text(
            "Greedy answers over the cache; ± standard error over items; the difference is to full "
            "precision on the same items."
        )
    for path in files.values():
        sink.text(path)
    if not _print_gates(sink, report["gates"]):
        raise typer.Exit(GATE_MISSED)


def _names(values: list[str] | None) -> tuple[str, ...]:
    """What a repeated option with commas names."""
    return tuple(name for value in values or () for name in value.split(",") if name)


def _draw(calibration: Path, report: quality.QualityReport) -> dict[str, str]:
    """Draw the plot and write the HTML report anew; where everything is."""
    from cqtool.quality import report_path
    from cqtool.report.html import write_report
    from cqtool.report.plots import plot_quality

    path = report_path(calibration, report)
    if path is None:
        return {}
    plot = path.with_suffix(".png")
    plot_quality(report.to_json(), plot)
    written = write_report(calibration)
    return {file.name: str(file) for file in (path, plot, written)}


def table_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of :data:`COLUMNS` for the rows of a quality report."""
    return [
        [
            row.get("label") or row["name"],
            _number(row.get("bits_per_channel"), "{:.2f}"),
            _number(row.get("effective_bits"), "{:.2f}"),
            _measured(row, "perplexity", "{:.3f}"),
            _measured(row, "perplexity_increase", "{:.2%}"),
            _measured(row, "kl", "{:.4f}"),
            _measured(row, "top1", "{:.2%}"),
            _number(row.get("cache_bytes_per_token"), "{:.0f}"),
            _ratio(row),
        ]
        for row in rows
    ]


def generation_rows(scores: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The cells of :data:`GENERATION_COLUMNS`: the formats under each other for every measure."""
    measures = dict.fromkeys((one["task"], one["measure"], one["group"]) for one in scores)
    return [
        [
            one["task"],
            f"{one['measure']}, {one['group']}" if one["group"] else one["measure"],
            one["format"],
            str(one["items"]),
            _measured(one, "score", "{:.3g}"),
            _measured(one, "difference", "{:.3g}"),
        ]
        for measure in measures
        for one in scores
        if (one["task"], one["measure"], one["group"]) == measure
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _measured(row: dict[str, Any], name: str, form: str) -> str:
    value, error = row.get(name), row.get(f"{name}_se")
    if value is None or not error:
        return _number(value, form)
    return f"{form.format(value)} ± {form.format(error)}"


def _ratio(row: dict[str, Any]) -> str:
    part, whole = row.get("cache_bytes_per_token"), row.get("cache_bytes_per_token_full")
    return f"{whole / part:.1f}x" if part and whole else "-"


def _print_gates(sink: Output, gates: list[dict[str, Any]]) -> bool:
    """Print one line per gate, the missed ones on stderr; whether all passed."""
    for gate in gates:
        line = f"{gate['name']}: measured {gate['value']:.4g}, limit {gate['limit']:.4g}"
        if gate["passed"]:
            sink.text(f"gate passed: {line}")
        else:
            write_stderr(line, label="gate missed", style="bold red")
    return all(gate["passed"] for gate in gates)

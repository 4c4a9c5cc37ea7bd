"""`cqtool check`: what a calibration costs in quality and saves in bytes, with gates for CI."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cqtool.cli import options
from cqtool.cli.check_tables import (
    GENERATION_COLUMNS,
    HEAD_COLUMNS,
    LAYER_COLUMNS,
    PAIRED_COLUMNS,
    generation_rows,
    head_rows,
    layer_rows,
    paired_rows,
    quality_table,
)
from cqtool.cli.output import Output, write_stderr

if TYPE_CHECKING:
    from cqtool import quality

EXAMPLES = (
    "cqtool check demo calibration --compare cq-4c8b,int4 --max-ppl-increase 3% --max-kl 0.05",
    "cqtool check demo calibration --compare all --against other-calibration --context 32768",
    "cqtool check demo calibration --generation passkey,copy --items 10",
    "cqtool check Qwen/Qwen3-0.6B calibration --tasks hellaswag,gsm8k --items 200",
)
GATE_MISSED = 3
"""Exit code: everything ran, but the quality is not there."""


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
            help="Also measure: a format by name (int4, nf4, kivi-2 ...; a wrong name lists them), "
            "a coupled one fitted to the same samples (cq-4c8b, cq-8c8b:uniform, cq-8c8b:paper), "
            "another calibration folder, or all: every format that can be made here. Repeat the "
            "option, or separate with commas.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="ARTIFACT",
            help="Another calibration or artifact of the model (a folder or a Hub id), to be "
            "compared window by window. Repeat the option, or separate with commas.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        Literal["teacher", "prefill", "decode"],
        typer.Option(
            "--mode",
            help="teacher: one forward pass per window over the quantized cache; "
            "prefill: the same, each token as the first after a prompt; "
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
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="TASK",
            help="Also run tasks of lm-evaluation-harness over the cache, by its names "
            "(needs the extra `tasks`). Repeat the option, or separate with commas.",
            show_default=False,
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option(
            "--task-folder",
            metavar="DIR",
            help="Task files (*.yaml) of lm-evaluation-harness beside its own.",
            show_default=False,
        ),
    ] = None,
    items: Annotated[
        int | None,
        typer.Option(
            "--items",
            min=1,
            help="Items of each task; without it 20 of the built-in ones (minutes on a CPU), and "
            "all of those of --tasks.",
            show_default=False,
        ),
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option(
            "--by-layer",
            help="Also measure each layer's keys and values alone, all others exact: where bits "
            "matter. Two more passes over the text for each layer.",
        ),
    ] = False,
    by_head: Annotated[
        bool,
        typer.Option(
            "--by-head",
            help="The same of the keys and values of each key/value head. Two more passes over the "
            "text for each head of each layer.",
        ),
    ] = False,
    window: options.WindowOption = None,
    sinks: options.SinksOption = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            metavar="TOKENS",
            help="Also state the bits, all counted, of a context of this length (computed); pass "
            "keys and the prompts of RULER get as long.",
            show_default=False,
        ),
    ] = None,
    samples: options.SamplesOption = None,
    allow_other_base: options.AllowOtherBaseFlag = False,
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

    settings = replace(
        quality.CheckSettings.of_recipe(recipe),
        compare=_names(compare),
        against=_names(against),
        mode=mode,
        samples=samples,
        window=window,
        sinks=sinks,
        by_layer=by_layer,
        by_head=by_head,
        context=context,
        generation=_names(generation),
        tasks=_names(tasks),
        task_folder=task_folder,
        items=items,
        allow_other_base=allow_other_base,
    )
    opened = open_model(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=sink.progress(),
    )
    try:
        measured = quality.check(opened, calibration, settings, sink.progress())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "What is finished stays; run the same command again to continue."
        ) from None
    from cqtool.report.files import draw_quality

    files, report = draw_quality(calibration, measured), measured.to_json()
    sink.result(report | {"files": files})
    _print_tables(sink, measured, report, context)
    for path in files.values():
        sink.text(path)
    if not _print_gates(sink, report["gates"]):
        raise typer.Exit(GATE_MISSED)


def _print_tables(
    sink: Output, measured: quality.QualityReport, report: dict[str, Any], context: int | None
) -> None:
    rows, text = report["rows"], report["evaluation"]
    sink.table(*quality_table(rows, context))
    said = [
        f"First {rows[1]['sinks']} and last {rows[1]['window']} tokens in full precision; "
        f"{text['windows']} x {text['window_length']} tokens; ± standard error over windows."
    ]
    if context is not None:
        said.append(f"Bits at {context} tokens are computed, everything counted.")
    sink.text(" ".join(said))
    for one in report["paired"]:
        if one["other"] in report["against"]:
            sink.text(one["sentence"])
    if len(rows) > 2:
        sink.table(PAIRED_COLUMNS, paired_rows(report["paired"]))
        sink.text(
            f"{rows[1]['label']} minus each other format, paired by window; below 0 it is better."
        )
    if report["by_layer"]:
        sink.table(LAYER_COLUMNS, layer_rows(report["by_layer"]))
        sink.text("Only these keys or values coded, all others exact; the costliest first.")
    if report["by_head"]:
        shown = head_rows(report["by_head"])
        sink.table(HEAD_COLUMNS, shown)
        sink.text(
            f"Only these keys or values of one head coded, all others exact; the {len(shown)} "
            f"costliest of {len(report['by_head'])}."
        )
    for part, said_below in (
        (measured.generation, "Greedy answers over the cache"),
        (measured.tasks, "Tasks of lm-evaluation-harness over the cache"),
    ):
        if part is not None:
            sink.table(GENERATION_COLUMNS, generation_rows(part.scores))
            sink.text(
                f"{said_below}; ± standard error over items; the difference is to full precision "
                "on the same items."
            )


def _names(values: list[str] | None) -> tuple[str, ...]:
    """What a repeated option with commas names."""
    return tuple(name for value in values or () for name in value.split(",") if name)


def _print_gates(sink: Output, gates: list[dict[str, Any]]) -> bool:
    """Print one line per gate, the missed ones on stderr; whether all passed."""
    for gate in gates:
        line = f"{gate['name']}: measured {gate['value']:.4g}, limit {gate['limit']:.4g}"
        if gate["passed"]:
            sink.text(f"gate passed: {line}")
        else:
            write_stderr(line, label="gate missed", style="bold red")
    return all(gate["passed"] for gate in gates)

"""`cqtool bench`: kernel times, tokens a second and peak memory against 16-bit caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cqtool.cli import options
from cqtool.cli.output import Output

EXAMPLES = (
    "cqtool bench --suite targets --plot decode.png",
    "cqtool bench llama-3.1-8b --part decode --batch 1,16 --tokens 8k,128k",
    "cqtool bench llama-3.1-8b --part decode --format cq-8c8b --grouping contiguous,pairs",
    "cqtool bench qwen3-8b artifact --part decode --format cq-8c8b",
    "cqtool bench qwen3-8b artifact --part end-to-end --largest-batch --json",
    "cqtool bench qwen3-8b calibration --part decode,end-to-end --keep",
    "cqtool bench llama-3.2-1b --part tune --repeats 10",
    "cqtool bench tiny --part end-to-end --batch 2 --prompt-tokens 64 --new-tokens 16",
)


def bench(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="SHAPE_OR_MODEL",
            help="A shape such as llama-2-7b, llama-3.1-8b or qwen3-8b, or a model folder or Hub "
            "id, of which only the configuration is read. Weights are random. Without it, the "
            "suite `targets` runs.",
            show_default=False,
        ),
    ] = None,
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="ARTIFACT",
            help="An artifact folder, a calibration folder, or the Hub id of an artifact, whose "
            "codebooks to use instead of random ones.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        Literal["targets", "generation"] | None,
        typer.Option(
            "--suite",
            help="Fixed cases: `targets` times kernels, `generation` whole models at their "
            "largest batches.",
            show_default=False,
        ),
    ] = None,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            metavar="PART",
            help="Only decode, encode or end-to-end; or kmeans, the engines that fit a layer's "
            "codebooks; or tune, a step of end-to-end tuning. Repeat the option, or separate with "
            "commas.",
            show_default=False,
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="Formats such as cq-8c8b or k-cq-4c8b-v-cq-8c8b, with random codebooks. By "
            "default cq-8c8b,cq-8c10b,cq-4c8b,cq-2c8b for kernels, and cq-8c8b for all else; with "
            "ARTIFACT none, else beside it.",
            show_default=False,
        ),
    ] = None,
    groupings: Annotated[
        list[str] | None,
        typer.Option(
            "--grouping",
            metavar="GROUPING",
            help="Which channels random codebooks group: contiguous (the default), correlation, "
            "pairs or balanced-pairs. Each format is measured with each of them.",
            show_default=False,
        ),
    ] = None,
    batches: Annotated[
        list[str] | None,
        typer.Option(
            "--batch",
            metavar="N",
            help="Rows, by default 1,16; sequences of a step when tuning, by default 8.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens",
            metavar="N",
            help="Cached tokens of each row, for the decode kernels, or samples of a codebook, for "
            "kmeans; by default 8k,32k.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            "--prompt-tokens",
            min=1,
            help="Prompt of each row, when encoding and end to end; a sequence, when tuning.",
        ),
    ] = 1024,
    new_tokens: Annotated[
        int,
        typer.Option("--new-tokens", min=2, help="Tokens to generate, end to end."),
    ] = 128,
    caches: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            metavar="CACHE",
            help="Generate with dynamic, static, static-compiled (transformers compiles the step) "
            "or cq; by default dynamic,static,cq.",
            show_default=False,
        ),
    ] = None,
    largest_batch: Annotated[
        bool,
        typer.Option(
            "--largest-batch", help="End to end, find the largest batch that each cache fits."
        ),
    ] = False,
    most: Annotated[
        int,
        typer.Option("--most", min=1, help="With --largest-batch, try no larger one."),
    ] = 8192,
    window: options.WindowOption = None,
    sinks: options.SinksOption = None,
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(
            "--dtype",
            help="Precision of the model and of 16-bit caches; by default float16, bfloat16 when "
            "tuning, and float32 on a CPU.",
            show_default=False,
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    repeats: Annotated[
        int,
        typer.Option("--repeats", min=2, help="Measurements of each kernel, or steps of tuning."),
    ] = 30,
    seed: options.SeedOption = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="PNG", help="Draw the figure there.", show_default=False),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Keep decode and end-to-end in reports/speed.json of ARTIFACT, a calibration "
            "folder: `cqtool export` puts them on the model card.",
        ),
    ] = False,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Time kernels and whole models against every 16-bit rival on this machine, in the same run.

    Weights and text are random, so nothing is downloaded. A kernel is timed only after its result
    has agreed with float64. Kernel times need a GPU; all else runs on a CPU too.
    """
    sink = Output(json=json, quiet=quiet)
    from cqtool.bench.settings import make_settings

    settings = make_settings(
        target=target,
        artifact=artifact,
        suite=suite,
        parts=parts,
        formats=formats,
        groupings=groupings,
        batches=batches,
        tokens=tokens,
        prompt=prompt_tokens,
        new=new_tokens,
        caches=caches,
        largest=largest_batch,
        most=most,
        window=window,
        sinks=sinks,
        dtype=dtype,
        device=device,
        repeats=repeats,
        seed=seed,
    )

    from cqtool.bench.kept import Keeper
    from cqtool.bench.run import run
    from cqtool.bench.show import draw, show

    keeper = Keeper.of(settings) if keep else None
    report = run(settings, sink.progress())
    show(report, sink)
    # What was measured first: to draw or to keep it may fail.
    sink.result(report)
    if keeper is not None:
        kept = keeper.keep(report)
        if kept is None:
            sink.warn("Nothing was measured that a model card shows, so nothing is kept.")
        else:
            sink.text(f"Kept in {kept}; `cqtool export` puts it on the model card.")
    if plot is not None:
        draw(report, plot, sink)

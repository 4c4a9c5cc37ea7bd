"""Arguments and options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_TEXT = (
    "Text to use: a Hub dataset id, a .txt, .jsonl or .parquet file, a folder of such, `demo`, or "
    "`auto`."
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hub id, a local model folder or .gguf file, or `demo` for the built-in demo model.",
        show_default=False,
    ),
]
CalibrationArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CALIBRATION",
        help="The folder that `cqtool calibrate` wrote.",
        show_default=False,
    ),
]
ArtifactArgument = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT",
        help="An artifact folder, a calibration folder, or the Hub id of an artifact.",
        show_default=False,
    ),
]

JsonFlag = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout instead of text."),
]
QuietFlag = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print no text and no progress; errors remain."),
]

DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:1; auto takes a GPU when there is one.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Precision of the model: float32, bfloat16, float16, or auto, which is float32 on a "
        "CPU, else the checkpoint's own.",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REV",
        help="Branch, tag or commit of the model on the Hub.",
        show_default=False,
    ),
]
TrustRemoteCodeFlag = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model."),
]
AllowOtherBaseFlag = Annotated[
    bool,
    typer.Option(
        "--allow-other-base",
        help="Accept a model whose weights differ from the base model's: a fine-tune of it.",
    ),
]

DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="TEXT",
        help=_TEXT,
        show_default=False,
    ),
]
DatasetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="TEXT",
        # No commas, which the name of a file may have.
        help=f"{_TEXT} Repeat the option to mix several in equal parts.",
        show_default=False,
    ),
]
DatasetConfigOption = Annotated[
    str | None,
    typer.Option(
        "--dataset-config",
        metavar="NAME",
        help="Configuration of the Hub dataset.",
        show_default=False,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split", metavar="NAME", help="Split of the Hub dataset or demo text.", show_default=False
    ),
]
TextColumnOption = Annotated[
    str | None,
    typer.Option(
        "--text-column",
        metavar="NAME",
        help="Column or field that holds the text.",
        show_default=False,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed", metavar="N", min=0, help="Seed of everything random.", show_default=False
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        min=0,
        help="How many of the newest tokens stay in full precision.",
        show_default=False,
    ),
]
SinksOption = Annotated[
    int | None,
    typer.Option(
        "--sinks",
        min=0,
        help="How many of the first tokens stay in full precision.",
        show_default=False,
    ),
]
SamplesOption = Annotated[
    Path | None,
    typer.Option(
        "--samples",
        metavar="DIR",
        help="A calibration folder (or its samples/) whose stored activations are used again.",
        show_default=False,
    ),
]
ResumeFlag = Annotated[
    bool, typer.Option("--resume", help="Continue a run that was stopped, from --out.")
]
ForceFlag = Annotated[
    bool, typer.Option("--force", help="Replace the calibration that stands at --out.")
]

PrivateOption = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Visibility of a repository that is created, by default what its owner has set. One "
        "that exists must have it already.",
        show_default=False,
    ),
]
CreatePrFlag = Annotated[
    bool, typer.Option("--create-pr", help="Propose the commit as a pull request instead.")
]
TagOption = Annotated[
    str | None,
    typer.Option(
        "--tag",
        metavar="NAME",
        help="Name to give the commit once it is verified; a name that is taken is not moved.",
        show_default=False,
    ),
]
OverwriteFlag = Annotated[
    bool, typer.Option("--overwrite", help="Replace also files that cqtool did not write.")
]
KernelsOption = Annotated[
    bool | None,
    typer.Option(
        "--kernels/--no-kernels",
        help="Ship the runtime with compiled CUDA kernels, or an artifact without any code. By "
        "default kernels are compiled where NVRTC is installed; no GPU is needed.",
        show_default=False,
    ),
]

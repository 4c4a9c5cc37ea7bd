"""`cqtool analyze-entropy`: how many bits coupled channels share."""

from __future__ import annotations

import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cqtool.cli import options
from cqtool.cli.output import Output
from cqtool.errors import RecipeError, SampleError
from cqtool.files import atomic_dir, explain_os_errors

if TYPE_CHECKING:
    from cqtool.entropy import EntropyReport
    from cqtool.sampling import SampleStore

EXAMPLES = (
    "cqtool analyze-entropy demo --samples calibration",
    "cqtool analyze-entropy Qwen/Qwen3-0.6B --sequences 128 --out entropy --per-layer",
)


def analyze_entropy(
    model: options.ModelArgument,
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples",
            metavar="DIR",
            help="A calibration folder (or its samples/) whose stored activations are used; a "
            "folder that does not exist is filled and kept. Without it, samples are discarded.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where entropy.json and the plots go; by default reports/ of the calibration "
            "folder, otherwise entropy-MODEL.",
            show_default=False,
        ),
    ] = None,
    bins: Annotated[int, typer.Option("--bins", min=2, help="Equal-width bins per channel.")] = 16,
    max_coupled: Annotated[
        int, typer.Option("--max-coupled", min=1, help="Couple 1 to this many channels.")
    ] = 8,
    max_groups: Annotated[
        int,
        typer.Option(
            "--max-groups", min=1, help="Groups measured per layer and kind, evenly spread."
        ),
    ] = 64,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Print a table of every layer as well.")
    ] = False,
    dataset: options.DatasetOption = None,
    dataset_config: options.DatasetConfigOption = None,
    split: options.SplitOption = None,
    text_column: options.TextColumnOption = None,
    sequences: Annotated[
        int | None,
        typer.Option(
            "--sequences", min=1, help="Sequences to sample; 16 by default.", show_default=False
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            "--sequence-length", min=2, help="Tokens in each; 2048 by default.", show_default=False
        ),
    ] = None,
    seed: options.SeedOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustRemoteCodeFlag = False,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Set the joint entropy of 1 to 8 coupled channels against the sum of their marginals.

    The estimator is the paper's: equal-width bins between a channel's smallest and largest sample.
    Where there are fewer samples than cells the joint entropy is underestimated, and marked so.
    """
    sink = Output(json=json, quiet=quiet)
    text = {
        "dataset": dataset,
        "config": dataset_config,
        "split": split,
        "column": text_column,
        "sequences": sequences,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    given = {name: value for name, value in text.items() if value is not None}
    place = {
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    calibration = _calibration_folder(samples)
    folder = out or (calibration / "reports" if calibration else _default_folder(model))

    from cqtool.entropy import analyze
    from cqtool.entropy.estimators import cell_count

    cell_count(bins, max_coupled)  # an impossible wish ends here, not after the sampling
    with ExitStack() as stack:
        store = _stored(samples, model, given)
        if store is None and samples is not None:
            store = _sample_and_keep(samples, model, given, place, sink)
        elif store is None:
            # Beside the results: /tmp may be too small, or in memory.
            with explain_os_errors(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".samples-")
            store = _sample(Path(stack.enter_context(scratch)), model, given, place, sink)
        report = analyze(
            store,
            max_coupled=max_coupled,
            bins=bins,
            max_groups=max_groups,
            progress=sink.progress(),
        )
    from cqtool.report.files import write_entropy

    files = write_entropy(report, folder)
    if calibration is not None and folder == calibration / "reports":
        from cqtool.report.html import write_report

        files["report.html"] = write_report(calibration)
    _print(sink, report, files, per_layer=per_layer)


def _calibration_folder(samples: Path | None) -> Path | None:
    """The calibration folder that `samples` names or lies in."""
    if samples is None:
        return None
    for folder in (samples, samples.absolute().parent):
        if (folder / "cq_config.json").is_file() and (folder / "samples").is_dir():
            return folder
    return None


def _default_folder(model: str) -> Path:
    name = Path(model).name if Path(model).is_dir() else model
    return Path("entropy-" + re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-."))


def _stored(samples: Path | None, model: str, given: dict[str, Any]) -> SampleStore | None:
    """The store at `samples`, or None where nothing stands yet."""
    if samples is None or not samples.exists():
        return None
    from cqtool.sampling import SampleStore

    store = SampleStore.open(samples)
    from cqtool.models.load import base_id

    if store.meta["model"] != base_id(model):
        raise SampleError(
            f"The samples in {samples} were taken from {store.meta['model']}, not {model}; name "
            "that model, or another folder with --samples."
        )
    if given:
        names = ", ".join(sorted(given))
        raise RecipeError(
            f"{samples} already holds samples, so a choice of text ({names}) has no effect; leave "
            "it out, or name a new folder with --samples."
        )
    return store


def _sample_and_keep(
    samples: Path, model: str, given: dict[str, Any], place: dict[str, Any], sink: Output
) -> SampleStore:
    from cqtool.sampling import SampleStore

    with atomic_dir(samples) as temporary:
        _sample(temporary, model, given, place, sink)
    return SampleStore.open(samples)


def _sample(
    path: Path, model: str, given: dict[str, Any], place: dict[str, Any], sink: Output
) -> SampleStore:
    from cqtool.models.load import open_model
    from cqtool.models.probe import read_geometry
    from cqtool.recipe_texts import CalibrationText
    from cqtool.sampling import calibration_windows, collect

    text = CalibrationText(**given)
    opened = open_model(model, **place, progress=sink.progress())
    windows = calibration_windows(opened, text)
    geometry = read_geometry(opened.model)
    return collect(opened, geometry, windows, path, gradients=False, progress=sink.progress())


def _print(sink: Output, report: EntropyReport, files: dict[str, Path], *, per_layer: bool) -> None:
    sink.result(report.to_json() | {"files": {name: str(path) for name, path in files.items()}})
    sink.table(
        ["kind", "channels", "joint (bits)", "marginal sum (bits)", "saving", "sample"],
        [
            [
                f"{entry.kind}s",
                str(entry.channels),
                f"{entry.joint:.2f} ± {entry.joint_std:.2f}",
                f"{entry.marginal_sum:.2f} ± {entry.marginal_sum_std:.2f}",
                f"{entry.saving:.1%}",
                "too small" if entry.small_sample else "ok",
            ]
            for entry in report.summary
        ],
        title=f"{report.layers} layers, {report.tokens} tokens, {report.bins} bins per channel; "
        "± standard deviation over groups and layers",
    )
    if per_layer:
        _print_layers(sink, report)
    for kind in ("key", "value"):
        found = [c.mean_absolute for c in report.correlations if c.kind == kind]
        defined = [value for value in found if value is not None]
        if defined:
            mean = sum(defined) / len(defined)
            sink.text(f"Mean absolute correlation between channels of a head, {kind}s: {mean:.3f}")
    if any(entry.small_sample for entry in report.summary):
        sink.text(
            f"too small: fewer tokens than cells, or most cells hold one token; the joint entropy "
            f"is underestimated there and never exceeds log2(tokens) = {report.ceiling:.1f} bits."
        )
    for path in files.values():
        sink.text(str(path))


def _print_layers(sink: Output, report: EntropyReport) -> None:
    """One row per layer and kind: joint entropy / sum of marginals for each c."""
    channels = sorted({entry.channels for entry in report.entries})
    rows: dict[tuple[int | None, str], list[str]] = {}
    for entry in report.entries:
        row = rows.setdefault((entry.layer, entry.kind), [""] * len(channels))
        mark = "*" if entry.small_sample else ""
        row[channels.index(entry.channels)] = f"{entry.joint:.1f}/{entry.marginal_sum:.1f}{mark}"
    sink.table(
        ["layer", "kind", *(f"c={c}" for c in channels)],
        [[str(layer), f"{kind}s", *cells] for (layer, kind), cells in rows.items()],
        title="Joint entropy / sum of marginals (bits); * sample too small",
        right=set(range(2, 2 + len(channels))),
    )

"""The card's commands: what measures an artifact again, and what makes its codebooks again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from cqtool.artifact.card_content import LOCAL_MODEL, CardContent
from cqtool.artifact.markdown import one_line
from cqtool.artifact.measured import QualityReport, QualityRow
from cqtool.artifact.names import public_name
from cqtool.artifact.speed import SpeedReport
from cqtool.layout.config import text_parts
from cqtool.models.names import is_hub_id


def check_command(content: CardContent, quality: QualityReport, own: QualityRow) -> str:
    """The `cqtool check` that measured `quality`, with every choice spelled out."""
    # Rows of other calibrations are called after their folders, which readers do not have.
    rivals = [row for row in quality.rows[1:] if row is not own and not row.label.endswith(")")]
    fitted = any(row.fitted for row in rivals)
    generation, tasks = quality.generation, quality.tasks
    # Both kinds of tasks share --items. Without it the harness has None, the built-in ones 20.
    asked = tasks or generation
    return _command(
        f"cqtool check {content.model_argument} artifact",
        *_text_options(quality.evaluation),
        ("--windows", quality.windows),
        ("--window-length", quality.window_length),
        ("--context", quality.context if quality.context != quality.window_length else None),
        ("--window", own.window),
        ("--sinks", own.sinks),
        ("--mode", quality.mode),
        ("--dtype", quality.dtype),
        ("--compare", ",".join(dict.fromkeys(map(_compare_name, rivals))) or None),
        ("--generation", ",".join(generation.tasks) if generation else None),
        ("--tasks", ",".join(tasks.tasks) if tasks else None),
        ("--items", asked.items if asked else None),
        # Some other formats are fitted to the samples that a calibration keeps.
        ("--samples", "calibration" if fitted else None),
    )


def _compare_name(row: QualityRow) -> str:
    """What `--compare` calls a row."""
    if row.label == f"{row.name} paper":
        return f"{row.name}:paper"
    return f"{row.name}:{row.objective}" if row.objective else row.name


def speed_command(content: CardContent, speed: SpeedReport) -> str:
    """The `cqtool bench` that measured `speed`: every row of it, and nothing else."""
    base, decode, texts = content.config.base_model.id, speed.decode, speed.generation
    model = speed.target or (base if is_hub_id(base) else LOCAL_MODEL)
    rows = () if texts is None else texts.rows
    batches = [row.batch for row in decode]
    if texts is not None and not texts.largest:
        batches += [row.batch for row in texts.rows]
    parts = ["decode"] * bool(decode) + ["end-to-end"] * bool(rows)
    return _command(
        f"cqtool bench {shlex.quote(model)} artifact",
        ("--part", ",".join(parts)),
        ("--batch", _numbers(batches)),
        ("--tokens", _numbers(row.tokens for row in decode)),
        ("--repeats", speed.repeats if decode else None),
        ("--prompt-tokens", texts.prompt if texts else None),
        ("--new-tokens", texts.new if texts else None),
        ("--cache", ",".join(dict.fromkeys(row.cache for row in rows)) or None),
        *([("--largest-batch --most", texts.most)] if texts and texts.largest else []),
        ("--window", texts.window if texts else None),
        ("--sinks", texts.sinks if texts else None),
        ("--dtype", speed.dtype),
        ("--device", speed.device_type),
        ("--seed", speed.seed),
    )


def _numbers(values: Iterable[int]) -> str | None:
    return ",".join(map(str, dict.fromkeys(values))) or None


def samples_command(content: CardContent) -> str:
    """The `cqtool calibrate` that collects the samples again to which other formats were fitted."""
    return f"cqtool calibrate {content.model_argument} --recipe artifact --out calibration"


def rebuild_command(content: CardContent) -> str:
    """The command that makes the codebooks again and compares the bytes."""
    base = content.config.base_model.id
    model = "demo" if content.is_demo else None if is_hub_id(base) else LOCAL_MODEL
    return f"cqtool verify {content.repo} --rebuild" + (f" --model {model}" if model else "")


def needed_files(content: CardContent) -> list[str]:
    """Local files of whoever calibrated, by name, without which nothing can be made again."""
    config = content.config
    texts = [part.get("dataset") for part in text_parts(config.calibration.dataset)]
    grouping = config.recipe.get("grouping")
    groups = grouping.get("file") if isinstance(grouping, dict) else None
    local = [text for text in texts if isinstance(text, str) and not _is_public(text)]
    return [public_name(path) for path in [*local, groups] if isinstance(path, str)]


def _command(start: str, *options: tuple[str, object]) -> str:
    """A command for a shell, one option a line; options that are None are left out."""
    words = [
        f"{name} {shlex.quote(one_line(value))}" for name, value in options if value is not None
    ]
    return " \\\n    ".join([start, *words])


def _text_options(source: Mapping[str, Any]) -> list[tuple[str, object]]:
    """The options that choose a text source."""
    return [
        ("--dataset", _dataset_argument(source.get("dataset"))),
        ("--dataset-config", source.get("config")),
        ("--split", source.get("split")),
        ("--text-column", source.get("column")),
    ]


def _dataset_argument(name: object) -> str | None:
    if not isinstance(name, str):
        return None
    return name if _is_public(name) else f"PATH/TO/{public_name(name)}"


def _is_public(text: str) -> bool:
    return is_hub_id(text) or text == "demo"

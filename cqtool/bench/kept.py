"""What of a bench stays with the codebooks that it measured: ``reports/speed.json``.

`cqtool export` puts it on the model card. Only what the card shows is kept, so that a reader of an
artifact finds every figure there and nothing about formats that are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqtool.artifact.speed import FORMAT_VERSION, MAX_ROWS, PACKAGES, SPEED_NAME, check_speed
from cqtool.bench.settings import DEFAULT_BATCHES, BenchSettings, Part
from cqtool.errors import EnvironmentProblem, RecipeError
from cqtool.files import sha256_file, write_json
from cqtool.layout.codebook_file import check_codebooks
from cqtool.layout.config import CODEBOOKS_NAME, REPORTS_NAME, read_config
from cqtool.manifest import MANIFEST_NAME

_KEPT: tuple[Part, ...] = ("decode", "end-to-end")
_VERSIONS = frozenset({*PACKAGES, "python", "kernels_sha256"})
"""Not the commit: in a CI job it may be that of a repository of the user's own."""
_REMEDY = "drop --keep, or give a calibration folder"


@dataclass(frozen=True)
class Keeper:
    """Where a bench is kept, made before anything long begins.

    Attributes:
        folder: the calibration folder.
        codebooks_sha256: of its codebooks then.
        window: newest tokens that its cache keeps in full precision, end to end.
        sinks: first tokens that it keeps so.
        target: the shape or Hub id that is measured, None for a local folder, which means nothing
            to others.
    """

    folder: Path
    codebooks_sha256: str
    window: int
    sinks: int
    target: str | None

    @classmethod
    def of(cls, settings: BenchSettings) -> Keeper:
        """The keeper for what `settings` measure.

        Raises:
            RecipeError: that is no calibration folder, nothing that a card shows, or more than it
                has room for.
            ArtifactError: the calibration is damaged.
            EnvironmentProblem: the folder cannot be written.
        """
        if settings.artifact is None or settings.target is None:
            raise RecipeError(f"--keep keeps a bench with the codebooks it measured; {_REMEDY}.")
        if settings.formats:
            raise RecipeError(
                "--keep keeps what is measured of the artifact alone; leave out --format."
            )
        folder = Path(settings.artifact)
        if not folder.is_dir():
            raise RecipeError(
                f"{folder} is no folder here, so nothing can be kept in it; {_REMEDY}."
            )
        if (folder / MANIFEST_NAME).exists():
            raise RecipeError(
                f"{folder} is an artifact, whose digests cover every file; {_REMEDY}, and export "
                "that again."
            )
        if not set(settings.chosen_parts) & set(_KEPT):
            raise RecipeError(
                f"--keep is about the parts {' and '.join(_KEPT)}; add one to --part."
            )
        config = read_config(folder)
        check_codebooks(folder, config)
        cache = config.cache
        batches = len(settings.batches or DEFAULT_BATCHES)
        layers = enumerate(config.geometry.layers)
        codes = {own for index, layer in layers for own in cache.parts(index, layer.kv_heads)}
        decode = "decode" in settings.chosen_parts
        rows = batches * max(
            len(settings.tokens) * (len(codes) + bool(cache.layers)) * decode,
            len(settings.caches) * ("end-to-end" in settings.chosen_parts),
        )
        if rows > MAX_ROWS:
            raise RecipeError(
                f"A model card has room for {MAX_ROWS} rows; measure fewer of --batch and --tokens."
            )
        reports = folder / REPORTS_NAME
        where = reports if reports.exists() else folder
        if not where.is_dir() or not os.access(where, os.W_OK | os.X_OK):
            raise EnvironmentProblem(
                f"{where} is no folder that can be written; make it one, or drop --keep."
            )
        return cls(
            folder,
            sha256_file(folder / CODEBOOKS_NAME),
            cache.window if settings.window is None else settings.window,
            cache.sinks if settings.sinks is None else settings.sinks,
            None if Path(settings.target).is_dir() else settings.target,
        )

    def keep(self, report: dict[str, Any]) -> Path | None:
        """Write ``reports/speed.json``, in the place of an earlier one.

        Args:
            report: of :func:`cqtool.bench.run.run`.

        Returns:
            The file; None where nothing was measured that it could hold, and an earlier one stays.

        Raises:
            ArtifactError: the export would refuse it, as where the codebooks changed meanwhile.
            EnvironmentProblem: the file cannot be written.
        """
        value = self._to_json(report)
        if not value["decode"] and value["end_to_end"] is None:
            return None
        path = self.folder / REPORTS_NAME / SPEED_NAME
        # What the export would refuse must not take an earlier file's place.
        check_speed(value, path, self.folder)
        write_json(path, value)
        return path

    def _to_json(self, report: dict[str, Any]) -> dict[str, Any]:
        settings = report["settings"]
        return {
            "format_version": FORMAT_VERSION,
            "codebooks_sha256": self.codebooks_sha256,
            "target": self.target,
            "device": report["device"],
            "versions": {
                name: version for name, version in report["versions"].items() if name in _VERSIONS
            },
            "dtype": settings["dtype"],
            "seed": settings["seed"],
            "repeats": settings["repeats"],
            "decode": [row for found in report["decode"] for row in _decode(found)],
            "end_to_end": self._end_to_end(report["end_to_end"], settings["most"]),
        }

    def _end_to_end(self, found: Sequence[dict[str, Any]], most: int) -> dict[str, Any] | None:
        # A shape has one kind of texts; only suites, which measure no artifact, have several.
        for texts in found:
            if any(row["cache"] == "cq" for row in texts["rows"]):
                return {
                    "prompt": texts["prompt"],
                    "new": texts["new"],
                    "largest": texts["largest"],
                    "most": most,
                    "window": self.window,
                    "sinks": self.sinks,
                    "rows": [_text_row(row) for row in texts["rows"]],
                }
        return None


def _decode(found: dict[str, Any]) -> list[dict[str, Any]]:
    case, best = found["case"], found["best_16bit"]
    rival = None
    if best is not None:
        # A rival gets the better of its two times, as in the bench's own speedup.
        time = min(best["time"], best["again"], key=lambda spread: float(spread["median"]))
        rival = {"name": best["name"], "time": time, "cache_bytes": case["bytes_16bit"]}
    return [
        {
            "batch": case["batch"],
            "tokens": case["tokens"],
            "format": row["format"],
            "time": row["time"],
            "cache_bytes": row["cache_bytes"],
            "rival": rival,
        }
        for row in found["kernels"]
        if row["name"] == "cqtool"
    ]


def _text_row(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("cache", "format", "implementation", "batch", "cache_bytes")
    return {name: row[name] for name in kept} | {"time": row["total"]}

"""reports/speed.json: what `cqtool bench --keep` measured, read for the model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cqtool.errors import ArtifactError
from cqtool.files import sha256_file
from cqtool.layout.config import CODEBOOKS_NAME, REPORTS_NAME
from cqtool.layout.fields import Fields
from cqtool.models.names import is_hub_id
from cqtool.strictjson import read_object

SPEED_NAME = "speed.json"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 20
"""Many times what a bench of :data:`MAX_ROWS` rows writes."""
MAX_ROWS = 64
"""Lines of each table: beyond, nobody reads a card."""

PACKAGES = ("cqtool", "torch", "cuda", "transformers", "flashinfer-python", "flash-attn",
            "flash-attn-3", "triton")  # fmt: skip
"""What of ``versions`` decides a speed."""

_DTYPES = ("float16", "bfloat16", "float32")
_MOST_TEXT = 120
_SECONDS = (1e-9, 1e6)
"""Whatever is timed takes longer than the first, and less than the second."""

_REMEDY = "Run `cqtool bench` with --keep again, or delete the file."


@dataclass(frozen=True)
class Timing:
    """Seconds over `repeats` measurements: their median, and how far their quartiles lie apart."""

    median: float
    iqr: float
    repeats: int


@dataclass(frozen=True)
class Rival:
    """The fastest 16-bit attention on the same load in the same run, and the bytes it reads."""

    name: str
    time: Timing
    cache_bytes: int


@dataclass(frozen=True)
class DecodeRow:
    """Attention of one layer in one decode step, by cqtool's kernel over codes.

    Attributes:
        batch: rows.
        tokens: cached tokens of each row.
        format: name of the layer's codes.
        time: of the kernel.
        cache_bytes: of the codes.
        rival: None where no 16-bit attention ran.
    """

    batch: int
    tokens: int
    format: str
    time: Timing
    cache_bytes: int
    rival: Rival | None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the rival, None without one."""
        return None if self.rival is None else self.rival.time.median / self.time.median


@dataclass(frozen=True)
class GenerationRow:
    """Whole texts, prefill included, over one kind of cache.

    Attributes:
        cache: the kind, such as ``dynamic``; ``cq`` for the artifact's own.
        format: what it stores, such as ``float16``.
        implementation: how a cache of codes attended: ``fused`` by kernels, ``reference`` in plain
            torch, or how many layers did which; None for other caches.
        time: of all texts.
        cache_bytes: held in the end.
    """

    cache: str
    format: str
    implementation: str | None
    batch: int
    time: Timing
    cache_bytes: int

    @property
    def own(self) -> bool:
        """Whether the cache is that of the artifact."""
        return self.cache == "cq"


@dataclass(frozen=True)
class Generation:
    """Texts generated from prompts of `prompt` tokens, `new` tokens each.

    Attributes:
        largest: whether each cache had the largest batch that fitted, at most `most`.
        window: newest tokens kept in the model's dtype by the artifact's cache.
        sinks: first tokens kept so.
    """

    prompt: int
    new: int
    largest: bool
    most: int
    window: int
    sinks: int
    rows: tuple[GenerationRow, ...]

    def tokens_per_second(self, row: GenerationRow) -> float:
        """New tokens of all texts of `row`, by its median."""
        return row.batch * self.new / row.time.median

    def speedup(self, row: GenerationRow) -> float | None:
        """Over the fastest cache without codes, of the same batch or of any where each has its
        largest; None without one."""
        rivals = [
            self.tokens_per_second(one)
            for one in self.rows
            if not one.own and (self.largest or one.batch == row.batch)
        ]
        return self.tokens_per_second(row) / max(rivals) if rivals else None


@dataclass(frozen=True)
class SpeedReport:
    """``speed.json``, checked; it has rows of at least one of the two kinds.

    Attributes:
        target: the shape or Hub id that was measured, None for a local folder.
        device_type: ``cpu`` or ``cuda``.
        device_name: as the driver or the system calls it.
        driver: version of the GPU's driver, where known.
        dtype: of the model and of 16-bit caches.
        versions: those of :data:`PACKAGES` that were there.
        seed: of everything random.
        repeats: measurements of each kernel.
    """

    target: str | None
    device_type: str
    device_name: str
    driver: str | None
    dtype: str
    versions: Mapping[str, str]
    seed: int
    repeats: int
    decode: tuple[DecodeRow, ...]
    generation: Generation | None


def read_speed(folder: Path) -> SpeedReport | None:
    """Read ``reports/speed.json`` of a calibration folder or artifact; None if there is none.

    Raises:
        ArtifactError: the file is damaged, of another version, or about other codebooks than those
            of `folder`.
    """
    path = folder / REPORTS_NAME / SPEED_NAME
    if not path.exists():
        return None
    return check_speed(read_object(path, _REMEDY, limit=MAX_BYTES), path, folder)


def check_speed(value: Mapping[str, Any], path: Path, folder: Path) -> SpeedReport:
    """The content of `path`, or what is to be written there, against its format and the codebooks
    of `folder`; raises as :func:`read_speed`."""
    root = Fields(value, str(path), _REMEDY)
    if root.integer("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has a format version other than {FORMAT_VERSION}; upgrade cqtool (pip install "
            "-U cqtool), or run `cqtool bench` with --keep again."
        )
    if root.string("codebooks_sha256") != sha256_file(folder / CODEBOOKS_NAME):
        raise ArtifactError(
            f"{path} was measured with other codebooks than those of {folder}. {_REMEDY}"
        )
    report = _report(root)
    if not report.decode and report.generation is None:
        raise ArtifactError(f"{path} holds no measurement. {_REMEDY}")
    return report


def _report(root: Fields) -> SpeedReport:
    target = _optional_text(root, "target")
    if target is not None and not is_hub_id(target):
        raise ArtifactError(f"{root.name}: 'target' must be a shape or a Hub id. {root.remedy}")
    device, versions = root.child("device"), root.child("versions")
    cuda = device.choice("type", ("cpu", "cuda")) == "cuda"
    shown = {name: _optional_text(versions, name) for name in PACKAGES if name in versions.values}
    return SpeedReport(
        target=target,
        device_type="cuda" if cuda else "cpu",
        device_name=_text(device, "name"),
        driver=_optional_text(device, "driver") if cuda else None,
        dtype=root.choice("dtype", _DTYPES),
        versions={name: version for name, version in shown.items() if version is not None},
        seed=root.integer("seed"),
        repeats=root.integer("repeats", minimum=1),
        decode=tuple(map(_decode, root.children("decode", empty=True, most=MAX_ROWS))),
        generation=None
        if root.values.get("end_to_end") is None
        else _generation(root.child("end_to_end")),
    )


def _decode(row: Fields) -> DecodeRow:
    return DecodeRow(
        batch=row.integer("batch", minimum=1),
        tokens=row.integer("tokens", minimum=1),
        format=_text(row, "format"),
        time=_timing(row.child("time")),
        cache_bytes=row.integer("cache_bytes", minimum=1),
        rival=None if row.values.get("rival") is None else _rival(row.child("rival")),
    )


def _rival(row: Fields) -> Rival:
    return Rival(
        name=_text(row, "name"),
        time=_timing(row.child("time")),
        cache_bytes=row.integer("cache_bytes", minimum=1),
    )


def _generation(found: Fields) -> Generation:
    return Generation(
        prompt=found.integer("prompt", minimum=1),
        new=found.integer("new", minimum=1),
        largest=found.boolean("largest"),
        most=found.integer("most", minimum=1),
        window=found.integer("window", minimum=0),
        sinks=found.integer("sinks", minimum=0),
        rows=tuple(
            GenerationRow(
                cache=_text(row, "cache"),
                format=_text(row, "format"),
                implementation=_optional_text(row, "implementation"),
                batch=row.integer("batch", minimum=1),
                time=_timing(row.child("time")),
                cache_bytes=row.integer("cache_bytes", minimum=1),
            )
            for row in found.children("rows", most=MAX_ROWS)
        ),
    )


def _timing(spread: Fields) -> Timing:
    low, high = _SECONDS
    found = Timing(
        spread.number("median"), spread.number("iqr"), spread.integer("repeats", minimum=1)
    )
    if not (low <= found.median <= high and 0 <= found.iqr <= high):
        raise ArtifactError(f"{spread.name} is no time that anything takes. {spread.remedy}")
    return found


def _text(fields: Fields, key: str) -> str:
    """A text that a table has room for."""
    value = fields.string(key)
    if len(value) > _MOST_TEXT:
        raise ArtifactError(
            f"{fields.name}: '{key}' must be a text of at most {_MOST_TEXT} characters. "
            f"{fields.remedy}"
        )
    return value


def _optional_text(fields: Fields, key: str) -> str | None:
    return None if fields.optional_string(key) is None else _text(fields, key)

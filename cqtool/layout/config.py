"""What a calibration folder or artifact says it is, read and checked before anything is loaded.

``cq_config.json`` is read field by field; the header of ``codebooks.safetensors`` is then compared
with it, so that every tensor's name, shape, dtype and place in the file is known before a single
centroid is. torch is not needed for any of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from cqtool.errors import ArtifactError, RecipeError
from cqtool.geometry import KeyRotation, LayerGeometry, ModelGeometry, Style
from cqtool.layout.fields import Fields, is_number, is_plain
from cqtool.spec import (
    GAIN_BITS,
    KINDS,
    CacheSpec,
    Codes,
    CQSpec,
    Encoding,
    Gain,
    Grouping,
    Kind,
    LayerCodes,
    Objective,
    Sharing,
)
from cqtool.strictjson import read_object

CONFIG_NAME = "cq_config.json"
CODEBOOKS_NAME = "codebooks.safetensors"
CALIBRATION_NAME = "calibration.json"
REPORTS_NAME = "reports"
QUALITY_NAME = "quality.json"
RUNTIME_NAME = "build/torch-cuda"

FORMAT_VERSION = 1
MAX_JSON_BYTES = 16 << 20
MAX_LAYERS = 4096
"""Far more than any model has; what is worked out for each layer stays quick for a hostile file."""

MAX_HEADS = 1024
"""The same for the heads of a layer that have codes of their own."""

ROPE_NUMBERS = 5
"""What a fingerprint has of each RoPE table: a factor and four frequencies."""
PROBE_NUMBERS = 4
"""What a fingerprint has of some weights: their norm and three sums."""
MAX_CONFIG_FIELDS = 256
"""Of the base model's configuration, in a fingerprint."""

EXTRAS = ("metric", "feedback", "gains")
"""What a codebook may have beside it, as the encoding and the gain of its format say; the names of
:class:`cqtool.cache.codec.CQCodec`'s arguments."""

REMEDY = "Run `cqtool calibrate` again, or download the artifact again."


@dataclass(frozen=True)
class BaseModel:
    """The model that the codebooks were fitted to.

    Attributes:
        id: Hub id, or the local path it was loaded from.
        revision: commit on the Hub, where known.
        license: its license as the Hub writes it, where known.
        license_name: what a license is called that the Hub has no name for.
        license_link: where its text is: an address, or a file of the model's repository.
        fingerprint: see :func:`cqtool.models.fingerprint.fingerprint`.
    """

    id: str
    revision: str | None
    license: str | None
    fingerprint: Mapping[str, Any]
    license_name: str | None = None
    license_link: str | None = None


@dataclass(frozen=True)
class CalibrationData:
    """The text that the codebooks were fitted on; `sequences` windows of `sequence_length`."""

    dataset: Mapping[str, Any]
    digest: str
    sequences: int
    sequence_length: int
    seed: int


class TableOwner(NamedTuple):
    """Heads with one codebook tensor.

    Attributes:
        name: of :func:`owner_name`.
        code: what they are coded with.
        heads: how many they are: all of a layer, or one that has a code of its own.
        dim: channels of a head.
    """

    name: str
    code: CQSpec
    heads: int
    dim: int

    @property
    def groups(self) -> int:
        """Groups of a head's channels."""
        return self.dim // self.code.channels


@dataclass(frozen=True)
class CQConfig:
    """``cq_config.json``, checked.

    Attributes:
        tuned: whether the fitted codebooks were tuned end to end afterwards.
    """

    tool_version: str
    base_model: BaseModel
    cache: CacheSpec
    geometry: ModelGeometry
    objective: str
    recipe: Mapping[str, Any]
    calibration: CalibrationData
    tuned: bool = False

    @property
    def tables(self) -> Iterator[TableOwner]:
        """Who has codebooks, in the order of the model."""
        for index, layer in enumerate(self.geometry.layers):
            for kind in KINDS:
                for owner, code, head in self.cache.owners(index, kind):
                    heads = layer.kv_heads if head is None else 1
                    yield TableOwner(owner_name(index, owner), code, heads, layer.dim(kind))

    @property
    def codebook_shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """Every codebook of the file: name -> ``[kv_heads, groups, 2**bits, channels]``, one head
        for all where they share, and where the codebook is of a single one."""
        return {
            codebook_name(owner.name): (
                owner.code.codebook_heads(owner.heads),
                owner.groups,
                owner.code.centroids,
                owner.code.channels,
            )
            for owner in self.tables
        }

    @property
    def channels_shapes(self) -> dict[str, tuple[int, int]]:
        """The codebook file's other tensors, the channels of groups that are not contiguous: name
        -> ``[kv_heads, head_dim]``."""
        return {
            channels_name(owner.name): (owner.heads, owner.dim)
            for owner in self.tables
            if owner.code.grouping != "contiguous"
        }

    @property
    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """The codebook file's float32 tensors, which encodings other than ``nearest`` and gains
        need: name -> shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, code, heads, dim in self.tables:
            if code.encoding != "nearest":
                shape = (heads, dim // code.channels, code.channels, code.channels)
                shapes[extra_name(name, "metric")] = shape
            if code.encoding == "ldlq":
                shapes[extra_name(name, "feedback")] = (heads, dim, dim)
            if code.gain == "token":
                shapes[extra_name(name, "gains")] = (heads, 1 << GAIN_BITS)
        return shapes

    @property
    def bits_per_channel(self) -> float:
        """Mean bits per channel in codes alone, over all layers."""
        bits = sum(owner.heads * owner.dim * owner.code.bits_per_channel for owner in self.tables)
        return bits / self.geometry.channels_per_token

    @property
    def rate(self) -> str:
        """:attr:`bits_per_channel` in words, such as ``1 bit per channel``."""
        return self.cache.rate_of(self.bits_per_channel)

    @property
    def code_bytes_per_token(self) -> float:
        """Bytes of codes, and gains, that one token outside window and sinks puts into the
        cache."""
        bits = 0.0
        for _, code, heads, dim in self.tables:
            bits += heads * (dim * code.bits_per_channel + (code.gain == "token") * GAIN_BITS)
        return bits / 8


def text_parts(source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The texts of a text source: itself, or those that a mixture is made of."""
    parts = source.get("parts")
    if not isinstance(parts, list):
        return [source]
    return [part for part in parts if isinstance(part, dict)] or [source]


def owner_name(layer: int, owner: str) -> str:
    """How the names of the tensors begin, in the codebook file, of :attr:`TableOwner.owner`."""
    return f"layers.{layer}.{owner}"


def codebook_name(owner: str) -> str:
    """Name of a codebook in the codebook file; see :func:`owner_name`."""
    return f"{owner}.codebook"


def channels_name(owner: str) -> str:
    """Name, in the codebook file, of the model channels of a codebook's channels."""
    return f"{owner}.channels"


def extra_name(owner: str, part: str) -> str:
    """Name, in the codebook file, of one of :data:`EXTRAS`."""
    return f"{owner}.{part}"


def read_config(folder: Path) -> CQConfig:
    """Read ``cq_config.json``.

    Raises:
        ArtifactError: `folder` holds none, or it is damaged, inconsistent or of another version.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {CONFIG_NAME}, so it is neither a calibration folder nor an "
            "artifact; make one with `cqtool calibrate`."
        )
    root = Fields(read_object(path, REMEDY, limit=MAX_JSON_BYTES), str(path), REMEDY)
    version = root.integer("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version} and this cqtool reads {FORMAT_VERSION}; upgrade "
            "cqtool (pip install -U cqtool), or calibrate again with this one."
        )
    base, data = root.child("base_model"), root.child("calibration")
    geometry = root.child("geometry")
    config = CQConfig(
        tool_version=root.child("tool").string("version"),
        base_model=BaseModel(
            id=base.string("id"),
            revision=base.optional_string("revision"),
            license=base.optional_string("license"),
            fingerprint=_fingerprint(base.child("fingerprint")),
            # Most models have neither.
            license_name=base.string("license_name") if "license_name" in base.values else None,
            license_link=base.string("license_link") if "license_link" in base.values else None,
        ),
        cache=_cache_spec(root.child("cache")),
        geometry=ModelGeometry(
            query_heads=geometry.integer("query_heads", minimum=1),
            layers=tuple(
                _layer_geometry(layer) for layer in geometry.children("layers", most=MAX_LAYERS)
            ),
        ),
        objective=root.choice("objective", get_args(Objective)),
        recipe=root.mapping("recipe"),
        calibration=CalibrationData(
            dataset=data.mapping("dataset"),
            digest=data.string("digest"),
            sequences=data.integer("sequences", minimum=1),
            sequence_length=data.integer("sequence_length", minimum=1),
            seed=data.integer("seed"),
        ),
        # Written by `cqtool tune` only.
        tuned="tuned" in root.values and root.boolean("tuned"),
    )
    _check_groups(config, path)
    return config


def _fingerprint(fields: Fields) -> Mapping[str, Any]:
    fields.string("model_type")
    fields.string("shapes_sha256")
    probe = fields.values.get("probe")
    if not isinstance(probe, list) or not probe or not _are_numbers(probe, PROBE_NUMBERS):
        raise ArtifactError(
            f"{fields.name}: 'probe' must be a list of lists of {PROBE_NUMBERS} numbers. "
            f"{fields.remedy}"
        )
    # Files from before it was written have none.
    told = fields.mapping("config") if "config" in fields.values else {}
    if len(told) > MAX_CONFIG_FIELDS or not all(map(is_plain, told.values())):
        raise ArtifactError(
            f"{fields.name}: 'config' must be an object of at most {MAX_CONFIG_FIELDS} short "
            f"texts, numbers, true, false, null, and lists of these. {fields.remedy}"
        )
    # Models without RoPE have none, and files from before it was written.
    tables = fields.values.get("rope", [])
    if not isinstance(tables, list) or not _are_numbers(tables, ROPE_NUMBERS):
        raise ArtifactError(
            f"{fields.name}: 'rope' must be a list of lists of {ROPE_NUMBERS} numbers. "
            f"{fields.remedy}"
        )
    return fields.values


def _are_numbers(lists: list[Any], count: int) -> bool:
    """Whether all of `lists` are lists of `count` numbers."""
    return all(
        isinstance(one, list) and len(one) == count and all(map(is_number, one)) for one in lists
    )


def _layer_geometry(fields: Fields) -> LayerGeometry:
    rotation = fields.child("rotation")
    style = rotation.choice("style", get_args(Style))
    layer = LayerGeometry(
        kv_heads=fields.integer("kv_heads", minimum=1),
        key_dim=fields.integer("key_dim", minimum=1),
        value_dim=fields.integer("value_dim", minimum=1),
        sliding_window=fields.optional_integer("sliding_window", minimum=1),
        rotation=KeyRotation(
            style=cast("Style", style),
            dim=rotation.integer("dim", minimum=0),
            offset=rotation.integer("offset", minimum=0),
            source=rotation.optional_integer("source", minimum=0),
        ),
    )
    if layer.rotation.offset + layer.rotation.dim > layer.key_dim or layer.rotation.dim % 2:
        raise ArtifactError(f"{rotation.name} turns channels that a key lacks. {fields.remedy}")
    return layer


def _cache_spec(fields: Fields) -> CacheSpec:
    window, sinks = (fields.integer(name, minimum=0) for name in ("window", "sinks"))
    try:
        key, value = (_code(fields.child(kind)) for kind in KINDS)
        return CacheSpec(key, value, window, sinks, _layer_codes(fields))
    except RecipeError as error:
        raise ArtifactError(f"{fields.name}: {error} {REMEDY}") from error


def _layer_codes(fields: Fields) -> tuple[LayerCodes, ...]:
    # Only formats that have such layers have the field.
    if "layers" not in fields.values:
        return ()
    return tuple(
        LayerCodes(
            layer.integer("first", minimum=0),
            layer.integer("last", minimum=0),
            *(_codes(layer, kind) for kind in KINDS),
        )
        for layer in fields.children("layers", most=MAX_LAYERS)
    )


def _codes(fields: Fields, kind: Kind) -> Codes:
    if isinstance(fields.values.get(kind), list):
        return tuple(map(_code, fields.children(kind, most=MAX_HEADS)))
    return _code(fields.child(kind))


def _code(fields: Fields) -> CQSpec:
    grouping: Grouping = "contiguous"
    # Files from before there was a choice lack a field.
    if "grouping" in fields.values:
        grouping = cast("Grouping", fields.choice("grouping", get_args(Grouping)))
    encoding: Encoding = "nearest"
    if "encoding" in fields.values:
        encoding = cast("Encoding", fields.choice("encoding", get_args(Encoding)))
    gain: Gain = "none"
    if "gain" in fields.values:
        gain = cast("Gain", fields.choice("gain", get_args(Gain)))
    sharing: Sharing = "none"
    if "sharing" in fields.values:
        sharing = cast("Sharing", fields.choice("sharing", get_args(Sharing)))
    channels, bits = (fields.integer(name, minimum=1) for name in ("channels", "bits"))
    return CQSpec(channels, bits, grouping, encoding, gain, sharing)


def _check_groups(config: CQConfig, path: Path) -> None:
    count = len(config.geometry.layers)
    for codes in config.cache.layers:
        if codes.last >= count:
            raise ArtifactError(
                f"{path} has codes for {codes.place} of a model of {count} layers. {REMEDY}"
            )
    for index, layer in enumerate(config.geometry.layers):
        for kind in KINDS:
            own = config.cache.codes_of(index, kind)
            if len(own) not in (1, layer.kv_heads):
                raise ArtifactError(
                    f"{path} has {len(own)} codes for the {kind}s of layer {index}, which has "
                    f"{layer.kv_heads} heads. {REMEDY}"
                )
            unfit = [code.channels for code in own if layer.dim(kind) % code.channels]
            if unfit:
                raise ArtifactError(
                    f"{path}: {kind} heads of layer {index} have {layer.dim(kind)} channels, which "
                    f"do not divide into groups of {unfit[0]}. {REMEDY}"
                )

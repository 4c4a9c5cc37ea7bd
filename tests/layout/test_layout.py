"""A calibration folder is read completely and correctly, or refused before anything is loaded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic_artifact import codebooks, edit_json

from cqtool.artifact.measured import read_quality
from cqtool.errors import ArtifactError
from cqtool.layout.codebook_file import check_codebooks, read_channels
from cqtool.layout.config import read_config


def check(folder: Path) -> int:
    return check_codebooks(folder, read_config(folder))


def test_shapes_follow_from_the_configuration(calibration: Path) -> None:
    config = read_config(calibration)
    with safe_open(calibration / "codebooks.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert config.codebook_shapes == stored
    assert check(calibration) == (calibration / "codebooks.safetensors").stat().st_size


def test_bytes_per_token_count_every_group_of_every_head(calibration: Path) -> None:
    config = read_config(calibration)
    # By hand: 2 layers of 2 heads; keys 4 groups of 3 bits, values 2 groups of 4 bits.
    assert config.code_bytes_per_token == 2 * 2 * (4 * 3 + 2 * 4) / 8
    assert config.geometry.channels_per_token == 2 * 2 * (16 + 16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format_version=2), "upgrade cqtool"),
        (lambda c: c.pop("cache"), "no field 'cache'"),
        (lambda c: c["cache"]["key"].update(channels=3), "do not divide into groups of 3"),
        (lambda c: c["cache"]["key"].update(bits=17), "not a possible format"),
        (lambda c: c["cache"].update(window=-1), "'window' must be"),
        (lambda c: c["cache"].update(sinks=1.5), "'sinks' must be"),
        (lambda c: c["geometry"].update(layers=[]), "'layers' must be"),
        (lambda c: c["geometry"].update(layers=["x"]), "'layers' must be"),
        (lambda c: c["geometry"]["layers"][0].update(kv_heads=0), "'kv_heads' must be"),
        (lambda c: c["base_model"].update(id=None), "'id' must be a text"),
        (lambda c: c["base_model"].update(fingerprint="x"), "'fingerprint' must be"),
        (lambda c: c["calibration"].update(seed="0"), "'seed' must be"),
    ],
)
def test_an_odd_configuration_is_refused_by_field(
    calibration: Path, change: Any, says: str
) -> None:
    edit_json(calibration / "cq_config.json", change)
    with pytest.raises(ArtifactError, match=says):
        read_config(calibration)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cqtool calibrate"):
        read_config(tmp_path)


def damage_nothing_listed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.9.key.codebook"] = tensors["layers.0.key.codebook"].clone()


def damage_missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["layers.1.value.codebook"]


def damage_swapped(tensors: dict[str, torch.Tensor]) -> None:
    a, b = "layers.0.key.codebook", "layers.0.value.codebook"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def damage_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.key.codebook"] = tensors["layers.0.key.codebook"].float()


def test_bfloat16_codebooks_are_fine_and_checked_too(calibration: Path) -> None:
    path = calibration / "codebooks.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert check(calibration) == path.stat().st_size
    tensors["layers.1.value.codebook"].view(-1)[7] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match="NaN or infinite"):
        check(calibration)


def damage_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.key.codebook"] = tensors["layers.0.key.codebook"].flatten(1)


def damage_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.1.value.codebook"][1, 1, 15, 7] = float("nan")


def damage_infinity(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.key.codebook"][0, 0, 0, 0] = -float("inf")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_nothing_listed, "layers.9.key"),
        (damage_missing, "layers.1.value"),
        (damage_swapped, r"layers.0.key.codebook is F16"),
        (damage_dtype, "is F32"),
        (damage_shape, "should be F16"),
        (damage_nan, "NaN or infinite"),
        (damage_infinity, "NaN or infinite"),
    ],
)
def test_codebooks_that_do_not_fit_are_refused(calibration: Path, damage: Any, says: str) -> None:
    tensors = codebooks()
    damage(tensors)
    save_file(tensors, calibration / "codebooks.safetensors")
    with pytest.raises(ArtifactError, match=says):
        check(calibration)


def test_every_truncation_is_refused(calibration: Path) -> None:
    path = calibration / "codebooks.safetensors"
    content = path.read_bytes()
    for size in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ArtifactError):
            check(calibration)


def test_every_byte_of_the_header_matters_or_changes_nothing(calibration: Path) -> None:
    """Each single changed header byte is refused, or the tensors read are the same ones."""
    path = calibration / "codebooks.safetensors"
    content = path.read_bytes()
    expected = load_file(path)
    (length,) = struct.unpack("<Q", content[:8])
    refused = 0
    for position in range(8 + length):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        try:
            check(calibration)
        except ArtifactError:
            refused += 1
            continue
        assert all(torch.equal(a, expected[n]) for n, a in load_file(path).items())
    assert refused > 0.9 * length


def test_a_huge_header_is_refused_unread(calibration: Path) -> None:
    path = calibration / "codebooks.safetensors"
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
    with pytest.raises(ArtifactError, match="its header would have"):
        check(calibration)
    padding = 1 << 20
    (length,) = struct.unpack("<Q", content[:8])
    path.write_bytes(
        struct.pack("<Q", length + padding)
        + content[8 : 8 + length] + b" " * padding + content[8 + length :]
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="its header would have"):
        check(calibration)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["layers.0.key.codebook"].update(data_offsets=[0, 10]),
        lambda h: h["layers.0.key.codebook"].update(
            data_offsets=h["layers.1.key.codebook"]["data_offsets"]
        ),
        lambda h: h["layers.0.key.codebook"].update(data_offsets=[-8, 10]),
        lambda h: h["layers.0.key.codebook"].update(shape=[2.0, 4, 8, 4]),
        lambda h: h["layers.0.key.codebook"].update(extra=1),
        lambda h: h.update({"layers.0.key.codebook": 7}),
        lambda h: h.update({"__metadata__": {"a": 1}}),
    ],
)
def test_overlapping_or_odd_header_entries_are_refused(calibration: Path, change: Any) -> None:
    path = calibration / "codebooks.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(ArtifactError):
        check(calibration)


def test_quality_is_optional_but_not_half_there(calibration: Path) -> None:
    path = calibration / "reports" / "quality.json"
    report = read_quality(calibration)
    assert report is not None
    own = report.row_of("k-cq-4c3b-v-cq-8c4b", "fisher")
    assert own is not None and (own.kl, own.kl_se) == (0.0871, 0.0023)
    assert report.row_of("k-cq-4c3b-v-cq-8c4b", "uniform") is None
    edit_json(path, lambda q: q["rows"][1].pop("kl_se"))
    with pytest.raises(ArtifactError, match=r"rows\[1\] has no field 'kl_se'.*cqtool check"):
        read_quality(calibration)
    path.unlink()
    assert read_quality(calibration) is None


def grouped(folder: Path, **changes: Any) -> Path:
    """The synthetic calibration with keys in pairs; a change of None leaves a tensor out."""
    edit_json(folder / "cq_config.json", lambda c: c["cache"]["key"].update(grouping="pairs"))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).to(torch.int16)
    channels = {f"layers.{i}.key.channels": torch.stack((order, order.flip(0))) for i in (0, 1)}
    tensors = codebooks() | channels | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "codebooks.safetensors")
    return folder


def test_channels_of_groups_are_read_as_they_were_written(calibration: Path) -> None:
    assert read_channels(calibration, read_config(calibration)) == {}
    grouped(calibration)
    config = read_config(calibration)
    assert config.cache.key.grouping == "pairs"
    assert config.cache.value.grouping == "contiguous"
    assert config.channels_shapes == {f"layers.{i}.key.channels": (2, 16) for i in (0, 1)}
    assert check(calibration) == (calibration / "codebooks.safetensors").stat().st_size
    tensors = load_file(calibration / "codebooks.safetensors")
    found = read_channels(calibration, config)
    assert found.keys() == config.channels_shapes.keys()
    for name, rows in found.items():
        assert [list(row) for row in rows] == tensors[name].tolist()


def order_with(head: int, place: int, channel: int) -> torch.Tensor:
    order = torch.arange(16, dtype=torch.int16).repeat(2, 1)
    order[head, place] = channel
    return order


@pytest.mark.parametrize(
    ("channels", "says"),
    [
        (None, "layers.1.key.channels"),
        (torch.arange(16).repeat(2, 1), r"is I64 .* should be I16 \[2, 16\]"),
        (torch.arange(16, dtype=torch.int16), r"should be I16 \[2, 16\]"),
        (torch.zeros(2, 16).half(), "should be I16"),
        (order_with(1, 15, 14), "every channel of a head once"),
        (order_with(0, 0, -1), "every channel of a head once"),
        (order_with(0, 3, 16), "every channel of a head once"),
    ],
)
def test_channels_that_are_no_permutation_are_refused(
    calibration: Path, channels: torch.Tensor | None, says: str
) -> None:
    grouped(calibration, **{"layers.1.key.channels": channels})
    with pytest.raises(ArtifactError, match=says):
        check(calibration)
    with pytest.raises(ArtifactError, match=says):
        read_channels(calibration, read_config(calibration))


def test_channels_belong_to_groups_that_are_not_contiguous(calibration: Path) -> None:
    grouped(calibration, **{"layers.0.value.channels": order_with(0, 0, 0)})
    with pytest.raises(ArtifactError, match=r"layers\.0\.value\.channels"):
        check(calibration)
    grouped(calibration)
    edit_json(calibration / "cq_config.json", lambda c: c["cache"]["key"].pop("grouping"))
    with pytest.raises(ArtifactError, match=r"layers\.0\.key\.channels"):
        check(calibration)


def test_a_codebook_that_heads_share_is_stored_once(calibration: Path) -> None:
    path, config = calibration / "codebooks.safetensors", calibration / "cq_config.json"
    assert read_config(calibration).cache.key.sharing == "none"
    edit_json(config, lambda c: c["cache"]["key"].update(sharing="heads"))
    with pytest.raises(ArtifactError, match=r"key.codebook is F16 .* should be .*\[1, 4, 8, 4"):
        check(calibration)
    before = path.stat().st_size
    tensors = {
        name: tensor[:1].clone() if ".key." in name else tensor
        for name, tensor in codebooks().items()
    }
    save_file(tensors, path)
    # In each of two layers, 4 codebooks of 8 centroids with 4 numbers less.
    assert before - check(calibration) == pytest.approx(2 * 4 * 8 * 4 * 2, abs=16)
    assert read_config(calibration).codebook_shapes["layers.1.value.codebook"][0] == 2
    edit_json(config, lambda c: c["cache"]["key"].update(sharing="layers"))
    with pytest.raises(ArtifactError, match="'sharing' must be one of none, heads"):
        read_config(calibration)


KEY_GROUPS, KEY_SIZE = 4, 4


def encoded(folder: Path, **changes: Any) -> Path:
    """The synthetic calibration with all that encoding keys may need besides."""
    more = {"encoding": "ldlq", "gain": "token"}
    edit_json(folder / "cq_config.json", lambda c: c["cache"]["key"].update(more))
    extras = {}
    for index in (0, 1):
        root = torch.randn(
            2, KEY_GROUPS, KEY_SIZE, KEY_SIZE, generator=torch.Generator().manual_seed(index)
        )
        metric = root @ root.mT + torch.eye(KEY_SIZE)
        extras[f"layers.{index}.key.metric"] = (metric + metric.mT) / 2
        extras[f"layers.{index}.key.feedback"] = torch.randn(2, 16, 16)
        extras[f"layers.{index}.key.gains"] = torch.linspace(0.01, 3, 256).repeat(2, 1)
    tensors = codebooks() | extras | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "codebooks.safetensors")
    return folder


def test_what_encoding_needs_follows_from_the_configuration(calibration: Path) -> None:
    assert read_config(calibration).extra_shapes == {}
    encoded(calibration)
    config = read_config(calibration)
    assert config.extra_shapes == {
        f"layers.{i}.key.{part}": shape
        for i in (0, 1)
        for part, shape in (
            ("metric", (2, 4, 4, 4)),
            ("feedback", (2, 16, 16)),
            ("gains", (2, 256)),
        )
    }
    assert check(calibration) == (calibration / "codebooks.safetensors").stat().st_size
    # A gain of 8 bits for each of 2 layers and 2 heads of the keys.
    assert config.code_bytes_per_token == 2 * 2 * (4 * 3 + 8 + 2 * 4) / 8
    edit_json(calibration / "cq_config.json", lambda c: c["cache"]["key"].update(encoding="metric"))
    with pytest.raises(ArtifactError, match=r"see 'layers.0.key.feedback'"):
        check(calibration)
    edit_json(calibration / "cq_config.json", lambda c: c["cache"]["key"].update(encoding="best"))
    with pytest.raises(ArtifactError, match=r"'encoding' must be one of nearest, metric, ldlq"):
        read_config(calibration)


def metric_with(number: float, at: tuple[int, int]) -> torch.Tensor:
    metric = torch.eye(KEY_SIZE).repeat(2, KEY_GROUPS, 1, 1)
    metric[1, 2, at[0], at[1]] = number
    return metric


@pytest.mark.parametrize(
    ("part", "tensor", "says"),
    [
        ("metric", None, "layers.1.key.metric"),
        ("metric", metric_with(1.0, (0, 0)).half(), r"is F16 .* should be F32 \[2, 4, 4, 4\]"),
        ("metric", metric_with(0.5, (0, 1)), "symmetric, positive definite"),
        ("metric", metric_with(-1.0, (3, 3)), "symmetric, positive definite"),
        ("metric", metric_with(float("nan"), (3, 3)), "NaN or infinite"),
        ("feedback", torch.full((2, 16, 16), torch.inf), "NaN or infinite"),
        ("gains", torch.linspace(3, 0.01, 256).repeat(2, 1), "positive gains in ascending"),
        ("gains", torch.linspace(0, 3, 256).repeat(2, 1), "positive gains in ascending"),
        ("gains", torch.linspace(1, 3, 255).repeat(2, 1), r"should be F32 \[2, 256\]"),
    ],
)
def test_what_encoding_cannot_work_with_is_refused(
    calibration: Path, part: str, tensor: torch.Tensor | None, says: str
) -> None:
    encoded(calibration, **{f"layers.1.key.{part}": tensor})
    with pytest.raises(ArtifactError, match=says):
        check(calibration)

"""The JSON Schemas that cqtool ships, and its readers, take and refuse the same files."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hostile import places, with_item
from jsonschema import Draft202012Validator
from synthetic_artifact import config

from cqtool.artifact.export import export
from cqtool.errors import ArtifactError
from cqtool.layout.config import read_config
from cqtool.manifest import parse_manifest

Change = Callable[[dict[str, Any]], Any]
DEVICES = ("con", "Prn.txt", "AUX", "nul", "COM1.tar.gz", "lpt9")
HEX = "0123456789abcdef" * 4
RECORD = {"size": 3, "sha256": HEX}
PROVENANCE = {
    "tool_version": "0.1.0",
    "tool_commit": None,
    "versions": {"torch": "2.13.0"},
    "recipe_digest": HEX,
    "data_digest": HEX,
    "base_model": "some-org/Tiny-Model",
    "base_revision": None,
    "base_fingerprint": HEX,
}


def schema(name: str) -> Draft202012Validator:
    text = files("cqtool.layout").joinpath("schemas", f"{name}.schema.json").read_text("utf-8")
    value = json.loads(text)
    Draft202012Validator.check_schema(value)
    return Draft202012Validator(value)


CONFIG, MANIFEST = schema("cq_config"), schema("manifest")


def manifest() -> dict[str, Any]:
    return {"format_version": 1, "files": {"a.bin": RECORD, "reports/b.json": RECORD}}


def config_is_read(value: Any, folder: Path) -> bool:
    (folder / "cq_config.json").write_text(json.dumps(value))
    try:
        read_config(folder)
    except ArtifactError:
        return False
    return True


def manifest_is_read(value: Any) -> bool:
    try:
        parse_manifest(json.dumps(value).encode(), "manifest.json")
    except ArtifactError:
        return False
    return True


def rich() -> dict[str, Any]:
    """A configuration with every optional field."""
    value = copy.deepcopy(config())
    key = {"channels": 4, "bits": 8, "grouping": "pairs", "encoding": "ldlq"}
    key |= {"gain": "token", "sharing": "heads"}
    other = key | {"grouping": "file", "encoding": "metric", "gain": "none", "sharing": "none"}
    value["cache"] |= {"key": key, "value": other}
    of_heads = [key | {"bits": bits, "sharing": "none"} for bits in (2, 8)]
    value["cache"]["layers"] = [
        {"first": 0, "last": 0, "key": of_heads, "value": [other, other | {"channels": 8}]},
        {"first": 1, "last": 1, "key": key, "value": other},
    ]
    value["base_model"] |= {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    value["base_model"]["fingerprint"]["rope"] = [[1.0, 1.0, 0.5, 0.25, 0.125]]
    told = {"hidden_act": "silu", "alibi": False, "rms_norm_eps": 1e-6, "layer_types": ["full", 1]}
    value["base_model"]["fingerprint"]["config"] = told | {"sliding_window": None}
    value["tuned"] = True
    value["objective"] = "query"
    value["geometry"]["layers"] = [copy.deepcopy(one) for one in value["geometry"]["layers"]]
    layer = value["geometry"]["layers"][1]
    layer["sliding_window"] = 512
    layer["rotation"] = {"style": "none", "dim": 0, "offset": 0, "source": None}
    return value


NEW = (
    ...,
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    17,
    2.5,
    2**53,
    10**40,
    1e300,
    "",
    "x",
    "a\x1b[2J",
    "a\nb",
    [],
    {},
)
NEW += (
    "heads",
    "pairs",
    "balanced-pairs",
    "file",
    "ldlq",
    "token",
    "none",
    "half",
    "query",
    [1],
    [{}],
    {"x": 1},
)

CONFIG_ONLY_READER: dict[str, Change] = {
    "a whole number with a fraction": lambda c: c["cache"].update(window=5.0),
    "groups that do not divide a head": lambda c: c["cache"]["key"].update(channels=3),
    "a rotation outside the key": lambda c: c["geometry"]["layers"][0]["rotation"].update(offset=2),
    "layers out of order": lambda c: c["cache"]["layers"][0].update(first=1, last=0),
    "layers that the model lacks": lambda c: c["cache"]["layers"][0].update(first=1, last=2),
    "layers twice": lambda c: c["cache"]["layers"].append(c["cache"]["layers"][0]),
    "codes for more heads than there are": lambda c: c["cache"]["layers"][0]["key"].append(
        c["cache"]["layers"][0]["key"][0]
    ),
    "half of a surrogate pair": lambda c: c["base_model"].update(id="\ud800"),
}
"""What is refused in words only, as the schema's description says."""

MANIFEST_ONLY_READER: dict[str, Change] = {
    "a whole number with a fraction": lambda m: m["files"]["a.bin"].update(size=3.0),
    "two paths but for the case": lambda m: m["files"].update({"A.bin": RECORD}),
    "the manifest but for the case": lambda m: m["files"].update({"Manifest.json": RECORD}),
    "half of a surrogate pair": lambda m: m["files"].update({"\ud800": RECORD}),
}


def test_schemas_get_into_a_wheel() -> None:
    root = Path(__file__).parents[2]
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    (pattern,) = setuptools["package-data"]["cqtool.layout"]
    found = {path.name for path in (root / "cqtool" / "layout").glob(pattern)}
    assert found == {"cq_config.schema.json", "manifest.schema.json"}


def test_what_is_written_validates(calibration: Path, tmp_path: Path) -> None:
    folder = export(calibration, tmp_path / "artifact").folder
    for name, validator in (("cq_config.json", CONFIG), ("manifest.json", MANIFEST)):
        validator.validate(json.loads((folder / name).read_text()))
    written = json.loads((folder / "manifest.json").read_text())
    known = MANIFEST.schema["$defs"]["provenance"]["properties"].keys()
    assert written["provenance"].keys() == known


def test_every_optional_field_is_taken(tmp_path: Path) -> None:
    value = rich()
    CONFIG.validate(value)
    assert config_is_read(value, tmp_path)
    found = read_config(tmp_path)
    of_heads, plain = found.cache.layers
    assert found.cache.key.sharing == "heads" and plain.value.grouping == "file"
    assert [code.bits for code in of_heads.codes("key")] == [2, 8]
    assert [code.channels for code in of_heads.codes("value")] == [4, 8]


def test_schema_and_reader_agree_on_every_change_of_a_configuration(tmp_path: Path) -> None:
    value = rich()
    assert CONFIG.is_valid(config()) and config_is_read(config(), tmp_path)
    refused = 0
    # The second layer's has what the first one's has.
    first = ("geometry", "layers", 0)
    for place in (one for one in places(value) if one[:3] != first or len(one) == 3):
        for new in NEW:
            changed = with_item(value, place, new)
            by_schema, by_reader = CONFIG.is_valid(changed), config_is_read(changed, tmp_path)
            # A schema cannot compare one number with another.
            only_reader = place[-1] in ("channels", "key_dim", "value_dim", "dim", "offset")
            only_reader |= place[-1] in ("first", "last") or place[-2:] == ("geometry", "layers")
            only_reader |= place[:2] == ("geometry", "layers") and new is ...
            assert by_schema == by_reader or (by_schema and only_reader), (place, new)
            refused += not by_reader
    assert refused > 500


@pytest.mark.parametrize(
    ("told", "taken"),
    [
        ({"a": "x" * 100}, True), ({"a": "x" * 101}, False), ({"a": ["x" * 101]}, False),
        ({"a": [1] * 4096}, True), ({"a": [1] * 4097}, False), ({"a": [[1]]}, False),
        ({str(i): i for i in range(256)}, True), ({str(i): i for i in range(257)}, False),
        ({"a": {}}, False), ({}, True),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_schema_and_reader_agree_on_a_models_configuration(
    told: dict[str, Any], taken: bool, tmp_path: Path
) -> None:
    value = rich()
    value["base_model"]["fingerprint"]["config"] = told
    assert (CONFIG.is_valid(value), config_is_read(value, tmp_path)) == (taken, taken)


@pytest.mark.parametrize(("heads", "taken"), [(1, False), (2, True), (1024, True), (1025, False)])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_schema_and_reader_agree_on_how_many_heads_have_codes(
    heads: int, taken: bool, kind: str, tmp_path: Path
) -> None:
    value = config()
    layer = value["geometry"]["layers"][0] | {"kv_heads": heads}
    value["geometry"] |= {"query_heads": heads, "layers": [layer]}
    code = {"channels": 8, "bits": 4}
    own = {"first": 0, "last": 0, "key": code, "value": code, kind: [code] * heads}
    value["cache"]["layers"] = [own]
    assert (CONFIG.is_valid(value), config_is_read(value, tmp_path)) == (taken, taken)


@pytest.mark.parametrize("says", CONFIG_ONLY_READER)
def test_what_a_schema_cannot_say_of_a_configuration_the_reader_refuses(
    says: str, tmp_path: Path
) -> None:
    value = rich()
    CONFIG_ONLY_READER[says](value)
    assert CONFIG.is_valid(value)
    assert not config_is_read(value, tmp_path)


@pytest.mark.parametrize("only", [False, True])
def test_schema_and_reader_agree_on_every_change_of_a_manifest(only: bool) -> None:
    value = manifest() if only else manifest() | {"provenance": PROVENANCE}
    assert MANIFEST.is_valid(value) and manifest_is_read(value)
    refused = 0
    for place in [*places(value), ("more",), ("files", "a.bin", "mode")]:
        for new in NEW:
            if new is ... and place[-1] in ("more", "mode"):
                continue
            changed = with_item(value, place, new)
            by_reader = manifest_is_read(changed)
            assert MANIFEST.is_valid(changed) == by_reader, (place, new)
            refused += not by_reader
    assert refused > 150


@pytest.mark.parametrize(
    ("path", "taken"),
    [
        *((name, False) for name in ("", ".", "..", "../a", "a/../b", "/a", "a/", "a//b", "a\\b")),
        *((name, False) for name in ("C:a", "a\nb", "a\0", "a\x7f", "a.", "a /b", "manifest.json")),
        *((f"x/{name}", False) for name in DEVICES),
        *((f"{name}/x", False) for name in DEVICES),
        *((name, False) for name in (".git/x", ".git", ".gitattributes", ".cache/huggingface/x")),
        *((f".eval_results/{name}", False) for name in ("gsm8k.yaml", "cqtool.yaml/x", "cqtool")),
        (".eval_results/cqtool.yaml", True),
        *(
            (name, True)
            for name in ("a", ".a", "a b", "..a", "a/manifest.json", "console", "com10")
        ),
        *((name, True) for name in ("ä/ö.bin", ".github/x", ".cache/x", "a.con", "é" * 300)),
    ],
)
def test_schema_and_reader_agree_on_paths(path: str, taken: bool) -> None:
    value = manifest()
    value["files"][path] = RECORD
    assert (MANIFEST.is_valid(value), manifest_is_read(value)) == (taken, taken)


@pytest.mark.parametrize("says", MANIFEST_ONLY_READER)
def test_what_a_schema_cannot_say_of_a_manifest_the_reader_refuses(says: str) -> None:
    value = manifest()
    MANIFEST_ONLY_READER[says](value)
    assert MANIFEST.is_valid(value)
    assert not manifest_is_read(value)


@pytest.mark.parametrize("sha256", [HEX[:-1], HEX + "0", HEX.upper(), HEX[:-1] + "\n", HEX + "\n"])
def test_digests_have_64_small_hex_digits(sha256: str) -> None:
    value = manifest()
    value["files"]["a.bin"] = RECORD | {"sha256": sha256}
    assert not MANIFEST.is_valid(value) and not manifest_is_read(value)

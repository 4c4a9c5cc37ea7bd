"""The kernels that an artifact ships are those that its caches ask for."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_artifact import config, edit_json

from cqtool.artifact import runtime_kernels
from cqtool.artifact.runtime_kernels import artifact_variants, compile_kernels, unsupported
from cqtool.cache.head_parts import head_parts
from cqtool.cache.layer_kernels import LayerKernels
from cqtool.cache.loading import CodecTables, make_codecs
from cqtool.codebooks.grouping import choose_groups
from cqtool.geometry import NO_ROTATION
from cqtool.kernels.decode.config import DecodeCase, choose
from cqtool.kernels.decode.op import variants
from cqtool.kernels.decode.tables import LayerTables
from cqtool.kernels.encode import Encoder
from cqtool.kernels.encode import op as encode_op
from cqtool.kernels.encode.config import EncodeCase, encode_variant
from cqtool.kernels.layout import CodeFormat, plan_keys
from cqtool.kernels.variants import ARCHITECTURES, Variant
from cqtool.layout.codebook_file import Channels
from cqtool.layout.config import CQConfig, read_config
from cqtool.spec import LayerCodes


def config_of(
    folder: Path,
    heads: int = 9,
    kv_heads: int = 3,
    dim: int = 64,
    key: tuple[int, int] = (8, 8),
    value: tuple[int, int] = (8, 8),
    *,
    model_type: str = "llama",
    rotations: tuple[dict[str, Any], ...] = ({"style": "half"},),
) -> CQConfig:
    raw = config()
    raw["base_model"]["fingerprint"]["model_type"] = model_type
    raw["cache"] |= {
        name: {"channels": code[0], "bits": code[1]}
        for name, code in (("key", key), ("value", value))
    }
    rotation = {"dim": dim, "offset": 0, "source": 0}
    shape = {"kv_heads": kv_heads, "key_dim": dim, "value_dim": dim, "sliding_window": None}
    layers = [{**shape, "rotation": {**rotation, **each}} for each in rotations]
    raw["geometry"] = {"query_heads": heads, "layers": layers}
    (folder / "cq_config.json").write_text(json.dumps(raw))
    return read_config(folder)


def defines(variants: list[Variant], stem: str) -> list[dict[str, int]]:
    return [dict(v.defines) for v in variants if v.source.endswith(f"/{stem}.cu")]


def test_encoders_have_a_metric_where_the_format_does(tmp_path: Path) -> None:
    plain = config_of(tmp_path)
    key = replace(plain.cache.key, encoding="metric")
    found = artifact_variants(replace(plain, cache=replace(plain.cache, key=key)), "sm_90")
    assert {(d["KIND_KEY"], d["HAS_METRIC"]) for d in defines(found, "encode")} == {(1, 1), (0, 0)}
    for change in ({"encoding": "ldlq"}, {"gain": "token"}):
        other = replace(plain.cache, value=replace(plain.cache.value, **change))
        reason = unsupported(replace(plain, cache=other))
        assert reason is not None and "no kernel" in reason


def test_layers_with_codes_of_their_own_get_their_kernels(tmp_path: Path) -> None:
    plain = config_of(tmp_path, rotations=({"style": "half"},) * 3)
    other = replace(plain.cache.key, channels=4)
    layers = (LayerCodes(1, 1, plain.cache.key, other), LayerCodes(2, 2, other, other))
    mixed = replace(plain, cache=replace(plain.cache, layers=layers))
    found = defines(artifact_variants(mixed, "sm_90"), "decode")
    pairs = {(each["KEY_CHANNELS"], each["VALUE_CHANNELS"]) for each in found}
    assert pairs == {(8, 8), (8, 4), (4, 4)}
    coded = {each["CHANNELS"] for each in defines(artifact_variants(mixed, "sm_90"), "encode")}
    assert coded == {4, 8}


def asked_for(config: CQConfig, channels: Channels, base: float) -> set[Variant]:
    """What a fused cache of an artifact in bfloat16 loads, by the tables that it makes."""

    def tables(layer: int, owner: str) -> CodecTables:
        name = f"layers.{layer}.{owner}"
        codebook = torch.randn(config.codebook_shapes[f"{name}.codebook"])
        rows = channels.get(f"{name}.channels")
        return codebook, None if rows is None else torch.tensor(rows), {}

    asked: set[Variant] = set()
    codecs = make_codecs(config.cache, config.geometry, tables)
    for geometry, own in zip(config.geometry.layers, codecs, strict=True):
        readers = config.geometry.query_heads // geometry.kv_heads
        for part in head_parts(geometry, own):
            kernels = LayerKernels(part.geometry, part.codecs)
            made = kernels.tables
            key, value = made.key_format, made.value_format
            slow = made.rope(base ** (-torch.arange(0, 64, 2) / 64)).slow
            for tokens in range(1, 9):
                case = DecodeCase(
                    64, 64, key.channels, key.bits, value.channels, value.bits,
                    readers * tokens, made.pairing, True, slow, "bfloat16",
                )  # fmt: skip
                launch = choose(case, 90)
                assert launch is not None
                asked |= {variant for _, variant in variants(launch)}
                asked.add(Variant("decode/finish.cu", launch.finish_defines()))
            for kind, encoder in kernels.encoders.items():
                format, is_key = encoder.format, kind == "key"
                for flat, tiles in ((False, 4), (True, 1), (True, 4)):
                    encode = EncodeCase(
                        64, format.channels, format.bits, "bfloat16", is_key, flat, tiles,
                        vector=encoder._neighbours, unrotate=is_key,
                    )  # fmt: skip
                    asked.add(encode_variant(encode))
    return asked


@pytest.mark.parametrize("groups", ["contiguous", "chosen", "some chosen"])
def test_heads_with_codes_of_their_own_get_the_kernels_that_their_cache_asks_for(
    tmp_path: Path, groups: str
) -> None:
    plain = config_of(tmp_path, rotations=({"style": "half"},) * 3)
    a, b = plain.cache.key, replace(plain.cache.key, channels=4)
    c = replace(a, bits=6)
    if groups != "contiguous":
        a, b = (replace(code, grouping="correlation") for code in (a, b))
    if groups == "chosen":
        c = replace(c, grouping="correlation")
    # Of the same code, but for the channels of its groups.
    d = replace(a, grouping="contiguous") if groups == "some chosen" else a
    layers = (LayerCodes(0, 0, (a, b, d), c), LayerCodes(2, 2, (b, b, c), (c, d, a)))
    mixed = replace(plain, cache=replace(plain.cache, layers=layers))
    draw = random.Random(0)
    channels = {
        name: tuple(tuple(draw.sample(range(dim), dim)) for _ in range(heads))
        for name, (heads, dim) in mixed.channels_shapes.items()
    }
    shipped = artifact_variants(mixed, "sm_90", channels)
    asked = set().union(*(asked_for(mixed, channels, base) for base in (1e4, 5e5)))
    assert asked == {each for each in shipped if dict(each.defines)["DTYPE"] == 1}
    decode = defines(shipped, "decode")
    assert {
        (d["KEY_CHANNELS"], d["KEY_BITS"], d["VALUE_CHANNELS"], d["VALUE_BITS"]) for d in decode
    } == {
        (8, 8, 8, 6),
        (4, 8, 8, 6),
        (8, 8, 8, 8),
        (4, 8, 8, 8),
        (8, 6, 8, 8),
    }


def test_one_decode_kernel_for_each_block_of_query_rows_and_dtype(tmp_path: Path) -> None:
    """9 heads over 3: 3 rows for one token and 24 for eight, in blocks of 4 and 8."""
    found = artifact_variants(config_of(tmp_path), "sm_90")
    assert len(set(found)) == len(found)
    decode = defines(found, "decode")
    assert {(d["ROWS"], d["DTYPE"]) for d in decode} == set(itertools.product((4, 8), (0, 1)))
    assert all(d["MODE"] == 0 for d in decode)
    for d in decode:
        assert (d["KEY_DIM"], d["VALUE_DIM"], d["KEY_CHANNELS"], d["KEY_BITS"]) == (64, 64, 8, 8)
        assert (d["PAIRING"], d["ROTATE"]) == (0, 1)
        assert d["PAGED"] == d["HAS_MASK"] == d["HAS_GAIN"] == d["SOFTCAP"] == 0
    finish = defines(found, "finish")
    assert {(d["ROWS"], d["DTYPE"]) for d in finish} == set(itertools.product((4, 8), (0, 1)))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "blocks"),
    [(32, 32, {1, 2, 4, 8}), (8, 4, {2, 4, 8}), (32, 8, {4, 8}), (8, 1, {8}), (24, 8, {4, 8})],
)
def test_blocks_of_query_rows(tmp_path: Path, heads: int, kv_heads: int, blocks: set[int]) -> None:
    found = artifact_variants(config_of(tmp_path, heads, kv_heads), "sm_90")
    assert {d["ROWS"] for d in defines(found, "decode")} == blocks


def test_architectures_with_less_shared_memory_have_other_kernels(tmp_path: Path) -> None:
    wide = config_of(tmp_path, 32, 8, 128, (4, 8), (4, 8))
    modes = {
        arch: {d["MODE"] for d in defines(artifact_variants(wide, arch), "decode")}
        for arch in ARCHITECTURES
    }
    # Both tables together take 2 x 64 KiB at least, and sm_86, sm_89 and sm_120 have 99 KiB.
    for arch in ("sm_86", "sm_89", "sm_120"):
        assert modes[arch] == {1, 2}
    assert 0 in modes["sm_90"] and 0 in modes["sm_100"]


def test_a_soft_cap_only_where_the_model_has_one(tmp_path: Path) -> None:
    for model_type, capped in (("llama", 0), ("gemma2", 1), ("gemma3_text", 0)):
        found = artifact_variants(config_of(tmp_path, model_type=model_type), "sm_90")
        assert {d["SOFTCAP"] for d in defines(found, "decode")} == {capped}
        assert {d["SOFTCAP"] for d in defines(found, "finish")} == {capped}


def test_layers_that_differ_have_their_own_kernels_and_equal_ones_share(tmp_path: Path) -> None:
    half, whole = {"style": "half"}, {"style": "interleaved"}
    none = {"style": "none", "dim": 0, "source": None}
    one = artifact_variants(config_of(tmp_path, rotations=(half,)), "sm_90")
    assert artifact_variants(config_of(tmp_path, rotations=(half,) * 5), "sm_90") == one
    mixed = artifact_variants(config_of(tmp_path, rotations=(half, whole, none)), "sm_90")
    pairs = {(d["PAIRING"], d["ROTATE"]) for d in defines(mixed, "decode")}
    assert pairs == {(0, 1), (1, 1), (0, 0)}
    unrotate = Counter(d["UNROTATE"] for d in defines(mixed, "encode") if d["KIND_KEY"])
    assert unrotate.keys() == {0, 1}


def test_formats_without_kernels_ship_none(tmp_path: Path) -> None:
    for options in ({"key": (4, 3)}, {"value": (8, 4)}, {"dim": 48, "key": (8, 8)}):
        other = config_of(tmp_path, **options)
        assert artifact_variants(other, "sm_90") == []
        shipped = compile_kernels(other, ["sm_90"])
        assert (shipped.files, shipped.cubins, shipped.architectures) == ({}, 0, ())
        reason = unsupported(other)
        assert reason is not None and shipped.note is not None and reason in shipped.note


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_encoder_asks_for_kernels_that_are_shipped(
    tmp_path: Path, style: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask the op itself which variant it loads, for a prompt, a token, and many rows."""
    shipped = set(artifact_variants(config_of(tmp_path, rotations=({"style": style},)), "sm_90"))
    asked: list[Variant] = []

    class Module:
        def launch(self, *arguments: Any) -> None:
            pass

    def load(variant: Variant, device_index: int) -> Module:
        asked.append(variant)
        return Module()

    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(encode_op, "load", load)
    monkeypatch.setattr(encode_op, "_processors", lambda index: 132)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    rotation = config_of(tmp_path, rotations=({"style": style},)).geometry.layers[0].rotation
    format = CodeFormat(64, 8, 8)
    codebook = torch.randn(3, 8, 256, 8)
    keys = Encoder(codebook, plan_keys(format, rotation), rotation=rotation)
    values = Encoder(codebook, format)
    for batch, tokens in ((1, 1), (1, 8), (2048, 1), (2, 700), (1, 17)):
        x = torch.zeros(batch, 3, tokens, 64, dtype=dtype)
        storage = torch.zeros(batch, 3, 1, 128, dtype=torch.uint8)
        column = torch.zeros(batch, dtype=torch.int32)
        steps = torch.zeros(3, 32, dtype=torch.int64)
        for encoder, turned in ((keys, steps), (values, None)):
            encode_op._encode_cuda(
                x, storage, None, column, None, encoder._image, encoder._scaling, encoder._maps,
                None, turned, column if turned is not None else None, 1.0, 8, 8,
                encoder.is_key, encoder._neighbours,
            )  # fmt: skip
    assert len(set(asked)) == 6
    assert set(asked) <= shipped


def test_a_kernel_of_another_compiler_is_not_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CQTOOL_CACHE", str(tmp_path))
    compiled: list[str] = []

    class Result:
        cubin = b"cubin"

    def compile_once(variant: Variant, arch: str) -> Result:
        compiled.append(arch)
        return Result()

    monkeypatch.setattr(runtime_kernels, "compile_variant", compile_once)
    variant = Variant("decode/finish.cu")
    for compiler in ("NVRTC 13.0", "NVRTC 13.0", "NVRTC 13.5"):
        runtime_kernels._compile_once(variant, "sm_90", "sources", compiler)
    assert len(compiled) == 2


def grouped(folder: Path, keys: str, style: str) -> tuple[CQConfig, dict[str, torch.Tensor]]:
    """Two layers of 3 heads, each with groups of its own; and their channels by name."""
    config_of(folder, dim=128, rotations=({"style": style},) * 2)
    edit_json(
        folder / "cq_config.json",
        lambda raw: [
            raw["cache"][kind].update(grouping=how)
            for kind, how in (("key", keys), ("value", "correlation"))
        ],
    )
    config = read_config(folder)
    generator = torch.Generator().manual_seed(0)
    channels = {}
    for index, layer in enumerate(config.geometry.layers):
        for kind, how in (("key", keys), ("value", "correlation")):
            samples = torch.randn(200, 3, 128, generator=generator)
            turned = layer.rotation if kind == "key" else NO_ROTATION
            order = choose_groups(samples, how, 8, turned)  # type: ignore[arg-type]
            assert order is not None
            channels[f"layers.{index}.{kind}.channels"] = order
    return config, channels


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("keys", "pairing", "slow"),
    # Pairs of all speeds meet in closed groups; "scatter" has them in the model's order.
    [("pairs", "closed", 0), ("correlation", "scatter", 1)],
    ids=["pairs", "correlation"],
)
def test_a_cache_of_chosen_groups_asks_for_kernels_that_are_shipped(
    tmp_path: Path, keys: str, pairing: str, slow: int, style: str
) -> None:
    config, channels = grouped(tmp_path, keys, style)
    rows = {name: tuple(map(tuple, order.tolist())) for name, order in channels.items()}
    shipped = set(artifact_variants(config, "sm_90", rows))
    rotation = config.geometry.layers[0].rotation
    codebook = torch.randn(3, 16, 256, 8)
    asked: set[Variant] = set()
    for index in range(2):
        orders = [channels[f"layers.{index}.{kind}.channels"] for kind in ("key", "value")]
        tables = LayerTables(codebook, codebook, rotation, *orders)
        assert tables.pairing == pairing
        # Bases of a Llama 2, a Llama 3 and a Qwen of long texts.
        for base in (1e4, 5e5, 1e7):
            turns_slowly = tables.rope(base ** (-torch.arange(0, 128, 2) / 128)).slow
            for tokens in range(1, 9):
                case = DecodeCase(
                    128, 128, 8, 8, 8, 8, 3 * tokens, tables.pairing, True, turns_slowly, "bfloat16"
                )
                launch = choose(case, 90)
                assert launch is not None
                asked |= {variant for _, variant in variants(launch)}
        encoders = {
            "key": Encoder(codebook, tables.plans, rotation=rotation),
            "value": Encoder(codebook, tables.value_format, permutation=orders[1]),
        }
        for kind, encoder in encoders.items():
            case_of = EncodeCase(128, 8, 8, "float16", kind == "key", False, 4, encoder._neighbours)
            asked.add(encode_variant(replace(case_of, unrotate=kind == "key")))
    assert max(d["SLOW"] for d in defines(list(asked), "decode")) == slow
    assert asked <= shipped
    assert not asked <= set(artifact_variants(config, "sm_90"))

"""A small calibration folder with random codebooks, as `calibrate` and `check` leave it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

KEY, VALUE = {"channels": 4, "bits": 3}, {"channels": 8, "bits": 4}
LAYERS, KV_HEADS, DIM = 2, 2, 16
ROTATION = {"style": "half", "dim": DIM, "offset": 0, "source": 0}


def config() -> dict[str, Any]:
    """cq_config.json of the synthetic calibration."""
    layer = {
        "kv_heads": KV_HEADS,
        "key_dim": DIM,
        "value_dim": DIM,
        "sliding_window": None,
        "rotation": ROTATION,
    }
    return {
        "format_version": 1,
        "tool": {"name": "cqtool", "version": "0.1.0"},
        "base_model": {
            "id": "some-org/Tiny-Model",
            "revision": "0123abc",
            "license": "apache-2.0",
            "fingerprint": {"model_type": "llama", "shapes_sha256": "00", "probe": [[0.5] * 4]},
        },
        "cache": {"key": KEY, "value": VALUE, "window": 5, "sinks": 3},
        "geometry": {"query_heads": 4, "layers": [layer] * LAYERS},
        "objective": "fisher",
        "recipe": {"name": "tiny", "kmeans": {"iterations": 25}},
        "calibration": {
            "dataset": {
                "dataset": "Salesforce/wikitext",
                "config": "wikitext-2-raw-v1",
                "split": "train",
                "column": "text",
                "revision": None,
            },
            "digest": "ab" * 32,
            "sequences": 7,
            "sequence_length": 96,
            "seed": 11,
        },
    }


def codebooks() -> dict[str, torch.Tensor]:
    """Random codebooks that fit :func:`config`."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{index}.{kind}.codebook": torch.randn(
            KV_HEADS,
            DIM // code["channels"],
            1 << code["bits"],
            code["channels"],
            generator=generator,
        ).half()
        for index in range(LAYERS)
        for kind, code in (("key", KEY), ("value", VALUE))
    }


def quality() -> dict[str, Any]:
    """reports/quality.json with figures that are easy to find again in a text."""
    full = {
        "name": "fp32",
        "label": "full precision (fp32)",
        "objective": None,
        "key_bits": 32.0,
        "value_bits": 32.0,
        "bits_per_channel": 32.0,
        "window": 0,
        "sinks": 0,
        "effective_bits": 32.0,
        "cache_bytes_per_token": 512.0,
        "cache_bytes_per_token_full": 512.0,
        "perplexity": 21.347,
        "perplexity_se": 0.713,
        "perplexity_increase": 0.0,
        "perplexity_increase_se": 0.0,
        "kl": 0.0,
        "kl_se": 0.0,
        "top1": 1.0,
        "top1_se": 0.0,
    }
    own = full | {
        "name": "k-cq-4c3b-v-cq-8c4b", "label": "K 4c3b, V 8c4b", "objective": "fisher",
        "key_bits": 0.75, "value_bits": 0.5, "bits_per_channel": 0.625,
        "window": 5, "sinks": 3, "effective_bits": 1.375,
        "cache_bytes_per_token": 22.0,
        "perplexity": 23.891, "perplexity_se": 0.829,
        "perplexity_increase": 0.1192, "perplexity_increase_se": 0.0137,
        "kl": 0.0871, "kl_se": 0.0023, "top1": 0.9143, "top1_se": 0.0031,
    }  # fmt: skip
    rival = own | {"name": "int4", "label": "int4", "objective": None, "perplexity": 22.468}
    return {
        "format_version": 1,
        "model": "some-org/Tiny-Model",
        "evaluation": {
            "dataset": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test",
            "column": "text", "revision": None, "digest": "cd" * 32,
            "windows": 6, "window_length": 768,
        },
        "device": "cpu",
        "mode": "teacher", "dtype": "float32",
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "rows": [full, own, rival],
        "gates": [{"name": "max_kl", "limit": 0.1, "value": 0.0871, "passed": True}],
    }  # fmt: skip


def write_calibration(folder: Path, *, with_quality: bool = True) -> Path:
    """Write a calibration folder as `cqtool calibrate` and `cqtool check` leave it."""
    (folder / "reports").mkdir(parents=True)
    (folder / "samples").mkdir()
    (folder / "samples" / "meta.json").write_text("{}")
    save_file(codebooks(), folder / "codebooks.safetensors")
    (folder / "cq_config.json").write_text(json.dumps(config(), indent=2))
    (folder / "calibration.json").write_text(json.dumps({"engine": "faiss", "seed": 11}))
    (folder / "reports" / "entropy.png").write_bytes(b"\x89PNG\r\n" + bytes(range(256)))
    (folder / "reports" / "report.html").write_text("<html></html>")
    (folder / "reports" / "scratch.tmp").write_text("not published")
    if with_quality:
        (folder / "reports" / "quality.json").write_text(json.dumps(quality()))
    return folder


def edit_json(path: Path, change: Any) -> None:
    """Apply `change` to the parsed JSON of `path` and write it back."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))

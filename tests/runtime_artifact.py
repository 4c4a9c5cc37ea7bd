"""A tiny model with heads that the kernels take, and an artifact of it with its runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from synthetic_artifact import config, write_calibration
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT = list(range(3, 40))
NEW_TOKENS = 12


def tiny_model() -> LlamaForCausalLM:
    """2 layers, 2 query heads, 1 kv head, head_dim 64; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=300,
                hidden_size=128,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=64,
                initializer_range=0.15,
            )
        ).eval()


def write_tiny_calibration(folder: Path, model: LlamaForCausalLM, *, grouped: bool = False) -> Path:
    """A calibration of `model` in cq-8c8b with random codebooks, window 4 and 2 sinks.

    With `grouped`, keys and values are coded in groups of random channels.
    """
    from cqtool.models.fingerprint import fingerprint
    from cqtool.models.probe import read_geometry

    write_calibration(folder, with_quality=False)
    value: dict[str, Any] = config()
    value["base_model"]["fingerprint"] = fingerprint(model)
    value["geometry"] = read_geometry(model).to_json()
    code = {"channels": 8, "bits": 8, "grouping": "correlation" if grouped else "contiguous"}
    value["cache"] = {"key": code, "value": code, "window": 4, "sinks": 2}
    (folder / "cq_config.json").write_text(json.dumps(value))
    generator = torch.Generator().manual_seed(0)
    codebooks = {
        f"layers.{layer}.{kind}.codebook": torch.randn(1, 8, 256, 8, generator=generator).half()
        for layer in range(2)
        for kind in ("key", "value")
    }
    if grouped:
        codebooks |= {
            f"layers.{layer}.{kind}.channels": torch.randperm(64, generator=generator)[None].short()
            for layer in range(2)
            for kind in ("key", "value")
        }
    save_file(codebooks, folder / "codebooks.safetensors")
    return folder


def generate(model: Any, cache: Any = None, **options: Any) -> list[int]:
    """What the model says to PROMPT, greedily."""
    ids = torch.tensor([PROMPT], device=model.device)
    output = model.generate(
        ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, **options,
    )  # fmt: skip
    return output[0, len(PROMPT) :].tolist()

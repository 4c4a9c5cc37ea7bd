"""Tiny randomly initialised decoders of many architectures, for tests of mechanics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

VOCABULARY = 120
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4}
_NEOX: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


def _llama(**changes: Any) -> tf.LlamaConfig:
    return tf.LlamaConfig(**{**_LLAMA, **changes})


CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": _llama,
    "llama-mha-bias": lambda: _llama(num_key_value_heads=4, attention_bias=True),
    "llama-mqa": lambda: _llama(num_key_value_heads=1),
    "llama3-rope": lambda: _llama(
        rope_parameters=_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "yarn": lambda: _llama(
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=128)
    ),
    "linear": lambda: _llama(rope_parameters=_rope("linear", factor=4.0)),
    "dynamic": lambda: _llama(
        max_position_embeddings=32, rope_parameters=_rope("dynamic", factor=4.0)
    ),
    # Another table from the 33rd token on; the two differ far more than in released models.
    "longrope": lambda: _llama(
        rope_parameters=_rope(
            "longrope",
            factor=4.0,
            short_factor=[1 + 0.05 * i for i in range(8)],
            long_factor=[1 + 0.7 * i for i in range(8)],
            original_max_position_embeddings=32,
        ),
    ),
    "mistral": lambda: tf.MistralConfig(**_LLAMA, sliding_window=16),
    "qwen2": lambda: tf.Qwen2Config(**_LLAMA),
    "qwen3": lambda: tf.Qwen3Config(**_LLAMA, head_dim=32),
    "gemma2": lambda: tf.Gemma2Config(**_LLAMA, head_dim=16, sliding_window=16),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_LLAMA,
        head_dim=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": lambda: tf.PhiConfig(**_LLAMA),
    "phi3": lambda: tf.Phi3Config(**_LLAMA),
    "gpt-oss": lambda: tf.GptOssConfig(
        **_LLAMA,
        head_dim=16,
        num_local_experts=4,
        sliding_window=16,
        rope_parameters=_rope("default"),
    ),
    "cohere": lambda: tf.CohereConfig(**_LLAMA),
    "cohere2": lambda: tf.Cohere2Config(**{**_LLAMA, "num_hidden_layers": 4}, sliding_window=16),
    "glm": lambda: tf.GlmConfig(**_LLAMA, head_dim=16),
    "smollm3": lambda: tf.SmolLM3Config(**{**_LLAMA, "num_hidden_layers": 4}),
    "stablelm": lambda: tf.StableLmConfig(**_LLAMA),
    "mixtral": lambda: tf.MixtralConfig(**_LLAMA, num_local_experts=4),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(
        **_LLAMA, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "olmo2": lambda: tf.Olmo2Config(**_LLAMA),
    "granite": lambda: tf.GraniteConfig(**_LLAMA),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**_NEOX, intermediate_size=96),
    "gptj": lambda: tf.GPTJConfig(**_GPT, rotary_dim=8, n_positions=512),
    "gpt2": lambda: tf.GPT2Config(**_GPT, n_positions=512),
    "opt": lambda: tf.OPTConfig(
        **_NEOX, ffn_dim=96, max_position_embeddings=512, word_embed_proj_dim=64
    ),
    "falcon": lambda: tf.FalconConfig(**_NEOX, multi_query=True, alibi=False),
    "falcon-gqa": lambda: tf.FalconConfig(
        **_NEOX, num_kv_heads=2, new_decoder_architecture=True, alibi=False
    ),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=3, n_head=4),
    "gpt-bigcode": lambda: tf.GPTBigCodeConfig(**_GPT, n_positions=512, multi_query=True),
}
_THREE_HEADS = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
_WIDE = {**_LLAMA, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
_WIDE_MHA = {**_WIDE, "num_key_value_heads": 2}
_WIDE_GPT = {**_GPT, "n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 512}
_WIDE_NEOX = {**_NEOX, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def _wide(**changes: Any) -> tf.LlamaConfig:
    return tf.LlamaConfig(**{**_LLAMA, "num_hidden_layers": 2, "head_dim": 64, **changes})


WIDE: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "wide-llama": _wide,
    "wide-llama-80": lambda: _wide(head_dim=80),
    "wide-llama-128": lambda: _wide(head_dim=128, num_key_value_heads=4),
    "wide-llama-mqa": lambda: _wide(num_key_value_heads=1),
    "wide-llama-gqa": lambda: _wide(**_THREE_HEADS),
    "wide-llama3-rope": lambda: _wide(
        rope_parameters=_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "wide-yarn": lambda: _wide(
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=128)
    ),
    "wide-dynamic": lambda: _wide(
        max_position_embeddings=32, rope_parameters=_rope("dynamic", factor=4.0)
    ),
    "wide-mistral": lambda: tf.MistralConfig(
        **{**_LLAMA, "num_hidden_layers": 2}, head_dim=64, sliding_window=16
    ),
    "wide-mistral-gqa": lambda: tf.MistralConfig(
        **{**_LLAMA, "num_hidden_layers": 2, **_THREE_HEADS},
        head_dim=64,
        sliding_window=16,
    ),
    "wide-qwen2": lambda: tf.Qwen2Config(**{**_WIDE, "num_key_value_heads": 1}),
    "wide-qwen3": lambda: tf.Qwen3Config(**_LLAMA, head_dim=64),
    "wide-gemma2": lambda: tf.Gemma2Config(
        **{**_LLAMA, "num_hidden_layers": 2},
        head_dim=64,
        sliding_window=16,
        attn_logit_softcapping=2.0,
        # Some versions of transformers run it with sdpa, which leaves the soft cap out.
        attn_implementation="eager",
    ),
    "wide-gemma3": lambda: tf.Gemma3TextConfig(
        **_LLAMA,
        head_dim=64,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "wide-gpt-oss": lambda: tf.GptOssConfig(
        **{**_LLAMA, "num_hidden_layers": 2},
        head_dim=64,
        num_local_experts=4,
        sliding_window=16,
        rope_parameters=_rope("default"),
    ),
    "wide-phi": lambda: tf.PhiConfig(**_WIDE_MHA),
    "wide-phi-yarn": lambda: tf.PhiConfig(
        **_WIDE_MHA,
        rope_parameters=_rope(
            "yarn", factor=4.0, original_max_position_embeddings=128, partial_rotary_factor=0.5
        ),
    ),
    "wide-cohere": lambda: tf.CohereConfig(**_WIDE_MHA),
    "wide-cohere2": lambda: tf.Cohere2Config(
        **{**_WIDE_MHA, "num_hidden_layers": 4}, sliding_window=16
    ),
    "wide-glm": lambda: tf.GlmConfig(**{**_LLAMA, "num_hidden_layers": 2}, head_dim=64),
    "wide-smollm3": lambda: tf.SmolLM3Config(**{**_WIDE_MHA, "num_hidden_layers": 4}),
    "wide-mixtral": lambda: tf.MixtralConfig(**_WIDE_MHA, num_local_experts=4),
    "wide-gpt-neox": lambda: tf.GPTNeoXConfig(**_WIDE_NEOX, intermediate_size=96),
    "wide-gpt2": lambda: tf.GPT2Config(**_WIDE_GPT),
    "wide-gptj": lambda: tf.GPTJConfig(**_WIDE_GPT, rotary_dim=32),
    "wide-gpt-bigcode": lambda: tf.GPTBigCodeConfig(**_WIDE_GPT, multi_query=True),
    "wide-opt": lambda: tf.OPTConfig(
        **_WIDE_NEOX, ffn_dim=96, max_position_embeddings=512, word_embed_proj_dim=128
    ),
    "wide-bloom": lambda: tf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=128, n_layer=2, n_head=2
    ),
}
"""The same architectures with heads as wide as the kernels take."""
_SHARING: dict[str, Any] = {
    **_LLAMA,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}
SHARING: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "gemma3n": lambda: tf.Gemma3nTextConfig(
        **_SHARING, head_dim=16, laurel_rank=8, activation_sparsity_pattern=[0.0] * 6
    ),
    "gemma4": lambda: tf.Gemma4TextConfig(**_SHARING, head_dim=16, global_head_dim=32),
}
"""The last three of six layers read the keys and values of the first three."""
ALIBI = frozenset({"bloom"})
"""Architectures that place tokens by a bias computed from the number of keys."""


def tiny(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
) -> tf.PreTrainedModel:
    """A model of architecture `name` with weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    config = (CONFIGS | WIDE | SHARING)[name]()
    config.vocab_size = vocabulary
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            elif parameter.dim() == 1:
                # Norm weights of one and biases of zero would hide a mistake in either.
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False).to(dtype)


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)

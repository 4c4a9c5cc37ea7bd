"""Windows: what is in them, that they repeat, and that they never overlap."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from cqtool.data import TextSource, load_windows
from cqtool.data import windows as windows_module
from cqtool.errors import DataError


@pytest.fixture
def source(tiny_text_file: Path) -> TextSource:
    return TextSource(str(tiny_text_file), split="all")


@pytest.fixture
def bos_tokenizer(tiny_model_dir: Path):
    """The tiny tokenizer, changed to put <s> in front of a text as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_sequential_windows_are_the_text_from_its_start(
    source: TextSource, tiny_tokenizer, tiny_text: str
) -> None:
    whole = tiny_tokenizer.backend_tokenizer.encode(tiny_text).ids
    found = load_windows(source, tiny_tokenizer, sequences=7, length=128, order="sequential")
    assert found.ids.dtype == torch.int64
    assert found.ids.flatten().tolist() == whole[: 7 * 128]


def test_all_of_a_text_can_be_used(tiny_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("abc " * 500, encoding="utf-8")
    tokens = tiny_tokenizer.backend_tokenizer.encode("abc " * 500).ids
    found = load_windows(
        TextSource(str(path), split="all"),
        tiny_tokenizer,
        sequences=len(tokens) // 10,
        length=10,
        order="sequential",
    )
    assert found.ids.flatten().tolist() == tokens[: len(tokens) // 10 * 10]


@pytest.mark.parametrize("pool", [40_000, 8_000_000])
def test_random_windows_are_disjoint_pieces_of_the_text(
    source: TextSource, tiny_tokenizer, tiny_text: str, monkeypatch: pytest.MonkeyPatch, pool: int
) -> None:
    monkeypatch.setattr(windows_module, "_POOL_CHARACTERS", pool)
    whole = np.array(tiny_tokenizer.backend_tokenizer.encode(tiny_text).ids)
    found = load_windows(source, tiny_tokenizer, sequences=20, length=64, order="random")
    views = np.lib.stride_tricks.sliding_window_view(whole, 64)
    starts = []
    for row in found.ids.numpy():
        places = np.flatnonzero((views == row).all(axis=1))
        assert len(places) == 1  # 64 tokens of this text occur once
        starts.append(int(places[0]))
    assert min(np.diff(sorted(starts))) >= 64
    assert max(starts) > len(whole) // 2 or pool == 40_000


def test_same_seed_same_windows_other_seed_others(source: TextSource, tiny_tokenizer) -> None:
    def draw(seed: int):
        return load_windows(
            source, tiny_tokenizer, sequences=8, length=64, seed=seed, order="random"
        )

    first, again, other = draw(3), draw(3), draw(4)
    assert torch.equal(first.ids, again.ids)
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert not torch.equal(first.ids, other.ids)


def test_digest_is_that_of_shape_and_little_endian_ids(source: TextSource, tiny_tokenizer) -> None:
    found = load_windows(source, tiny_tokenizer, sequences=3, length=16, order="sequential")
    packed = b"".join(int(i).to_bytes(8, "little") for i in found.ids.flatten())
    assert found.digest == hashlib.sha256(b"3x16:" + packed).hexdigest()


def test_source_says_where_the_text_is_from(source: TextSource, tiny_tokenizer) -> None:
    found = load_windows(source, tiny_tokenizer, sequences=2, length=32, seed=5, order="random")
    assert found.source == {
        "dataset": source.dataset,
        "config": None,
        "split": "all",
        "column": "text",
        "revision": None,
        "order": "random",
        "seed": 5,
        "documents": 1,
        "tokens_available": found.source["tokens_available"],
    }
    assert found.source["tokens_available"] > 60_000


def test_documents_are_joined_by_an_empty_line(tiny_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first text", encoding="utf-8")
    (tmp_path / "b.txt").write_text("second text", encoding="utf-8")
    source = TextSource(str(tmp_path), split="all")
    found = load_windows(source, tiny_tokenizer, sequences=1, length=9, order="sequential")
    assert "first text\n\nsecond text".startswith(tiny_tokenizer.decode(found.ids[0]))
    assert found.source["documents"] == 2


def test_each_window_begins_with_the_tokenizers_own_bos(
    source: TextSource, tiny_tokenizer, bos_tokenizer
) -> None:
    plain = load_windows(source, tiny_tokenizer, sequences=1, length=300, order="sequential")
    found = load_windows(source, bos_tokenizer, sequences=3, length=101, order="sequential")
    assert (found.ids[:, 0] == bos_tokenizer.bos_token_id).all()
    assert found.ids[:, 1:].flatten().tolist() == plain.ids.flatten().tolist()


def test_a_long_text_causes_no_warning(
    source: TextSource, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.model_max_length = 64
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # transformers' loggers do not propagate
    try:
        load_windows(source, tokenizer, sequences=2, length=64, order="sequential")
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_too_little_text_says_how_much_there_is(tiny_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("only a few words here", encoding="utf-8")
    count = len(tiny_tokenizer.backend_tokenizer.encode("only a few words here").ids)
    source = TextSource(str(path), split="all")
    with pytest.raises(DataError, match=f"has {count} tokens, but 4 sequences of 512 need 2048"):
        load_windows(source, tiny_tokenizer, sequences=4, length=512, order="random")
    with pytest.raises(DataError, match=f"at most {count // 4} sequences"):
        load_windows(source, tiny_tokenizer, sequences=100, length=4, order="sequential")


def test_empty_text(tiny_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="is empty"):
        load_windows(
            TextSource(str(path), split="all"),
            tiny_tokenizer,
            sequences=1,
            length=8,
            order="random",
        )

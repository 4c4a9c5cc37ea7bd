"""What tasks of lm-evaluation-harness that make their prompts are told: tokenizer and length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from tempfile import TemporaryDirectory

from cqtool.models.load import OpenedModel
from cqtool.quality.text import context_limit

PROMPT_TOKENS = 4096
"""Tokens of a prompt of RULER and its answer, unless told otherwise."""

_BESIDE_PROMPT = 64
"""RULER counts neither the beginning of the answer nor what a tokenizer puts in front."""


def prompt_length(opened: OpenedModel, context: int | None) -> dict[str, list[int]]:
    """How long prompts are, in RULER's words; nothing where they are as long as it would make
    them, because other tasks read the same words in another way."""
    limit, length = context_limit(opened), context or PROMPT_TOKENS
    if limit is not None:
        length = min(length, limit - _BESIDE_PROMPT)
    return {} if length == PROMPT_TOKENS else {"max_seq_lengths": [length]}


@contextmanager
def tokenizer_folder(opened: OpenedModel) -> Iterator[str]:
    """A folder with the model's tokenizer, which the harness reads by a name.

    The model's own name will not do: it may be of a GGUF file or the demo model, or miss the
    revision. The harness runs whatever code a tokenizer names, so one that transformers itself
    can build names none.
    """
    tokenizer = deepcopy(opened.tokenizer)
    if not type(tokenizer).__module__.startswith("transformers_modules"):
        tokenizer.init_kwargs.pop("auto_map", None)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield folder

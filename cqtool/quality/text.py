"""The text that formats are measured on."""

from __future__ import annotations

from cqtool.data import load_windows, resolve_source
from cqtool.data.windows import TokenWindows
from cqtool.models.load import OpenedModel
from cqtool.quality.settings import CheckSettings


def context_limit(opened: OpenedModel) -> int | None:
    """Most tokens that the model takes, prompt and answer together; None where it does not say."""
    text = opened.model.config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    return limit


def evaluation_windows(opened: OpenedModel, settings: CheckSettings) -> TokenWindows:
    """Token windows ``[windows, window_length]`` from the beginning of the text.

    Raises:
        DataError: the text is missing, empty, or too short.
    """
    source = resolve_source(
        settings.dataset,
        settings.split,
        model=opened.name,
        role="evaluation",
        config=settings.config,
        column=settings.column,
        revision=settings.text_revision,
    )
    return load_windows(
        source,
        opened.tokenizer,
        sequences=settings.windows,
        length=settings.window_length,
        order="sequential",
    )

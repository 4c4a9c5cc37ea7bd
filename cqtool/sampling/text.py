"""The text that a recipe samples a model on."""

from __future__ import annotations

from cqtool.data import load_windows, resolve_source
from cqtool.data.windows import TokenWindows
from cqtool.models.load import OpenedModel
from cqtool.recipe import CalibrationText


def calibration_windows(opened: OpenedModel, text: CalibrationText) -> TokenWindows:
    """Token windows ``[sequences, sequence_length]`` drawn from all over the text.

    Raises:
        DataError: the text is missing, empty, or too short.
    """
    source = resolve_source(
        text.dataset,
        text.split,
        model=opened.name,
        role="calibration",
        config=text.config,
        column=text.column,
        revision=text.revision,
    )
    return load_windows(
        source,
        opened.tokenizer,
        sequences=text.sequences,
        length=text.sequence_length,
        seed=text.seed,
        order="random",
    )

"""The text that codebooks are tuned on: the calibration's own, more of it."""

from __future__ import annotations

from cqtool.data.windows import TokenWindows
from cqtool.models.load import OpenedModel
from cqtool.recipe import Recipe
from cqtool.sampling import calibration_windows


def tuning_windows(opened: OpenedModel, recipe: Recipe) -> TokenWindows:
    """Token windows of `recipe`, which has `tuning`: those to train on, then the held-out ones.

    Raises:
        DataError: a text is missing, empty, or too short; or two have text in common.
    """
    settings = recipe.tuning
    assert settings is not None
    amount = {
        "sequences": settings.sequences + settings.held_out,
        "sequence_length": settings.sequence_length,
        "seed": settings.seed,
    }
    return calibration_windows(opened, recipe.calibration.model_copy(update=amount))

"""Names that may appear in public: Hub ids as they are, local paths by their last part."""

from __future__ import annotations

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from cqtool.errors import RecipeError
from cqtool.layout.config import CQConfig
from cqtool.models.names import is_hub_id

_MAX_NAME = 96


def public_name(name: str) -> str:
    """`name` if it is a Hub id, else its last part: a path says where somebody keeps files."""
    if is_hub_id(name):
        return name
    return name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or "model"


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be a repository.

    Raises:
        RecipeError: `repo_id` is not of the form ORG/NAME or NAME.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(
            f"'{repo_id}' cannot be a Hub repository; write --repo-id ORG/NAME with letters, "
            "digits, '-', '_' and '.'."
        ) from error


def default_repo_name(config: CQConfig) -> str:
    """The name of a repository for an artifact, for example ``SmolLM2-135M-cq-8c8b``."""
    base = re.sub(r"[^A-Za-z0-9._]+", "-", public_name(config.base_model.id).rsplit("/", 1)[-1])
    ending = f"-{config.cache.name}"
    return base[: _MAX_NAME - len(ending)].strip("-.") + ending

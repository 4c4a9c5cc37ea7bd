"""What users call models and data sets: Hub ids, paths, or ``demo``."""

from __future__ import annotations

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

_DATA_FILE = re.compile(r"\.(txt|jsonl|json|parquet|gguf)$", re.IGNORECASE)


def is_hub_id(name: str) -> bool:
    """Whether `name` is spelled like a repository of the Hub, and not like a path or ``demo``."""
    if name == "demo" or _DATA_FILE.search(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True

"""The license of a base model, as its model card's metadata name it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class License:
    """The three fields that the Hub has for it.

    Attributes:
        id: ``license``, a name of the Hub's list; ``other`` for what is not on it.
        name: ``license_name``, what a license that is not on the list is called.
        link: ``license_link``, where its text is: an address, or a file of the model's repository.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None

    @property
    def more(self) -> dict[str, str]:
        """What there is beside the id, by the names of the Hub's fields."""
        fields = {"license_name": self.name, "license_link": self.link}
        return {field: value for field, value in fields.items() if value is not None}


def read_license(path: str, revision: str | None = None) -> License:
    """The license of the model in a folder or repository; a missing or odd card is no error.

    Args:
        path: local folder, or Hub id.
        revision: of a repository.
    """
    import yaml
    from huggingface_hub import hf_hub_download, metadata_load
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        card = Path(path) / "README.md"
        if not Path(path).is_dir():
            card = Path(hf_hub_download(path, "README.md", revision=revision))
        found = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError, HfHubHTTPError, HFValidationError):
        return License()
    return _license(found or {})


def _license(metadata: dict[str, Any]) -> License:
    given = metadata.get("license")
    several = [one for one in map(_text, given if isinstance(given, list) else [given]) if one]
    name, link = (_text(metadata.get(field)) for field in ("license_name", "license_link"))
    if len(several) > 1:
        # The Hub's field takes one; what it calls a license of one's own has room for all.
        return License("other", name or "-".join(several), link)
    return License(several[0] if several else None, name, link)


def _text(value: Any) -> str | None:
    return (" ".join(value.split()) or None) if isinstance(value, str) else None

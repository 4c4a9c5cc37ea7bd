"""cqtool: release LLM KV caches at 1 to 4 bits per channel.

Importing the package imports no torch; :class:`cqtool.CQCache` is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cqtool.cache import CQCache

__version__ = "0.1.0"
__all__ = ["CQCache", "__version__"]


def __getattr__(name: str) -> object:
    """Load :class:`CQCache` (and torch with it) only when somebody asks for it."""
    if name == "CQCache":
        from cqtool.cache import CQCache

        return CQCache
    raise AttributeError(f"module 'cqtool' has no attribute {name!r}")

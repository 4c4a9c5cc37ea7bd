"""The transformers cache built on codebooks. Imports torch, transformers and safetensors only."""

from cqtool.cache.cache import CQCache
from cqtool.cache.codec import CQCodec, TokenCodec
from cqtool.cache.format import CacheFormat, LayerCodecs

__all__ = ["CQCache", "CQCodec", "CacheFormat", "LayerCodecs", "TokenCodec"]

"""Samples that formats are fitted to, written once for all tests that read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from scheme_samples import HEADS, TOKENS, layer_samples

from cqtool.schemes.scheme import LayerSamples


@pytest.fixture(scope="session")
def samples_of(tmp_path_factory) -> Callable[..., LayerSamples]:
    """(dim, tokens, heads) -> samples and gradients of one layer."""

    @cache
    def made(dim: int, tokens: int = TOKENS, heads: int = HEADS) -> LayerSamples:
        return layer_samples(tmp_path_factory.mktemp("samples"), dim, tokens, heads)

    return made

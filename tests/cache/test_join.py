"""Several caches become one: the rows of a large batch prefilled some at a time."""

from __future__ import annotations

import pytest
import torch
from formats import kernel_format
from zoo import WIDE, random_ids, tiny

from cqtool.cache import CQCache

ARCHITECTURE = next(name for name in WIDE if "llama" in name)


@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("window, sinks", [(0, 0), (5, 2)])
def test_joined_rows_go_on_as_if_they_had_been_together(
    implementation: str, window: int, sinks: int
) -> None:
    model = tiny(ARCHITECTURE)
    format = kernel_format(model, window=window, sinks=sinks)
    ids, more = random_ids(5, 20), random_ids(5, 6, seed=1)
    together = CQCache(format, model, implementation)
    parts = [CQCache(format, model, implementation) for _ in range(3)]
    rows = [slice(0, 2), slice(2, 4), slice(4, 5)]
    with torch.no_grad():
        model(ids, past_key_values=together)
        for part, row in zip(parts, rows, strict=True):
            model(ids[row], past_key_values=part)
        joined = CQCache.join(parts)
        assert joined is parts[0]
        assert [part.get_seq_length() for part in parts] == [20, 0, 0]
        assert joined.nbytes == together.nbytes
        for step in range(6):
            token = more[:, step : step + 1]
            expected = model(token, past_key_values=together).logits
            found = model(token, past_key_values=joined).logits
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_caches_of_unlike_length_are_refused() -> None:
    model = tiny(ARCHITECTURE)
    format = kernel_format(model)
    parts = [CQCache(format, model, "reference") for _ in range(2)]
    with torch.no_grad():
        for part, length in zip(parts, (4, 5), strict=True):
            model(random_ids(1, length), past_key_values=part)
    with pytest.raises(ValueError, match="same length"):
        CQCache.join(parts)


def test_a_row_without_padding_does_not_join_rows_with_it() -> None:
    model = tiny(ARCHITECTURE)
    format = kernel_format(model)
    padded, plain = (CQCache(format, model, "fused") for _ in range(2))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(random_ids(2, 6), attention_mask=mask, position_ids=positions, past_key_values=padded)
        model(random_ids(1, 6), past_key_values=plain)
    with pytest.raises(ValueError, match="padding"):
        CQCache.join([padded, plain])


def test_caches_with_unlike_reserves_join() -> None:
    model = tiny(ARCHITECTURE)
    format = kernel_format(model)
    ids, steps = random_ids(2, 250), random_ids(2, 20, seed=1)
    together, grown, short = (CQCache(format, model, "fused") for _ in range(3))
    with torch.no_grad():
        model(torch.cat((ids, steps), dim=1), past_key_values=together)
        model(ids[:1], past_key_values=grown)
        for step in range(20):
            model(steps[:1, step : step + 1], past_key_values=grown)
        model(torch.cat((ids, steps), dim=1)[1:], past_key_values=short)
        joined = CQCache.join([grown, short])
        next_token = random_ids(2, 1, seed=2)
        found = model(next_token, past_key_values=joined).logits
        expected = model(next_token, past_key_values=together).logits
    torch.testing.assert_close(found[1], expected[1], rtol=2e-5, atol=2e-5)

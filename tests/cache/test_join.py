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


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_a_joined_cache_has_the_room_it_is_given_and_its_parts_only_theirs(
    implementation: str,
) -> None:
    model = tiny(ARCHITECTURE)
    format = kernel_format(model)
    ids, more = random_ids(5, 20), random_ids(5, 40, seed=1)
    parts = [CQCache(format, model, implementation, max_cache_len=20) for _ in range(3)]
    whole = CQCache(format, model, implementation, max_cache_len=60)
    rows = [slice(0, 2), slice(2, 4), slice(4, 5)]
    with torch.no_grad():
        model(ids, past_key_values=whole)
        for part, row in zip(parts, rows, strict=True):
            model(ids[row], past_key_values=part)
        joined = CQCache.join(parts, max_cache_len=60)
        assert joined.nbytes == whole.nbytes
        if implementation == "fused":
            stores = [layer.parts[0].stores["key"] for layer in joined.layers]  # type: ignore[attr-defined]
            before = [store.tiles for store in stores]
            assert {tiles.shape[2] for tiles in before} == {4}
        for step in range(40):
            token = more[:, step : step + 1]
            expected = model(token, past_key_values=whole).logits
            found = model(token, past_key_values=joined).logits
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        if implementation == "fused":
            assert all(a is b.tiles for a, b in zip(before, stores, strict=True))


def test_one_cache_alone_is_joined_with_more_room() -> None:
    model = tiny(ARCHITECTURE)
    cache = CQCache(kernel_format(model), model, "fused", max_cache_len=9)
    ids = random_ids(1, 9)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        joined = CQCache.join([cache], max_cache_len=100)
        joined.batch_repeat_interleave(3)
        assert joined.layers[0].parts[0].stores["value"].tiles.shape[::2] == (3, 7)  # type: ignore[attr-defined]
        token = random_ids(1, 1, seed=1)
        found = model(token.expand(3, 1), past_key_values=joined).logits
        other = CQCache(kernel_format(model), model, "fused")
        model(ids, past_key_values=other)
        expected = model(token, past_key_values=other).logits
    torch.testing.assert_close(found, expected.expand_as(found), rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="max_cache_len=-1"):
        CQCache.join([joined], max_cache_len=-1)


def test_rows_with_and_without_a_ring_join() -> None:
    # A pass over a few tokens leaves room for such passes behind, a prompt does not.
    model = tiny(ARCHITECTURE)
    format = kernel_format(model)
    ids, more = random_ids(2, 24), random_ids(2, 5, seed=1)
    together, first, second = (CQCache(format, model, "fused") for _ in range(3))
    with torch.no_grad():
        model(ids, past_key_values=together)
        model(ids[:1], past_key_values=first)
        model(ids[1:, :20], past_key_values=second)
        model(ids[1:, 20:], past_key_values=second)
        joined = CQCache.join([first, second])
        assert joined.layers[0].keys.shape[:3] == (2, 2, 8)
        for tokens in more.split((1, 4), dim=1):
            expected = model(tokens, past_key_values=together).logits
            found = model(tokens, past_key_values=joined).logits
            # The second row's last four tokens came to their keys by codes.
            torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=2e-5)


def test_caches_that_were_cropped_or_made_in_another_way_are_refused() -> None:
    model = tiny(ARCHITECTURE)
    format = kernel_format(model, window=4)
    ids = random_ids(1, 12)
    fused, cropped = (CQCache(format, model, "fused") for _ in range(2))
    reference = CQCache(format, model, "reference")
    with torch.no_grad():
        for cache in (fused, reference):
            model(ids, past_key_values=cache)
        model(torch.cat((ids, ids[:, :2]), dim=1), past_key_values=cropped)
    cropped.crop(-2)
    with pytest.raises(ValueError, match="same history"):
        CQCache.join([fused, cropped])
    with pytest.raises(ValueError, match="one implementation"):
        CQCache.join([fused, reference])
    assert fused.get_seq_length() == cropped.get_seq_length() == 12

"""Layers whose heads have codes of their own: on the kernels they give the reference's logits.

The reference decodes each head with its own codec, so it knows nothing of the parts that kernels
take at once.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from formats import by_head, by_head_format, in_metrics, kernel_format, regrouped
from zoo import random_ids, tiny

from cqtool.cache import CQCache, CQCodec, LayerCodecs
from cqtool.cache.codec import HeadsCodec
from cqtool.cache.fused import FusedLayer
from cqtool.cache.head_parts import head_parts
from cqtool.errors import KernelsUnavailable
from cqtool.schemes.scalar import IntCodec


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def feed(model, cache, ids, sizes, mask=None):
    """Passes over `sizes` tokens one after the other; all logits."""
    logits, done, options = [], 0, {}
    for size in sizes:
        part = slice(done, done := done + size)
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, part]
            options = {"attention_mask": mask[:, :done], "position_ids": positions}
        with torch.no_grad():
            logits.append(model(input_ids=ids[:, part], past_key_values=cache, **options).logits)
    return torch.cat(logits, dim=1)


def same(model, format, drive):
    """Drives a reference and a fused cache; their logits must agree. Returns the latter."""
    reference, fused = CQCache(format, model, "reference"), CQCache(format, model, "fused")
    assert (reference.implementation, fused.implementation) == ("reference", "fused")
    expected, found = drive(reference), drive(fused)
    assert fused.get_seq_length() == reference.get_seq_length()
    assert fused.nbytes_full == reference.nbytes_full
    close(found, expected)
    return fused


@pytest.mark.parametrize("name", ["wide-llama-gqa", "wide-mistral-gqa"])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 2)])
def test_prompts_steps_and_passes_over_several_tokens(name, window, sinks, attended):
    model = tiny(name)
    sizes = [40, 1, 1, 5, *[1] * 12, 12, 8, 1]
    ids, mask = random_ids(2, sum(sizes)), torch.ones(2, sum(sizes), dtype=torch.long)
    mask[1, :5] = 0
    format = by_head_format(model, window=window, sinks=sinks)
    # What padding attends to is nobody's business.
    fused = same(model, format, lambda cache: feed(model, cache, ids, sizes, mask)[:, 5:])
    assert [len(layer.parts) for layer in fused.layers] == [2, 2]
    # Once a layer and pass; in the passes over 40 and 12 everything is decoded.
    few = [1, 1, 5, *[1] * 12, 8, 1]
    assert attended == [(layer, new) for new in few for layer in (0, 1)]


@pytest.mark.parametrize("keys", ["random", "pairs", "mixed"])
def test_groups_and_metrics_of_each_head(keys, attended):
    model, ids = tiny("wide-llama-gqa"), random_ids(1, 30)
    wide, narrow = (
        in_metrics(regrouped(kernel_format(model, key=key, value=(8, 8), window=3), keys))
        for key in ((8, 8), (4, 8))
    )
    # "mixed" leaves the first head's groups contiguous; the other of its part has other ones.
    format = by_head([[wide, narrow, wide], [narrow, wide, wide]])
    same(model, format, lambda cache: feed(model, cache, ids, [20, *[1] * 10]))
    assert len(attended) == 10 * 2


@pytest.mark.parametrize("name", ["wide-llama-gqa", "wide-mistral-gqa"])
def test_cropping_back_and_going_on(name):
    model, ids = tiny(name), random_ids(1, 60)

    def drive(cache):
        logits = [feed(model, cache, ids, [13, 1, 1])]
        if name == "wide-mistral-gqa":
            cache.activate_past_recording()
        for removed, size in ((3, 5), (4, 8), (7, 1)):
            logits.append(feed(model, cache, ids[:, removed:], [6, size]))
            cache.crop(-removed)
            logits.append(feed(model, cache, ids[:, 2 * size :], [1, 1]))
        cache.reset()
        assert cache.nbytes == 0
        logits.append(feed(model, cache, ids, [9, 1, 1]))
        return torch.cat(logits, dim=1)

    same(model, by_head_format(model, window=3, sinks=2), drive)


@pytest.mark.parametrize("name", ["wide-llama-gqa", "wide-mistral-gqa"])
def test_rows_are_reordered_repeated_and_selected(name):
    model, ids = tiny(name), random_ids(2, 60)

    def drive(cache):
        feed(model, cache, ids, [20, 1])
        cache.reorder_cache(torch.tensor([1, 0]))
        logits = [feed(model, cache, ids[:, 21:], [1, 2])[0]]
        cache.batch_repeat_interleave(2)
        logits.append(feed(model, cache, ids[[0, 1, 1, 0], 24:], [1, 1])[1])
        cache.batch_select_indices(torch.tensor([3, 1]))
        logits.append(feed(model, cache, ids[:, 26:], [1] * 20)[0])
        return torch.cat(logits)

    same(model, by_head_format(model, window=4, sinks=1), drive)


def test_beams_and_drafts_write_what_the_reference_writes():
    model = tiny("wide-mistral-gqa")
    prompt = random_ids(1, 12).repeat(1, 2)
    format = by_head_format(model, window=6, sinks=1)
    for more in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        texts = [
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=CQCache(format, model, implementation),
                max_new_tokens=20,
                do_sample=False,
                **more,
            )
            for implementation in ("reference", "fused")
        ]
        assert torch.equal(*texts)


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_joined_rows_go_on_as_if_they_had_been_together(implementation):
    model = tiny("wide-llama-gqa")
    format = by_head_format(model, window=5, sinks=2)
    ids, more = random_ids(3, 20), random_ids(3, 6, seed=1)
    together, first, second = (CQCache(format, model, implementation) for _ in range(3))
    feed(model, together, ids, [20])
    feed(model, first, ids[:2], [20])
    feed(model, second, ids[2:], [20])
    joined = CQCache.join([first, second])
    assert joined is first and joined.nbytes == together.nbytes
    assert second.get_seq_length() == 0 and second.nbytes == 0
    sizes = [1, 1, 3, 1]
    close(feed(model, joined, more, sizes), feed(model, together, more, sizes))


def test_caches_made_in_another_way_do_not_join():
    model = tiny("wide-llama-gqa")
    format = by_head_format(model)
    caches = [CQCache(format, model, each) for each in ("fused", "reference")]
    for cache in caches:
        feed(model, cache, random_ids(1, 9), [9])
    with pytest.raises(ValueError, match="one implementation"):
        CQCache.join(caches)


def test_bfloat16_is_as_near_to_float32_as_the_reference_is(attended):
    sizes = [40, *[1] * 12]
    ids = random_ids(2, sum(sizes))
    exact = tiny("wide-llama-gqa")
    format = by_head_format(exact, window=5, sinks=2)
    expected = feed(exact, CQCache(format, exact, "reference"), ids, sizes)
    model = tiny("wide-llama-gqa", dtype=torch.bfloat16)
    found, unavoidable = (
        feed(model, CQCache(format, model, each), ids, sizes).float()
        for each in ("fused", "reference")
    )
    error, limit = (float((each - expected).norm()) for each in (found, unavoidable))
    assert error < 1.2 * limit + 0.01 * float(expected.norm())
    assert len(attended) == 12 * 2


def test_what_is_counted_is_what_the_codes_of_each_head_take():
    model = tiny("wide-llama-gqa")
    cache = CQCache(by_head_format(model), model, "fused", max_cache_len=320)
    feed(model, cache, random_ids(1, 320), [320])
    # 64 channels: 8 groups of 8 bits each for keys and values, or 16 of 8 bits and 8 of 6 bits.
    code_bytes = {"a": 8 + 8, "b": 16 + 6}
    codes = 320 * sum(code_bytes[head] for head in "aba" + "bba")
    assert cache.nbytes == codes + 320 * 4 + 32 * 4  # positions and frequencies
    assert cache.nbytes_full == 320 * 2 * 3 * 2 * 64 * 4
    assert sum(layer.nbytes for layer in cache.layers) == codes
    held = [store.tiles.nbytes for layer in cache.layers for store in layer.stores]
    assert sum(held) == codes


@pytest.mark.parametrize("keys", [None, "mixed"])
def test_heads_with_the_same_code_are_the_plain_layer_to_the_last_bit(keys):
    model, ids = tiny("wide-llama-gqa"), random_ids(2, 40)
    plain = in_metrics(kernel_format(model, key=(4, 8), window=4, sinks=2))
    plain = plain if keys is None else regrouped(plain, keys)
    format = by_head([[plain] * 3] * 2)
    caches = [CQCache(each, model, "fused") for each in (plain, format)]
    expected, found = (feed(model, cache, ids, [20, 1, 5, 9, *[1] * 5]) for cache in caches)
    assert torch.equal(found, expected)
    assert caches[0].nbytes == caches[1].nbytes
    assert all(len(layer.parts) == 1 for layer in caches[1].layers)


@pytest.mark.parametrize("apart", ["key", "value"])
def test_heads_apart_in_keys_or_values_alone(apart, attended):
    model, ids = tiny("wide-llama-gqa"), random_ids(1, 30)
    format = by_head_format(model, window=2)
    whole = kernel_format(model, key=(8, 10), value=(8, 10)).layers
    layers = (
        LayerCodecs(own.key, one.value) if apart == "key" else LayerCodecs(one.key, own.value)
        for own, one in zip(format.layers, whole, strict=True)
    )
    mixed = replace(format, layers=tuple(layers))
    same(model, mixed, lambda cache: feed(model, cache, ids, [20, *[1] * 6]))
    assert len(attended) == 6 * 2


def test_caches_of_a_format_share_the_kernels_tables():
    model = tiny("wide-llama-gqa")
    format = by_head_format(model)
    caches = [CQCache(format, model, "fused") for _ in range(2)]
    for cache in caches:
        feed(model, cache, random_ids(1, 9), [9])
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        for part, again in zip(one.parts, other.parts, strict=True):
            assert part.kernels is again.kernels


def test_parts_hold_every_head_s_centroids_exactly_whatever_their_dtype():
    model = tiny("wide-llama-gqa")
    geometry = kernel_format(model).geometry.layers[0]
    torch.manual_seed(0)
    dtypes = (torch.float16, torch.bfloat16, torch.float16)
    books = [torch.randn(1, 8, 256, 8).to(dtype) for dtype in dtypes]
    codecs = LayerCodecs(
        HeadsCodec([CQCodec(book) for book in books]), CQCodec(torch.randn(3, 8, 256, 8))
    )
    (part,) = head_parts(geometry, codecs)
    assert part.heads == (0, 1, 2)
    for head, book in enumerate(books):
        assert torch.equal(part.codecs.key.codebook[head].double(), book[0].double())


def test_heads_that_no_kernel_serves_are_told():
    model = tiny("wide-llama-gqa")
    format = by_head_format(model)
    first = format.layers[0]
    gains = torch.linspace(0.1, 9, 256)[None]
    own = first.key.parts
    for words, changed in (
        ("gain for each token", CQCodec(own[1].codebook, gains=gains)),
        ("HeadsCodec has no kernel", IntCodec(8, 32)),
    ):
        layer = LayerCodecs(HeadsCodec([own[0], changed, own[2]]), first.value)
        with pytest.raises(KernelsUnavailable, match=words):
            CQCache(replace(format, layers=(layer,) * 2), model, "fused")
        mixed = CQCache(replace(format, layers=(layer, format.layers[1])), model, "fused")
        assert mixed.implementation == "fused in 1 of 2 layers"
        assert isinstance(mixed.layers[1], FusedLayer)


def test_a_pass_over_one_token_makes_no_mask(attended):
    model, ids = tiny("wide-llama-gqa"), random_ids(1, 12)
    masks = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")),
            with_kwargs=True,
        )
    cache = CQCache(by_head_format(model, window=3), model, "fused")
    masks.clear()
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, :2] = 0
    feed(model, cache, ids, [10, 1, 1], mask)
    assert [each is None for each in masks] == [False, False, True, True, True, True]

"""A cache that attends to its codes gives the logits of the reference cache, whatever happens.

On a CPU the kernels' ops run in plain torch, so everything around them is tested here.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from formats import RecordingCache, kernel_format, random_format, regrouped
from transformers import DynamicCache
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    sliding_window_causal_mask_function,
)
from zoo import WIDE, random_ids, tiny

from cqtool.cache import CacheFormat, CQCache, LayerCodecs
from cqtool.cache import cache as cache_module
from cqtool.cache import fused as fused_module
from cqtool.cache.attention import _Probe
from cqtool.errors import KernelsUnavailable
from cqtool.schemes.scalar import IntCodec

ELSEWHERE = {"wide-gptj", "wide-bloom", "wide-gpt-oss"}
"""Architectures with an attention of their own, which the kernels cannot stand in for."""


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def same(model, format, drive):
    """Drives a reference and a fused cache; their logits must agree. Returns the latter."""
    reference, fused = CQCache(format, model, "reference"), CQCache(format, model, "fused")
    with torch.no_grad():
        expected, found = drive(reference), drive(fused)
    assert fused.get_seq_length() == reference.get_seq_length()
    assert fused.nbytes_full == reference.nbytes_full
    close(found, expected)
    return fused


def feed(model, cache, ids, sizes, mask=None, **options):
    """Passes over `sizes` tokens one after the other; all logits."""
    logits, done = [], 0
    for size in sizes:
        part = slice(done, done + size)
        done += size
        if mask is not None:
            options["attention_mask"] = mask[:, :done]
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, part]
            options["position_ids"] = positions
        logits.append(model(input_ids=ids[:, part], past_key_values=cache, **options).logits)
    return torch.cat(logits, dim=1)


def padded(batch, tokens, *padding):
    mask = torch.ones(batch, tokens, dtype=torch.long)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return mask


@pytest.mark.parametrize("name", sorted(WIDE.keys() - ELSEWHERE - {"wide-phi-yarn"}))
def test_every_architecture_generates_with_the_references_logits(name, attended):
    model = tiny(name)
    ids, mask = random_ids(2, 20), padded(2, 20, 0, 6)

    def drive(cache):
        attended.clear()
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=21,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits)

    fused = same(model, kernel_format(model, window=5, sinks=2), drive)
    # A dynamic table changes behind token 32: from there on codes are decoded.
    passes = 12 if name == "wide-dynamic" else 20
    assert attended == [(layer, 1) for _ in range(passes) for layer in range(len(fused.layers))]


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_other_architectures_are_refused_or_left_to_the_reference(name):
    model = tiny(name)
    format = kernel_format(model)
    with pytest.raises(KernelsUnavailable, match="attention"):
        CQCache(format, model, "fused")
    assert CQCache(format, model).implementation == "reference"


@pytest.mark.parametrize(
    ("window", "sinks", "prompt"),
    [(0, 0, 9), (0, 2, 1), (3, 0, 9), (3, 2, 2), (40, 4, 9), (1, 20, 9), (8, 0, 1), (13, 3, 30)],
)
def test_windows_sinks_and_prompts_of_any_size(window, sinks, prompt, attended):
    model = tiny("wide-llama")
    ids = random_ids(2, prompt + 24)
    sizes = [prompt, *[1] * 24]
    format = kernel_format(model, window=window, sinks=sinks)
    same(model, format, lambda cache: feed(model, cache, ids, sizes))
    assert len(attended) == 2 * 24


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ((2, 8), (8, 8)),
        ((4, 8), (2, 8)),
        ((8, 10), (4, 8)),
        ((8, 8), (8, 10)),
        ((8, 6), (4, 8)),
        ((8, 8), (8, 6)),
    ],
)
def test_formats_of_keys_and_values_are_independent(key, value, attended):
    model = tiny("wide-qwen3")
    ids = random_ids(1, 30)
    format = kernel_format(model, key=key, value=value, window=2, sinks=1)
    same(model, format, lambda cache: feed(model, cache, ids, [20, 1, 1, 4, *[1] * 4]))
    assert len(attended) == 3 * 7


@pytest.mark.parametrize(
    ("name", "key", "keys", "pairing"),
    [
        ("wide-llama", (8, 8), "random", "scatter"),
        ("wide-llama", (8, 8), "pairs", "closed"),
        ("wide-llama", (4, 8), "mixed", "scatter"),
        ("wide-llama", (2, 8), "pairs", "scatter"),
        ("wide-llama", (4, 8), "shuffled", "paired"),
        ("wide-llama", (2, 8), "partners", "paired"),
        ("wide-llama", (8, 8), "partners", "paired"),
        ("wide-phi", (8, 8), "pairs", "closed"),
        ("wide-phi", (4, 8), "random", "scatter"),
        ("wide-cohere2", (8, 8), "pairs", "closed"),
        ("wide-gpt2", (8, 8), "random", "paired"),
    ],
)
@pytest.mark.parametrize("window", [0, 5])
def test_groups_of_any_channels_of_each_head(name, key, keys, pairing, window, attended):
    model = tiny(name)
    ids, mask = random_ids(2, 40), padded(2, 40, 0, 3)
    plain = kernel_format(model, key=key, window=window, sinks=1)
    format = regrouped(plain, keys)
    sizes = [15, 1, 1, 5, 12, *[1] * 5]
    fused = same(model, format, lambda cache: feed(model, cache, ids, sizes, mask)[:, 3:])
    turned = [layer for layer in fused.layers if layer.key_rotation.style != "none"]
    assert {
        part.kernels.tables.pairing for layer in turned or fused.layers for part in layer.parts
    } == {pairing}
    # In the pass over 12 tokens everything is decoded.
    assert {tokens for _, tokens in attended} == {1, 5}
    with torch.no_grad():
        grouped, contiguous = (
            feed(model, CQCache(one, model, "fused"), ids, [30, 1, 1]) for one in (format, plain)
        )
    assert not torch.allclose(grouped[:, -1], contiguous[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["wide-llama", "wide-mistral", "wide-gemma2", "wide-gpt2"])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("padding", [0, 5])
def test_passes_over_several_tokens_and_further_turns(name, window, padding, attended):
    model = tiny(name)
    sizes = [7, 2, 8, 1, 1, 5, 9, 1, 3, 30, 1, 8, 8, 1, 1]
    ids = random_ids(2, sum(sizes))
    mask = padded(2, sum(sizes), padding) if padding else None
    format = kernel_format(model, window=window, sinks=2)
    if mask is None:
        same(model, format, lambda cache: feed(model, cache, ids, sizes))
    else:
        # What padding attends to is nobody's business.
        same(model, format, lambda cache: feed(model, cache, ids, sizes, mask)[:, padding:])
    assert [tokens for layer, tokens in attended if layer == 0] == [
        2,
        8,
        1,
        1,
        5,
        1,
        3,
        1,
        8,
        8,
        1,
        1,
    ]


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 3), (40, 0), (4, 18)])
@pytest.mark.parametrize("prompt", [4, 70])
def test_a_sliding_layer_drops_what_it_has_passed(window, sinks, prompt, attended):
    model = tiny("wide-mistral")
    ids, mask = random_ids(2, prompt + 110), padded(2, prompt + 110, 0, 3)
    sizes = [prompt, *[1] * 100, 6, *[1] * 4]
    format = kernel_format(model, window=window, sinks=sinks)
    fused = same(model, format, lambda cache: feed(model, cache, ids, sizes, mask)[:, prompt:])
    assert len(attended) == 2 * 105
    layer = fused.layers[0]
    store = layer.parts[0].stores["key"]
    assert store.base > 0 and store.base % layer.unit == 0
    assert layer.capacity < min(window, 16 + 8) + 16
    assert store.end - store.base <= 16 + layer.unit + 8
    assert store.tiles.shape[2] <= 16, "the storage does not grow with the text"


def test_storage_is_moved_when_it_is_full(attended):
    model = tiny("wide-llama")
    ids = random_ids(1, 270)
    moved = set()

    def drive(cache):
        logits = [feed(model, cache, ids[:, :250], [250])[:, -1]]
        for token in ids[:, 250:].split(1, dim=1):
            logits.append(feed(model, cache, token, [1])[:, 0])
            if cache.implementation == "fused":
                moved.add(cache.layers[0].parts[0].stores["value"].tiles.shape[2])
        return torch.stack(logits)

    same(model, kernel_format(model, window=0, sinks=1), drive)
    assert moved == {16, 32}


def test_beam_search_follows_the_reference(attended):
    model = tiny("wide-qwen3")
    ids, mask = random_ids(2, 12), padded(2, 12, 0, 3)
    format = kernel_format(model, window=4, sinks=2)
    texts = [
        model.generate(
            ids,
            attention_mask=mask,
            past_key_values=CQCache(format, model, implementation),
            num_beams=3,
            max_new_tokens=12,
            do_sample=False,
        )
        for implementation in ("reference", "fused")
    ]
    assert torch.equal(*texts)
    assert len(attended) == 3 * 11


@pytest.mark.parametrize("name", ["wide-gemma3", "wide-gpt2"])
def test_rows_can_be_reordered_repeated_and_selected(name, attended):
    model = tiny(name)
    ids, mask = random_ids(3, 40), padded(3, 40, 0, 0, 6)
    order = torch.tensor([2, 0, 0, 1])
    changes = [
        lambda cache: cache.reorder_cache(order),
        lambda cache: cache.batch_select_indices(order),
        lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(2 * order)),
    ]
    format = kernel_format(model, window=2, sinks=1)
    for change in changes:

        def drive(cache, change=change):
            feed(model, cache, ids, [19, 1, 1], mask)
            change(cache)
            logits = []
            for done in range(21, 40):
                logits.append(
                    model(
                        input_ids=ids[order, done : done + 1],
                        attention_mask=mask[order, : done + 1],
                        position_ids=mask[order, : done + 1].sum(1, keepdim=True) - 1,
                        past_key_values=cache,
                    ).logits
                )
            return torch.cat(logits)

        attended.clear()
        fused = same(model, format, drive)
        assert len(attended) == 21 * len(fused.layers)


@pytest.mark.parametrize("name", ["wide-llama", "wide-mistral"])
def test_cropping_back_and_going_on(name, attended):
    model = tiny(name)
    ids = random_ids(1, 60)

    def drive(cache):
        logits = [feed(model, cache, ids, [13, 1, 1])]
        if name == "wide-mistral":
            cache.activate_past_recording()
        for removed, size in ((3, 5), (4, 8), (7, 1), (1, 2), (2, 4)):
            logits.append(feed(model, cache, ids[:, size:], [size]))
            logits.append(feed(model, cache, ids[:, removed:], [6, 1]))
            cache.crop(-removed)
            logits.append(feed(model, cache, ids[:, 2 * size :], [1, 1]))
        return torch.cat(logits, dim=1)

    same(model, kernel_format(model, window=3, sinks=2), drive)
    assert len(attended) == 2 * (2 + 5 * 5)


def test_cropping_to_nothing_and_what_is_gone():
    model = tiny("wide-mistral")
    cache = CQCache(kernel_format(model, window=2), model, "fused")
    with torch.no_grad():
        feed(model, cache, random_ids(1, 60), [60])
        with pytest.raises(RuntimeError, match="before the sliding window"):
            cache.crop(-30)
        with pytest.raises(ValueError, match="negative"):
            cache.crop(2)
    model = tiny("wide-llama")

    def drive(cache):
        feed(model, cache, random_ids(1, 12), [12])
        cache.crop(-100)
        assert cache.get_seq_length() == 0
        return feed(model, cache, random_ids(1, 12, seed=4), [5, 1, 1, 4, 1])

    same(model, kernel_format(model, window=2, sinks=3), drive)


@pytest.mark.parametrize("name", ["wide-llama", "wide-mistral", "wide-gemma3"])
def test_assisted_decoding_follows_the_reference(name, attended):
    model = tiny(name)
    prompt = random_ids(1, 12).repeat(1, 2)
    format = kernel_format(model, window=6, sinks=1)
    texts = []
    for implementation in ("reference", "fused"):
        cache, crops = CQCache(format, model, implementation), []
        crop = cache.crop
        cache.crop = lambda count, crop=crop, crops=crops: (crops.append(int(count)), crop(count))
        texts.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                prompt_lookup_num_tokens=4,
                max_new_tokens=30,
                do_sample=False,
            )
        )
        assert min(crops) < 0, "no draft was rejected"
    assert torch.equal(*texts)
    assert {tokens for _, tokens in attended} - {1}, "no pass had a draft in it"


def test_reset_and_two_caches_at_once(attended):
    model = tiny("wide-llama")
    format = kernel_format(model, window=2, sinks=1)
    ids, mask = random_ids(3, 30), padded(3, 30, 0, 4)

    def drive(cache):
        other = CQCache(format, model, cache.implementation)
        logits = [feed(model, cache, ids[:1], [9, 1, 1])]
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes == 0
        logits.append(feed(model, other, ids[1:2], [12, 1]))
        logits.append(feed(model, cache, ids, [9, 1, 4], mask)[:1])
        logits.append(feed(model, other, ids[2:], [1, 1, 2]))
        logits.append(feed(model, cache, ids[:, 14:], [0 + 1, 1], None, attention_mask=None)[:1])
        return torch.cat(logits, dim=1)

    same(model, format, drive)


@pytest.mark.parametrize("name", ["wide-llama", "wide-mistral"])
def test_columns_hidden_inside_a_row_stay_hidden(name, attended):
    model = tiny(name)
    ids, mask = random_ids(2, 40), padded(2, 40, 0, 3)
    mask[0, 7:10] = 0
    mask[1, 14] = mask[0, 33] = 0
    positions = torch.arange(40).expand(2, -1)

    def drive(cache):
        logits, done = [], 0
        for size in [16, 1, 1, 5, 1, 12, 1, 3]:
            part = slice(done, done := done + size)
            logits.append(
                model(
                    input_ids=ids[:, part],
                    attention_mask=mask[:, :done],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                ).logits
            )
        return torch.cat(logits, dim=1)[:, 16:]

    same(model, kernel_format(model, window=3, sinks=2), drive)
    assert len(attended) == 2 * 6


def test_a_further_turn_may_hide_tokens(attended):
    # Right padding in the second prompt; the first had none.
    model = tiny("wide-gpt2")
    ids, mask = random_ids(2, 40), padded(2, 40)
    mask[1, 25:30] = 0

    def drive(cache):
        return feed(model, cache, ids, [10, 1, 1, 18, 1, 1, 4], mask)[:, 30:]

    same(model, kernel_format(model, window=3, sinks=2), drive)
    assert len(attended) == 2 * 5


def test_partly_turned_keys_with_a_scale_are_decoded(attended):
    # The kernels would scale what is not turned as well.
    model = tiny("wide-phi-yarn")
    ids = random_ids(1, 30)
    format = kernel_format(model, window=3, sinks=2)
    fused = same(model, format, lambda cache: feed(model, cache, ids, [20, 1, 3, 1]))
    rotation = fused.format.geometry.layers[0].rotation
    assert rotation.dim == 32 and fused.layers[0].rotary.table[1] != 1
    assert not attended


def test_positions_that_jump_are_decoded(attended):
    model = tiny("wide-llama")
    ids = random_ids(1, 40)
    positions = torch.arange(40)[None].clone()
    positions[:, 12:] += 30

    def drive(cache):
        logits, done = [], 0
        for size in [10, 1, 1, 10, 1, 3, 1]:
            part = slice(done, done := done + size)
            logits.append(
                model(
                    input_ids=ids[:, part],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                ).logits
            )
        return torch.cat(logits, dim=1)

    same(model, kernel_format(model, window=3, sinks=2), drive)
    assert [tokens for _, tokens in attended] == [1] * 4


def test_what_the_kernels_cannot_mask_is_decoded(attended):
    model = tiny("wide-llama")
    ids = random_ids(1, 20)
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool)
    mask[..., 4:9] = False

    def with_a_mask_of_four_dimensions(cache):
        feed(model, cache, ids, [15])
        return feed(model, cache, ids[:, 15:], [1], attention_mask=mask)

    def without_the_mask_of_the_prompt(cache):
        feed(model, cache, ids, [15], padded(1, 15, 4))
        return feed(model, cache, ids[:, 15:], [1])

    def with_a_mask_that_shows_what_was_padding(cache):
        feed(model, cache, ids, [15], padded(1, 15, 4))
        return feed(model, cache, ids[:, 15:], [1], attention_mask=padded(1, 16))

    format = kernel_format(model, window=3, sinks=2)
    same(model, format, with_a_mask_of_four_dimensions)
    # Where nothing is turned, what is coded of padding is the same too.
    model = tiny("wide-gpt2")
    format = kernel_format(model, window=3, sinks=2)
    same(model, format, without_the_mask_of_the_prompt)
    same(model, format, with_a_mask_that_shows_what_was_padding)
    assert not attended


def test_attention_weights_are_given_where_they_are_asked_for(attended):
    model = tiny("wide-llama")
    model.set_attn_implementation("eager")
    ids = random_ids(1, 20)

    def drive(cache):
        feed(model, cache, ids, [15, 1])
        out = model(input_ids=ids[:, 16:17], past_key_values=cache, output_attentions=True)
        assert [weights.shape[-1] for weights in out.attentions] == [17, 17]
        return torch.cat((out.logits, feed(model, cache, ids[:, 17:], [1, 2])), dim=1)

    same(model, kernel_format(model, window=3, sinks=2), drive)
    assert len(attended) == 2 * 3


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_everything_else_keeps_the_models_own_attention(own):
    model = tiny("wide-gemma3")
    model.set_attn_implementation(own)
    ids, mask = random_ids(2, 30), padded(2, 30, 0, 4)

    def plain():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            alone = model(input_ids=ids, attention_mask=mask).logits
            return alone, feed(model, cache, ids, [20, 1, 1, 4, 4], mask)

    before = plain()
    cache = CQCache(kernel_format(model, window=3), model, "fused")
    with torch.no_grad():
        feed(model, cache, ids, [20, 1, 1], mask)
    assert model.config._attn_implementation == own
    for found, expected in zip(plain(), before, strict=True):
        assert torch.equal(found, expected)


def test_a_pass_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("wide-llama")
    format, ids = kernel_format(model, window=3), random_ids(1, 12)
    cache = CQCache(format, model, "fused")

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    with torch.no_grad():
        feed(model, cache, ids, [9])
        with monkeypatch.context() as patch:
            patch.setattr(fused_module, "decode_parts", fail)
            with pytest.raises(ZeroDivisionError):
                feed(model, cache, ids, [1])
        assert model.config._attn_implementation == "sdpa"
        cache.reset()
    same(model, format, lambda cache: feed(model, cache, ids, [9, 1, 1]))


def test_keys_that_nobody_attended_to_are_an_error():
    model = tiny("wide-llama")
    cache = CQCache(kernel_format(model, window=3), model, "fused")
    ids = random_ids(1, 12)
    layer = cache.layers[0]
    with torch.no_grad():
        feed(model, cache, ids, [9])
        # As if an architecture had copied the keys on their way.
        update = layer.update
        layer.update = lambda k, v, *rest: tuple(part.clone() for part in update(k, v, *rest))
        feed(model, cache, ids, [1])
        with pytest.raises(RuntimeError, match="never came to the attention function"):
            feed(model, cache, ids, [1])


def test_a_pass_over_one_token_makes_no_mask(monkeypatch, attended):
    model = tiny("wide-gemma3")
    masks = []
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "q_proj"):
            module.register_forward_pre_hook(
                lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")),
                with_kwargs=True,
            )
    cache = CQCache(kernel_format(model, window=3), model, "fused")
    masks.clear()
    with torch.no_grad():
        feed(model, cache, random_ids(2, 25), [20, 1, 1], padded(2, 25, 3))
    assert all(mask is not None for mask in masks[:3])
    assert masks[3:] == [None] * 6 and len(attended) == 6


def test_masks_are_causal_or_sliding_or_unknown():
    def known(function, *windows):
        probe = _Probe(list(windows))
        probe.look_at(function)
        return probe.plain_masks

    assert known(causal_mask_function, None, None)
    assert known(sliding_window_causal_mask_function(40), None, 40)
    assert not known(sliding_window_causal_mask_function(41), None, 40)
    assert not known(sliding_window_causal_mask_function(40), None)
    chunks = chunked_overlay(40, torch.zeros(1, dtype=torch.long))
    assert not known(and_masks(chunks, causal_mask_function), None, 40)
    assert not known(lambda row, head, query, key: key >= 0, None)


def test_gradients_come_through_a_pass_as_they_do_through_the_reference(attended):
    model = tiny("wide-llama").requires_grad_(True)
    ids, mask = random_ids(1, 14), padded(1, 14, 2)

    def run(implementation):
        model.zero_grad()
        cache = CQCache(kernel_format(model, window=3), model, implementation)
        with torch.no_grad():
            feed(model, cache, ids, [9], mask)
        # Of a pass's own tokens, that is: a fused cache holds no graph of earlier ones.
        logits = []
        for part in (slice(9, 12), slice(12, 13)):
            out = model(
                input_ids=ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=mask.cumsum(-1)[:, part] - 1,
                past_key_values=cache,
            )
            logits.append(out.logits)
        logits[0].sum().backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
        return gradient, logits[1].detach()

    for found, expected in zip(run("fused"), run("reference"), strict=True):
        close(found, expected)
    assert not attended


@pytest.mark.parametrize("reorder", [False, True])
def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(reorder, attended):
    model = tiny("wide-mistral")
    ids = random_ids(2, 60)

    def drive(cache):
        with torch.inference_mode():
            feed(model, cache, ids, [30, 1])
            if reorder:
                cache.reorder_cache(torch.tensor([1, 0]))
        with torch.no_grad():
            return feed(model, cache, ids, [1, 1, 5, *[1] * 20])

    same(model, kernel_format(model, window=3, sinks=2), drive)


def test_what_is_counted_is_what_is_held_in_memory():
    model = tiny("wide-llama")
    format = kernel_format(model, window=5, sinks=3)
    cache = CQCache(format, model, "fused")
    with torch.no_grad():
        feed(model, cache, random_ids(1, 320), [300, *[1] * 20])
    tensors = []
    for layer in cache.layers:
        assert not layer.coded
        tensors += [layer.keys, layer.values, *layer.kept.values()]
        tensors += [store.tiles for store in layer.stores]
    held = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    positions_and_frequencies = 320 * 4 + 32 * 4
    assert cache.nbytes == held + positions_and_frequencies
    tiles = 32  # 16 at first, and as many again at the prompt
    kept_and_ring = (3 + 16) * 64 * 4
    assert held == 2 * 2 * 2 * (tiles * 16 * 8 + kept_and_ring)
    assert cache.nbytes_full == 320 * 2 * 2 * 2 * 64 * 4


def stored(cache):
    """The tiles of every layer's keys and values."""
    return [store.tiles for layer in cache.layers for store in layer.stores]


def test_without_a_window_nothing_is_kept_in_full_until_a_pass_needs_it(attended):
    model = tiny("wide-llama")
    ids = random_ids(2, 40)
    rings = []

    def drive(cache):
        logits = []
        for done, size in ((0, 20), (20, 1), (21, 1), (22, 9), (31, 4), (35, 1), (36, 3)):
            logits.append(feed(model, cache, ids[:, done : done + size], [size]))
            if cache.implementation == "fused":
                rings.append({layer.keys.shape[2] for layer in cache.layers})
                rings.append({layer.values.shape[2] for layer in cache.layers})
                assert (
                    cache.nbytes
                    == sum(t.nbytes for t in stored(cache))
                    + sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
                    + 4 * (done + size)
                    + 32 * 4
                )
        return torch.cat(logits, dim=1)

    same(model, kernel_format(model), drive)
    assert rings == [{0}] * 8 + [{8}] * 6
    assert [tokens for layer, tokens in attended if layer == 0] == [1, 1, 4, 1, 3]


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 3)])
def test_room_for_a_known_length_is_made_once_and_limits_nothing(window, sinks, attended):
    model = tiny("wide-llama")
    ids = random_ids(2, 420)
    format = kernel_format(model, window=window, sinks=sinks)
    fused = CQCache(format, model, "fused", max_cache_len=340)
    reference = CQCache(format, model, "reference", max_cache_len=340)
    with torch.no_grad():
        feed(model, fused, ids, [300])
        feed(model, reference, ids, [300])
        assert reference.nbytes < fused.nbytes, "it has no reserve"
        before = stored(fused)
        assert {tiles.shape[2] for tiles in before} == {22 if window == 0 else 21}
        logits = [feed(model, each, ids[:, 300:], [1] * 30) for each in (fused, reference)]
        assert all(a is b for a, b in zip(stored(fused), before, strict=True))
        close(*logits)
        # Beyond it.
        more = ids[:, 330:]
        close(*(feed(model, each, more, [1, 30, 5, *[1] * 10]) for each in (fused, reference)))
        assert fused.get_seq_length() == 376
        fused.reset()
        feed(model, fused, ids, [10])
        assert [tiles.shape for tiles in stored(fused)] == [tiles.shape for tiles in before]


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 3), (40, 0), (4, 18)])
def test_a_sliding_layer_makes_no_more_room_than_it_keeps(window, sinks, attended):
    model = tiny("wide-mistral")
    ids, mask = random_ids(2, 240), padded(2, 240, 0, 3)
    format = kernel_format(model, window=window, sinks=sinks)
    cache = CQCache(format, model, "fused", max_cache_len=240)
    with torch.no_grad():
        feed(model, cache, ids[:, :30], [30], mask[:, :30])
        before = stored(cache)
        layer = cache.layers[0]
        kept = 16 + max(layer.unit, sinks + 3) + 8
        assert {tiles.shape[2] for tiles in before} == {-(-(kept - layer.window) // 16)}
        for done in range(30, 240, 15):
            for size, start in ((1, 0), (1, 1), (8, 2), (5, 10)):
                stop = done + start + size
                positions = mask.cumsum(-1)[:, done + start : stop] - 1
                model(
                    input_ids=ids[:, done + start : stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions,
                    past_key_values=cache,
                )
        assert all(a is b for a, b in zip(stored(cache), before, strict=True))
    short = CQCache(format, model, "fused", max_cache_len=9)
    with torch.no_grad():
        feed(model, short, ids, [5])
    assert {tiles.shape[2] for tiles in stored(short)} == {1}


def test_a_loaded_cache_makes_room_for_a_length_that_is_given(monkeypatch):
    model = tiny("wide-llama")
    format = kernel_format(model)
    monkeypatch.setattr(cache_module, "load_format", lambda path, model, **options: format)
    options = {"implementation": "fused", "max_cache_len": 100}
    cache = CQCache.from_pretrained("a folder", model, **options)
    with torch.no_grad():
        feed(model, cache, random_ids(1, 9), [9])
    assert {tiles.shape[2] for tiles in stored(cache)} == {7}


def test_a_length_that_cannot_be_is_refused():
    model = tiny("wide-llama")
    with pytest.raises(ValueError, match="max_cache_len=0: give 1 or more"):
        CQCache(kernel_format(model), model, max_cache_len=0)


def test_layers_without_a_kernel_stay_beside_those_with_one(attended):
    model = tiny("wide-llama")
    format = kernel_format(model, window=4, sinks=1)
    layers = (format.layers[0], LayerCodecs(IntCodec(8, 32), IntCodec(8, 32)))
    mixed = CacheFormat("mixed", format.geometry, layers, 4, 1)
    ids, mask = random_ids(2, 30), padded(2, 30, 0, 4)
    fused = same(model, mixed, lambda cache: feed(model, cache, ids, [20, 1, 4, 1], mask)[:, 20:])
    assert repr(fused).startswith("CQCache(mixed, fused in 1 of 2 layers, tokens=26, bytes=")
    assert [layer for layer, _ in attended] == [0, 0, 0]


def test_a_cache_says_which_implementation_it_has():
    model = tiny("wide-llama")
    format = kernel_format(model)
    assert repr(CQCache(format, model)).startswith("CQCache(kernel, reference, tokens=0")
    assert repr(CQCache(format, model, "fused")).startswith("CQCache(kernel, fused, tokens=0")
    with pytest.raises(ValueError, match="auto, fused, reference"):
        CQCache(format, model, "fast")
    with pytest.raises(KernelsUnavailable, match=r"4-bit codes of 8 .*have\)\. Use"):
        CQCache(random_format(model), model, "fused")


def test_bfloat16_models_keep_their_dtype(attended):
    model = tiny("wide-llama", dtype=torch.bfloat16)
    cache = CQCache(kernel_format(model, window=2, sinks=1), model, "fused")
    out = model.generate(random_ids(1, 9), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 14) and len(attended) == 2 * 4
    assert cache.layers[0].keys.dtype == torch.bfloat16


def test_a_recorded_run_and_a_fused_cache_share_a_model(attended):
    # Another cache in between must not be taken for the fused one.
    model = tiny("wide-llama")
    ids = random_ids(1, 20)

    def drive(cache):
        logits = [feed(model, cache, ids, [9, 1])]
        other = RecordingCache(model)
        with contextlib.suppress(KeyError):
            feed(model, other, ids, [9, 1])
        logits.append(feed(model, cache, ids, [1, 2]))
        return torch.cat(logits, dim=1)

    same(model, kernel_format(model, window=2), drive)
    assert len(attended) == 2 * 3

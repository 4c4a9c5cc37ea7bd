"""One pass over a whole text gives the logits that decoding token by token gives."""

from __future__ import annotations

import pytest
import torch
from block_formats import means_format
from formats import random_format
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from zoo import ALIBI, CONFIGS, random_ids, tiny

from cqtool.cache import CacheFormat, CQCache
from cqtool.errors import ModelError
from cqtool.quality import simulate
from cqtool.quality.measure import quantized_logits
from cqtool.quality.simulate import require_simulation, simulated_cache
from cqtool.tuning.memory import recomputing_layers

# These rotate early tokens otherwise in one long pass than in many short ones.
SAME_EITHER_WAY = sorted(set(CONFIGS) - {"dynamic", "longrope"} - ALIBI)


@pytest.mark.parametrize("name", SAME_EITHER_WAY)
def test_teacher_mode_equals_decode_mode(name):
    model = tiny(name)
    ids = random_ids(1, 40)[0]
    for window, sinks in ((0, 0), (0, 3), (5, 0), (7, 3), (50, 2)):
        format = random_format(model, window=window, sinks=sinks)
        require_simulation(model, format, ids)
        teacher = quantized_logits(model, format, ids, "teacher")
        decode = quantized_logits(model, format, ids, "decode")
        torch.testing.assert_close(teacher, decode, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", SAME_EITHER_WAY)
def test_blocks_of_tokens_are_codes_as_soon_as_all_of_them_have_left_the_window(name):
    model = tiny(name)
    ids = random_ids(1, 43)[0]
    cases = [
        means_format(model, key=8, value=8),
        means_format(model, key=8, value=2, window=5, sinks=3),
        means_format(model, key=4, value=6, sinks=14),
        means_format(model, key=64, value=8, window=2),
    ]
    for format in cases:
        require_simulation(model, format, ids)
        teacher = quantized_logits(model, format, ids, "teacher")
        decode = quantized_logits(model, format, ids, "decode")
        torch.testing.assert_close(teacher, decode, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_layers_with_and_without_blocks_may_be_mixed(name):
    model = tiny(name)
    ids = random_ids(1, 43)[0]
    blocks, single = means_format(model), random_format(model)
    for window in (0, 3):
        layers = (blocks.layers[0], single.layers[1], *blocks.layers[2:])
        format = CacheFormat("mixed", blocks.geometry, layers, window, 1)
        teacher = quantized_logits(model, format, ids, "teacher")
        decode = quantized_logits(model, format, ids, "decode")
        torch.testing.assert_close(teacher, decode, rtol=1e-3, atol=2e-3)


def after_prompts(model, format, ids):
    """Logits of each token as the first one after a prompt, by a cache for each prompt."""
    found = []
    for position in range(1, ids.shape[0]):
        cache = CQCache(format, model)
        with torch.no_grad():
            model(input_ids=ids[None, :position], past_key_values=cache, use_cache=True)
            token = ids[None, position : position + 1]
            found.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 2)])
def test_prefill_mode_is_the_first_step_after_a_prompt(name, window, sinks):
    model = tiny(name)
    ids = random_ids(1, 24)[0]
    format = random_format(model, window=window, sinks=sinks)
    expected = after_prompts(model, format, ids)
    prefill, teacher = (
        quantized_logits(model, format, ids, mode)[1:] for mode in ("prefill", "teacher")
    )
    # Apart by a token's own key and value only, where the prompt's are out of codes in the other.
    assert (prefill - expected).square().mean() < 0.25 * (teacher - expected).square().mean()


def test_a_single_layer_after_a_prompt_is_exact():
    # What it keeps of a token does not hang on codes, so its own key and value are no exception.
    model = tiny("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    ids = random_ids(1, 24)[0]
    for window, sinks in ((0, 0), (5, 2)):
        format = random_format(model, window=window, sinks=sinks)
        found = quantized_logits(model, format, ids, "prefill")[1:]
        expected = after_prompts(model, format, ids)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


def test_the_window_matters_and_the_model_is_left_as_it_was():
    model = tiny("llama")
    ids = random_ids(1, 40)[0]
    with torch.no_grad():
        before = model(input_ids=ids[None]).logits
    results = [
        quantized_logits(model, random_format(model, window=w, sinks=s), ids, "teacher")
        for w, s in ((0, 0), (4, 0), (4, 2), (40, 0))
    ]
    for other in results[1:]:
        assert (results[0] - other).abs().max() > 0.1
    # A window as long as the text leaves nothing to quantize.
    torch.testing.assert_close(results[-1], before[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids[None]).logits, before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_additive_and_boolean_masks(attention):
    model = tiny("gemma3")
    model.set_attn_implementation(attention)
    ids = random_ids(1, 30)[0]
    format = random_format(model, window=6, sinks=1)
    teacher = quantized_logits(model, format, ids, "teacher")
    torch.testing.assert_close(
        teacher, quantized_logits(model, format, ids, "decode"), rtol=1e-3, atol=2e-3
    )


@pytest.mark.parametrize(("name", "kinds"), [("llama", 1), ("gemma3", 2)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed-again"])
def test_a_mask_is_made_once_a_pass_for_each_kind_of_layer(
    name, kinds, attention, again, monkeypatch
):
    model = tiny(name)
    model.set_attn_implementation(attention)
    format = random_format(model, window=6, sinks=1)
    assert len(format.layers) > kinds
    ids = random_ids(3, 30)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def gradient():
        with recomputing_layers(model, again), simulated_cache(model, format, 30) as cache:
            logits = model(inputs_embeds=embedded, past_key_values=cache, use_cache=True).logits
            found = torch.autograd.grad(logits.square().mean(), embedded)[0]
        return logits, found

    made = []
    original = simulate._doubled

    def counted(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(simulate, "_doubled", counted)
    logits, found = gradient()
    assert len(made) == kinds
    # What is the same for all sequences is there once; the eager masks come one for each.
    assert {mask.shape[0] for mask in made} == {1 if attention == "sdpa" else 3}
    for row, alone in zip(ids, logits, strict=True):
        decode = quantized_logits(model, format, row, "decode")
        torch.testing.assert_close(alone, decode, rtol=1e-3, atol=2e-3)
    # With one at a time, layers of two kinds that take turns have theirs made anew.
    monkeypatch.setattr(simulate, "_MASKS", 1)
    torch.testing.assert_close(gradient()[1], found)
    assert (len(made) > 2 * kinds) == (kinds > 1)


@pytest.mark.parametrize("name", sorted(ALIBI))
def test_models_that_count_keys_are_sent_to_decode_mode(name):
    model = tiny(name)
    ids = random_ids(1, 40)[0]
    with pytest.raises(ModelError, match="--mode decode"):
        require_simulation(model, random_format(model, window=5), ids)
    with pytest.raises(ModelError, match="encodes several tokens together"):
        require_simulation(model, means_format(model), ids)
    without = random_format(model)
    require_simulation(model, without, ids)
    torch.testing.assert_close(
        quantized_logits(model, without, ids, "teacher"),
        quantized_logits(model, without, ids, "decode"),
        rtol=1e-3,
        atol=2e-3,
    )


def count_keys(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention that prefers high columns, whatever token stands there."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling + 0.3 * torch.arange(key.shape[2])
    weights = (scores + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def test_attention_that_silently_counts_keys_is_noticed():
    AttentionInterface.register("count-keys", count_keys)
    AttentionMaskInterface.register("count-keys", AttentionMaskInterface()["eager"])
    model = tiny("llama")
    ids = random_ids(1, 40)[0]
    require_simulation(model, random_format(model, window=5), ids)
    model.set_attn_implementation("count-keys")
    with pytest.raises(ModelError, match="--mode decode"):
        require_simulation(model, random_format(model, window=5), ids)

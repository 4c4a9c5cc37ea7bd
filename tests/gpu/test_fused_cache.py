"""The cache on the kernels against the cache in plain torch, and what a GPU has to hold for it."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers as tf
from formats import by_head_format, kernel_format, regrouped
from transformers import DynamicCache
from zoo import random_ids, tiny

from cqtool.cache import CacheFormat, CQCache, CQCodec, LayerCodecs
from cqtool.models.probe import read_geometry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# Of the logits' norm, from what the reference finds in float32. In 16 bits a vector near the border
# between two centroids falls on either side: 0.01 to 0.12 with the reference itself.
TOLERANCE = 0.01
NAMES = [
    "wide-llama",
    "wide-llama-80",
    "wide-llama-128",
    "wide-llama-mqa",
    "wide-yarn",
    "wide-mistral",
    "wide-gemma2",
    "wide-gemma3",
    "wide-cohere2",
    "wide-phi",
    "wide-smollm3",
    "wide-gpt2",
]


@pytest.fixture
def attended(attended):
    """As everywhere; the warning that the reference serves is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield attended


def run(model, format, implementation, ids, sizes, mask):
    """Passes over `sizes` tokens one after the other; all logits but the prompt's, in float32."""
    cache = CQCache(format, model, implementation)
    logits, done = [], 0
    with torch.no_grad():
        for size in sizes:
            part = slice(done, done := done + size)
            out = model(
                input_ids=ids[:, part],
                attention_mask=mask[:, :done],
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, part],
                past_key_values=cache,
            )
            logits.append(out.logits.float())
    return cache, torch.cat(logits[1:], dim=1)


def check(name, dtype, sizes, *, padding=5, keys=None, make=kernel_format, **options):
    model = tiny(name, dtype=dtype).cuda()
    format = make(tiny(name), **options)
    if keys is not None:
        format = regrouped(format, keys)
    format = format.to(torch.device("cuda"))
    ids = random_ids(3, sum(sizes)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    _, reference = run(model, format, "reference", ids, sizes, mask)
    cache, found = run(model, format, "auto", ids, sizes, mask)
    assert cache.implementation == "fused"
    assert torch.isfinite(found).all()
    _, expected = run(model.float(), format, "reference", ids, sizes, mask)
    error, unavoidable = (
        float((logits - expected).norm() / expected.norm()) for logits in (found, reference)
    )
    assert error < 1.2 * unavoidable + TOLERANCE
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_gives_the_references_logits(name, dtype, attended):
    cache = check(name, dtype, [70, *[1] * 40], window=5, sinks=2)
    assert len(attended) == 40 * len(cache.layers)


@pytest.mark.parametrize(("window", "sinks", "prompt"), [(0, 0, 9), (40, 4, 9), (3, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_sinks_and_prompts_of_any_size(window, sinks, prompt, dtype, attended):
    check("wide-llama", dtype, [prompt, *[1] * 60], padding=0, window=window, sinks=sinks)
    assert len(attended) == 2 * 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["wide-llama", "wide-mistral", "wide-gemma2"])
def test_passes_over_several_tokens_and_further_turns(name, dtype, attended):
    sizes = [40, 2, 8, 1, 1, 5, 50, 1, 3, 1, 8, 1]
    check(name, dtype, sizes, window=6, sinks=2)
    assert [tokens for layer, tokens in attended if layer == 0] == [2, 8, 1, 1, 5, 1, 3, 1, 8, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_first_pass_over_several_tokens_finds_a_ring(dtype, attended):
    cache = check("wide-llama", dtype, [40, 1, 1, 5, 1, 8, 1, 1], padding=0)
    assert [tokens for layer, tokens in attended if layer == 0] == [1, 1, 5, 1, 8, 1, 1]
    assert {layer.keys.shape[2] for layer in cache.layers} == {8}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ((2, 8), (8, 8)),
        ((4, 8), (4, 8)),
        ((8, 10), (8, 10)),
        ((8, 8), (2, 8)),
        ((8, 6), (4, 8)),
        ((8, 10), (8, 6)),
    ],
)
def test_formats_of_keys_and_values(key, value, attended):
    sizes = [300, *[1] * 10, 4]
    check("wide-llama-128", torch.float16, sizes, key=key, value=value, window=7, sinks=1)
    assert len(attended) == 2 * 11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "key", "keys", "pairing"),
    [
        ("wide-llama-128", (8, 8), "random", "scatter"),
        ("wide-llama-128", (8, 8), "pairs", "closed"),
        ("wide-llama-128", (4, 8), "pairs", "closed"),
        ("wide-llama", (4, 8), "mixed", "scatter"),
        ("wide-llama", (2, 8), "random", "scatter"),
        ("wide-llama", (4, 8), "shuffled", "paired"),
        ("wide-llama", (2, 8), "partners", "paired"),
        ("wide-llama-128", (8, 8), "partners", "paired"),
        ("wide-llama-128", (8, 10), "partners", "paired"),
        ("wide-llama-128", (8, 10), "pairs", "closed"),
        ("wide-llama-128", (8, 6), "pairs", "closed"),
        ("wide-llama", (8, 6), "random", "scatter"),
        ("wide-phi", (8, 8), "pairs", "closed"),
        ("wide-cohere2", (8, 8), "random", "scatter"),
        ("wide-gpt2", (8, 8), "random", "paired"),
    ],
)
def test_groups_of_any_channels_of_each_head(name, key, keys, pairing, dtype, attended):
    sizes = [300, *[1] * 20, 4, 30, 1]
    cache = check(name, dtype, sizes, key=key, keys=keys, window=7, sinks=2)
    assert pairing in {
        part.kernels.tables.pairing for layer in cache.layers for part in layer.parts
    }
    # In the pass over 30 tokens everything is decoded.
    assert len(attended) == 22 * len(cache.layers)


@pytest.mark.parametrize("keys", [None, "random", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["wide-llama-gqa", "wide-mistral-gqa"])
def test_heads_with_codes_of_their_own(name, dtype, keys, attended):
    sizes = [70, *[1] * 20, 4, 8, 30, *[1] * 20]
    make = partial(by_head_format, keys=keys)
    cache = check(name, dtype, sizes, make=make, window=7, sinks=2)
    assert [len(layer.parts) for layer in cache.layers] == [2, 2]
    # In the pass over 30 tokens everything is decoded.
    assert len(attended) == 42 * 2


@pytest.mark.parametrize(
    ("name", "make"), [("wide-qwen3", kernel_format), ("wide-llama-gqa", by_head_format)]
)
def test_generation_beams_and_drafts_run_through(name, make):
    model = tiny(name, dtype=torch.bfloat16).cuda()
    format = make(tiny(name), window=6, sinks=2).to(torch.device("cuda"))
    prompt = random_ids(1, 12).repeat(2, 2).cuda()
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    options = {"max_new_tokens": 30, "do_sample": False}
    for rows, more in (
        (2, {}),
        (2, {"num_beams": 3}),
        (1, {"prompt_lookup_num_tokens": 4}),
    ):
        cache = CQCache(format, model)
        out = model.generate(
            prompt[:rows], attention_mask=mask[:rows], past_key_values=cache, **options, **more
        )
        assert out.shape == (rows, 54) and cache.implementation == "fused"


@pytest.mark.parametrize(("window", "sinks"), [(6, 2), (0, 0)])
@pytest.mark.parametrize(
    ("name", "make"), [("wide-mistral", kernel_format), ("wide-mistral-gqa", by_head_format)]
)
def test_a_step_over_one_token_does_not_wait_for_the_gpu_in_the_cache(name, make, window, sinks):
    model = tiny(name, dtype=torch.float16).cuda()
    format = make(tiny(name), window=window, sinks=sinks)
    cache = CQCache(format.to(torch.device("cuda")), model)
    ids = random_ids(2, 200).cuda()
    with torch.no_grad():
        model(input_ids=ids[:, :50], past_key_values=cache)
        for token in ids[:, 50:53].split(1, dim=1):
            model(input_ids=token, past_key_values=cache)
        layer = cache.layers[0]
        heads = format.geometry.layers[0].kv_heads
        keys = torch.randn(2, heads, 1, 64, dtype=torch.float16, device="cuda")
        query = torch.randn(2, 2 * heads, 1, 64, dtype=torch.float16, device="cuda")
        # The model's own part of a pass may wait; what the cache does in it must not.
        cache.state.running = True
        step = cache._tap.steps[0]
        for _ in range(30):
            step.positions = step.positions + 1
            torch.cuda.set_sync_debug_mode("error")
            try:
                layer.update(keys, keys)
                layer.attend(query, 0.125, 0.0)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def llama_with_long_memory():
    """Little more than a cache: 4 layers of 8 kv heads of 128 channels."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=120,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
    )
    model = tf.AutoModelForCausalLM.from_config(config).half().cuda().eval().requires_grad_(False)
    geometry = read_geometry(model)
    layers = tuple(
        LayerCodecs(*(CQCodec(torch.randn(8, 16, 256, 8, device="cuda").half()) for _ in range(2)))
        for _ in range(4)
    )
    return model, CacheFormat("cq-8c8b", geometry, layers, 128, 4)


def peak_of(work):
    """Bytes in use before, at the height of, and after `work()`."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return before, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()


def test_memory_stays_near_the_compressed_size():
    model, format = llama_with_long_memory()
    batch, prompt, new = 4, 8192, 64
    ids = random_ids(batch, prompt + new).cuda()

    def prefill(cache):
        with torch.no_grad():
            model(
                input_ids=ids[:, :prompt],
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=1,
            )

    def decode(cache):
        with torch.no_grad():
            for token in ids[:, prompt:].split(1, dim=1):
                model(input_ids=token, past_key_values=cache)

    warm = CQCache(format, model)
    prefill(warm)
    decode(warm)
    del warm
    start, peak_without, _ = peak_of(lambda: prefill(None))
    without = peak_without - start

    cache = CQCache(format, model)
    start, peak, after = peak_of(lambda: prefill(cache))
    slack = 8 << 20
    # The prompt's own activations, and the codes: nothing of the size of a dense cache.
    assert after - start <= cache.nbytes + slack
    assert peak - start <= without + cache.nbytes + slack
    prompt_bytes = cache.nbytes
    start, peak, after = peak_of(lambda: decode(cache))
    assert cache.implementation == "fused"
    # One layer's storage grows at a time; the old and the new one exist side by side.
    assert peak - start <= 0.5 * prompt_bytes + slack
    assert cache.nbytes_full == batch * (prompt + new) * 4 * 8 * 256 * 2
    assert cache.nbytes * 8 < cache.nbytes_full

    full = DynamicCache(config=model.config)
    start, peak, after = peak_of(lambda: (prefill(full), decode(full)))
    assert after - start > 8 * cache.nbytes


def test_a_known_length_is_all_that_a_large_batch_takes():
    model, format = llama_with_long_memory()
    format = replace(format, window=0, sinks=0)
    rows, chunk, prompt, new = 64, 16, 1024, 1024
    ids = random_ids(rows, prompt + new).cuda()

    def fill(cache, part):
        with torch.no_grad():
            model(input_ids=part[:, :prompt], past_key_values=cache, logits_to_keep=1)

    def decode(cache, tokens):
        with torch.no_grad():
            for token in ids[:, prompt : prompt + tokens].split(1, dim=1):
                model(input_ids=token, past_key_values=cache)

    warm = CQCache(format, model)
    fill(warm, ids)
    decode(warm, 2)
    del warm
    parts = [CQCache(format, model, max_cache_len=prompt) for _ in range(rows // chunk)]
    for part, own in zip(parts, ids.split(chunk), strict=True):
        fill(part, own)
    # 32 bytes a token and kv head: 16 groups of 8 bits, of keys and of values.
    token = 4 * 8 * 32
    positions = sum(history.nbytes for part in parts for history in part._rotary.values())
    assert sum(part.nbytes for part in parts) == rows * prompt * token + positions
    whole = rows * (prompt + new) * token
    slack = 4 << 20
    start, peak, after = peak_of(lambda: CQCache.join(parts, max_cache_len=prompt + new))
    cache = parts[0]
    assert after - start <= whole - rows * prompt * token + slack
    # One layer exists twice while it is moved: as its chunks, and joined.
    assert peak - after <= rows * prompt * token / 4 + slack
    held = cache.nbytes
    start, peak, after = peak_of(lambda: decode(cache, new))
    assert cache.implementation == "fused" and cache.get_seq_length() == prompt + new
    assert cache.nbytes - held <= rows * new * 8, "positions alone were added"
    assert peak - start <= 64 << 20


def test_a_gpu_without_kernels_says_so_and_uses_the_reference(monkeypatch):
    from cqtool.cache import cache as module
    from cqtool.errors import KernelsUnavailable
    from cqtool.kernels.load import Outlook

    model = tiny("wide-llama").cuda()
    format = kernel_format(tiny("wide-llama")).to(torch.device("cuda"))
    said = []
    monkeypatch.setattr(module, "outlook", lambda capability: Outlook("reference", "No driver."))
    monkeypatch.setattr(module, "warn_fallback", said.append)
    assert CQCache(format, model).implementation == "reference"
    assert said == ["No driver."]
    with pytest.raises(KernelsUnavailable, match="No driver"):
        CQCache(format, model, "fused")

"""`cqtool generate`: text from a model whose cache is an artifact."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cqtool.cli import options
from cqtool.cli.output import Output
from cqtool.errors import DataError

if TYPE_CHECKING:
    from transformers import Cache, TextStreamer

    from cqtool.cache import CQCache
    from cqtool.models.load import OpenedModel

EXAMPLES = (
    'cqtool generate demo artifact --prompt "What is a key-value cache?" --compare',
    "cqtool generate demo artifact --prompt - --max-new-tokens 200 < question.txt",
)


def generate(
    model: options.ModelArgument,
    artifact: options.ArtifactArgument,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt", metavar="TEXT", help="What to continue; - reads it from standard input."
        ),
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Most tokens to generate.")
    ] = 128,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Wrap the prompt in the model's chat template; by default if it has one.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also generate with the full-precision cache.")
    ] = False,
    artifact_revision: Annotated[
        str | None,
        typer.Option(
            "--artifact-revision",
            metavar="REV",
            help="Branch, tag or commit of the artifact on the Hub.",
            show_default=False,
        ),
    ] = None,
    allow_other_base: options.AllowOtherBaseFlag = False,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    revision: options.RevisionOption = None,
    trust_remote_code: options.TrustRemoteCodeFlag = False,
    json: options.JsonFlag = False,
    quiet: options.QuietFlag = False,
) -> None:
    """Generate text with the quantized cache, and say how many bytes the cache took.

    On a terminal the text appears as it is generated.
    """
    sink = Output(json=json, quiet=quiet)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise DataError("The prompt is empty; give some text with --prompt.")

    from transformers import DynamicCache

    from cqtool.cache import CQCache
    from cqtool.models.load import open_model

    opened = open_model(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=sink.progress(),
    )
    cache = CQCache.from_pretrained(
        artifact,
        opened.model,
        revision=artifact_revision,
        allow_other_base=allow_other_base,
    )
    inputs = _encode(opened, text, chat)
    sampling = _Sampling(max_new_tokens, temperature, seed)
    answer = _generate(sink, opened, inputs, cache, sampling)
    used, full = cache.nbytes, _full_bytes(cache, opened)
    sink.note(_account(cache, used, full))
    result: dict[str, Any] = {
        "prompt": text,
        "text": answer,
        "cache": {"bytes": used, "bytes_full": full},
    }
    if compare:
        sink.text("\nWith the full-precision cache:")
        full_cache = DynamicCache(config=opened.model.config)
        result["text_full"] = _generate(sink, opened, inputs, full_cache, sampling)
    sink.result(result)


def _account(cache: CQCache, used: int, full: int) -> str:
    tokens, exact = cache.get_seq_length(), cache.format.window + cache.format.sinks
    if tokens == 0:
        return (
            "warning: transformers replaced the cache by one of its own (it does so for LongRoPE "
            "models beyond their original context), so nothing was quantized"
        )
    line = f"cache: {used:,} bytes for {tokens} tokens; in full precision {full:,} bytes"
    if tokens <= exact:
        return f"{line}. The newest and first {exact} tokens are never quantized."
    return f"{line} ({full / used:.1f} times as many)"


def _full_bytes(cache: CQCache, opened: OpenedModel) -> int:
    """Bytes that transformers' own cache takes for the tokens in `cache`."""
    tokens = cache.get_seq_length()
    numbers = sum(
        layer.kv_heads
        * (layer.key_dim + layer.value_dim)
        * min(tokens, layer.sliding_window or tokens)
        for layer in cache.format.geometry.layers
    )
    return numbers * opened.model.dtype.itemsize


@dataclass(frozen=True)
class _Sampling:
    max_new_tokens: int
    temperature: float
    seed: int


def _encode(opened: OpenedModel, text: str, chat: bool | None) -> dict[str, Any]:
    tokenizer: Any = opened.tokenizer
    if chat and not tokenizer.chat_template:
        raise DataError(f"The tokenizer of {opened.name} has no chat template; leave out --chat.")
    if tokenizer.chat_template and chat is not False:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    return {name: inputs[name].to(opened.model.device) for name in ("input_ids", "attention_mask")}


def _generate(
    sink: Output,
    opened: OpenedModel,
    inputs: dict[str, Any],
    cache: Cache,
    sampling: _Sampling,
) -> str:
    import torch

    streaming = sink.human and sys.stdout.isatty()
    torch.manual_seed(sampling.seed)
    model: Any = opened.model
    ids = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        temperature=sampling.temperature or None,
        streamer=_streamer(sink, opened.tokenizer) if streaming else None,
    )
    new = ids[0, inputs["input_ids"].shape[1] :]
    answer = str(opened.tokenizer.decode(new, skip_special_tokens=True))
    if not streaming:
        sink.text(answer)
    return answer


def _streamer(sink: Output, tokenizer: Any) -> TextStreamer:
    from transformers import TextStreamer

    class SinkStreamer(TextStreamer):
        """Sends words to the sink as soon as they are whole."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            sink.raw(text + ("\n" if stream_end else ""))

    return SinkStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

"""README.md: the model card of an artifact, made of what is in its files and nothing else.

Every number in it is read from the configuration or from what `cqtool check` measured; without a
measurement the card says so. The metadata follow the Hub's model card specification and are read
back through `huggingface_hub` before the card is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from cqtool.artifact.card_commands import calibrate_command, mixture_recipe, tune_command
from cqtool.artifact.card_content import LOCAL_MODEL, CardContent
from cqtool.artifact.card_measured import memory_section, quality_section
from cqtool.artifact.card_runtime import runtime_limit, runtime_section
from cqtool.artifact.markdown import dataset, number, plain
from cqtool.artifact.names import is_hub_id, public_name
from cqtool.errors import ArtifactError
from cqtool.layout.config import CQConfig, text_parts
from cqtool.spec import GROUPED_CHANNELS

_TAGS = ["kv-cache", "kv-cache-quantization", "coupled-quantization", "quantization"]

_CITATION = """\
```bibtex
@inproceedings{zhang2024kvcache,
  title     = {{KV} Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with
               Coupled Quantization},
  author    = {Zhang, Tianyi and Yi, Jonah and Xu, Zhaozhuo and Shrivastava, Anshumali},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://arxiv.org/abs/2405.03917}
}
```"""


def render_card(content: CardContent) -> str:
    """The text of ``README.md``.

    Raises:
        ArtifactError: the metadata do not survive the Hub client's own reading.
    """
    config = content.config
    base = public_name(config.base_model.id)
    sections = [
        f"# {plain(base.rsplit('/', 1)[-1])}: KV cache in {config.rate} ({config.cache.name})",
        *_introduction(config),
        "## Usage",
        _usage(content),
        *runtime_section(content),
        "## Measured quality",
        *quality_section(content),
        "## Memory",
        *memory_section(content),
        "## Limits",
        *_limits(content),
        "## Calibration",
        *_calibration(content),
        *_pictures(content.reports),
        "## Citation",
        "The method is Coupled Quantization ([arXiv 2405.03917](https://arxiv.org/abs/2405.03917)):",
        _CITATION,
    ]
    data = card_metadata(config)
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    if ModelCard(text).data.to_yaml() != data.to_yaml():
        raise ArtifactError(
            "The model card's metadata cannot be written as YAML that the Hub reads back; check "
            "base_model and calibration.dataset in cq_config.json for odd characters."
        )
    return text


def card_metadata(config: CQConfig) -> ModelCardData:
    """The card's front matter; only what the Hub can resolve is named in it."""
    base = config.base_model
    texts = [part.get("dataset") for part in text_parts(config.calibration.dataset)]
    named = [text for text in texts if isinstance(text, str) and is_hub_id(text)]
    return ModelCardData(
        base_model=base.id if is_hub_id(base.id) else None,
        base_model_relation="quantized" if is_hub_id(base.id) else None,
        library_name="cqtool",
        license=base.license,
        datasets=list(dict.fromkeys(named)) or None,
        tags=[*_TAGS, config.cache.name],
    )


def _introduction(config: CQConfig) -> Iterator[str]:
    base = config.base_model
    if is_hub_id(base.id):
        model = f"[{base.id}](https://huggingface.co/{base.id})"
        revision = f" at revision `{plain(base.revision)}`" if base.revision else ""
    else:
        model, revision = f"the local model `{plain(public_name(base.id))}`", ""
    yield (
        f"Codebooks that hold the key/value cache of {model}{revision} in "
        f"{config.rate}. They are no model: the base "
        "model's weights stay as they are, and are loaded from their own repository."
    )
    parts = [
        f"{name}: groups of {code.channels} {GROUPED_CHANNELS[code.grouping]} of a head share one "
        f"of {code.centroids} learned centroids"
        f"{', the same for all heads of a layer' if code.sharing == 'heads' else ''}, "
        f"a code of {code.bits} bits "
        f"({number(code.bits_per_channel)} per channel)"
        for name, code in (("keys", config.cache.key), ("values", config.cache.value))
    ]
    others = "".join(
        f"- {codes.place.capitalize()}: keys {codes.key.name}, values {codes.value.name}.\n"
        for codes in config.cache.layers
    )
    yield (
        f"- {parts[0]}; taken before RoPE and rotated after decoding.\n- {parts[1]}.\n{others}"
        f"- The first {config.cache.sinks} tokens and the last {config.cache.window} tokens stay "
        "in the model's own precision."
    )


def _usage(content: CardContent) -> str:
    base = content.config.base_model.id
    model = base if is_hub_id(base) else LOCAL_MODEL
    opening = (
        "from cqtool import CQCache\n"
        "from cqtool.models.load import open_model\n\n"
        'opened = open_model("demo")\n'
        "model = opened.model\n"
        'inputs = opened.tokenizer("Hello", return_tensors="pt")\n\n'
        if content.is_demo
        else "from cqtool import CQCache\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model}")\n'
        f'inputs = AutoTokenizer.from_pretrained("{model}")("Hello", return_tensors="pt")\n\n'
    )
    return (
        f"```python\n{opening}"
        f'cache = CQCache.from_pretrained("{content.repo}", model)\n'
        "output = model.generate(**inputs, past_key_values=cache)\n"
        "```"
    )


def _limits(content: CardContent) -> Iterator[str]:
    quality = content.quality if content.own_row is not None else None
    limits = [
        "The codebooks fit this base model only; loading refuses another one.",
        f"A context no longer than sinks and window together "
        f"({content.config.cache.sinks + content.config.cache.window} tokens) is not compressed.",
        runtime_limit(content),
    ]
    if content.is_demo:
        limits.append(
            "They were made with cqtool's demo model, weights of this base model that had been "
            "quantized before: figures are not those of the published checkpoint."
        )
    if quality is not None:
        measured = quality.generation is not None or quality.tasks is not None
        tasks = "other tasks" if measured else "downstream tasks"
        limits.append(
            f"Quality was measured on the text above, in windows of {quality.window_length} "
            f"tokens; other domains, longer contexts and {tasks} were not."
        )
    yield "\n".join(f"- {limit}" for limit in limits)


def _calibration(content: CardContent) -> Iterator[str]:
    config, data = content.config, content.config.calibration
    recipe = config.recipe.get("name")
    made = f"recipe `{plain(recipe)}`, " if isinstance(recipe, str) else ""
    yield (
        f"{data.sequences} sequences of {data.sequence_length} tokens{_texts(data.dataset)}, "
        f"seed {data.seed}; {made}objective `{plain(config.objective)}`, cqtool "
        f"{plain(config.tool_version)}. SHA-256 of the token ids: `{plain(data.digest)}`."
    )
    if config.tuned:
        yield (
            "The fitted codebooks were then tuned end to end, on further sequences of "
            f"{'this text' if 'parts' not in data.dataset else 'these texts'}; "
            "`calibration.json` has the settings and the figures."
        )
    mixture = mixture_recipe(content)
    if mixture is None:
        yield "This fits them again:"
    else:
        yield "To fit them again, put these texts into a copy `recipe.yaml` of the recipe, and run:"
        yield f"```yaml\n{mixture}\n```"
    tuning = f"\n{tune_command(content)}" if config.tuned else ""
    yield f"```bash\n{calibrate_command(content)}{tuning}\n```"


def _texts(source: Mapping[str, Any]) -> str:
    """` of` the text, or how many sequences are of which."""
    parts = text_parts(source)
    if len(parts) == 1:
        return f" of {dataset(parts[0])}"
    shown = [f"{plain(part.get('sequences'))} of {dataset(part)}" for part in parts]
    return ": " + ", ".join(shown)


def _pictures(reports: tuple[str, ...]) -> Iterator[str]:
    shown = [f"![{name.rsplit('/', 1)[-1]}]({name})" for name in reports if name.endswith(".png")]
    linked = [f"[{name}]({name})" for name in reports if name.endswith(".html")]
    if shown or linked:
        yield "## Reports"
        yield from [*linked, *shown]

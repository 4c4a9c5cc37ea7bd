"""README.md: the model card of an artifact, made of what is in its files and nothing else.

Every number in it is read from the configuration or from what `cqtool check` and `cqtool bench`
measured; where the quality was not measured, the card says so. The metadata follow the Hub's model
card specification and are read back through `huggingface_hub` before the card is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from cqtool.artifact.card_commands import needed_files, rebuild_command
from cqtool.artifact.card_content import LOCAL_MODEL, CardContent
from cqtool.artifact.card_format import OBJECTIVES, format_section, kept_tokens
from cqtool.artifact.card_measured import headline, memory_section, quality_section
from cqtool.artifact.card_results import index_results, result_name
from cqtool.artifact.card_runtime import runtime_limit, runtime_section
from cqtool.artifact.card_speed import speed_section
from cqtool.artifact.markdown import dataset, plain
from cqtool.artifact.names import public_name
from cqtool.artifact.runtime import GENERATE_NAME
from cqtool.errors import ArtifactError
from cqtool.layout.config import text_parts
from cqtool.models.names import is_hub_id

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
        *_introduction(content),
        "## Usage",
        _usage(content),
        "## Measured quality",
        *quality_section(content),
        "## Memory",
        *memory_section(content),
        *speed_section(content),
        *runtime_section(content),
        "## Limits",
        *_limits(content),
        "## Calibration",
        *_calibration(content),
        *_links(content.reports),
        "## Citation",
        "The method is Coupled Quantization ([arXiv 2405.03917](https://arxiv.org/abs/2405.03917)):",
        _CITATION,
    ]
    data = card_metadata(content)
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    if ModelCard(text).data.to_yaml() != data.to_yaml():
        raise ArtifactError(
            "The model card's metadata cannot be written as YAML that the Hub reads back; check "
            "base_model and calibration.dataset in cq_config.json for odd characters."
        )
    return text


def card_metadata(content: CardContent) -> ModelCardData:
    """The card's front matter; only what the Hub can resolve is named in it."""
    config, base = content.config, content.config.base_model
    texts = [part.get("dataset") for part in text_parts(config.calibration.dataset)]
    named = [text for text in texts if isinstance(text, str) and is_hub_id(text)]
    results = index_results(content)
    return ModelCardData(
        base_model=base.id if is_hub_id(base.id) else None,
        base_model_relation="quantized" if is_hub_id(base.id) else None,
        library_name="cqtool",
        license=base.license,
        license_name=base.license_name,
        license_link=_license_link(content),
        datasets=list(dict.fromkeys(named)) or None,
        tags=[*_TAGS, *([] if content.kernels is None else [GENERATE_NAME]), config.cache.name],
        model_name=result_name(content) if results else None,
        eval_results=results or None,
    )


def _license_link(content: CardContent) -> str | None:
    """Where the license's text is; a file of the base model's repository by its address there."""
    base = content.config.base_model
    link = base.license_link
    if link is None or "://" in link:
        return link
    if not is_hub_id(base.id):
        return None
    path = quote(link.removeprefix("./"))
    return f"https://huggingface.co/{base.id}/blob/{quote(base.revision or 'main')}/{path}"


def _introduction(content: CardContent) -> Iterator[str]:
    config, base = content.config, content.config.base_model
    if is_hub_id(base.id):
        model = f"[{base.id}](https://huggingface.co/{base.id})"
        revision = f" at revision `{plain(base.revision)}`" if base.revision else ""
    else:
        model, revision = f"the local model `{plain(public_name(base.id))}`", ""
    yield (
        f"Learned codebooks that store the key/value cache of {model}{revision} in "
        f"{config.rate}. They are not a model: the base model's weights stay as they are and come "
        "from their own repository."
    )
    lines, *rest = format_section(config)
    yield "\n".join(filter(None, [headline(content), lines]))
    yield from rest


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
        runtime_limit(content),
    ]
    cache = content.config.cache
    if kept := kept_tokens(cache):
        limits.insert(
            1,
            f"A context of up to {cache.sinks + cache.window} tokens is not compressed: {kept} "
            "stay as they are.",
        )
    if content.is_demo:
        limits.append(
            "The codebooks were made with cqtool's demo model, weights of this base model that had "
            "been quantized before: figures are not those of the published checkpoint."
        )
    if quality is not None:
        measured = quality.generation is not None or quality.tasks is not None
        tasks = "other tasks" if measured else "downstream tasks"
        limits.append(
            f"Quality was measured on the text above, in windows of {quality.window_length} "
            f"tokens. Other domains, longer contexts and {tasks} were not measured."
        )
    yield "\n".join(f"- {limit}" for limit in limits)


def _calibration(content: CardContent) -> Iterator[str]:
    config, data = content.config, content.config.calibration
    recipe = config.recipe.get("name")
    made = f"the recipe `{plain(recipe)}` and " if isinstance(recipe, str) else ""
    yield (
        f"Fitted by cqtool {plain(config.tool_version)} to {data.sequences} sequences of "
        f"{data.sequence_length} tokens{_texts(data.dataset)}, seed {data.seed}, with {made}the "
        f"objective `{plain(config.objective)}` ({OBJECTIVES[config.objective]}). SHA-256 of the "
        f"token ids: `{plain(data.digest)}`."
    )
    if config.tuned:
        yield (
            "The fitted codebooks were then tuned end to end, on further text; `calibration.json` "
            "names it, and has the settings and the figures."
        )
    files = [f"`{plain(name)}`" for name in needed_files(content)]
    where = f", run in a folder that holds {' and '.join(files)}" if files else ""
    yield (
        "The whole recipe is in `cq_config.json`. This makes the codebooks again from it, and "
        f"compares the bytes{where}:"
    )
    yield f"```bash\n{rebuild_command(content)}\n```"


def _texts(source: Mapping[str, Any]) -> str:
    """` of` the text, or how many sequences are of which."""
    parts = text_parts(source)
    if len(parts) == 1:
        return f" of {dataset(parts[0])}"
    shown = [f"{plain(part.get('sequences'))} of {dataset(part)}" for part in parts]
    return ": " + ", ".join(shown)


def _links(reports: tuple[str, ...]) -> Iterator[str]:
    """The section that names what else was reported; nothing where that is nothing."""
    names = [name for name in reports if name.endswith((".html", ".png"))]
    if names:
        yield "## Reports"
        # The page that has all of it comes first.
        names.sort(key=lambda name: not name.endswith(".html"))
        links = ", ".join(f"[{name.rsplit('/', 1)[-1]}]({name})" for name in names)
        yield f"Figures and plots: {links}."

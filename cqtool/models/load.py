"""Open a decoder and its tokenizer: from the Hub, a folder, a GGUF file, or the embedded demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqtool.errors import EnvironmentProblem, ModelError
from cqtool.models.demo import DEMO_ID, DEMO_LICENSE, demo_folder
from cqtool.models.explain import explained
from cqtool.models.gguf import converted
from cqtool.models.license import License, read_license
from cqtool.models.quiet import quiet_transformers
from cqtool.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}
"""The names a user may give for a dtype, besides ``auto``."""


@dataclass
class OpenedModel:
    """A model that is ready to run.

    Attributes:
        model: in evaluation mode, without gradients on its parameters.
        tokenizer: the model's own; None only when it was not required and is not there.
        name: what the user called the model.
        base_id: see :func:`base_id`.
        revision: the commit it was loaded from, if known.
        license: as stated in its model card, as far as known.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    base_id: str
    revision: str | None
    license: License = field(default_factory=License)


def open_model(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    require_tokenizer: bool = True,
    progress: Progress = SILENT,
) -> OpenedModel:
    """Open a decoder: a language model, or one that reads images too, with all its parts.

    Attention runs through PyTorch's scaled_dot_product_attention where the architecture has it
    (transformers' own default).

    Args:
        name: ``demo``, a Hub id, a local folder as written by ``save_pretrained``, or a local
            ``.gguf`` file.
        revision: branch, tag or commit of a Hub model.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1`` or
            ``mps``.
        dtype: ``auto`` takes the checkpoint's own dtype on a GPU and float32 on the CPU, where
            16-bit arithmetic is slow; otherwise a name from :data:`DTYPES`.
        trust_remote_code: whether to run model code that comes with the checkpoint.
        require_tokenizer: whether a missing tokenizer is an error.
        progress: is told when the demo model or a GGUF file has to be converted first.

    Raises:
        ModelError: the model is missing, gated, damaged, or no decoder.
        EnvironmentProblem: there is no such device, or its memory is too small.
    """
    target = resolve_device(device)
    path, base_id = _locate(name, revision, progress)
    with quiet_transformers(), explained(name, revision):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
        auto = _model_class(config, name)
        tokenizer = _open_tokenizer(path, name, revision, trust_remote_code, require_tokenizer)
        loaded: Any = auto.from_pretrained(
            path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=_resolve_dtype(dtype, target),
            output_loading_info=True,
        )
        model, loading = loaded
        _require_all_weights(loading["missing_keys"], name)
        model = model.to(target)
    model.eval()
    model.requires_grad_(False)
    return OpenedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        base_id=base_id,
        revision=_commit(path, revision),
        license=License(DEMO_LICENSE) if name == "demo" else read_license(path, revision),
    )


def resolve_device(device: str) -> torch.device:
    """The device that a name such as ``auto`` or ``cuda:1`` stands for.

    Raises:
        ModelError: there is no such kind of device.
        EnvironmentProblem: this machine lacks it.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"There is no device '{device}'; use auto, cpu, cuda or mps.") from error
    if target.type == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentProblem("PyTorch sees no Apple GPU here; use --device cpu.")
    if target.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or count == 0:
            raise EnvironmentProblem(
                "PyTorch sees no CUDA GPU here; use --device cpu, or run `cqtool doctor`."
            )
        if target.index is not None and target.index >= count:
            raise EnvironmentProblem(
                f"There is no GPU {target.index}: this machine has {count}, counted from cuda:0."
            )
    return target


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    import torch

    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise ModelError(f"There is no dtype '{dtype}'; use auto, {', '.join(DTYPES)}.")
    found = getattr(torch, DTYPES[dtype])
    assert isinstance(found, torch.dtype)
    return found


def base_id(name: str) -> str:
    """What the model a user calls `name` is called in files that leave this machine.

    ``demo`` goes by its Hub id, and a local folder or file by its own name alone: ``./folder``.
    """
    if name == "demo":
        return DEMO_ID
    path = Path(name).expanduser()
    return f"./{path.resolve().name}" if path.exists() else name


def _locate(name: str, revision: str | None, progress: Progress) -> tuple[str, str]:
    """What to hand to ``from_pretrained``, and what the model is called elsewhere."""
    if name == "demo":
        if revision is not None:
            raise ModelError("The embedded demo model has one version only; leave out --revision.")
        return str(demo_folder(progress)), base_id(name)
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(f"{name} is a local folder, which has no --revision; leave it out.")
        if not (path / "config.json").is_file():
            raise ModelError(
                f"The folder {name} has no config.json, so it is not a transformers model; give a "
                "folder written by save_pretrained."
            )
        return str(path), base_id(name)
    if path.suffix == ".gguf" and path.is_file():
        if revision is not None:
            raise ModelError(f"{name} is a local file, which has no --revision; leave it out.")
        return str(converted(path, progress=progress)), base_id(name)
    if path.is_file():
        raise ModelError(
            f"{name} is a file; give the folder that holds the model's config.json, or a .gguf."
        )
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelError(f"There is no folder {name}; check the path.")
    return name, name


def _model_class(config: PreTrainedConfig, name: str) -> Any:
    """The class of transformers that opens the model; refuses what is no decoder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    kind = str(config.model_type)
    decoders = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    readers = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    encoders = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    fix = "cqtool needs a decoder with a KV cache, such as Llama, Qwen, Mistral or Gemma"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model ({kind}); {fix}.")
    if kind in encoders and not getattr(config, "is_decoder", False):
        raise ModelError(f"{name} is an encoder ({kind}); {fix}.")
    if kind in decoders or remote:
        return AutoModelForCausalLM
    if kind in readers:
        return AutoModelForImageTextToText
    raise ModelError(f"{name} is not a text generating model ({kind}); {fix}.")


def _open_tokenizer(
    path: str, name: str, revision: str | None, trust_remote_code: bool, required: bool
) -> Any:
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers import AutoTokenizer

    cause: Exception | None = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
        # Without tokenizer files, transformers may make an empty tokenizer from the config alone.
        if tokenizer("a b", add_special_tokens=False)["input_ids"]:
            return tokenizer
    except (LocalEntryNotFoundError, ImportError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = error
    if required:
        raise ModelError(
            f"{name} has no usable tokenizer; save the model's tokenizer beside its weights."
        ) from cause
    return None


def _require_all_weights(missing: Any, name: str) -> None:
    names = sorted(missing)
    if names:
        raise ModelError(
            f"The checkpoint of {name} lacks {len(names)} of the model's tensors (such as "
            f"{names[0]}), which would be random; use a complete checkpoint."
        )


def _commit(path: str, revision: str | None) -> str | None:
    """The commit that a model on the Hub was read from, None for a folder."""
    from huggingface_hub import hf_hub_download

    if Path(path).is_dir():
        return None
    # The file is in the cache by now, in a folder named after its commit.
    return Path(hf_hub_download(path, "config.json", revision=revision)).parent.name

"""The card's words on the code that an artifact carries: how to run it, and what trusting means."""

from __future__ import annotations

from collections.abc import Iterator

from cqtool.artifact.card_content import CardContent
from cqtool.layout.config import RUNTIME_NAME

_TRUST = (
    "All of this runs code of this repository, so do it only where you trust its author. Digests "
    "are compared with `manifest.json` before runtime and kernels are loaded; they show that the "
    "files are whole, not who wrote them. Pin a `revision` that you have looked at."
)


def runtime_section(content: CardContent) -> Iterator[str]:
    """The section on kernels; nothing where the artifact holds no code."""
    kernels = content.kernels
    if kernels is None:
        return
    yield "## Kernels"
    if kernels.cubins:
        yield (
            f"`{RUNTIME_NAME}` holds CUDA kernels for {', '.join(kernels.architectures)}, and the "
            "sources and Python modules that they are a part of. cqtool compiles its own kernels "
            "on first use, and takes these where you say so:"
        )
        yield (
            "```python\n"
            f'cache = CQCache.from_pretrained("{content.repo}", model, trust_kernels=True)\n'
            "```"
        )
        launch = " (and `cuda-bindings`, to launch the kernels)"
    else:
        yield f"`{RUNTIME_NAME}` holds cqtool's runtime: Python modules and CUDA sources."
        launch = ""
    yield (
        "Without cqtool, the runtime comes from the artifact itself, with only torch, transformers "
        f"and safetensors installed{launch}. transformers fetches and runs it in one call:"
    )
    yield (
        "```python\n"
        "output = model.generate(\n"
        f'    **inputs, custom_generate="{content.repo}", trust_remote_code=True\n'
        ")\n"
        "```"
    )
    yield "For a cache of your own, take `CQCache` from a downloaded folder:"
    yield (
        "```python\n"
        "import importlib, sys\n"
        "from huggingface_hub import snapshot_download\n\n"
        f'folder = snapshot_download("{content.repo}")\n'
        'sys.path.insert(0, f"{folder}/build")\n'
        'CQCache = importlib.import_module("torch-cuda").CQCache\n'
        "cache = CQCache.from_pretrained(folder, model)\n"
        "```"
    )
    yield (
        "On a machine with CUDA, `kernels.get_local_kernel(pathlib.Path(folder)).CQCache` does the "
        f"same. {_TRUST}"
    )


def runtime_limit(content: CardContent) -> str:
    """What a reader must know of speed."""
    kernels = content.kernels
    if kernels is None:
        return (
            "The artifact holds codebooks and no kernels: without cqtool's own, on a GPU, codes "
            "are decoded in plain PyTorch, which saves memory and not time."
        )
    if kernels.note:
        return (
            f"No compiled kernels are in it: {kernels.note.rstrip('.')}. Codes that no kernel "
            "decodes are decoded in plain PyTorch, which saves memory and not time."
        )
    return (
        "The kernels need an NVIDIA GPU of compute capability 8.0 or later. Elsewhere codes are "
        "decoded in plain PyTorch, which saves memory and not time."
    )

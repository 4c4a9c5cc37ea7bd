"""What transformers and the Hub client raise, said in one sentence with the fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cqtool.errors import CqtoolError, EnvironmentProblem, ModelError


@contextmanager
def explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn what goes wrong while the model `name` is opened into a :class:`CqtoolError`."""
    try:
        yield
    except CqtoolError:
        raise
    except Exception as error:
        sentence = _sentence(error, name, revision)
        if sentence is None:
            raise
        raise sentence from error


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and what caused it; transformers wraps the Hub's precise exceptions in vague ones."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _sentence(error: Exception, name: str, revision: str | None) -> CqtoolError | None:
    return _hub_sentence(_chain(error), name, revision) or _local_sentence(error, name)


def _hub_sentence(
    chain: list[BaseException], name: str, revision: str | None
) -> CqtoolError | None:
    from huggingface_hub import errors

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if any_of(errors.GatedRepoError):  # a subclass of RepositoryNotFoundError, so it comes first
        return ModelError(
            f"The model {name} is gated: request access at https://huggingface.co/{name}, then run "
            "`hf auth login`."
        )
    if any_of(errors.RepositoryNotFoundError, errors.HFValidationError):
        return ModelError(
            f"There is no model '{name}' on the Hub that you may read, and no such folder; check "
            "the name, or run `hf auth login` if it is private."
        )
    if any_of(errors.RevisionNotFoundError):
        return ModelError(
            f"The model {name} has no revision '{revision}'; name a branch, a tag or a commit."
        )
    # The client library's own exceptions come from httpx or its successor, by version.
    unreachable = any(type(link).__module__.startswith("httpx") for link in chain)
    if unreachable or any_of(
        errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError
    ):
        return ModelError(
            f"Cannot reach the Hub for {name}, and it is not in the local cache; check the network "
            "(and HF_HUB_OFFLINE), or give a local folder or `demo`."
        )
    return None


def _local_sentence(error: Exception, name: str) -> CqtoolError | None:
    import torch
    from safetensors import SafetensorError

    text = str(error)
    short = text.strip().split("\n")[0].rstrip(". ")
    if isinstance(error, torch.OutOfMemoryError):
        return EnvironmentProblem(
            f"{name} does not fit into the device's memory; use --dtype bfloat16, a larger GPU or "
            "--device cpu."
        )
    if "trust_remote_code" in text:
        return ModelError(
            f"{name} brings its own model code; read it, and if you trust it, pass "
            "--trust-remote-code."
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return ModelError(
            f"This version of transformers does not know the architecture of {name}; upgrade "
            "transformers, or pass --trust-remote-code if the model brings its own code."
        )
    if "Unrecognized configuration class" in text:
        return ModelError(f"{name} is not a text generating model; cqtool needs a decoder.")
    if isinstance(error, SafetensorError):
        return ModelError(f"A weight file of {name} is damaged ({short}); download it again.")
    if isinstance(error, ImportError):
        return EnvironmentProblem(f"{name} needs a package that is missing here: {short}.")
    if isinstance(error, OSError) and "no file named" in text:
        return ModelError(f"{name} has a config but no weights; give a folder with model files.")
    if isinstance(error, OSError) and "is not a valid JSON file" in text:
        return ModelError(f"The config.json of {name} is not valid JSON; download it again.")
    if isinstance(error, OSError | ValueError | KeyError | RuntimeError):
        return ModelError(f"{name} cannot be loaded ({short}); use another model or revision.")
    return None

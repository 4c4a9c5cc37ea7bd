"""The one exception family for what a user can cause or repair.

Every message is one or two plain sentences that end with the fix; the command line prints it
without a traceback and ends with :attr:`CqtoolError.exit_code`. Anything else that is raised is a
bug in cqtool and keeps its traceback.
"""

from __future__ import annotations


class CqtoolError(Exception):
    """Base of all errors that carry their own remedy."""

    exit_code = 2


class RecipeError(CqtoolError):
    """A recipe, a format name or an option is wrong."""


class ModelError(CqtoolError):
    """The model is missing, gated, of a kind without a usable KV cache, or misbehaves."""


class DataError(CqtoolError):
    """The text is missing, unreadable or too short."""


class SampleError(CqtoolError):
    """The sample store is missing, damaged or does not fit what is asked of it."""


class ArtifactError(CqtoolError):
    """A calibration folder or artifact is missing, damaged or made for another model."""


class EnvironmentProblem(CqtoolError):
    """Something this machine lacks: a package, a GPU, disk space, the network."""

    exit_code = 1


class HubError(CqtoolError):
    """The Hub refused, or could not be reached."""

    exit_code = 1


class KernelError(CqtoolError):
    """A CUDA kernel could not be compiled, loaded or launched."""

    exit_code = 1


class KernelsUnavailable(KernelError):
    """This machine has no way to run a kernel; the torch reference can take its place."""

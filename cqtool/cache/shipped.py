"""The compiled kernels that an artifact ships: used when the user says that they trust them."""

from __future__ import annotations

from pathlib import Path

from cqtool.errors import ArtifactError
from cqtool.kernels.cubins import INDEX, shipped_index
from cqtool.kernels.load import register_folder
from cqtool.layout.config import RUNTIME_NAME
from cqtool.manifest import MANIFEST_NAME


def trust_shipped_kernels(folder: Path) -> None:
    """Let this process run the compiled kernels of an artifact, where it ships any.

    They are code for the GPU. Their digests must have been compared with the manifest before (see
    :func:`cqtool.cache.loading.resolve`), and those of other sources than this package's are never
    run.

    Raises:
        ArtifactError: there is no manifest, so that nothing was compared.
        KernelError: the list of the kernels cannot be read.
    """
    runtime = folder / RUNTIME_NAME
    if not (runtime / INDEX).is_file():
        return
    if not (folder / MANIFEST_NAME).is_file():
        raise ArtifactError(
            f"{folder} ships compiled kernels and has no {MANIFEST_NAME}, so they cannot be "
            "verified; download or export the artifact again, or leave trust_kernels out."
        )
    shipped_index(runtime)
    register_folder(runtime)

"""What a model card is made of, and the few names that several of its sections share."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from cqtool.artifact.measured import QualityReport, QualityRow
from cqtool.artifact.runtime_kernels import CompiledKernels
from cqtool.artifact.speed import SpeedReport
from cqtool.layout.config import CQConfig
from cqtool.models.demo import DEMO_ID
from cqtool.models.names import is_hub_id

LOCAL_MODEL = "PATH/TO/MODEL"


@dataclass(frozen=True)
class CardContent:
    """Everything a card may speak of.

    Attributes:
        config: the artifact's configuration.
        quality: what was measured, None if nothing was.
        codebook_bytes: size of ``codebooks.safetensors``.
        reports: relative paths of the report files, ``/`` between folders.
        repo_id: Hub id that the artifact is meant for, None if not known.
        kernels: what it ships of kernels, None if it carries no runtime.
        speed: what was measured of speed, None if nothing was.
    """

    config: CQConfig
    quality: QualityReport | None
    codebook_bytes: int
    reports: tuple[str, ...]
    repo_id: str | None
    kernels: CompiledKernels | None = None
    speed: SpeedReport | None = None

    @property
    def own_row(self) -> QualityRow | None:
        """The measurement of this artifact itself; a report may hold other formats only."""
        if self.quality is None:
            return None
        return self.quality.row_of(self.config.cache.name, self.config.objective)

    @property
    def is_demo(self) -> bool:
        """Whether the base is the built-in demo model: named after its original, but no commit."""
        base = self.config.base_model
        return base.id == DEMO_ID and base.revision is None

    @property
    def repo(self) -> str:
        """The repository as the card's commands name it."""
        return self.repo_id or "ORG/NAME"

    @property
    def model_argument(self) -> str:
        """The base model as the card's `cqtool` commands name it, with its revision."""
        base = self.config.base_model
        if self.is_demo:
            return "demo"
        if not is_hub_id(base.id):
            return LOCAL_MODEL
        return base.id + (f" --revision {shlex.quote(base.revision)}" if base.revision else "")

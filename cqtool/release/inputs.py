"""What decides the outcome of each local step, JSON-ready, for the journal.

The model is told by its fingerprint and commit, text by the digest of its tokens, code by the
versions of the libraries. Names of folders decide nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cqtool
from cqtool.artifact.provenance import cqtool_commit
from cqtool.artifact.runtime import RuntimeChoice
from cqtool.codebooks.calibrate import library_versions
from cqtool.codebooks.engines import make_engine
from cqtool.files import digest_json, sha256_file
from cqtool.layout.config import CODEBOOKS_NAME, read_config
from cqtool.manifest import artifact_files
from cqtool.models.fingerprint import fingerprint
from cqtool.models.load import OpenedModel
from cqtool.quality import CheckSettings
from cqtool.quality.text import evaluation_windows
from cqtool.recipe import Recipe
from cqtool.sampling import calibration_windows
from cqtool.tuning.text import tuning_windows

_NOT_EXPORTED = "samples/"


@dataclass(frozen=True)
class Inputs:
    """The inputs of every step for one model and recipe.

    Raises:
        DataError: on use, where a text is missing or too short.
        EnvironmentProblem: on use, where the k-means engine is not installed.
    """

    opened: OpenedModel
    recipe: Recipe

    @cached_property
    def _common(self) -> dict[str, Any]:
        opened = self.opened
        return {
            "model": [opened.base_id, opened.revision, digest_json(fingerprint(opened.model))],
            "device": opened.model.device.type,
            "dtype": str(opened.model.dtype).removeprefix("torch."),
            "versions": library_versions(),
        }

    @cached_property
    def calibrate(self) -> dict[str, Any]:
        """Of the fitted codebooks; how they are tuned or judged later changes nothing."""
        file = self.recipe.grouping.file
        path = Path(file).expanduser() if file is not None else None
        device = self.opened.model.device.type
        return self._common | {
            "recipe": self.recipe.model_copy(update={"tuning": None}).digest,
            "engine": make_engine(self.recipe.kmeans, device).detail,
            "text": calibration_windows(self.opened, self.recipe.calibration).digest,
            # The content of the file may change under its name.
            "groups": sha256_file(path) if path is not None and path.is_file() else None,
        }

    def tune(self, calibration: Path) -> dict[str, Any]:
        """Of the codebooks of `calibration`, tuned."""
        return self._common | {
            "recipe": self.recipe.digest,
            "codebooks": sha256_file(calibration / CODEBOOKS_NAME),
            "text": tuning_windows(self.opened, self.recipe).digest,
        }

    @cached_property
    def entropy(self) -> dict[str, Any]:
        """Of the entropy report, which is about the samples and not about the codebooks."""
        return {"calibration": digest_json(self.calibrate), "versions": library_versions()}

    def check(self, folder: Path) -> dict[str, Any]:
        """Of the quality report of the calibration in `folder`."""
        windows = evaluation_windows(self.opened, CheckSettings.of_recipe(self.recipe))
        return self._common | {
            "codebooks": sha256_file(folder / CODEBOOKS_NAME),
            "format": read_config(folder).cache.to_json(),
            "text": windows.digest,
            "gates": self.recipe.gates.model_dump(mode="json"),
        }


def export_inputs(folder: Path, repo_id: str | None, runtime: RuntimeChoice) -> dict[str, Any]:
    """Of the artifact of the calibration in `folder`."""
    return {
        "files": {
            name: sha256_file(path)
            for name, path in sorted(artifact_files(folder).items())
            if not name.startswith(_NOT_EXPORTED)
        },
        "repository": repo_id,
        "runtime": asdict(runtime),
        "versions": {"cqtool": cqtool.__version__, "commit": cqtool_commit()},
    }

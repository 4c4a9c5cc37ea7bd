"""What to do: the validated recipe, read from a YAML file; options override single fields.

A recipe is everything that decides a calibration (format, objective, k-means, text) and how it is
judged (evaluation text, gates). The shipped ones lie in the folder `recipes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from cqtool.errors import RecipeError
from cqtool.files import digest_json
from cqtool.layout.config import CONFIG_NAME, read_config
from cqtool.recipe_codes import Format, Groups, LayerFormat
from cqtool.recipe_errors import explain
from cqtool.recipe_texts import CalibrationText, EvaluationText, Fraction, Section, Text
from cqtool.spec import (
    KINDS,
    CacheSpec,
    Codes,
    CQSpec,
    Encoding,
    Gain,
    Kind,
    LayerCodes,
    Objective,
    Sharing,
)
from cqtool.yaml_lines import Lines, read_yaml

_LAYERS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


class KMeans(Section):
    """How centroids are fitted; the engine auto is batched on a CUDA GPU and faiss elsewhere."""

    engine: Literal["auto", "faiss", "batched"] = "auto"
    iterations: int = Field(default=100, ge=1)
    init: Literal["kmeans++", "random"] = "kmeans++"


class Tuning(Section):
    """End-to-end tuning of the fitted codebooks (`cqtool tune`), on the calibration's text.

    Steps take `batch` of the `sequences` each, `micro_batch` at a time; `held_out` further ones say
    every `evaluate_every` steps whether it still helps, and the best codebooks so far are kept.
    After `patience` such looks without a gain, tuning ends. The step size rises over the first
    tenth of the steps and falls along a cosine; it is relative to the error that a codebook makes.
    `softness` is the temperature of the choice of a centroid that gradients see, 0 for none. `mode`
    says what lies in the cache: what decoding token by token leaves there, or a prompt's keys and
    values, computed in full precision before they were coded.
    """

    steps: int = Field(default=600, ge=1)
    learning_rate: float = Field(default=0.06, gt=0, allow_inf_nan=False)
    softness: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    batch: int = Field(default=8, ge=1)
    micro_batch: int = Field(default=8, ge=1)
    sequences: int = Field(default=256, ge=1)
    sequence_length: int = Field(default=1024, ge=2)
    held_out: int = Field(default=8, ge=1)
    evaluate_every: int = Field(default=50, ge=1)
    patience: int = Field(default=4, ge=1)
    gradient_checkpointing: bool = False
    mode: Literal["teacher", "prefill"] = "teacher"
    seed: int = Field(default=0, ge=0)


class GateLimits(Section):
    """Limits that `cqtool check` holds a calibration to; None is no limit."""

    max_ppl_increase: Fraction | None = None
    max_kl: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    min_top1: Fraction | None = Field(default=None, le=1)


class Recipe(Section):
    """How to make and judge one quantized cache."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    description: str = ""
    format: Format
    layers: dict[str, LayerFormat] = Field(default_factory=dict)
    grouping: Groups = Groups()
    window: int = Field(default=128, ge=0)
    sinks: int = Field(default=4, ge=0)
    objective: Objective = "fisher"
    feedback: Literal["none", "ldlq"] = "none"
    gain: Gain = "none"
    sharing: Sharing = "none"
    kmeans: KMeans = KMeans()
    tuning: Tuning | None = None
    calibration: CalibrationText = CalibrationText()
    evaluation: EvaluationText = EvaluationText()
    gates: GateLimits = GateLimits()

    @field_validator("layers", mode="before")
    @classmethod
    def _by_text(cls, layers: object) -> object:
        # YAML reads `29: cq-4c8b` as a number.
        return (
            {str(key): one for key, one in layers.items()} if isinstance(layers, dict) else layers
        )

    @field_validator("layers")
    @classmethod
    def _are_layers(cls, layers: dict[str, LayerFormat]) -> dict[str, LayerFormat]:
        ends = [_ends(name) for name in layers]
        if ends != sorted(ends) or any(before[1] >= after[0] for before, after in pairwise(ends)):
            raise ValueError("name layers from the lowest index on, each once, such as 0-3 and 29")
        return layers

    @field_validator("feedback")
    @classmethod
    def _feedback_has_a_metric(cls, feedback: str, info: ValidationInfo) -> str:
        if feedback != "none" and info.data.get("objective", "query") != "query":
            raise ValueError(
                f"{feedback} needs the metric of another objective; write objective: query, or "
                "feedback: none"
            )
        return feedback

    @field_validator("sharing")
    @classmethod
    def _heads_of_their_own_share_nothing(cls, sharing: str, info: ValidationInfo) -> str:
        layers = info.data.get("layers", {}).values()
        lists = any(isinstance(names, list) for own in layers for names in (own.key, own.value))
        if sharing != "none" and lists:
            raise ValueError(
                "heads with codes of their own cannot share codebooks; write sharing: none, or one "
                "code for all heads of a layer"
            )
        return sharing

    @property
    def spec(self) -> CacheSpec:
        """The cache format that this recipe makes."""
        encoding: Encoding = "nearest"
        if self.objective == "query":
            encoding = "ldlq" if self.feedback == "ldlq" else "metric"

        def codes(format: Format | LayerFormat, kind: Kind) -> Codes:
            names, grouping = getattr(format, kind), getattr(self.grouping, kind)
            found = tuple(
                replace(
                    CQSpec.parse(name),
                    grouping=grouping,
                    encoding=encoding,
                    gain=self.gain,
                    sharing=self.sharing,
                )
                for name in ([names] if isinstance(names, str) else names)
            )
            return found[0] if isinstance(names, str) else found

        layers = tuple(
            LayerCodes(*_ends(name), *(codes(format, kind) for kind in KINDS))
            for name, format in self.layers.items()
        )
        key, value = (codes(self.format, kind) for kind in KINDS)
        assert isinstance(key, CQSpec) and isinstance(value, CQSpec)
        return CacheSpec(key, value, self.window, self.sinks, layers)

    @property
    def digest(self) -> str:
        """SHA-256 over the fields that decide a calibration: all but its name, its description and
        how it is judged."""
        decisive = self._decisive()
        # As it was before there was a choice.
        if self.grouping == Groups():
            del decisive["grouping"]
        if self.tuning is None:
            del decisive["tuning"]
        if not self.layers:
            del decisive["layers"]
        for name in ("feedback", "gain", "sharing"):
            if decisive[name] == "none":
                del decisive[name]
        return digest_json(decisive)

    def differences(self, other: Self) -> list[str]:
        """Names of the decisive fields in which two recipes differ, such as `window`."""
        mine, theirs = self._decisive(), other._decisive()
        return [name for name in mine if mine[name] != theirs[name]]

    def _decisive(self) -> dict[str, Any]:
        judged = {"name", "description", "evaluation", "gates"}
        return self.model_dump(mode="json", exclude=judged)


def _ends(layers: str) -> tuple[int, int]:
    """First and last index of layers written `3` or `0-3`."""
    match = _LAYERS.fullmatch(layers)
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise ValueError(f"'{layers}' names no layers; write an index or a range, such as 3 or 0-3")
    return int(match[1]), int(match[2] or match[1])


def recipe_folder() -> Path:
    """The folder of the shipped recipes: inside the installed package, or beside it in a
    checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a shipped recipe, a YAML file, or what a calibration or artifact was made with.

    Args:
        name_or_path: a name of :func:`recipe_names`, or the path of a YAML file or such a folder.
        overrides: values by dotted key, such as `{"calibration.seed": 1}`, that replace the file's.

    Raises:
        ArtifactError: it is a folder of something else, or damaged.
        RecipeError: there is no such recipe, or a key or value is wrong; says where and what is
            allowed.
    """
    path = _find(name_or_path)
    if path.is_dir():
        return recipe_of(path, overrides)
    value, lines = read_yaml(path)
    return recipe_from(value, overrides or {}, origin=str(path), lines=lines)


def recipe_from(
    value: Any, overrides: Mapping[str, Any], *, origin: str, lines: Lines | None = None
) -> Recipe:
    """Validate the parsed content of a recipe, `overrides` applied.

    Raises:
        RecipeError: a key or value is wrong; the message begins with `origin` and its line, or
            with the overriding option.
    """
    if not isinstance(value, dict):
        raise RecipeError(
            f"{origin}: a recipe is a list of `key: value` lines, such as `format: cq-8c8b`."
        )
    merged = value
    for key, override in overrides.items():
        merged = _replaced(merged, key.split("."), override)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        overridden = {tuple(key.split(".")) for key in overrides}
        raise RecipeError(explain(error, Recipe, origin, lines or {}, overridden)) from None


def recipe_of(folder: Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that a calibration folder or artifact was made with, `overrides` applied.

    Raises:
        ArtifactError: `folder` is none of the two, or damaged.
        RecipeError: an override is wrong.
    """
    recipe = dict(read_config(folder).recipe)
    return recipe_from(recipe, overrides or {}, origin=str(folder / CONFIG_NAME))


def text_overrides(
    part: Literal["calibration", "evaluation"],
    dataset: str | list[str] | None,
    config: str | None,
    split: str | None,
    column: str | None,
) -> dict[str, Any]:
    """Overrides that name another text, or several; None leaves the recipe's own value.

    A new data set starts from the defaults, since the recipe's configuration, split, column and
    revision belong to its own.
    """
    if isinstance(dataset, list):
        dataset = dataset[0] if len(dataset) == 1 else dataset or None
    given = {"dataset": dataset, "config": config, "split": split, "column": column}
    overrides = {name: value for name, value in given.items() if value is not None}
    if dataset is not None:
        overrides = Text().model_dump() | overrides
    return {f"{part}.{name}": value for name, value in overrides.items()}


def _find(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or "/" in name_or_path:
        return path
    names = recipe_names()
    if name_or_path in names:
        return recipe_folder() / f"{name_or_path}.yaml"
    if (path / CONFIG_NAME).is_file():
        return path
    close = get_close_matches(name_or_path, names, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise RecipeError(
        f"There is no recipe '{name_or_path}'.{hint} Shipped are {', '.join(names)}; or give the "
        "path of a YAML file, or of a calibration or artifact."
    )


def _replaced(value: Any, keys: list[str], new: Any) -> dict[str, Any]:
    content = dict(value) if isinstance(value, dict) else {}
    head, *rest = keys
    content[head] = _replaced(content.get(head), rest, new) if rest else new
    return content

"""The formats of one check: the calibration, and what it is compared with.

Names are looked at before anything is measured, so that a wrong one costs no time; the formats
themselves are made one after the other, when their turn comes, and let go before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

from cqtool.cache import CacheFormat, LayerCodecs
from cqtool.cache.loading import CodecTables, load_format, make_codecs, resolve
from cqtool.codebooks.calibrate import fit_codebooks
from cqtool.codebooks.engines import make_engine
from cqtool.codebooks.fit import check_enough_samples, check_fits_geometry
from cqtool.errors import ArtifactError, CqtoolError, RecipeError, SampleError
from cqtool.files import digest_json, sha256_file
from cqtool.layout.config import CODEBOOKS_NAME, CONFIG_NAME, read_config
from cqtool.manifest import MANIFEST_NAME
from cqtool.models.fingerprint import compare_fingerprints, fingerprint
from cqtool.models.load import OpenedModel
from cqtool.progress import Progress
from cqtool.quality.memory import OutOfMemory, memory_explained
from cqtool.quality.report import Skipped
from cqtool.quality.settings import CheckSettings
from cqtool.recipe import Recipe, recipe_from, recipe_of
from cqtool.sampling import SampleStore
from cqtool.schemes import SCHEMES, make_format
from cqtool.spec import Objective

ALL = "all"
PAPER = "paper"
"""What stands in the place of an objective for the method as published: contiguous groups, the
Fisher-guided objective, codebooks as fitted (Zhang et al., KV Cache is 1 Bit Per Channel, 2024)."""
PAPER_FORMATS = ("cq-4c8b", "cq-8c8b", "cq-8c10b")
"""The formats of the paper's tables."""


@dataclass(frozen=True)
class Candidate:
    """A format to measure.

    Attributes:
        label: how tables call it.
        objective: how its codebooks were fitted, None without codebooks.
        fitted: whether it was fitted to samples of the model.
        make: makes it, on the model's device.
        origin: what it is made from, JSON-ready: digests of files, a recipe and its seed, samples.
        optional: whether one that cannot be measured is named in a note and left out.
    """

    label: str
    objective: str | None
    fitted: bool
    make: Callable[[], CacheFormat]
    origin: Mapping[str, str | int]
    optional: bool = False


def distinct(found: Sequence[Candidate]) -> list[Candidate]:
    """The same with a number behind labels that were there before: scores go by label."""
    counts: dict[str, int] = {}
    named = []
    for one in found:
        counts[one.label] = count = counts.get(one.label, 0) + 1
        named.append(one if count == 1 else replace(one, label=f"{one.label} ({count})"))
    return named


def _files(folder: Path) -> dict[str, str | int]:
    """What the format of a calibration is read from: its recipe, and digests of the files."""
    digests = {name: sha256_file(folder / name) for name in (CONFIG_NAME, CODEBOOKS_NAME)}
    return {**_recipe(recipe_of(folder)), **digests}


def _recipe(recipe: Recipe) -> dict[str, str | int]:
    return {"recipe": recipe.digest, "seed": recipe.calibration.seed}


def _method(folder: Path) -> str:
    """How the codebooks of a calibration came about."""
    tuned = ", tuned" if read_config(folder).tuned else ""
    return f"{recipe_of(folder).objective}{tuned}"


class Candidates:
    """Looks up what a check names.

    Args:
        opened: the model.
        calibration: the folder that is checked.
        settings: what to compare it with; window and sinks of all formats.
        progress: where fits report to.

    Raises:
        ArtifactError: the calibration is damaged or of another model.
    """

    def __init__(
        self, opened: OpenedModel, calibration: Path, settings: CheckSettings, progress: Progress
    ) -> None:
        self._opened, self._calibration = opened, calibration
        self._settings, self._progress = settings, progress
        self.recipe = recipe_of(calibration)
        if settings.allow_other_base and not (calibration / MANIFEST_NAME).exists():
            raise ArtifactError(
                "What is measured on another model than the base must not stand among a "
                f"calibration's own figures; run `cqtool export {calibration}` and check the "
                "artifact with --allow-other-base."
            )
        checked = self._load(calibration)
        self._geometry = checked.geometry
        self._device = opened.model.device.type
        self.window = checked.window if settings.window is None else settings.window
        self.sinks = checked.sinks if settings.sinks is None else settings.sinks
        label, load = f"{checked.name} {_method(calibration)}", partial(self._loaded, calibration)
        objective = self.recipe.objective
        self.checked = Candidate(label, objective, True, load, _files(calibration))

    def against(self) -> list[Candidate]:
        """What ``--against`` names: other calibrations and artifacts.

        Raises:
            ArtifactError: one is damaged or of another model.
            HubError: one cannot be downloaded.
        """
        return [self._of_folder(resolve(name, None)) for name in self._settings.against]

    def compared(self) -> tuple[list[Candidate], list[Skipped]]:
        """What ``--compare`` names, and what cannot be made here: of ``all``, or for memory.

        Raises:
            RecipeError: a format does not exist or does not fit.
            SampleError: a fitted format needs samples that are gone.
        """
        found: list[Candidate] = []
        skipped: list[Skipped] = []
        named = self._settings.compare
        for name in dict.fromkeys(one for entry in named for one in self._expanded(entry)):
            optional = name not in named
            try:
                with memory_explained(name):
                    candidate = self._named(name, optional)
            except CqtoolError as error:
                if not (optional or isinstance(error, OutOfMemory)):
                    raise
                skipped.append(Skipped(name, str(error)))
                continue
            found.append(replace(candidate, optional=optional))
        return found, skipped

    def _expanded(self, name: str) -> Sequence[str]:
        if name != ALL:
            return (name,)
        codes = dict.fromkeys((*PAPER_FORMATS, self.recipe.spec.name))
        # Where the calibration is the paper's method itself, its own row is that.
        papers = [code for code in codes if self._differs(self._fitted_recipe(code, PAPER))]
        return (*SCHEMES, *(f"{code}:{PAPER}" for code in papers))

    def _differs(self, other: Recipe) -> bool:
        return bool(set(self.recipe.differences(other)) - {"window", "sinks"})

    def _named(self, name: str, optional: bool) -> Candidate:
        if not optional and Path(name).is_dir():
            return self._of_folder(Path(name))
        if name.startswith(("cq-", "k-cq-")):
            return self._of_code(name)
        made: tuple[LayerCodecs, ...] = ()
        if optional and SCHEMES[name].calibrated:
            # Fitting a layer may take minutes, and what else is missing is told when it is made.
            self._store()
        else:
            # One layer shows what is missing: a package, samples, or heads that fit.
            first = replace(self._geometry, layers=self._geometry.layers[:1])
            made = make_format(name, first, 0, self.sinks, self._store, self._device).layers
        fitted, make = SCHEMES[name].calibrated, partial(self._of_scheme, name, made)
        origin: dict[str, str | int] = {"scheme": name, **(self._sampled() if fitted else {})}
        return Candidate(name, None, fitted, make, origin)

    def _of_folder(self, folder: Path) -> Candidate:
        name, objective = self._load(folder).name, recipe_of(folder).objective
        label = f"{name} {_method(folder)} ({folder.name})"
        return Candidate(label, objective, True, partial(self._loaded, folder), _files(folder))

    def _of_code(self, name: str) -> Candidate:
        code, _, objective = name.partition(":")
        recipe = self._fitted_recipe(code, objective or self.recipe.objective)
        check_fits_geometry(recipe.spec, self._geometry)
        store = self._store()
        check_enough_samples(recipe.spec, store.tokens)
        if recipe.objective != "uniform" and not store.has_gradients:
            raise SampleError(
                f"'{name}' weights samples by gradients, and {store.path} has none; calibrate with "
                "--objective fisher, or compare with the objective uniform."
            )
        if recipe.objective == "query" and not store.has_moments:
            raise SampleError(
                f"'{name}' needs to know how keys and values are read, which {store.path} does not "
                "say; calibrate with --objective query, or compare with the objective fisher."
            )
        label = f"{recipe.spec.name} {objective or recipe.objective}"
        origin = {**_recipe(recipe), **self._sampled()}
        return Candidate(label, recipe.objective, True, partial(self._of_samples, recipe), origin)

    def _fitted_recipe(self, code: str, objective: str) -> Recipe:
        """The calibration's recipe with another code and objective, or the paper's."""
        if objective not in (*get_args(Objective), PAPER):
            raise RecipeError(
                f"'{code}:{objective}': after the colon comes one of "
                f"{', '.join(get_args(Objective))}; or {PAPER}, for contiguous groups and fisher."
            )
        own = self.recipe.model_dump(mode="json")
        if objective == PAPER:
            # All else is left at its default, which is the paper's.
            own = {key: own[key] for key in ("name", "kmeans", "calibration")}
            changed: dict[str, Any] = {"objective": "fisher", "grouping": "contiguous"}
        else:
            changed = {"objective": objective}
            if objective != "query":
                # Feedback needs the metric of that objective.
                changed["feedback"] = "none"
        if code == self.recipe.spec.name:
            kept = self.recipe.model_dump(mode="json")
            changed |= {name: kept[name] for name in ("format", "layers")}
        else:
            changed |= {"format": code, "layers": {}}
        value = {**own, **changed}
        return recipe_from(value, {}, origin=f"--compare {code}:{objective}")

    def _loaded(self, folder: Path) -> CacheFormat:
        return self._finished(self._load(folder))

    def _load(self, folder: Path) -> CacheFormat:
        return load_format(
            folder, self._opened.model, allow_other_base=self._settings.allow_other_base
        )

    def _of_scheme(self, name: str, made: tuple[LayerCodecs, ...]) -> CacheFormat:
        given = self._geometry, 0, self.sinks, self._store, self._device, made
        if not SCHEMES[name].calibrated:
            return self._finished(make_format(name, *given))
        with self._progress.task(f"fitting {name}", total=1) as task:
            format = make_format(name, *given)
            task.advance()
        return self._finished(format)

    def _of_samples(self, recipe: Recipe) -> CacheFormat:
        """Fit a coupled format to the samples; the fits stay beside them for next time."""
        store = self._store()
        engine = make_engine(recipe.kmeans, self._device)
        work = store.path / "fits"
        fits = fit_codebooks(store, self._geometry, recipe, engine, work, progress=self._progress)

        def tables(layer: int, owner: str) -> CodecTables:
            fit = fits[layer]
            return fit.codebooks[owner], fit.channels[owner], fit.extras[owner]

        layers = make_codecs(recipe.spec, self._geometry, tables)
        return self._finished(CacheFormat(recipe.spec.name, self._geometry, layers, 0, 0))

    def _finished(self, format: CacheFormat) -> CacheFormat:
        """`format` with the window and sinks that all rows share, on the model's device."""
        shared = replace(format, window=self.window, sinks=self.sinks)
        return shared.to(self._opened.model.device)

    def _sampled(self) -> dict[str, str]:
        return {"samples": digest_json(self._store().meta)}

    def _store(self) -> SampleStore:
        return self._samples

    @cached_property
    def _samples(self) -> SampleStore:
        """The samples of this model that formats are fitted to."""
        store = SampleStore.open(self._settings.samples or self._calibration)
        if compare_fingerprints(store.meta["fingerprint"], fingerprint(self._opened.model)):
            raise ArtifactError(
                f"The samples in {store.path} are of {store.meta['model']}, not of this model; "
                "give others with --samples."
            )
        return store

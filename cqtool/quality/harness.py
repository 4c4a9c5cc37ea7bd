"""Tasks of lm-evaluation-harness, with the quantized cache inside the model.

Any task that the harness knows runs: LongBench and RULER are among its own, and a folder of YAML
files adds others. Tasks that write prompts of a length, as RULER does, are told the tokenizer and
the length.

What is scored by likelihood sees, at every position, what decoding up to there would see
(:mod:`cqtool.quality.simulate`), the context included. What is generated runs over a real cache, as
users run it: the prompt attends to itself in full precision and is coded afterwards. Requests go
one at a time, since padding would change what some formats code.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cqtool.cache import CacheFormat, CQCache
from cqtool.errors import CqtoolError, DataError, EnvironmentProblem, RecipeError
from cqtool.files import sha256_file
from cqtool.models.load import OpenedModel
from cqtool.progress import SILENT, Progress
from cqtool.quality.measure import Mode, quantized_logits
from cqtool.quality.prompts import prompt_length, tokenizer_folder
from cqtool.quality.scores import HarnessScores, Score
from cqtool.quality.settings import CheckSettings
from cqtool.quality.statistics import compare_items
from cqtool.quality.text import context_limit

SEED = 0
"""Of few-shot examples and everything else that the harness draws."""


class Harness:
    """Runs the same tasks over one format after the other; full precision comes first.

    Args:
        opened: the model and its tokenizer.
        names: tasks, groups or tags as the harness calls them.
        folder: more of them, as YAML files.
        items: at most so many of each task; None for all.
        mode: how likelihoods are computed.
        context: tokens of the prompts that tasks make, as far as the model takes them; None for
            as long as they are meant.

    Raises:
        EnvironmentProblem: the harness is not installed.
        RecipeError: a name is unknown, or there is no such folder.
        DataError: the data of a task cannot be loaded.
    """

    def __init__(
        self,
        opened: OpenedModel,
        names: Sequence[str],
        folder: Path | None,
        items: int | None,
        mode: Mode,
        context: int | None,
    ) -> None:
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise EnvironmentProblem(
                f"--tasks runs lm-evaluation-harness, which cannot be imported here ({error}); "
                "install it with: pip install 'cqtool[tasks]'."
            ) from error
        if folder is not None and not folder.is_dir():
            raise RecipeError(
                f"--task-folder: {folder} is not a folder; give one with task files (*.yaml)."
            )
        self._evaluate = lm_eval.simple_evaluate
        self._opened, self._mode = opened, mode
        self._names, self._items = tuple(dict.fromkeys(names)), items
        path = None if folder is None else str(folder)
        with tokenizer_folder(opened) as tokenizer:
            about = {"tokenizer": tokenizer, **prompt_length(opened, context)}
            with _quiet():
                # The harness has thousands of tasks of its own, which takes seconds to find out.
                self._manager = TaskManager(
                    include_path=path, include_defaults=path is None, metadata=about
                )
                if not set(self._names) <= set(self._manager.all_tasks):
                    self._manager = TaskManager(include_path=path, metadata=about)
            self._tasks = self._loaded()
        self._full: dict[tuple[str, str], Score] = {}
        self._folder = folder

    @classmethod
    def of(cls, opened: OpenedModel, settings: CheckSettings) -> Harness | None:
        """The harness for what `settings` ask, None where they ask for no task."""
        if not settings.tasks:
            if settings.task_folder is not None:
                raise RecipeError("--task-folder only defines tasks; name those to run in --tasks.")
            return None
        folder, items = settings.task_folder, settings.items
        return cls(opened, settings.tasks, folder, items, settings.mode, settings.context)

    @property
    def identity(self) -> list[Any]:
        """What decides the scores beside the model and the format, JSON-ready."""
        folder, digests = self._folder, {}
        if folder is not None:
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            digests = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
        return [self._names, self._items, SEED, version("lm_eval"), digests]

    def measure(
        self, label: str, format: CacheFormat | None, progress: Progress = SILENT
    ) -> tuple[Score, ...]:
        """Run all tasks over a cache of `format`; its scores.

        Args:
            label: of the format's row.
            format: on the model's device; None is full precision.
            progress: where to report to.

        Raises:
            ModelError: the model cannot be measured in this mode.
            DataError: a task stopped with an error of its own.
        """
        with progress.task(f"tasks, {label}", total=1) as bar:
            try:
                with _quiet():
                    found: Any = self._evaluate(
                        model=_language_model(self._opened, format, self._mode),
                        tasks=self._tasks,
                        task_manager=self._manager,
                        limit=self._items,
                        log_samples=True,
                        bootstrap_iters=0,
                        random_seed=SEED,
                        numpy_random_seed=SEED,
                        torch_random_seed=SEED,
                        fewshot_random_seed=SEED,
                    )
            except CqtoolError:
                raise
            except (ImportError, ValueError, LookupError, AssertionError) as error:
                raise DataError(
                    f"lm-evaluation-harness stopped with: {error}; try `lm-eval run` with the same "
                    "tasks and model, and leave out of --tasks what does not run there either."
                ) from error
            bar.advance()
        scores = []
        for task, samples in found["samples"].items():
            higher = found["higher_is_better"].get(task, {})
            for measure, values in _outcomes(samples).items():
                better = higher.get(measure.partition(" ")[0]) is not False
                scores.append(self._score(label, task, measure, values, better))
        return tuple(scores)

    def resume(self, scores: Sequence[Score]) -> None:
        """Take full precision's `scores` from an earlier run of the same tasks."""
        self._full = {(score.task, score.measure): score for score in scores}

    def result(self, scores: Sequence[Score]) -> HarnessScores:
        """`scores` of all formats, and what they are of."""
        return HarnessScores(self._names, self._items, SEED, version("lm_eval"), tuple(scores))

    def _loaded(self) -> list[Any]:
        """The tasks with their data, once for all formats: some draw their items while they load.

        Raises:
            EnvironmentProblem: a task needs a package that is not installed.
            RecipeError: a name is unknown.
            DataError: the data of a task cannot be loaded.
        """
        for name in self._names:
            if name not in self._manager.all_tasks:
                raise RecipeError(
                    f"--tasks: lm-evaluation-harness {version('lm_eval')} has no task '{name}'; "
                    "list its tasks with `lm-eval ls tasks`, or give a folder that defines it with "
                    "--task-folder."
                )
        try:
            with _quiet():
                random.seed(SEED)
                np.random.seed(SEED)
                return list(self._manager.load(list(self._names))["tasks"].values())
        except ImportError as error:
            raise EnvironmentProblem(
                f"A task of {', '.join(self._names)} needs a package that is not installed "
                f"({error}); install it, or leave the task out of --tasks."
            ) from error
        # Each source of data has exceptions of its own.
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"The data of {', '.join(self._names)} cannot be loaded ({reason[0]}); see that "
                "the data set exists and this machine can reach it, or download it beforehand."
            ) from error

    def _score(
        self, label: str, task: str, measure: str, values: list[float], higher: bool
    ) -> Score:
        score = Score(
            format=label,
            task=task,
            measure=measure,
            group=None,
            items=len(values),
            higher_is_better=higher,
            per_item=tuple(values),
            **compare_items(  # type: ignore[arg-type]
                list(self._full[task, measure].per_item)
                if (task, measure) in self._full
                else values,
                values,
            ),
        )
        self._full.setdefault((task, measure), score)
        return score


def _outcomes(samples: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Each metric's value for each item, in the data's order, filters told apart by name.

    A metric whose items have no number of their own (a corpus' BLEU, a word perplexity weighted by
    length) cannot be paired, and is left out. So is the -1 that RULER puts under every length but
    the item's own.
    """
    found: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda one: (one["filter"], one["doc_id"])):
        for metric in sample["metrics"]:
            value = sample[metric]
            if metric.isdecimal() and value == -1:
                continue
            if isinstance(value, bool | int | float) or hasattr(value, "item"):
                filtered = sample["filter"]
                name = metric if filtered == "none" else f"{metric} ({filtered})"
                found.setdefault(name, []).append(float(value))
    return found


def _language_model(opened: OpenedModel, format: CacheFormat | None, mode: Mode) -> Any:
    """The harness's own wrapper of a transformers model, the cache put inside."""
    from lm_eval.models.huggingface import HFLM
    from torch import Tensor, stack

    class Cached(HFLM):  # type: ignore[misc]
        """Every request over a cache of `cache_format`.

        An attribute, because a class lives on until the garbage collector comes by.
        """

        cache_format: CacheFormat | None = None

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            if self.cache_format is None:
                logits: Tensor = super()._model_call(inps)
                return logits
            return stack(
                [quantized_logits(self.model, self.cache_format, ids, mode) for ids in inps]
            )

        def _model_generate(
            self, context: Tensor, max_length: int, stop: list[str], **more: Any
        ) -> Tensor:
            if self.cache_format is not None:
                more["past_key_values"] = CQCache(self.cache_format, self.model)
            tokens: Tensor = super()._model_generate(context, max_length, stop, **more)
            return tokens

    made = Cached(
        pretrained=opened.model,
        # The wrapper gives a tokenizer without padding token one; the caller's stays as it is.
        tokenizer=deepcopy(opened.tokenizer),
        batch_size=1,
        max_length=context_limit(opened),
    )
    made.cache_format = format
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's bars and log lines: stdout is for results, stderr for progress."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield
    finally:
        logger.setLevel(level)

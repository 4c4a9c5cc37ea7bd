"""What `cqtool check` is asked to measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cqtool.quality.measure import Mode
from cqtool.quality.report import Gates
from cqtool.recipe import Recipe


@dataclass(frozen=True)
class CheckSettings:
    """What to measure, and on which text.

    Attributes:
        dataset: as in a recipe; ``auto`` is the demo's text or WikiText-2.
        config: data set configuration.
        split: data set split; None is the held-out one.
        column: text column.
        text_revision: revision of a Hub data set.
        windows: how many windows.
        window_length: tokens in each.
        compare: further formats: ``int4``, ``cq-4c8b``, ``cq-8c8b:uniform``, ``cq-8c8b:paper``, a
            calibration folder; ``all`` for every one that can be made here.
        against: calibrations or artifacts of the same model, folders or Hub ids.
        mode: ``teacher`` for one pass per window, ``prefill`` for one in which each token is the
            first after a prompt, ``decode`` for one pass per token.
        gates: limits for the calibration's row.
        samples: sample store for formats that are fitted; None is the calibration's own.
        window: replaces the calibration's window.
        sinks: replaces the calibration's sinks.
        by_layer: also measure each layer's keys and values alone.
        by_head: also measure those of each key/value head alone.
        context: tokens that bits are also computed for, and that pass keys and the prompts that
            tasks make get as long as; None is `window_length`, and their usual lengths.
        generation: built-in tasks to answer besides, see :mod:`cqtool.quality.items`; ``all`` for
            all.
        tasks: tasks of lm-evaluation-harness, see :mod:`cqtool.quality.harness`.
        task_folder: a folder with more of them, as YAML files.
        items: how many of each task; None is 20 of the built-in ones and all of the others.
        allow_other_base: measure an artifact on a fine-tune of its base model.
    """

    dataset: str = "auto"
    config: str | None = None
    split: str | None = None
    column: str = "text"
    text_revision: str | None = None
    windows: int = 16
    window_length: int = 2048
    compare: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    mode: Mode = "teacher"
    gates: Gates = field(default_factory=Gates)
    samples: Path | None = None
    window: int | None = None
    sinks: int | None = None
    by_layer: bool = False
    by_head: bool = False
    context: int | None = None
    generation: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    items: int | None = None
    allow_other_base: bool = False

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Self:
        """What a recipe says of its own evaluation: the text and the gates."""
        text, gates = recipe.evaluation, recipe.gates
        return cls(
            dataset=text.dataset,
            config=text.config,
            split=text.split,
            column=text.column,
            text_revision=text.revision,
            windows=text.windows,
            window_length=text.window_length,
            gates=Gates(gates.max_ppl_increase, gates.max_kl, gates.min_top1),
        )

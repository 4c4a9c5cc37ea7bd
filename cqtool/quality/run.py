"""One check's measurements: every format on the same windows and the same items."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cqtool.cache import CacheFormat
from cqtool.data import TokenWindows
from cqtool.models.load import OpenedModel
from cqtool.progress import Progress, Task
from cqtool.quality.candidates import Candidate
from cqtool.quality.finished import FinishedRows, FullScores, Measured
from cqtool.quality.harness import Harness
from cqtool.quality.layers import HeadCost, LayerCost, head_cost, layer_cost, only
from cqtool.quality.measure import WindowFigures, add_window, prompt_states, quantized_logits
from cqtool.quality.memory import memory_explained
from cqtool.quality.reference import Reference
from cqtool.quality.report import Row, row_figures
from cqtool.quality.scores import Score
from cqtool.quality.settings import CheckSettings
from cqtool.quality.simulate import require_simulation
from cqtool.quality.storage import cache_bytes, context_bits, typical_length
from cqtool.quality.tasks import TaskRun
from cqtool.spec import KINDS

_SHORT_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Run:
    """Measures one candidate after the other on the same windows and items.

    Args:
        opened: the model.
        settings: what to measure.
        windows: the text.
        tasks: the built-in tasks, None without.
        harness: tasks of lm-evaluation-harness, None without.
        finished: what earlier checks measured.
        progress: where to report to.

    Attributes:
        full_scores: of full precision, in the built-in tasks and in the harness.
    """

    def __init__(
        self,
        opened: OpenedModel,
        settings: CheckSettings,
        windows: TokenWindows,
        tasks: TaskRun | None,
        harness: Harness | None,
        finished: FinishedRows,
        progress: Progress,
    ) -> None:
        self._model, self._settings, self._windows = opened.model, settings, windows
        self._tasks, self._harness, self._progress = tasks, harness, progress
        self._reference = Reference(opened.model, windows.ids)
        self._full = WindowFigures()
        dtype = str(opened.model.dtype).removeprefix("torch.")
        self._name = _SHORT_DTYPES.get(dtype, dtype)
        self._full_bits = 8.0 * opened.model.dtype.itemsize
        self.full_scores = self._full_scores(f"{self._name} (full)", finished)

    def measure(self, candidate: Candidate) -> Measured:
        """Everything about one candidate; its format is gone afterwards.

        Raises:
            OutOfMemory: the model and this format together do not fit into memory.
            ModelError: the model cannot be measured in this mode, or not over this format.
        """
        with memory_explained(candidate.label):
            format = candidate.make()
            return Measured(self._row(candidate, format), *self._scores(candidate.label, format))

    def _row(self, candidate: Candidate, format: CacheFormat) -> Row:
        if self._settings.mode != "decode":
            require_simulation(self._model, format, self._windows.ids[0])
        length = self._settings.window_length
        with self._progress.task(candidate.label, total=self._settings.windows) as task:
            figures = self._over_windows(format, task)
        held = typical_length(format, length)
        stored, whole = cache_bytes(self._model, format, self._windows.ids[0][:held])
        key_bits, value_bits = format.bits_per_channel
        geometry = format.geometry
        keys = sum(layer.kv_heads * layer.key_dim for layer in geometry.layers)
        share = keys / geometry.channels_per_token
        return Row(
            name=format.name,
            label=candidate.label,
            objective=candidate.objective,
            fitted=candidate.fitted,
            origin=dict(candidate.origin),
            key_bits=key_bits,
            value_bits=value_bits,
            bits_per_channel=share * key_bits + (1 - share) * value_bits,
            window=format.window,
            sinks=format.sinks,
            effective_bits=self._full_bits * stored / whole,
            context_bits=context_bits(format, self._settings.context or length, self._full_bits),
            cache_bytes_per_token=stored / held,
            cache_bytes_per_token_full=whole / held,
            **row_figures(self._full, figures, length),
        )

    def by_layer(self, candidate: Candidate) -> tuple[LayerCost, ...]:
        """What each layer's keys and values cost alone."""
        format = candidate.make()
        parts = [(layer, kind) for layer in range(len(format.layers)) for kind in KINDS]
        formats = [only(format, *part) for part in parts]
        measured = self._side_by_side(formats, f"{candidate.label} by layer")
        return tuple(
            layer_cost(format, *part, one.kl) for part, one in zip(parts, measured, strict=True)
        )

    def by_head(self, candidate: Candidate) -> tuple[HeadCost, ...]:
        """What the keys and values of each key/value head cost alone."""
        format = candidate.make()
        parts = [
            (index, kind, head)
            for index, shape in enumerate(format.geometry.layers)
            for kind in KINDS
            for head in range(shape.kv_heads)
        ]
        formats = [only(format, *part) for part in parts]
        measured = self._side_by_side(formats, f"{candidate.label} by head")
        return tuple(
            head_cost(format, *part, one.kl) for part, one in zip(parts, measured, strict=True)
        )

    def _side_by_side(self, formats: Sequence[CacheFormat], label: str) -> list[WindowFigures]:
        """The figures of many formats, window after window: what a prompt leaves in the cache is
        the same for all."""
        figures = [WindowFigures() for _ in formats]
        mode = self._settings.mode
        with self._progress.task(label, total=len(formats) * self._settings.windows) as task:
            for number, ids in enumerate(self._windows.ids):
                reference = self._reference_of(number)
                states = prompt_states(self._model, ids, mode)
                for format, own in zip(formats, figures, strict=True):
                    logits = quantized_logits(self._model, format, ids, mode, states)
                    add_window(own, reference, logits, ids)
                    task.advance()
        return figures

    def full_row(self, checked: Row) -> Row:
        """Full precision's row; `checked` says what a token takes there."""
        for number in range(len(self._full.nll), self._settings.windows):
            # All formats were measured before this check began.
            self._reference_of(number)
        return Row(
            name=self._name,
            label=f"{self._name} (full)",
            objective=None,
            fitted=False,
            origin={},
            key_bits=self._full_bits,
            value_bits=self._full_bits,
            bits_per_channel=self._full_bits,
            window=0,
            sinks=0,
            effective_bits=self._full_bits,
            context_bits=self._full_bits,
            cache_bytes_per_token=checked.cache_bytes_per_token_full,
            cache_bytes_per_token_full=checked.cache_bytes_per_token_full,
            **row_figures(self._full, self._full, self._settings.window_length),
        )

    def _over_windows(self, format: CacheFormat, task: Task) -> WindowFigures:
        figures = WindowFigures()
        for number, ids in enumerate(self._windows.ids):
            reference = self._reference_of(number)
            logits = quantized_logits(self._model, format, ids, self._settings.mode)
            add_window(figures, reference, logits, ids)
            task.advance()
        return figures

    def _reference_of(self, number: int) -> Tensor:
        """Full precision's logits of a window, whose own figures are noted the first time."""
        reference = self._reference.logits(number)
        if len(self._full.nll) == number:
            add_window(self._full, reference, reference, self._windows.ids[number])
        return reference

    def _full_scores(self, label: str, finished: FinishedRows) -> list[tuple[Score, ...]]:
        """As :meth:`_scores`, but what was answered before is not asked again."""
        before = finished.find_full()
        if before is None:
            found = self._scores(label, None)
            if self._tasks is not None or self._harness is not None:
                answers = [] if self._tasks is None else self._tasks.full_answers
                finished.keep(None, FullScores(answers, found[1]))
            return found
        if self._harness is not None:
            self._harness.resume(before.tasks)
        built_in = () if self._tasks is None else self._tasks.scored(label, before.answers)
        return [built_in, before.tasks]

    def _scores(self, label: str, format: CacheFormat | None) -> list[tuple[Score, ...]]:
        """Of the built-in tasks, then of the harness; none where none are asked for."""
        return [
            () if run is None else run.measure(label, format, self._progress)
            for run in (self._tasks, self._harness)
        ]

"""What to measure: one frozen object, checked before anything long begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

from cqtool.errors import RecipeError
from cqtool.spec import Grouping

DEFAULT_FORMATS = ("cq-8c8b", "cq-8c10b", "cq-4c8b", "cq-2c8b")
DEFAULT_BATCHES = (1, 16)
Part = Literal["decode", "encode", "end-to-end", "kmeans", "tune"]
PARTS: tuple[Part, ...] = get_args(Part)
CALIBRATING: tuple[Part, ...] = ("kmeans", "tune")
"""The parts about making codebooks, which run only when asked for."""
SuiteName = Literal["targets", "generation"]
SUITES: Mapping[SuiteName, tuple[Part, ...]] = {
    "targets": ("decode", "encode"),
    "generation": ("end-to-end",),
}
"""The fixed sets of cases, and the parts each of them has."""
CACHES = ("dynamic", "static", "static-compiled", "cq")
"""The caches that text can be generated with."""
GROUPINGS: tuple[Grouping, ...] = ("contiguous", "correlation", "pairs", "balanced-pairs")
"""The ways to group channels that random codebooks can have."""
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class BenchSettings:
    """What to measure, and how.

    Attributes:
        target: a named shape, a model folder or a Hub id; None runs a suite.
        artifact: a folder or Hub id whose codebooks to use.
        suite: a fixed set of cases; without target and suite, ``targets``.
        parts: what of it to run; empty for all but those of :data:`CALIBRATING`.
        formats: names of formats, with random codebooks; empty for the default ones, or for the
            artifact's own.
        groupings: which channels of a head random codebooks code together, each format with each of
            them; empty for contiguous ones, or for the artifact's own.
        batches: rows, or sequences of a step of tuning; empty for :data:`DEFAULT_BATCHES`, and for
            the batch of the tuned recipes when tuning.
        tokens: cached tokens of each row, of the decode kernels; samples of a codebook, of k-means.
        prompt: tokens of the prompt, when encoding and end to end, or of a sequence, when tuning.
        new: tokens to generate.
        caches: which of :data:`CACHES` to generate with.
        largest: generate at the largest batch that each cache fits, instead of at `batches`.
        most: no batch is larger.
        window: newest tokens kept in full precision, end to end and when tuning; None for the
            artifact's, or else for none end to end and for those of the tuned recipes when tuning.
        sinks: first tokens kept in full precision, as `window`.
        dtype: of the model and of 16-bit caches; None for float32 on a CPU, and on a GPU for
            float16, or bfloat16 when tuning.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        repeats: measurements of each kernel, and of a step of tuning.
        seed: of everything random.
    """

    target: str | None = None
    artifact: str | None = None
    suite: SuiteName | None = None
    parts: tuple[Part, ...] = ()
    formats: tuple[str, ...] = ()
    groupings: tuple[Grouping, ...] = ()
    batches: tuple[int, ...] = ()
    tokens: tuple[int, ...] = (8192, 32768)
    prompt: int = 1024
    new: int = 128
    caches: tuple[str, ...] = ("dynamic", "static", "cq")
    largest: bool = False
    most: int = 8192
    window: int | None = None
    sinks: int | None = None
    dtype: str | None = None
    device: str = "auto"
    repeats: int = 30
    seed: int = 0
    chosen_formats: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.target is not None and self.suite is not None:
            raise RecipeError("A suite has shapes of its own; give either a shape or --suite.")
        if self.artifact is not None and self.groupings and not self.formats:
            raise RecipeError("An artifact has groups of its own; --grouping is that of --format.")
        if self.artifact is not None and self.target is None:
            raise RecipeError("Give the shape of the artifact's base model before the artifact.")
        for name, allowed, given in (
            ("--part", PARTS, self.parts),
            ("--grouping", GROUPINGS, self.groupings),
            ("--cache", CACHES, self.caches),
            ("--dtype", DTYPES, (self.dtype,) if self.dtype else ()),
            ("--suite", tuple(SUITES), (self.suite,) if self.suite else ()),
        ):
            for word in given:
                if word not in allowed:
                    raise RecipeError(f"{name} {word} is not known; use {', '.join(allowed)}.")
        for name, numbers, least in (
            ("--batch", self.batches or DEFAULT_BATCHES, 1),
            ("--tokens", self.tokens, 1),
            ("--prompt-tokens", (self.prompt,), 1),
            ("--new-tokens", (self.new,), 2),
            ("--most", (self.most,), 1),
            ("--repeats", (self.repeats,), 2),
            ("--window", (self.window or 0,), 0),
            ("--sinks", (self.sinks or 0,), 0),
        ):
            if not numbers or min(numbers) < least:
                wrong = f" {min(numbers)}" if numbers else ""
                raise RecipeError(f"{name}{wrong} is too small; use {least} or more.")
        formats = self.formats or (() if self.artifact else DEFAULT_FORMATS)
        object.__setattr__(self, "chosen_formats", formats)

    @property
    def chosen_suite(self) -> SuiteName | None:
        """The suite to run, None with a shape."""
        return self.suite or ("targets" if self.target is None else None)

    @property
    def chosen_parts(self) -> tuple[Part, ...]:
        """The parts to run.

        Raises:
            RecipeError: the suite has none of those asked for.
        """
        suite = self.chosen_suite
        offered = SUITES[suite] if suite is not None else PARTS
        wanted = self.parts or tuple(part for part in offered if part not in CALIBRATING)
        chosen = tuple(part for part in offered if part in wanted)
        if not chosen:
            raise RecipeError(f"The suite {suite} has only {' and '.join(offered)}.")
        return chosen

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self) | {"suite": self.chosen_suite, "parts": self.chosen_parts}


def split_words(values: Sequence[str] | None) -> tuple[str, ...]:
    """The words of options that may be repeated and hold commas."""
    return tuple(
        word.strip() for value in values or () for word in value.split(",") if word.strip()
    )


def split_numbers(option: str, values: Sequence[str] | None) -> tuple[int, ...] | None:
    """The whole numbers of such options, None without any; ``8k`` is 8192.

    Raises:
        RecipeError: a word is no number.
    """
    words = split_words(values)
    if not words:
        return None
    numbers = []
    for word in words:
        digits, factor = (word[:-1], 1024) if word[-1:] in "kK" else (word, 1)
        if not digits.isascii() or not digits.isdigit():
            raise RecipeError(f"{option} {word} is not a whole number; write 16, or 8k for 8192.")
        numbers.append(int(digits) * factor)
    return tuple(numbers)


def make_settings(
    *,
    parts: Sequence[str] | None = None,
    formats: Sequence[str] | None = None,
    groupings: Sequence[str] | None = None,
    batches: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
    caches: Sequence[str] | None = None,
    **rest: Any,
) -> BenchSettings:
    """Settings from the words of a command line; what is None keeps its default.

    Raises:
        RecipeError: a word is not known, or a number is too small.
    """
    given: dict[str, Any] = {
        "parts": cast("tuple[Part, ...]", split_words(parts)),
        "formats": split_words(formats),
        "groupings": cast("tuple[Grouping, ...]", split_words(groupings)),
        "batches": split_numbers("--batch", batches),
        "tokens": split_numbers("--tokens", tokens),
        "caches": split_words(caches) or None,
        **rest,
    }
    return BenchSettings(**{name: value for name, value in given.items() if value is not None})

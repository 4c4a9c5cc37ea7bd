"""The training loop: Adam on all codebooks at once, the model itself frozen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from cqtool.cache.format import CacheFormat
from cqtool.errors import EnvironmentProblem, RecipeError, SampleError
from cqtool.files import atomic_file
from cqtool.quality.simulate import full_pass, simulated_cache
from cqtool.recipe import Tuning
from cqtool.tuning.capture import CapturedStep, NotCapturable
from cqtool.tuning.codec import trainable, trained
from cqtool.tuning.loss import divergence
from cqtool.tuning.memory import recomputing_layers
from cqtool.tuning.precision import tensor_cores
from cqtool.tuning.ranks import ALONE, Ranks

# Of the steps: how long the step size rises, and where from and where to it goes, of its peak.
_RISE, _FIRST, _LAST = 0.1, 0.1, 0.01


@dataclass
class History:
    """What tuning has seen so far.

    Attributes:
        step: steps done.
        losses: mean training loss between looks at the held-out text, nats a token.
        held_out: KL on the held-out text at each look, the first before any step.
        best: index in `held_out` of the codebooks kept.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best: int = 0


class Trainer:
    """Tunes the codebooks of a format.

    Args:
        model: the model, frozen, in eval mode.
        format: on the model's device; where tuning starts.
        settings: how to tune.
        ids: int64 ``[sequences, tokens]`` to train on.
        held_out: int64 ``[sequences, tokens]`` to stop by.
        ranks: the processes that tune together. Each takes its share of every batch and of the
            held-out text; they sum up gradients and losses, and take the same steps.

    Attributes:
        captured: whether steps on a CUDA GPU are recorded and replayed; False once a model turned
            out to be one that cannot be.

    Raises:
        RecipeError: a batch cannot be shared evenly.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        format: CacheFormat,
        settings: Tuning,
        ids: Tensor,
        held_out: Tensor,
        ranks: Ranks = ALONE,
    ) -> None:
        if settings.batch % ranks.count:
            raise RecipeError(
                f"A batch of {settings.batch} sequences cannot be shared by {ranks.count} "
                f"processes; use a --batch that {ranks.count} divides."
            )
        self.model, self.settings, self._ranks = model, settings, ranks
        self.format, self.codecs = trainable(format, settings.softness)
        self.history = History()
        self._ids, self._held_out = ids, held_out
        self._deltas = [codec.delta for codec in self.codecs]
        self._best = [delta.detach().clone() for delta in self._deltas]
        self._optimizer = torch.optim.Adam(self._deltas, betas=(0.9, 0.95), eps=1e-12)
        self._losses: list[float] = []
        self._gradients = [torch.zeros_like(delta) for delta in self._deltas]
        for delta, gradient in zip(self._deltas, self._gradients, strict=True):
            delta.grad = gradient
        self.captured = True
        self._steps: dict[tuple[int, float], CapturedStep] = {}

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last looks brought nothing."""
        looks = self.history.held_out
        waited = len(looks) - 1 - self.history.best
        return self.history.step >= self.settings.steps or waited >= self.settings.patience

    def run_until_next_look(self) -> int:
        """Train up to the next look at the held-out text, and look; returns the steps taken.

        Raises:
            SampleError: the loss is not finite.
            EnvironmentProblem: out of GPU memory.
        """
        before, history = self.history.step, self.history
        if not history.held_out:
            self._look()
            return 0
        goal = min(before + self.settings.evaluate_every, self.settings.steps)
        with tensor_cores(self.model.device):
            while history.step < goal:
                self._step()
        history.losses.append(float(np.mean(self._losses)))
        self._losses = []
        self._look()
        return history.step - before

    def best_format(self) -> CacheFormat:
        """The format with the codebooks that did best on the held-out text."""
        for delta, best in zip(self._deltas, self._best, strict=True):
            delta.data.copy_(best)
        return trained(self.format)

    def save(self, path: Path, identity: str) -> None:
        """Write everything that :meth:`load` needs to go on, in one step."""
        tensors = {}
        for index, (delta, best) in enumerate(zip(self._deltas, self._best, strict=True)):
            tensors[f"{index}.delta"], tensors[f"{index}.best"] = delta.detach(), best
            state = self._optimizer.state.get(delta, {})
            for name in ("exp_avg", "exp_avg_sq"):
                tensors[f"{index}.{name}"] = state.get(name, torch.zeros_like(best))
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        metadata = {"identity": identity, "history": json.dumps(vars(self.history))}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata)

    def load(self, path: Path, identity: str) -> bool:
        """Go on from what :meth:`save` wrote; False if that was of another run.

        The first process reads the file, for all.
        """
        metadata = self._ranks.from_first(lambda: _metadata(path))
        if metadata.get("identity") != identity:
            return False
        self.history = History(**json.loads(metadata["history"]))
        for index, (delta, best) in enumerate(zip(self._deltas, self._best, strict=True)):
            state = self._ranks.from_first(partial(_state, path, index))
            delta.data.copy_(state["delta"])
            best.copy_(state["best"])
            self._optimizer.state[delta] = {
                "step": torch.tensor(float(self.history.step)),
                "exp_avg": state["exp_avg"].to(delta.device),
                "exp_avg_sq": state["exp_avg_sq"].to(delta.device),
            }
        return True

    def _step(self) -> None:
        settings = self.settings
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * step_size(self.history.step, settings.steps)
        for gradient in self._gradients:
            gradient.zero_()
        chosen = batch_of(self.history.step, settings.batch, self._ids.shape[0], settings.seed)
        own = torch.chunk(chosen, self._ranks.count)[self._ranks.index]
        parts = torch.split(own, settings.micro_batch)
        with (
            self._ranks.together(),
            _memory_explained(),
            recomputing_layers(self.model, settings.gradient_checkpointing),
        ):
            losses = [self._add_gradients(part, len(part) / len(chosen)) for part in parts]
            found = [float(loss) for loss in losses]
        total = torch.tensor(sum(found), dtype=torch.float64)
        self._ranks.sum([total])
        loss = float(total)
        if not math.isfinite(loss):
            with self._ranks.together():
                raise SampleError(
                    "Tuning ended in NaN; use a smaller --learning-rate, or --dtype float32."
                )
        with _memory_explained():
            self._ranks.sum(self._gradients)
            self._optimizer.step()
        self._losses.append(loss)
        self.history.step += 1

    def _add_gradients(self, chosen: Tensor, share: float) -> Tensor:
        """Add the gradients of some sequences, which are a `share` of the step's; their share of
        the KL."""
        ids = self._ids[chosen].to(self.model.device)
        step = partial(self._divergence, share=share)
        if ids.is_cuda and self.captured:
            key = (ids.shape[0], share)
            try:
                if key not in self._steps:
                    self._steps[key] = CapturedStep(step, self._gradients, ids)
                return self._steps[key](ids)
            except NotCapturable:
                self.captured = False
        return step(ids)

    def _divergence(self, ids: Tensor, share: float | None = None) -> Tensor:
        """KL of a batch; with its `share` of a step also the gradient, and that share of the KL."""
        prefilled = None
        if self.settings.mode == "prefill":
            full, prefilled = full_pass(self.model, ids)
        else:
            with torch.no_grad():
                full = self.model(input_ids=ids, use_cache=False).logits
        with (
            torch.set_grad_enabled(share is not None),
            simulated_cache(self.model, self.format, ids.shape[1], prefilled) as cache,
        ):
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            loss = divergence(full, logits)
            if share is not None:
                loss = loss * share
                # In the block: layers that are computed again hand over their keys again.
                torch.autograd.backward(loss)
        return loss.detach()

    def _look(self) -> None:
        history = self.history
        found = torch.zeros(self._held_out.shape[0], dtype=torch.float64)
        with self._ranks.together(), _memory_explained():
            for index in self._ranks.share(found.shape[0]):
                ids = self._held_out[index : index + 1].to(self.model.device)
                found[index] = float(self._divergence(ids))
        self._ranks.sum([found])
        history.held_out.append(float(np.mean(found.tolist())))
        if history.held_out[-1] <= min(history.held_out):
            history.best = len(history.held_out) - 1
            for delta, best in zip(self._deltas, self._best, strict=True):
                best.copy_(delta.detach())


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Say what to do where the GPU's memory does not suffice."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise EnvironmentProblem(
            "The GPU ran out of memory while tuning; use a smaller --micro-batch, "
            "--gradient-checkpointing, a shorter --sequence-length, or --dtype bfloat16."
        ) from error


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _state(path: Path, index: int) -> dict[str, Tensor]:
    """What :meth:`Trainer.save` wrote of one codebook, on the CPU."""
    names = ("delta", "best", "exp_avg", "exp_avg_sq")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(f"{index}.{name}") for name in names}


def step_size(step: int, steps: int) -> float:
    """The step size of step number `step` relative to its peak: a rise, then half a cosine.

    As in one-cycle schedules (Smith and Topin, 2019, arXiv 1708.07120).
    """
    rise = max(1, round(_RISE * steps))
    if step < rise:
        return _FIRST + (1 - _FIRST) * step / rise
    done = (step - rise) / max(1, steps - rise)
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * done)) / 2


def batch_of(step: int, batch: int, sequences: int, seed: int) -> Tensor:
    """Which sequences step number `step` takes: int64 ``[batch]``, every epoch in another order."""
    places = np.arange(step * batch, (step + 1) * batch)
    epochs = {
        int(epoch): np.random.RandomState((seed * 1_000_003 + int(epoch)) % 2**32).permutation(
            sequences
        )
        for epoch in np.unique(places // sequences)
    }
    chosen = [int(epochs[int(place // sequences)][place % sequences]) for place in places]
    return torch.tensor(chosen)

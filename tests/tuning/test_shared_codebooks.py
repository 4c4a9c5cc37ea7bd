"""A codebook that all heads share stays shared while it is tuned."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from cqtool.cache import CQCodec
from cqtool.codebooks.calibrate import calibrate
from cqtool.models.load import open_model
from cqtool.recipe import load_recipe
from cqtool.tuning import tune
from cqtool.tuning.codec import TrainedCodec


@pytest.mark.parametrize("softness", [0.0, 1.0])
def test_its_gradient_is_the_sum_over_the_heads(softness):
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(1, 3, 16, 4, generator=generator).half()
    vectors, upstream = torch.randn(2, 2, 3, 40, 12, generator=generator)
    shared = TrainedCodec(CQCodec(book, heads=3), softness)
    apart = TrainedCodec(CQCodec(book.repeat(3, 1, 1, 1)), softness)
    for codec in (shared, apart):
        torch.autograd.backward((codec.decode(codec.encode(vectors)) * upstream).sum())
    assert shared.delta.grad.shape == (1, 3, 16, 4)
    torch.testing.assert_close(shared.delta.grad, apart.delta.grad.sum(dim=0, keepdim=True))
    shared.delta.data -= 0.1 * shared.delta.grad.sign()
    moved = shared.trained()
    assert torch.equal(moved.codebook, moved.stored_codebook.expand(3, -1, -1, -1))
    assert len(moved.stored_codebook) == 1 and not torch.equal(moved.stored_codebook, book)


def test_what_is_written_is_shared_as_before(tiny_model_dir, tiny_text_file, tmp_path):
    settings = {
        "calibration.dataset": str(tiny_text_file),
        "calibration.sequences": 4,
        "calibration.sequence_length": 64,
        "kmeans.iterations": 5,
        "format": "cq-8c4b",
        "window": 8,
        "sinks": 2,
        "sharing": "heads",
        "tuning": {
            "steps": 4,
            "batch": 2,
            "micro_batch": 1,
            "sequences": 4,
            "sequence_length": 48,
            "held_out": 2,
            "evaluate_every": 2,
        },
    }
    recipe, opened = load_recipe("cq-8c8b", settings), open_model(str(tiny_model_dir), device="cpu")
    calibrate(opened, recipe, tmp_path / "cal")
    history = tune(opened, tmp_path / "cal", recipe, tmp_path / "tuned").history
    assert history.held_out[history.best] < history.held_out[0]
    before, after = (load_file(tmp_path / f / "codebooks.safetensors") for f in ("cal", "tuned"))
    for name, codebook in before.items():
        assert after[name].shape == codebook.shape == (1, 2, 16, 8)
        assert not torch.equal(after[name], codebook)

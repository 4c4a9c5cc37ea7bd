"""Formats fitted to a model's samples, from calibration to logits, on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scheme_samples import check_in_pieces, check_same_bytes, check_stored_bytes
from small_checks import calibrated

from cqtool.errors import RecipeError
from cqtool.models.load import open_model
from cqtool.models.probe import read_geometry
from cqtool.quality.measure import full_logits, quantized_logits
from cqtool.sampling import SampleStore
from cqtool.schemes import SCHEMES, make_format

CALIBRATED = [name for name, scheme in SCHEMES.items() if scheme.calibrated]
# 4096 centroids take samples that a unit test does not have time for.
QUICK = [name for name in CALIBRATED if name not in ("vecinfer-1.25", "vecinfer-1.5")]
# One of each kind, for what takes fitting twice.
KINDS = ("kvquant-nuq2", "kvquant-nuq3-1p", "vecinfer-1", "vecinfer-2", "tasq-1", "commvq-1")


@pytest.fixture(scope="module")
def opened(tiny_model_dir):
    return open_model(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def store(opened, tiny_text_file, tmp_path_factory):
    changes = {"kmeans.iterations": 2, "format": "cq-4c4b"}
    folder = tmp_path_factory.mktemp("calibrated")
    return SampleStore.open(calibrated(opened, tiny_text_file, folder, **changes))


@pytest.mark.parametrize(
    "name", ["kvquant-nuq3-1p", "vecinfer-2", "nsnquant-2", "tasq-1", "commvq-1"]
)
def test_one_pass_over_a_text_equals_token_by_token(name, opened, store):
    geometry = read_geometry(opened.model)
    format = make_format(name, geometry, 3, 2, lambda: store)
    ids = torch.arange(80) % opened.model.config.vocab_size
    teacher = quantized_logits(opened.model, format, ids, "teacher")
    decode = quantized_logits(opened.model, format, ids, "decode")
    torch.testing.assert_close(teacher, decode, rtol=1e-3, atol=2e-3)
    # The codes do matter, so that the two could have differed.
    assert not torch.allclose(teacher, full_logits(opened.model, ids), atol=1e-3)


def tokens_for(name):
    """Enough samples for the codebooks of a scheme, of which CommVQ's take long to fit."""
    return 256 if name.startswith("commvq") else 1024


@pytest.mark.parametrize(
    ("name", "dim"),
    [(name, 32) for name in QUICK] + [(one, 80) for one in QUICK if one.startswith("kvquant")],
)
def test_the_bits_reported_are_the_bytes_stored(name, dim, samples_of):
    check_stored_bytes(SCHEMES[name], samples_of(dim, tokens_for(name)), dim)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_bytes_again_and_tokens_apart(name, samples_of):
    samples = samples_of(32, tokens_for(name))
    check_same_bytes(SCHEMES[name], samples, 32)
    check_in_pieces(SCHEMES[name], samples, 32)


@pytest.mark.parametrize("name", ["kvquant-nuq2", "vecinfer-2", "int4"])
def test_layers_that_were_made_before_are_taken_as_they_are(name, opened, store):
    geometry = read_geometry(opened.model)
    whole = make_format(name, geometry, 3, 2, lambda: store)
    first = replace(geometry, layers=geometry.layers[:1])
    made = make_format(name, first, 3, 2, lambda: store).layers
    format = make_format(name, geometry, 3, 2, lambda: store, made=made)
    assert format.layers[0] is made[0] and len(format.layers) == len(whole.layers) == 2
    ids = torch.arange(80) % opened.model.config.vocab_size
    one, other = (quantized_logits(opened.model, each, ids, "teacher") for each in (format, whole))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", CALIBRATED)
def test_without_samples_the_format_is_named(name, opened):
    with pytest.raises(RecipeError, match=f"'{name}' is fitted to samples"):
        make_format(name, read_geometry(opened.model), 0, 0)


def test_names_are_unlike_codes_and_folders():
    for name in SCHEMES:
        assert not name.startswith(("cq-", "k-cq-")) and "/" not in name and ":" not in name

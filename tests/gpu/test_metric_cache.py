"""What a metric takes on a GPU: the encode kernels inside a cache, and sampling how it is read."""

from __future__ import annotations

import pytest
import torch
from formats import in_metrics, kernel_format, regrouped
from zoo import random_ids, tiny

from cqtool.cache import CQCache
from cqtool.data.windows import TokenWindows
from cqtool.models.load import OpenedModel
from cqtool.models.probe import read_geometry
from cqtool.sampling import collect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# Of the logits' norm. The kernel holds scores to 2**-19 of the largest one, so that of random
# codebooks one code in a few thousand is another centroid, as near in the metric, but not in what
# it decodes to: a single one moves the logits by up to 0.02, and attention in half precision moves
# them by 0.01 before. The kernels' arithmetic repeated on a CPU gave 0.021 at most in 24 cases;
# distances without the metric give 0.37 at least.
TOLERANCE = 0.05


@pytest.mark.parametrize("keys", [None, "random", "pairs"])
@pytest.mark.parametrize("code", [(8, 8), (4, 8), (8, 10), (8, 6)])
def test_the_fused_cache_encodes_in_the_metric(code, keys):
    model, ids = tiny("wide-llama"), random_ids(2, 60).cuda()
    format = kernel_format(model, key=code, value=code, window=4, sinks=2)
    format = format if keys is None else regrouped(format, keys)
    format = in_metrics(format).to(torch.device("cuda"))
    model = model.cuda()
    found = {}
    for implementation in ("reference", "auto"):
        cache = CQCache(format, model, implementation)
        with torch.no_grad():
            logits = [model(input_ids=ids[:, :40], past_key_values=cache).logits[:, -1:]]
            for column in range(40, 60):
                part = ids[:, column : column + 1]
                logits.append(model(input_ids=part, past_key_values=cache).logits)
        found[implementation] = torch.cat(logits, dim=1)
    assert cache.implementation == "fused"
    apart = (found["auto"] - found["reference"]).norm() / found["reference"].norm()
    assert apart < TOLERANCE


def test_moments_are_those_of_a_cpu(tmp_path):
    text = TokenWindows(random_ids(2, 200), "digest", {"dataset": "zoo"})
    stores = []
    for device in ("cpu", "cuda"):
        model = tiny("gemma3").to(device)
        opened = OpenedModel(model, None, "gemma3", "gemma3", None, None)
        geometry = read_geometry(model)
        stores.append(
            collect(opened, geometry, text, tmp_path / device, gradients=False, moments=True)
        )
    for layer in range(stores[0].layers):
        for kind in ("key", "value"):
            expected, found = (store.load_moment(layer, kind) for store in stores)
            torch.testing.assert_close(
                found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
            )

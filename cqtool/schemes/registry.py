"""Formats by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches

from cqtool.cache.format import CacheFormat, LayerCodecs
from cqtool.errors import RecipeError
from cqtool.geometry import ModelGeometry
from cqtool.sampling import SampleStore
from cqtool.schemes import (
    calibquant,
    commvq,
    hf_quantized,
    kitty,
    kivi,
    kvquant,
    nsnquant,
    scalar,
    tasq,
    vecinfer,
    vidkv,
)
from cqtool.schemes.scheme import LayerSamples, Scheme

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        *scalar.SCHEMES,
        *kivi.SCHEMES,
        *kitty.SCHEMES,
        *vidkv.SCHEMES,
        *calibquant.SCHEMES,
        *hf_quantized.SCHEMES,
        *kvquant.SCHEMES,
        *vecinfer.SCHEMES,
        *nsnquant.SCHEMES,
        *tasq.SCHEMES,
        *commvq.SCHEMES,
    )
}
"""Name -> scheme."""


def make_format(
    name: str,
    geometry: ModelGeometry,
    window: int,
    sinks: int,
    samples: Callable[[], SampleStore] | None = None,
    device: str = "cpu",
    made: Sequence[LayerCodecs] = (),
) -> CacheFormat:
    """Bind a scheme to a model.

    Args:
        name: one of :data:`SCHEMES`.
        geometry: the model's cache geometry.
        window: newest tokens kept in the model's dtype.
        sinks: first tokens kept in the model's dtype, and left out of fits.
        samples: opens samples of the model; called only for calibrated schemes.
        device: where those are fitted, such as ``cuda``; the codecs are on the CPU.
        made: codecs of the first layers, of an earlier call with the same arguments.

    Raises:
        RecipeError: there is no scheme of that name, or it needs samples and there are none.
    """
    if name not in SCHEMES:
        close = get_close_matches(name, SCHEMES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise RecipeError(
            f"There is no format '{name}'.{hint} Use {', '.join(sorted(SCHEMES))}, a coupled one "
            "such as cq-4c8b, or a calibration folder."
        )
    scheme = SCHEMES[name]
    store = None
    if scheme.calibrated:
        if samples is None:
            raise RecipeError(f"'{name}' is fitted to samples of the model, and none were given.")
        store = samples()
    rest = tuple(
        scheme.make(layer, None if store is None else LayerSamples(store, index, device, sinks))
        for index, layer in enumerate(geometry.layers[len(made) :], start=len(made))
    )
    return CacheFormat(name, geometry, (*made, *rest), window, sinks)

"""Which k-means engine runs, and faiss, the reference: one codebook per call, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cqtool.codebooks.batched import BatchedEngine
from cqtool.codebooks.kmeans import (
    Engine,
    Fit,
    Floats,
    Init,
    check_samples,
    in_parts,
    usable_weights,
)
from cqtool.codebooks.start import choose_start
from cqtool.errors import EnvironmentProblem

if TYPE_CHECKING:
    from cqtool.recipe import KMeans


def import_faiss() -> ModuleType:
    """The faiss module.

    Raises:
        EnvironmentProblem: neither faiss-cpu nor faiss-gpu is installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise EnvironmentProblem(
            "faiss is not installed or does not load; install one of the two: "
            "pip install 'cqtool[cpu]', or pip install 'cqtool[gpu]' on a machine with a GPU; or "
            "take the k-means that needs neither, --engine batched."
        ) from error
    assert isinstance(faiss, ModuleType)
    return faiss


def make_engine(settings: KMeans, device: str) -> Engine:
    """The engine that a recipe asks for.

    ``auto`` is ``batched`` where the model runs on a CUDA GPU, which fits hundreds of codebooks
    side by side, and ``faiss`` elsewhere. ``faiss`` takes the GPU too if it was built for one.

    Args:
        settings: the recipe's k-means settings.
        device: where the model runs, such as ``cuda``.

    Raises:
        EnvironmentProblem: it is to be faiss, which is not installed.
    """
    cuda = device.startswith("cuda")
    if settings.engine == "batched" or (settings.engine == "auto" and cuda):
        return BatchedEngine(settings.iterations, settings.init, device if cuda else "cpu")
    gpu = cuda and getattr(import_faiss(), "get_num_gpus", lambda: 0)() > 0
    return FaissEngine(settings.iterations, settings.init, gpu=gpu)


class FaissEngine:
    """Lloyd's algorithm by faiss.

    Args:
        iterations: Lloyd iterations (faiss stops early when nothing moves).
        init: ``kmeans++`` (Arthur and Vassilvitskii, 2007) or ``random`` samples.
        gpu: use faiss's GPU index; faiss must have been built with one and see a GPU.
    """

    name = "faiss"

    def __init__(self, iterations: int, init: Init, *, gpu: bool = False) -> None:
        self._faiss = import_faiss()
        self._iterations = iterations
        self._init = init
        self._gpu = gpu
        # By default faiss compares fewer than 128000 / channels samples one by one, which takes
        # six times as long as the matrix product it uses beyond.
        self._faiss.cvar.distance_compute_blas_threshold = 0

    @property
    def threads(self) -> int:
        """How many fits may run at once: one on a GPU, else one per core.

        Fits of a few thousand samples scale poorly inside one call and perfectly across calls.
        """
        return 1 if self._gpu else int(self._faiss.omp_get_max_threads())

    @property
    def detail(self) -> str:
        """What runs where, for the record."""
        return f"faiss {self._faiss.__version__} on {'GPU' if self._gpu else 'CPU'}"

    def fit_many(
        self, points: Tensor, weights: Tensor | None, centroids: int, seeds: Sequence[int]
    ) -> Iterator[Fit]:
        """Fit one codebook to each problem, as many at a time as there are :attr:`threads`; see
        :meth:`Engine.fit_many <cqtool.codebooks.kmeans.Engine.fit_many>`."""
        check_samples(points.shape[1], centroids)
        with ThreadPoolExecutor(self.threads) as pool:
            for part in in_parts(points, torch.device("cpu")):
                own = points[part].contiguous()
                heavy = usable_weights(own, None if weights is None else weights[part])
                # faiss's k-means++ would leave the weights out.
                start = choose_start(own, heavy, centroids, self._init, seeds[part])
                arrays = (own.numpy(), heavy.numpy(), start.numpy(), seeds[part])
                yield from pool.map(self._fit, *arrays)

    def fit(self, points: Floats, weights: Floats | None, centroids: int, seed: int) -> Fit:
        """Fit one codebook to ``[samples, channels]`` with weights ``[samples]``, see
        :meth:`fit_many`."""
        heavy = None if weights is None else torch.from_numpy(weights)[None]
        return next(self.fit_many(torch.from_numpy(points)[None], heavy, centroids, [seed]))

    def _fit(self, points: Floats, weights: Floats, start: NDArray[np.int64], seed: int) -> Fit:
        samples, channels = points.shape
        kmeans = self._faiss.Kmeans(
            channels,
            len(start),
            niter=self._iterations,
            seed=seed,
            gpu=self._gpu,
            # faiss would otherwise subsample, and print a warning below 39 samples per centroid.
            max_points_per_centroid=samples,
            min_points_per_centroid=1,
        )
        with self._one_thread():
            kmeans.train(points, weights=weights, init_centroids=points[start])
            distances, _ = kmeans.assign(points)
        # faiss's own objective leaves the weights out and is one centroid update behind.
        error = np.average(distances.astype(np.float64), weights=weights)
        return Fit(centroids=kmeans.centroids, error=float(error))

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """One OpenMP thread for a fit on the CPU: the same sums whatever the number of cores."""
        if self._gpu:
            yield
            return
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)
        try:
            yield
        finally:
            self._faiss.omp_set_num_threads(before)

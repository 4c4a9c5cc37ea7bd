"""k-means engines. faiss is the reference: one codebook per call, weighted, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cqtool.errors import EnvironmentProblem, SampleError
from cqtool.recipe import KMeans

# Sample-centroid comparisons a second and core, and seconds of a fit on the GPU: one H100 and its
# host, faiss 1.15.1, 8192 samples of 8 channels, 256 centroids.
_CPU_RATE = 2.5e9
_GPU_SECONDS = 0.2

Init = Literal["kmeans++", "random"]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Fit:
    """One fitted codebook.

    Attributes:
        centroids: float32 ``[centroids, channels]``.
        error: weighted mean squared distance of a sample to its centroid, summed over channels.
    """

    centroids: Floats
    error: float


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
            "pip install 'cqtool[cpu]', or pip install 'cqtool[gpu]' on a machine with a GPU."
        ) from error
    assert isinstance(faiss, ModuleType)
    return faiss


def make_engine(settings: KMeans, device: str, *, samples: int, centroids: int) -> FaissEngine:
    """The engine that a recipe asks for.

    ``faiss`` takes the GPU where faiss was built for one and `device` is one. ``auto`` takes it
    only where it is faster: faiss's GPU k-means spends about 0.2 s on any codebook (it updates
    centroids on the CPU), in which time the cores fit dozens of small ones side by side.

    Args:
        settings: the recipe's k-means settings.
        device: where the model runs, such as ``cuda``.
        samples: samples of a codebook.
        centroids: entries of a codebook.
    """
    faiss = import_faiss()
    gpu = device.startswith("cuda") and getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    if gpu and settings.engine == "auto":
        comparisons = samples * centroids * settings.iterations
        gpu = comparisons / _CPU_RATE / int(faiss.omp_get_max_threads()) > _GPU_SECONDS
    return FaissEngine(settings.iterations, settings.init, gpu=gpu)


class FaissEngine:
    """Lloyd's algorithm by faiss.

    Args:
        iterations: Lloyd iterations (faiss stops early when nothing moves).
        init: ``kmeans++`` (Arthur and Vassilvitskii, 2007) or ``random`` samples.
        gpu: use faiss's GPU index; faiss must have been built with one and see a GPU.
    """

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

    def fit(self, points: Floats, weights: Floats | None, centroids: int, seed: int) -> Fit:
        """Fit one codebook; the same arguments give the same bytes.

        Args:
            points: ``[samples, channels]``.
            weights: non-negative ``[samples]``, or None for equal ones.
            centroids: how many; at most the number of samples.
            seed: of the initialisation.

        Raises:
            SampleError: fewer samples than centroids.
        """
        samples, channels = points.shape
        if samples < centroids:
            raise SampleError(
                f"{centroids} centroids cannot be fitted to {samples} samples; use more "
                "--sequences, a longer --sequence-length, or a format with fewer bits."
            )
        faiss = self._faiss
        methods = {
            "kmeans++": faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            "random": faiss.ClusteringInitMethod_RANDOM,
        }
        kmeans = faiss.Kmeans(
            channels,
            centroids,
            niter=self._iterations,
            seed=seed,
            gpu=self._gpu,
            init_method=methods[self._init],
            # faiss would otherwise subsample, and print a warning below 39 samples per centroid.
            max_points_per_centroid=samples,
            min_points_per_centroid=1,
        )
        points = np.ascontiguousarray(points)
        if weights is not None:
            weights = np.ascontiguousarray(_usable(weights))
        with self._one_thread():
            kmeans.train(points, weights=weights)
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


def _usable(weights: Floats) -> Floats:
    """Scale weights to mean 1 and lift zeros a little.

    A cluster of zero-weight samples has no mean. The last token of a sequence, which nothing
    attends to, has zero gradient, and a group that the model ignores has nothing else.
    """
    mean = weights.mean(dtype=np.float64)
    if not mean > 0:
        return np.ones_like(weights)
    lifted: Floats = np.maximum(weights / mean, 1e-6).astype(np.float32)
    return lifted

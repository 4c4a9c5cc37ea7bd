"""k-means engines. faiss is the reference: one codebook per call, weighted, on CPU or GPU."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cqtool.errors import EnvironmentProblem, SampleError

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


class FaissEngine:
    """Lloyd's algorithm by faiss.

    Args:
        iterations: Lloyd iterations (faiss stops early when nothing moves).
        init: ``kmeans++`` (Arthur and Vassilvitskii, 2007) or ``random`` samples.
        device: ``cuda`` uses faiss's GPU index when faiss was built with one and sees a GPU.
    """

    def __init__(self, iterations: int, init: Init, device: str) -> None:
        self._faiss = import_faiss()
        self._iterations = iterations
        self._init = init
        gpus = getattr(self._faiss, "get_num_gpus", lambda: 0)()
        self._gpu = device.startswith("cuda") and gpus > 0
        self._local = threading.local()
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
        if not self._gpu and not getattr(self._local, "single", False):
            # OpenMP's thread count is per calling thread; one makes sums independent of the cores.
            faiss.omp_set_num_threads(1)
            self._local.single = True
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
        kmeans.train(points, weights=weights)
        # faiss's own objective leaves the weights out and is one centroid update behind.
        distances, _ = kmeans.assign(points)
        error = np.average(distances.astype(np.float64), weights=weights)
        return Fit(centroids=kmeans.centroids, error=float(error))


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

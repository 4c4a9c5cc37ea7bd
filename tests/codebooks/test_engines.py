"""Both k-means engines: one objective, weights, repairs, and bytes that depend on nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from cqtool.codebooks import batched, engines, kmeans, start
from cqtool.codebooks.batched import BatchedEngine
from cqtool.codebooks.calibrate import calibrate
from cqtool.codebooks.engines import FaissEngine, make_engine
from cqtool.errors import EnvironmentProblem, SampleError
from cqtool.models.load import open_model
from cqtool.recipe import KMeans, load_recipe

PROBLEMS = 16


def clustered(samples=1500, channels=4, clusters=24, seed=0):
    """``[16, samples, channels]``, round clusters around centres of their own."""
    rng = np.random.default_rng(seed)
    centres = 4 * rng.standard_normal((PROBLEMS, clusters, channels))
    chosen = centres[np.arange(PROBLEMS)[:, None], rng.integers(clusters, size=(PROBLEMS, samples))]
    points = chosen + rng.standard_normal(chosen.shape)
    return torch.from_numpy(points.astype(np.float32))


def like_keys(samples=1500, channels=8, seed=0):
    """The same shape, correlated channels with heavy tails, of unequal spread, and a bias."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal((PROBLEMS, 1, channels)))
    mix = rng.standard_normal((PROBLEMS, channels, channels)) * spread
    points = rng.standard_t(4, (PROBLEMS, samples, channels)) @ mix
    points += 20 * rng.standard_normal((PROBLEMS, 1, channels))
    return torch.from_numpy(points.astype(np.float32))


def like_gradients(samples=1500, seed=0):
    """Weights ``[16, samples]`` with a heavy tail, as squared gradients have."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((PROBLEMS, samples)) ** 4).astype(np.float32))


def both(iterations=60, init="kmeans++"):
    return FaissEngine(iterations, init), BatchedEngine(iterations, init, "cpu")


def centroids_of(engine, points, weights, count, seeds):
    return np.stack([fit.centroids for fit in engine.fit_many(points, weights, count, seeds)])


def error(points, centroids, weights=None):
    """The objective in float64, by brute force."""
    x, c = points.double().numpy(), centroids.astype(np.float64)
    distances = ((x[:, None] - c[None]) ** 2).sum(-1).min(1)
    return np.average(distances, weights=None if weights is None else weights.double().numpy())


@pytest.mark.parametrize("init", ["kmeans++", "random"])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("make", [clustered, like_keys])
def test_both_engines_reach_the_same_objective(make, weighted, init):
    for seed in range(3):
        points = make(seed=seed)
        weights = like_gradients(seed=seed) if weighted else None
        seeds = list(range(100 * seed, 100 * seed + PROBLEMS))
        means = [
            np.mean([fit.error for fit in engine.fit_many(points, weights, 32, seeds)])
            for engine in both(init=init)
        ]
        assert means[1] == pytest.approx(means[0], rel=5e-3)


@pytest.mark.parametrize("engine", both(), ids=["faiss", "batched"])
def test_the_error_is_the_weighted_mean_of_squared_distances(engine):
    points, weights = like_keys(), like_gradients()
    fits = list(engine.fit_many(points, weights, 32, range(PROBLEMS)))
    assert len(fits) == PROBLEMS
    for fit, x, w in zip(fits, points, weights, strict=True):
        assert fit.centroids.shape == (32, 8) and fit.centroids.dtype == np.float32
        # faiss takes its distances from products, far from the origin.
        assert fit.error == pytest.approx(error(x, fit.centroids, w), rel=2e-3)


@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
def test_a_fit_is_a_fixed_point_of_lloyd_in_float64(weighted):
    points, weights = clustered(), like_gradients() if weighted else torch.ones(PROBLEMS, 1500)
    fitted = centroids_of(both(200)[1], points, weights, 16, range(PROBLEMS))
    for x, w, centroids in zip(points.double(), weights.double(), fitted, strict=True):
        codes = torch.cdist(x, torch.from_numpy(centroids).double()).argmin(1)
        for k in range(16):
            mine = codes == k
            mean = (x[mine] * w[mine, None]).sum(0) / w[mine].sum()
            np.testing.assert_allclose(centroids[k], mean, rtol=1e-4, atol=1e-4)


def test_weights_count_like_repetitions():
    points = clustered(samples=300)
    times = torch.randint(1, 6, (300,), generator=torch.Generator().manual_seed(0))
    repeated = points.repeat_interleave(times, dim=1)
    begin = points[:, :12].clone()
    mean_one = (times / times.double().mean()).float().expand(PROBLEMS, -1)
    torch.testing.assert_close(
        batched.lloyd(points, mean_one, begin, 40),
        batched.lloyd(repeated, torch.ones(repeated.shape[:2]), begin, 40),
        rtol=1e-5,
        atol=1e-5,
    )


def test_plus_plus_draws_in_proportion_to_weight_times_squared_distance():
    # From sample 0, which alone has weight at first, the others lie 1, 2, 3 and 0 away.
    line = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0])
    weights = torch.tensor([1e9, 36.0, 9.0, 4.0, 1.0])
    problems = 3000
    points = line[:, None].expand(problems, 5, 1)
    chosen = start.choose_start(
        points, weights.expand(problems, 5), 2, "kmeans++", list(range(problems))
    )
    assert (chosen[:, 0] == 0).all()
    shares = chosen[:, 1].bincount(minlength=5) / problems
    expected = weights * line.square()
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)
    assert shares[0] == shares[4] == 0


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_a_start_is_of_distinct_samples(init):
    points = clustered(samples=40)
    chosen = start.choose_start(points, torch.ones(PROBLEMS, 40), 40, init, range(PROBLEMS))
    assert (chosen.sort(dim=1).values == torch.arange(40)).all()


@pytest.mark.parametrize("engine", both(), ids=["faiss", "batched"])
def test_as_many_centroids_as_samples_leave_no_error(engine):
    points = like_keys(samples=50)
    for fit, x in zip(engine.fit_many(points, None, 50, range(PROBLEMS)), points, strict=True):
        assert fit.error < 1e-3 * float(x.var())


def test_empty_clusters_move_to_what_costs_most():
    # Nine tenths of the samples are one point, where chance puts nearly all centroids.
    points = clustered(samples=1000, clusters=8)
    points[:, :900] = points[:, :1]
    fits = list(both(init="random")[1].fit_many(points, None, 16, range(PROBLEMS)))
    best = list(both(init="kmeans++")[1].fit_many(points, None, 16, range(PROBLEMS)))
    assert np.mean([f.error for f in fits]) < 1.3 * np.mean([f.error for f in best])
    for fit in fits:
        assert len(np.unique(fit.centroids, axis=0)) == 16


def test_repairs_take_the_weight_into_account_and_end_when_nothing_costs():
    # Two far samples, the farther of little weight; centroids 1 and 2 have nothing.
    points = torch.tensor([[[0.0], [0.0], [10.0], [20.0]]])
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.01]])
    begin = torch.tensor([[[0.0], [-99.0]]])
    found = batched.lloyd(points, weights, begin, 1)
    assert found[0, 1, 0] == 10
    three = torch.tensor([[[1.0], [-99.0], [-98.0], [-97.0], [-96.0]]])
    done = batched.lloyd(points, weights, three, 20)[0, :, 0]
    assert {0.0, 10.0, 20.0} <= set(done.tolist())
    assert torch.isfinite(done).all()


@pytest.mark.parametrize("engine", both(), ids=["faiss", "batched"])
def test_fewer_distinct_samples_than_centroids(engine):
    points = torch.arange(5.0).repeat(20)[None, :, None].expand(1, 100, 2).contiguous()
    (fit,) = engine.fit_many(points, None, 16, [0])
    assert fit.error == pytest.approx(0, abs=1e-4)
    assert np.isfinite(fit.centroids).all()


@pytest.mark.parametrize("engine", both(), ids=["faiss", "batched"])
def test_zero_weights(engine):
    points = clustered()
    plain = centroids_of(engine, points, None, 8, range(PROBLEMS))
    zero = centroids_of(engine, points, torch.zeros(PROBLEMS, 1500), 8, range(PROBLEMS))
    np.testing.assert_array_equal(zero, plain)
    weights = torch.ones(PROBLEMS, 1500)
    weights[:, ::2] = 0
    half = [fit.error for fit in engine.fit_many(points, weights, 32, range(PROBLEMS))]
    alone = [fit.error for fit in engine.fit_many(points[:, 1::2], None, 32, range(PROBLEMS))]
    assert np.mean(half) == pytest.approx(np.mean(alone), rel=2e-2)


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_a_problem_does_not_notice_the_others_of_its_batch(init, monkeypatch):
    engine = both(15, init)[1]
    points, weights, seeds = like_keys(), like_gradients(), list(range(PROBLEMS))
    together = list(engine.fit_many(points, weights, 32, seeds))
    assert together[0].error != together[1].error
    for order in ([3], [15, 3, 3, 0], list(range(15, -1, -1))):
        apart = engine.fit_many(points[order], weights[order], 32, [seeds[i] for i in order])
        for index, fit in zip(order, apart, strict=True):
            np.testing.assert_array_equal(fit.centroids, together[index].centroids)
            assert fit.error == together[index].error
    monkeypatch.setattr(kmeans, "WORKING_BYTES", 2 << 20)
    assert len(list(kmeans.in_parts(points, torch.device("cpu")))) > 4
    np.testing.assert_array_equal(
        centroids_of(engine, points, weights, 32, seeds), [f.centroids for f in together]
    )


@pytest.mark.parametrize("engine", both(15), ids=["faiss", "batched"])
def test_the_seed_decides_the_bytes_and_inputs_stay_as_they_were(engine):
    points, weights = like_keys(), like_gradients()
    copies = points.clone(), weights.clone()
    first, second, other = (
        centroids_of(engine, points, weights, 32, range(first, first + PROBLEMS))
        for first in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[1:], np.roll(first, -1, axis=0)[:-1])
    assert not np.array_equal(first, other)
    assert torch.equal(points, copies[0]) and torch.equal(weights, copies[1])


def test_threads_do_not_change_the_bytes():
    points, weights = like_keys(), like_gradients()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            fits = list(both(15)[1].fit_many(points[:3], weights[:3], 32, [0, 1, 2]))
            found.append([(fit.centroids.tobytes(), fit.error) for fit in fits])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_samples_far_from_the_origin_are_told_apart():
    near = clustered(seed=1)
    far = near + 4096
    engine = both()[1]
    errors = [
        np.mean([fit.error for fit in engine.fit_many(points, None, 24, range(PROBLEMS))])
        for points in (near, far)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=5e-3)


@pytest.mark.parametrize("engine", both(), ids=["faiss", "batched"])
def test_what_cannot_be_fitted_is_refused(engine):
    points, weights = clustered(samples=30), torch.ones(PROBLEMS, 30)
    with pytest.raises(SampleError, match="31 centroids cannot be fitted to 30 samples"):
        list(engine.fit_many(points, None, 31, range(PROBLEMS)))
    for value in (float("nan"), float("inf")):
        for broken in (points, weights):
            sound = broken[5, 7].clone()
            broken[5, 7] = value
            with pytest.raises(SampleError, match="infinite or NaN"):
                list(engine.fit_many(points, weights, 8, range(PROBLEMS)))
            broken[5, 7] = sound


def test_the_recipe_and_the_device_choose_the_engine(monkeypatch):
    faiss = engines.import_faiss()

    def chosen(engine, device):
        made = make_engine(KMeans(engine=engine), device)
        return f"{made.name} on {made.detail.rsplit(' ', 1)[1]}"

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    assert chosen("auto", "cpu") == "faiss on CPU"
    assert chosen("auto", "cuda") == chosen("batched", "cuda") == "batched on GPU"
    assert chosen("batched", "cpu") == chosen("batched", "mps") == "batched on CPU"
    assert chosen("faiss", "cuda") == "faiss on GPU"
    assert chosen("faiss", "cpu") == "faiss on CPU"
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0, raising=False)
    assert chosen("faiss", "cuda") == "faiss on CPU"


def test_without_faiss_the_batched_engine_fits_and_is_named_as_the_way_out(monkeypatch):
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "import torch\n"
        "from cqtool.codebooks.engines import make_engine\n"
        "from cqtool.recipe import KMeans\n"
        "engine = make_engine(KMeans(engine='batched', iterations=3), 'cpu')\n"
        "print(len(list(engine.fit_many(torch.rand(2, 20, 2), None, 4, [0, 1]))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(EnvironmentProblem, match="--engine batched"):
        make_engine(KMeans(), "cpu")


def test_a_calibration_records_its_engine_and_both_make_nearly_the_same(
    tiny_model_dir, tiny_text_file, tmp_path
):
    opened = open_model(str(tiny_model_dir), device="cpu")
    values, records = {}, {}
    for name in ("faiss", "batched"):
        wanted = {
            "calibration.dataset": str(tiny_text_file),
            "calibration.sequences": 4,
            "calibration.sequence_length": 64,
            "kmeans.engine": name,
            "format": "cq-8c4b",
        }
        calibrate(opened, load_recipe("cq-8c8b", wanted), tmp_path / name)
        records[name] = json.loads((tmp_path / name / "calibration.json").read_text())
        layers = records[name]["objective_values"]
        values[name] = [layer[kind] for layer in layers for kind in ("key", "value")]
    assert [records[name]["engine"] for name in records] == ["faiss", "batched"]
    assert records["batched"]["engine_detail"] == f"torch {torch.__version__} on CPU"
    np.testing.assert_allclose(values["batched"], values["faiss"], rtol=5e-3)

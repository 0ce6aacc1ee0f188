"""Scores against scipy, NumPy, closed forms and brute force in float64."""

import numpy as np
import pytest
import scipy.linalg
from jaxprs import assert_exact

from lit_jax.evaluation import metrics


def random_covariance(rng, dim, rank=None):
    factor = rng.standard_normal((dim, rank or 2 * dim)) * rng.uniform(0.1, 3.0, (dim, 1))
    return factor @ factor.T / factor.shape[1]


@pytest.mark.parametrize(
    "batches",
    [[2500], [999, 999, 502], [1] * 2500, [2048, 452], [0, 1023, 0, 1, 1476]],
    ids=lambda batches: f"{len(batches)} batches",
)
def test_streaming_moments_are_those_of_numpy_for_any_batches(batches):
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((2500, 12)) * rng.uniform(0.1, 4.0, 12) + 1e3).astype(
        np.float32
    )
    moments = metrics.Moments(12)
    for batch in np.split(features, np.cumsum(batches)[:-1]):
        moments.update(batch)
    assert moments.count == 2500
    np.testing.assert_allclose(moments.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(
        moments.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-10
    )


def test_moments_refuse_other_shapes_and_too_few():
    moments = metrics.Moments(3)
    with pytest.raises(ValueError, match=r"shape \(B, 3\), got \(2, 4\)"):
        moments.update(np.zeros((2, 4)))
    moments.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        _ = moments.covariance


@pytest.mark.parametrize("dim", [1, 5, 64])
def test_frechet_distance_is_that_of_scipy(dim):
    rng = np.random.default_rng(dim)
    mean1, mean2 = rng.standard_normal((2, dim))
    covariance1, covariance2 = random_covariance(rng, dim), random_covariance(rng, dim)
    expected = (
        ((mean1 - mean2) ** 2).sum()
        + np.trace(covariance1 + covariance2)
        - 2 * np.trace(scipy.linalg.sqrtm(covariance1 @ covariance2)).real
    )
    np.testing.assert_allclose(
        metrics.frechet_distance(mean1, covariance1, mean2, covariance2), expected, rtol=1e-9
    )


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    mean1, mean2 = rng.standard_normal((2, 20))
    deviation1, deviation2 = rng.uniform(0.1, 2.0, (2, 20))
    expected = ((mean1 - mean2) ** 2).sum() + ((deviation1 - deviation2) ** 2).sum()
    actual = metrics.frechet_distance(mean1, np.diag(deviation1**2), mean2, np.diag(deviation2**2))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_frechet_distance_of_singular_covariances_is_finite():
    """Fewer images than features: the covariances span different subspaces.

    scipy's root is ill-defined here.
    """
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    covariance1, covariance2 = basis[:, :5] @ basis[:, :5].T, 4.0 * basis[:, 3:9] @ basis[:, 3:9].T
    # Two shared directions, of variance 1 and 4: traces 5 + 24 - 2 * 2 * sqrt(1 * 4).
    distance = metrics.frechet_distance(np.zeros(30), covariance1, np.zeros(30), covariance2)
    np.testing.assert_allclose(distance, 21.0, rtol=1e-6)
    same = metrics.frechet_distance(np.ones(30), covariance1, np.ones(30), covariance1)
    assert abs(same) < 1e-6


def test_frechet_distance_refuses_what_is_no_covariance():
    eye, mean = np.eye(4), np.zeros(4)
    with pytest.raises(ValueError, match="not a covariance"):
        metrics.frechet_distance(mean, np.diag([1.0, 1.0, 1.0, -0.5]), mean, eye)
    with pytest.raises(ValueError, match="not a covariance"):
        metrics.frechet_distance(mean, eye, mean, eye + np.diag(np.ones(3), 1))
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet_distance(mean, eye, mean, eye * np.nan)
    with pytest.raises(ValueError, match=r"\(4,\) and \(5,\)"):
        metrics.frechet_distance(mean, eye, np.zeros(5), np.eye(5))


def inception_score_oracle(logits, split_size):
    """exp of the mean divergence, one image and one class at a time."""
    scores = []
    for start in range(0, len(logits), split_size):
        probabilities = [
            [np.exp(v) / sum(np.exp(row)) for v in row]
            for row in logits[start : start + split_size]
        ]
        marginal = [
            sum(p[c] for p in probabilities) / len(probabilities) for c in range(logits.shape[1])
        ]
        divergences = [
            sum(p[c] * np.log(p[c] / marginal[c]) for c in range(len(p))) for p in probabilities
        ]
        scores.append(np.exp(sum(divergences) / len(divergences)))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("count, split_size", [(40, 10), (43, 10), (5, 10)])
def test_inception_score_is_that_of_brute_force(count, split_size):
    logits = np.random.default_rng(0).standard_normal((count, 6)) * 3
    np.testing.assert_allclose(
        metrics.inception_score(np.float32(logits), split_size),
        inception_score_oracle(np.float32(logits).astype(np.float64), split_size),
        rtol=1e-12,
    )


def test_inception_score_of_certain_and_of_even_predictions():
    certain = 1e4 * np.eye(10)[np.arange(100) % 10]
    np.testing.assert_allclose(metrics.inception_score(certain), 10.0, rtol=1e-9)
    np.testing.assert_allclose(metrics.inception_score(np.zeros((100, 10))), 1.0, rtol=1e-12)


def test_inception_score_splits_in_file_order():
    """Sorted by class, each split of 10 holds one class and scores 1; shuffled about 10."""
    certain = 1e4 * np.repeat(np.eye(10), 10, axis=0)
    np.testing.assert_allclose(metrics.inception_score(certain, split_size=10), 1.0, rtol=1e-9)


def precision_recall_oracle(reference, samples, k):
    def distance(a, b):
        return ((a - b) ** 2).sum()

    def radius(points, i):
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    def coverage(points, others):
        radii = [radius(others, j) for j in range(len(others))]
        return np.mean([any(distance(p, o) <= r for o, r in zip(others, radii)) for p in points])

    return coverage(samples, reference), coverage(reference, samples)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block_size", [16, 37, 1000])
def test_precision_and_recall_are_those_of_brute_force(k, block_size):
    rng = np.random.default_rng(1)
    reference = rng.standard_normal((61, 5)).astype(np.float32) + 20.0
    samples = 1.2 * rng.standard_normal((48, 5)).astype(np.float32) + 20.8
    expected = precision_recall_oracle(np.float64(reference), np.float64(samples), k)
    assert 0.1 < expected[0] < 0.9 and 0.1 < expected[1] < 0.9 and expected[0] != expected[1]
    assert metrics.precision_recall(reference, samples, k, block_size) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_ties_and_duplicates_count_as_brute_force_counts_them(k):
    """On a lattice many distances are equal and some are 0: every second one is on a boundary."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        reference, samples = (
            rng.integers(low, low + 6, (count, 3)) for low, count in ((0, 61), (2, 50))
        )
        expected = precision_recall_oracle(reference, samples, k)
        assert metrics.precision_recall(
            np.float32(reference), np.float32(samples), k, 32
        ) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_of_equal_and_of_distant_sets():
    points = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    assert metrics.precision_recall(points, points) == (1.0, 1.0)
    assert metrics.precision_recall(points, points + 100.0) == (0.0, 0.0)


def test_distances_are_exact_on_every_device():
    """The squared distance of neighbours is a small difference of large numbers."""
    features = np.zeros((4, 8), np.float32)
    assert assert_exact(metrics.squared_distances, features, features) == 1


def test_the_boundary_of_a_ball_is_inside():
    reference = np.array([[0.0], [1.0], [2.0]], np.float32)  # every radius for k = 1 is 1
    radii = metrics.manifold_radii(reference, k=1)
    np.testing.assert_array_equal(radii, [1.0, 1.0, 1.0])
    assert metrics.manifold_coverage(np.array([[3.0], [3.5]], np.float32), reference, radii) == 0.5


def test_too_few_images_for_neighbours_are_named():
    with pytest.raises(ValueError, match="more than 3 images, got 3"):
        metrics.precision_recall(np.zeros((3, 2), np.float32), np.zeros((9, 2), np.float32))

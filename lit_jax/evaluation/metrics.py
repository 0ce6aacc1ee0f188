"""Scores of generated images from their features: Frechet distance, Inception score, precision and recall.

Statistics and the Frechet distance are float64 on the host; the distances of precision and recall are float32 on the
device. What a number means depends on the features and on the protocol around it: see docs/evaluation.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


class Moments:
    """Mean and covariance of a stream of feature batches, float64, in one pass.

    Rows are folded in by Chan's rule (sums of squares about the running mean), which does not cancel as
    E[x^2] - E[x]^2 does; about a thousand at a time, as folding costs a pass over the whole matrix.
    """

    def __init__(self, dim: int):
        self._count = 0
        self._mean = np.zeros(dim)
        self._squares = np.zeros((dim, dim))  # sum of outer products of deviations from the mean
        self._pending, self._num_pending = [], 0

    def update(self, features: np.ndarray) -> None:
        """Adds features (B, dim); any B, 0 included."""
        if features.ndim != 2 or features.shape[1] != len(self._mean):
            raise ValueError(
                f"expected features of shape (B, {len(self._mean)}), got {features.shape}"
            )
        self._pending.append(np.array(features, np.float64))
        self._num_pending += len(features)
        if self._num_pending >= 1024:
            self._fold()

    def _fold(self):
        if not self._num_pending:
            return
        features, count = np.concatenate(self._pending), self._num_pending
        mean, total = features.mean(axis=0), self._count + count
        deviations, step = features - mean, mean - self._mean
        self._squares += deviations.T @ deviations
        self._squares += np.outer(step * (self._count * count / total), step)
        self._mean = self._mean + step * (count / total)
        self._count, self._pending, self._num_pending = total, [], 0

    @property
    def count(self) -> int:
        return self._count + self._num_pending

    @property
    def mean(self) -> np.ndarray:
        """(dim,)"""
        self._fold()
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """(dim, dim), divided by count - 1 as np.cov does; raises ValueError with fewer than two features."""
        self._fold()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self._count}")
        return self._squares / (self._count - 1)


def frechet_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """Frechet distance between two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: no
    complex numbers, no failure on singular covariances, the same value as scipy.linalg.sqrtm(C1 @ C2).

    Args: means (D,), covariances (D, D), symmetric and positive semidefinite up to rounding.
    Raises: ValueError for unequal shapes, values that are not finite, or a matrix that is no covariance.
    """
    mean1, mean2 = np.asarray(mean1, np.float64), np.asarray(mean2, np.float64)
    covariance1, covariance2 = (
        np.asarray(covariance1, np.float64),
        np.asarray(covariance2, np.float64),
    )
    if mean1.shape != mean2.shape or covariance1.shape != covariance2.shape:
        raise ValueError(
            f"the two sides have features of different size: means {mean1.shape} and {mean2.shape}, "
            f"covariances {covariance1.shape} and {covariance2.shape}"
        )
    values, vectors = _eigh(covariance1)
    _eigh(covariance2, vectors=False)
    root = vectors * np.sqrt(values) @ vectors.T
    residual = np.abs(root @ root - covariance1).max(initial=0.0)
    if residual > 1e-6 * max(values[-1], 1e-12):
        raise ValueError(
            f"the root of a covariance is {residual:.3g} off where its largest eigenvalue is {values[-1]:.3g}"
        )
    # The product of two roots' worth of rounding: eigenvalues that should be 0 come out as small negative numbers.
    product = np.linalg.eigvalsh(root @ covariance2 @ root)
    trace_of_root = np.sqrt(np.clip(product, 0.0, None)).sum()
    distance = (
        ((mean1 - mean2) ** 2).sum()
        + np.trace(covariance1)
        + np.trace(covariance2)
        - 2.0 * trace_of_root
    )
    return float(distance)


def _eigh(covariance, vectors=True):
    """Eigenvalues (ascending, cut at 0) and vectors of a covariance; refuses a matrix that is none."""
    if not np.isfinite(covariance).all():
        raise ValueError("a covariance holds values that are not finite")
    asymmetry = np.abs(covariance - covariance.T).max(initial=0.0)
    values = np.linalg.eigh(covariance) if vectors else (np.linalg.eigvalsh(covariance), None)
    values, basis = values
    scale = max(np.abs(values).max(initial=0.0), 1e-12)
    if asymmetry > 1e-6 * scale or values[0] < -1e-5 * scale:
        raise ValueError(
            f"not a covariance: asymmetric by {asymmetry:.3g}, smallest eigenvalue {values[0]:.3g}, "
            f"largest {values[-1]:.3g}"
        )
    return np.clip(values, 0.0, None), basis


def inception_score(logits: np.ndarray, split_size: int = 5000) -> float:
    """exp(E[KL(p(y|x) || p(y))]) averaged over consecutive splits, in file order; arXiv 1606.03498.

    ADM's evaluator: 5,000 images a split (10 splits of 50,000), not shuffled, logits without the classifier's bias.

    Args: logits (N, classes); the softmax is taken in float64.
    """
    if not len(logits):
        raise ValueError("the Inception score needs at least 1 image, got 0")
    scores = []
    for start in range(0, len(logits), split_size):
        x = np.asarray(logits[start : start + split_size], np.float64)
        x = x - x.max(axis=1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        # Where a class has no probability anywhere in the split, p is 0 and its term is too.
        log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))


@jax.jit
def _squared_distances(a, b):
    """(M, D), (N, D) -> (M, N) float32."""
    squares = jnp.square(a).sum(axis=1)[:, None] + jnp.square(b).sum(axis=1)[None, :]
    return jnp.maximum(squares - 2.0 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST), 0.0)


@functools.partial(jax.jit, static_argnames="k", donate_argnums=0)
def _keep_nearest(nearest, rows, columns, is_column, k):
    """Merges the squared distances to a block of columns into the k smallest so far, (M, k) ascending."""
    distances = jnp.where(is_column[None, :], _squared_distances(rows, columns), jnp.inf)
    return -jax.lax.top_k(-jnp.concatenate([nearest, distances], axis=1), k)[0]


@jax.jit
def _is_inside(inside, rows, columns, radii):
    return inside | (_squared_distances(rows, columns) <= radii[None, :]).any(axis=1)


def _blocks(features, block_size):
    """Yields (slice, device array (block_size, D), mask (block_size,)), the last block padded with zeros."""
    for start in range(0, len(features), block_size):
        block = features[start : start + block_size]
        padding = block_size - len(block)
        mask = np.arange(block_size) < len(block)
        yield (
            slice(start, start + len(block)),
            jnp.asarray(np.pad(block, ((0, padding), (0, 0)))),
            jnp.asarray(mask),
        )


def manifold_radii(features: np.ndarray, k: int = 3, block_size: int = 5000) -> np.ndarray:
    """Squared distance of each feature (N, D) to its k-th nearest neighbour, itself not counted; (N,) float32."""
    if len(features) <= k:
        raise ValueError(f"{k} nearest neighbours need more than {k} images, got {len(features)}")
    radii = np.empty(len(features), np.float32)
    for where, rows, _ in _blocks(features, block_size):
        nearest = jnp.full(
            (block_size, k + 1), jnp.inf
        )  # its distance to itself is among them, the smallest
        for _, columns, is_column in _blocks(features, block_size):
            nearest = _keep_nearest(nearest, rows, columns, is_column, k + 1)
        radii[where] = np.asarray(nearest)[: where.stop - where.start, k]
    return radii


def manifold_coverage(
    features: np.ndarray, others: np.ndarray, radii: np.ndarray, block_size: int = 5000
) -> float:
    """Share of `features` (M, D) within the radius (N,) of at least one of `others` (N, D); the boundary is inside."""
    inside_count = 0
    for where, rows, _ in _blocks(features, block_size):
        inside = jnp.zeros(block_size, bool)
        for columns_at, columns, _ in _blocks(others, block_size):
            block_radii = np.full(
                block_size, -1.0, np.float32
            )  # nothing is within a negative radius
            block_radii[: columns_at.stop - columns_at.start] = radii[columns_at]
            inside = _is_inside(inside, rows, columns, jnp.asarray(block_radii))
        inside_count += int(np.asarray(inside)[: where.stop - where.start].sum())
    return inside_count / len(features)


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, block_size: int = 5000
) -> tuple[float, float]:
    """Improved precision and recall from features; arXiv 1904.06991.

    Precision is the share of samples inside the manifold of the reference (the union of balls that reach to each
    feature's k-th neighbour), recall the share of the reference inside that of the samples. Distances are float32;
    both sides are first moved by the reference's mean, rounded to integers: that changes no distance but keeps their squares
    small, and features of few digits stay exact, so that what lies on a boundary is still inside.

    Args: reference (N, D), samples (M, D).
    """
    if reference.shape[1:] != samples.shape[1:]:
        raise ValueError(
            f"reference features {reference.shape} and sample features {samples.shape} differ in size"
        )
    centre = np.round(np.asarray(reference, np.float64).mean(axis=0))
    reference, samples = ((np.asarray(x) - centre).astype(np.float32) for x in (reference, samples))
    block_size = min(block_size, max(len(reference), len(samples)))
    reference_radii = manifold_radii(reference, k, block_size)
    sample_radii = manifold_radii(samples, k, block_size)
    return (
        manifold_coverage(samples, reference, reference_radii, block_size),
        manifold_coverage(reference, samples, sample_radii, block_size),
    )

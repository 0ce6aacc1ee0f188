"""Scores of generated images from their features.

Moments and the Frechet distance are float64 on the host; the distances of
precision and recall are float32 on the device. What a number means depends on
the features and on the protocol around it: see docs/evaluation.md.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

# ---- Frechet distance ----


class Moments:
    """Mean and covariance of a stream of feature batches, float64.

    Features are added by Chan's rule, with sums of squares about the running
    mean.
    """

    # Adding to the sums costs a pass over the whole (dim, dim) matrix, so
    # small batches wait until they are this many features together.
    _CHUNK = 1024

    def __init__(self, dim: int):
        self._count = 0
        self._mean = np.zeros(dim)
        # The sum of outer products of deviations from the mean. It does not
        # cancel, as E[x^2] - E[x]^2 does where the mean is large.
        self._squares = np.zeros((dim, dim))
        self._pending: list[np.ndarray] = []
        self._num_pending = 0

    def update(self, features: np.ndarray) -> None:
        """Adds features (B, dim); B may be 0."""
        dim = len(self._mean)
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"expected features of shape (B, {dim}), got {features.shape}")
        # A copy, since the caller may reuse the array.
        self._pending.append(np.array(features, np.float64))
        self._num_pending += len(features)
        if self._num_pending >= self._CHUNK:
            self._add_pending()

    def _add_pending(self) -> None:
        if not self._num_pending:
            return
        features = np.concatenate(self._pending)
        count = self._num_pending
        total = self._count + count

        mean = features.mean(axis=0)
        deviations = features - mean
        step = mean - self._mean
        self._squares += deviations.T @ deviations
        self._squares += np.outer(step * (self._count * count / total), step)
        self._mean = self._mean + step * (count / total)

        self._count = total
        self._pending = []
        self._num_pending = 0

    @property
    def count(self) -> int:
        """The number of features."""
        return self._count + self._num_pending

    @property
    def mean(self) -> np.ndarray:
        """(dim,) float64"""
        self._add_pending()
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """(dim, dim) float64, divided by count - 1 as in np.cov.

        Raises: ValueError for fewer than two features.
        """
        self._add_pending()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self._count}")
        return self._squares / (self._count - 1)


def frechet_distance(
    mean1: np.ndarray,
    covariance1: np.ndarray,
    mean2: np.ndarray,
    covariance2: np.ndarray,
) -> float:
    """Frechet distance between two Gaussians, float64.

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    Args:
      mean1, mean2: (D,).
      covariance1, covariance2: (D, D), symmetric and positive semidefinite up
        to rounding.
    Raises: ValueError for unequal shapes, for values that are not finite, and
      for a matrix that is no covariance.
    """
    mean1 = np.asarray(mean1, np.float64)
    mean2 = np.asarray(mean2, np.float64)
    covariance1 = np.asarray(covariance1, np.float64)
    covariance2 = np.asarray(covariance2, np.float64)
    if mean1.shape != mean2.shape or covariance1.shape != covariance2.shape:
        raise ValueError(
            "the two sides have features of different size: "
            f"means {mean1.shape} and {mean2.shape}, "
            f"covariances {covariance1.shape} and {covariance2.shape}"
        )

    # Before any decomposition, which may not end on such values.
    for covariance in (covariance1, covariance2):
        if not np.isfinite(covariance).all():
            raise ValueError("a covariance holds values that are not finite")
    _check_covariance(covariance2, np.linalg.eigvalsh(covariance2))
    root = _root(covariance1)

    # C1^(1/2) C2 C1^(1/2) has the eigenvalues of C1 C2 and is symmetric: no
    # complex numbers and no failure on singular covariances, where
    # scipy.linalg.sqrtm(C1 @ C2) has both.
    product = np.linalg.eigvalsh(root @ covariance2 @ root)
    # Eigenvalues that should be 0 come out as small negative numbers.
    trace_of_root = np.sqrt(np.clip(product, 0.0, None)).sum()
    distance = (
        ((mean1 - mean2) ** 2).sum()
        + np.trace(covariance1)
        + np.trace(covariance2)
        - 2.0 * trace_of_root
    )
    return float(distance)


def _root(covariance):
    """The symmetric root of a covariance, (D, D)."""
    values, vectors = np.linalg.eigh(covariance)
    _check_covariance(covariance, values)
    values = np.clip(values, 0.0, None)
    root = vectors * np.sqrt(values) @ vectors.T

    # A wrong root would be a wrong score and nothing else would show it.
    residual = np.abs(root @ root - covariance).max(initial=0.0)
    if residual > 1e-6 * max(values[-1], 1e-12):
        raise ValueError(
            f"the root of a covariance is {residual:.3g} off, where its largest "
            f"eigenvalue is {values[-1]:.3g}"
        )
    return root


def _check_covariance(covariance, eigenvalues):
    """Raises ValueError unless the matrix is a covariance; `eigenvalues` ascend."""
    asymmetry = np.abs(covariance - covariance.T).max(initial=0.0)
    scale = max(np.abs(eigenvalues).max(initial=0.0), 1e-12)
    # Rounding leaves eigenvalues a little below 0 where there are fewer images
    # than features, above all in files with float32 statistics. What is below
    # this limit is no rounding.
    if asymmetry > 1e-6 * scale or eigenvalues[0] < -1e-5 * scale:
        raise ValueError(
            f"not a covariance: asymmetric by {asymmetry:.3g}, "
            f"smallest eigenvalue {eigenvalues[0]:.3g}, largest {eigenvalues[-1]:.3g}"
        )


# ---- Inception score ----


def inception_score(logits: np.ndarray, split_size: int = 5000) -> float:
    """exp(E[KL(p(y|x) || p(y))]), the mean over consecutive splits; arXiv 1606.03498.

    As in ADM's evaluator: 5,000 images a split (10 splits of 50,000) in file
    order, not shuffled, and logits without the classifier's bias.

    Args:
      logits: (N, classes); the softmax is computed in float64.
    Raises: ValueError for no images.
    """
    if not len(logits):
        raise ValueError("the Inception score needs at least 1 image, got 0")

    scores = []
    for start in range(0, len(logits), split_size):
        x = np.asarray(logits[start : start + split_size], np.float64)
        x = x - x.max(axis=1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
        p = np.exp(log_p)

        # A class without probability in the whole split has p = 0, and its
        # term is 0 too.
        marginal = np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny)
        divergence = (p * (log_p - np.log(marginal))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


# ---- Precision and recall ----

# Where a block of features lies, the block (block_size, D), and which of its
# rows are features and no padding.
Block = tuple[slice, jax.Array, jax.Array]


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    k: int = 3,
    block_size: int = 5000,
) -> tuple[float, float]:
    """Improved precision and recall from features; arXiv 1904.06991.

    The manifold of a set is the union of the balls around its features that
    reach to the k-th neighbour. Precision is the share of the samples inside
    the manifold of the reference, recall the share of the reference inside
    that of the samples. Distances are float32.

    Args:
      reference: (N, D).
      samples: (M, D).
      block_size: features whose distances are computed at once; it does not
        change the result.
    Raises: ValueError for features of different size, or not more than k
      images.
    """
    if reference.shape[1:] != samples.shape[1:]:
        raise ValueError(
            f"reference features {reference.shape} and sample features "
            f"{samples.shape} differ in size"
        )
    # Moving both sides changes no distance but keeps the squares small. The
    # centre is rounded to integers so that features of few digits stay exact:
    # what lies on a boundary must stay inside.
    centre = np.round(np.asarray(reference, np.float64).mean(axis=0))
    reference = (np.asarray(reference) - centre).astype(np.float32)
    samples = (np.asarray(samples) - centre).astype(np.float32)

    block_size = min(block_size, max(len(reference), len(samples)))
    reference_radii = manifold_radii(reference, k, block_size)
    sample_radii = manifold_radii(samples, k, block_size)
    return (
        manifold_coverage(samples, reference, reference_radii, block_size),
        manifold_coverage(reference, samples, sample_radii, block_size),
    )


def manifold_radii(
    features: np.ndarray,
    k: int = 3,
    block_size: int = 5000,
) -> np.ndarray:
    """Squared distance of each feature (N, D) to its k-th nearest neighbour.

    Returns: (N,) float32.
    Raises: ValueError for k features or fewer.
    """
    if len(features) <= k:
        raise ValueError(f"{k} nearest neighbours need more than {k} images, got {len(features)}")

    radii = np.empty(len(features), np.float32)
    for where, rows, _ in _blocks(features, block_size):
        # One more than k: the distance of a feature to itself is among them.
        nearest = jnp.full((block_size, k + 1), jnp.inf)
        for _, columns, is_column in _blocks(features, block_size):
            nearest = _keep_nearest(nearest, rows, columns, is_column, k + 1)
        radii[where] = np.asarray(nearest)[: where.stop - where.start, k]
    return radii


def manifold_coverage(
    features: np.ndarray,
    others: np.ndarray,
    radii: np.ndarray,
    block_size: int = 5000,
) -> float:
    """The share of features inside the manifold of others, boundary included.

    Args:
      features: (M, D).
      others: (N, D).
      radii: (N,), see `manifold_radii`.
    """
    count = 0
    for where, rows, _ in _blocks(features, block_size):
        inside = jnp.zeros(block_size, bool)
        for columns_at, columns, _ in _blocks(others, block_size):
            # The padding gets negative radii, within which there is nothing.
            block_radii = np.full(block_size, -1.0, np.float32)
            block_radii[: columns_at.stop - columns_at.start] = radii[columns_at]
            inside = _is_inside(inside, rows, columns, jnp.asarray(block_radii))
        count += int(np.asarray(inside)[: where.stop - where.start].sum())
    return count / len(features)


def _blocks(features: np.ndarray, block_size: int) -> Iterator[Block]:
    # All blocks have one shape, so that each program is compiled once.
    for start in range(0, len(features), block_size):
        block = features[start : start + block_size]
        padding = block_size - len(block)
        mask = np.arange(block_size) < len(block)
        yield (
            slice(start, start + len(block)),
            jnp.asarray(np.pad(block, ((0, padding), (0, 0)))),
            jnp.asarray(mask),
        )


@functools.partial(jax.jit, static_argnames="k", donate_argnums=0)
def _keep_nearest(nearest, rows, columns, is_column, k):
    """Merges the distances to some columns into the k smallest, (M, k)."""
    distances = squared_distances(rows, columns)
    distances = jnp.where(is_column[None, :], distances, jnp.inf)
    candidates = jnp.concatenate([nearest, distances], axis=1)
    return -jax.lax.top_k(-candidates, k)[0]


@jax.jit
def _is_inside(inside, rows, columns, radii):
    distances = squared_distances(rows, columns)
    return inside | (distances <= radii[None, :]).any(axis=1)


@jax.jit
def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """(M, D), (N, D) -> (M, N) float32."""
    # Full precision, since the three terms nearly cancel between neighbours.
    products = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(a).sum(axis=1)[:, None] + jnp.square(b).sum(axis=1)[None, :]
    return jnp.maximum(squares - 2.0 * products, 0.0)

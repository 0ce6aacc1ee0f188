"""Cook and Toom's algorithm: short one-dimensional convolutions with fewer products.

The plain sum makes m outputs of K taps from m K products; here m + K - 1 do. It
is Winograd's minimal filtering, in one dimension. The taps and the inputs are
the coefficients of polynomials: both are evaluated at n = m + K - 1 points,
multiplied there, and the product's coefficients are read off.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# Points of small powers of two, in pairs of p and -p: their powers
# are exact in float32, and each pair shares its sums. One more
# point lies at infinity: it stands for the leading coefficient.
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 4.0, -4.0)


def cook_toom(m: int, K: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices A (n, m), B (n, n) and G (n, K) of m outputs of K taps, n = m + K - 1.

    The correlation of n inputs x with the taps g is A^T ((G g) * (B x)). Rows 1
    and 2, 3 and 4, ... belong to points p and -p: they are equal but for the
    sign of their odd columns. For m = 1 it is the plain sum.
    """
    if m == 1:
        return np.ones((K, 1)), np.eye(K), np.eye(K)

    n = m + K - 1
    points = POINTS[: n - 1]
    A = np.zeros((n, m))
    B = np.zeros((n, n))
    G = np.zeros((n, K))
    for row, p in enumerate(points):
        others = [q for q in points if q != p]
        A[row] = p ** np.arange(m)
        # The polynomial that vanishes at the
        # other points, the lowest power first.
        B[row, : n - 1] = np.poly(others)[::-1]
        G[row] = p ** np.arange(K) / np.prod([p - q for q in others])
    A[-1, -1] = 1.0
    G[-1, -1] = 1.0
    B[-1] = np.poly(points)[::-1]
    return A, B, G


def evaluate(matrix: np.ndarray, values: Sequence[Any]) -> list[Any]:
    """`matrix` times a list of rows, for A and B of `cook_toom`; a row of None is zero.

    The even and the odd columns of points p and -p are summed once: half of the
    work.
    """
    out = [weighted_sum(matrix[0], values)]
    for row in matrix[1:-1:2]:
        even = weighted_sum(row[::2], values[::2])
        odd = weighted_sum(row[1::2], values[1::2])
        if odd is None:
            out += [even, even]
        elif even is None:
            out += [odd, -odd]
        else:
            out += [even + odd, even - odd]
    return out + [weighted_sum(matrix[-1], values)]


def interpolate(A: np.ndarray, values: Sequence[Any]) -> list[Any]:
    """A^T times a list of rows."""
    if A.shape[1] == 1:
        return [weighted_sum(A[:, 0], values)]

    # Points p and -p have the same even powers, and odd ones of opposite sign.
    pairs = [(x + y, x - y) for x, y in zip(values[1:-1:2], values[2:-1:2])]
    out = []
    for i in range(A.shape[1]):
        weights = [A[0, i], *A[1:-1:2, i], A[-1, i]]
        terms = [values[0], *(pair[i % 2] for pair in pairs), values[-1]]
        out.append(weighted_sum(weights, terms))
    return out


def weighted_sum(weights: Iterable[float], values: Iterable[Any]) -> Any:
    """The sum of weights * values, or None if it is empty; a value of None is zero.

    Weights of 1 and -1 cost no product: the weights are known when the kernel
    is traced.
    """
    total = None
    for weight, value in zip(weights, values):
        if weight == 0 or value is None:
            continue
        if total is None:
            total = value if weight == 1 else value * float(weight)
        elif weight == -1:
            total = total - value
        else:
            total = total + (value if weight == 1 else value * float(weight))
    return total

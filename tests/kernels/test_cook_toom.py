"""Cook and Toom's algorithm against the plain sum."""

import numpy as np
import pytest

from lit_jax.kernels.cook_toom import cook_toom, evaluate, interpolate


@pytest.mark.parametrize("K", [3, 5, 7])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_it_correlates(m, K):
    A, B, G = cook_toom(m, K)
    n = m + K - 1
    x, g = np.random.default_rng(0).normal(size=(2, n))
    expected = [sum(g[k] * x[i + k] for k in range(K)) for i in range(m)]
    close = dict(rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(A.T @ ((G @ g[:K]) * (B @ x)), expected, **close)
    # And row by row, with what points p and -p share computed once.
    windows = evaluate(B, list(x)) if m > 1 else list(x)
    sums = [tap * value for tap, value in zip(G @ g[:K], windows)]
    np.testing.assert_allclose(interpolate(A, sums), expected, **close)


def test_rows_of_none_are_zero():
    """Rows outside the image are known when the kernel is traced, and cost nothing."""
    _, B, _ = cook_toom(4, 5)
    x = np.random.default_rng(0).normal(size=8)
    x[:2] = 0.0
    rows = evaluate(B, [None, None, *x[2:]])
    np.testing.assert_allclose(rows, B @ x, rtol=1e-10)

"""Slow, obvious references in NumPy float64, and the one comparison helper of the suite."""
import numpy as np

_UNIT = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-52}


def assert_close(actual, expected, *, reduction=1, dtype="float32", factor=8.0, what=""):
    """Asserts |actual - expected| <= factor * unit(dtype) * sqrt(reduction) * max|expected|, naming the worst element.

    `reduction` is the length of the longest sum behind one element: rounding errors of a sum grow with its root.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: {np.size(actual) - np.isfinite(actual).sum()} elements are not finite"
    scale = np.max(np.abs(expected), initial=0.0)
    bound = factor * _UNIT[dtype] * np.sqrt(reduction) * max(scale, 1e-30)
    error = np.abs(actual - expected)
    if error.size and error.max() > bound:
        worst = np.unravel_index(error.argmax(), error.shape)
        raise AssertionError(f"{what}: at {tuple(map(int, worst))} got {actual[worst]:.9g}, expected {expected[worst]:.9g}; "
                             f"error {error.max():.3g} > {bound:.3g} ({dtype}, reduction {reduction}, factor {factor})")

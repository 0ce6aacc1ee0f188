"""Slow, obvious references in NumPy float64, and the one comparison helper of the suite."""

import numpy as np

_UNIT = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-52}


def assert_close(actual, expected, *, reduction=1, dtype="float32", factor=8.0, what=""):
    """Asserts |actual - expected| <= factor * unit(dtype) * sqrt(reduction) * max|expected|.

    The error names the worst element. `reduction` is the length of the longest sum behind one
    element: the rounding error of a sum grows with the root of its length.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (
        f"{what}: shape {actual.shape}, expected {expected.shape}"
    )
    assert np.isfinite(actual).all(), (
        f"{what}: {np.size(actual) - np.isfinite(actual).sum()} elements are not finite"
    )
    scale = np.max(np.abs(expected), initial=0.0)
    bound = factor * _UNIT[dtype] * np.sqrt(reduction) * max(scale, 1e-30)
    error = np.abs(actual - expected)
    if error.size and error.max() > bound:
        worst = np.unravel_index(error.argmax(), error.shape)
        raise AssertionError(
            f"{what}: at {tuple(map(int, worst))} got {actual[worst]:.9g}, "
            f"expected {expected[worst]:.9g}; error {error.max():.3g} > {bound:.3g} "
            f"({dtype}, reduction {reduction}, factor {factor})"
        )


def linear_schedule(num_steps=1000):
    """betas and their running products of 1 - beta, (S,) each, one step at a time."""
    betas, alphas_cumprod, product = [], [], 1.0
    for i in range(num_steps):
        betas.append((1e-4 + (0.02 - 1e-4) * i / (num_steps - 1)) * 1000 / num_steps)
        product *= 1.0 - betas[-1]
        alphas_cumprod.append(product)
    return np.array(betas), np.array(alphas_cumprod)


def posterior(x_start, x_t, t, betas, alphas_cumprod):
    """Mean and variance of q(x_{t-1} | x_t, x_start) of one sample.

    By Bayes' rule on two Gaussians. At t = 0 the distribution is a point.
    """
    if t == 0:
        return np.array(x_start, np.float64), 0.0
    likelihood, prior = (
        (1.0 - betas[t]) / betas[t],
        1.0 / (1.0 - alphas_cumprod[t - 1]),
    )  # precisions
    mean = (
        np.sqrt(1.0 - betas[t]) / betas[t] * x_t + np.sqrt(alphas_cumprod[t - 1]) * prior * x_start
    )
    return mean / (likelihood + prior), 1.0 / (likelihood + prior)


def log_variance_range(t, betas, alphas_cumprod):
    """The two ends that the variance head interpolates: log-variances of the posterior and of beta.

    Step 0 takes the posterior's log-variance of step 1.
    """
    zero = np.zeros(())
    return np.log(posterior(zero, zero, max(t, 1), betas, alphas_cumprod)[1]), np.log(betas[t])


def learned_log_variance(v, t, betas, alphas_cumprod):
    """log Sigma of one sample from the raw variance head v in [-1, 1]."""
    low, high = log_variance_range(t, betas, alphas_cumprod)
    return low + (np.asarray(v, np.float64) + 1.0) / 2.0 * (high - low)


def discretized_log_likelihood(x, mean, log_scale):
    """log-probability of the level x (scalar, one of 256 in [-1, 1]).

    The CDF is DiT's tanh approximation.
    """

    def cdf(z):
        return 0.5 * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))

    upper = 1.0 if x > 0.999 else cdf((x + 1 / 255 - mean) / np.exp(log_scale))
    lower = 0.0 if x < -0.999 else cdf((x - 1 / 255 - mean) / np.exp(log_scale))
    return np.log(max(upper - lower, 1e-12))


def variational_bound(output, x_start, x_t, t, betas, alphas_cumprod):
    """One sample's term of the bound, in bits per dimension.

    Shapes: output (h, w, 2C); x_start, x_t (h, w, C); t is an int.
    """
    output, x_start, x_t = (np.asarray(x, np.float64) for x in (output, x_start, x_t))
    C = x_t.shape[-1]
    eps, v = output[..., :C], output[..., C:]
    predicted = (x_t - np.sqrt(1.0 - alphas_cumprod[t]) * eps) / np.sqrt(alphas_cumprod[t])
    mean, _ = posterior(predicted, x_t, t, betas, alphas_cumprod)
    log_variance = learned_log_variance(v, t, betas, alphas_cumprod)
    if t == 0:
        nats = [
            -discretized_log_likelihood(*args)
            for args in zip(x_start.ravel(), mean.ravel(), 0.5 * log_variance.ravel(), strict=True)
        ]
        return np.mean(nats) / np.log(2.0)
    true_mean, true_variance = posterior(x_start, x_t, t, betas, alphas_cumprod)
    variance = np.exp(log_variance)
    nats = 0.5 * (
        np.log(variance / true_variance)
        + (true_variance + (true_mean - mean) ** 2) / variance
        - 1.0
    )
    return nats.mean() / np.log(2.0)

"""The diffusion tables and formulas: float64 oracles, and the properties they must have.

The oracles derive them in another way.
"""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close

from lit_jax import diffusion

PROCESS = diffusion.GaussianDiffusion()
BETAS, ALPHAS_CUMPROD = oracles.linear_schedule(1000)
STEPS = np.array([0, 1, 2, 17, 499, 998, 999])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_batch(seed=0, shape=(4, 4, 3)):
    """x_start in [-1, 1], noise, x_t by the float64 formula, and a model output.

    There is one sample for each of STEPS.
    """
    x_start = np.clip(normal(len(STEPS), *shape, seed=seed), -1, 1)
    noise = normal(len(STEPS), *shape, seed=seed + 1)
    a = ALPHAS_CUMPROD[STEPS][:, None, None, None]
    x_t = (np.sqrt(a) * x_start + np.sqrt(1 - a) * noise).astype(np.float32)
    output = np.concatenate(
        [noise + 0.1 * normal(*noise.shape, seed=seed + 2), normal(*noise.shape, seed=seed + 3)],
        axis=-1,
    )
    return x_start, noise, x_t, output


def test_tables_are_float64_and_match_the_oracle():
    assert PROCESS.betas[0] == 1e-4 and PROCESS.betas[-1] == 0.02
    expected = {
        "betas": BETAS,
        "alphas_cumprod": ALPHAS_CUMPROD,
    }
    posteriors = [
        [
            oracles.posterior(np.float64(x0), np.float64(x_t), t, BETAS, ALPHAS_CUMPROD)
            for t in range(1000)
        ]
        for x0, x_t in ((1.0, 0.0), (0.0, 1.0))
    ]
    expected["posterior_mean_coef1"] = np.array([mean for mean, _ in posteriors[0]])
    expected["posterior_mean_coef2"] = np.array([mean for mean, _ in posteriors[1]])
    expected["posterior_log_variance"] = np.array(
        [oracles.log_variance_range(t, BETAS, ALPHAS_CUMPROD)[0] for t in range(1000)]
    )
    for name, table in expected.items():
        actual = getattr(PROCESS, name)
        assert actual.dtype == np.float64
        # 1 - alphas_cumprod loses a factor beta_0 = 1e-4 of the last digits, however it is formed.
        np.testing.assert_allclose(actual, table, rtol=1e-11, atol=1e-300, err_msg=name)


def test_a_short_schedule_ends_where_the_long_one_does():
    short = diffusion.GaussianDiffusion(diffusion.linear_betas(100))
    np.testing.assert_allclose(short.betas[[0, -1]], [1e-3, 0.2], rtol=1e-12)
    assert abs(math.log(short.alphas_cumprod[-1] / PROCESS.alphas_cumprod[-1])) < 1.5


@pytest.mark.parametrize(
    "num_steps, kept",
    [
        (2, [0, 999]),
        (3, [0, 500, 999]),  # 499.5 rounds to the even 500
        (4, [0, 333, 666, 999]),
        (5, [0, 250, 500, 749, 999]),
        (10, [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),
        (1000, list(range(1000))),
    ],
)
def test_respacing_keeps_exactly_these_timesteps(num_steps, kept):
    assert diffusion.respaced_timesteps(1000, num_steps).tolist() == kept


@pytest.mark.parametrize("num_steps", [20, 50, 100, 250, 500, 999])
def test_respacing_rounds_the_evenly_spaced_positions(num_steps):
    """Against exact fractions; a position that is exactly a half may go either way."""
    kept = diffusion.respaced_timesteps(1000, num_steps)
    assert len(set(kept.tolist())) == num_steps
    for i, t in enumerate(kept.tolist()):
        distance = abs(fractions.Fraction(999 * i, num_steps - 1) - t)
        assert distance <= fractions.Fraction(1, 2), (i, t)


@pytest.mark.parametrize("num_steps", [0, 1, 1001])
def test_impossible_respacing_names_both_numbers(num_steps):
    with pytest.raises(ValueError, match=f"steps = {num_steps}: between 2 and 1000 of 1000"):
        diffusion.respaced_timesteps(1000, num_steps)


@pytest.mark.parametrize("betas", [[0.1], [0.0, 0.1], [0.1, 1.1], [[0.1, 0.1]]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        diffusion.GaussianDiffusion(np.array(betas))


def test_q_sample_matches_the_oracle():
    x_start, noise, x_t, _ = make_batch()
    assert_close(PROCESS.perturb(x_start, STEPS, noise), x_t)


def test_the_true_noise_recovers_x_start():
    x_start, noise, _, _ = make_batch()
    x_t = PROCESS.perturb(x_start, STEPS, noise)
    recovered = PROCESS.predict_x_start(x_t, STEPS, noise)
    for i, t in enumerate(STEPS):
        # Dividing by sqrt(alphas_cumprod) enlarges the rounding of x_t: 160 times at the last step.
        assert_close(
            recovered[i], x_start[i], factor=8.0 / np.sqrt(ALPHAS_CUMPROD[t]), what=f"t = {t}"
        )


def test_posterior_mean_is_that_of_bayes_rule():
    x_start, _, x_t, _ = make_batch()
    actual = PROCESS.posterior_mean(x_start, x_t, STEPS)
    for i, t in enumerate(STEPS):
        expected, _ = oracles.posterior(
            x_start[i].astype(np.float64), x_t[i], t, BETAS, ALPHAS_CUMPROD
        )
        assert_close(actual[i], expected, what=f"t = {t}")


@pytest.mark.parametrize(
    "mean1, log_variance1, mean2, log_variance2",
    [(0.0, 0.0, 0.0, 0.0), (0.3, -1.0, -0.4, 0.5), (2.0, 1.0, 0.0, -1.0)],
)
def test_kl_is_the_integral_it_stands_for(mean1, log_variance1, mean2, log_variance2):
    x, dx = np.linspace(-40, 40, 400_001, retstep=True)

    def log_density(mean, log_variance):
        return -0.5 * (np.log(2 * np.pi) + log_variance + (x - mean) ** 2 / np.exp(log_variance))

    p, q = log_density(mean1, log_variance1), log_density(mean2, log_variance2)
    expected = np.sum(np.exp(p) * (p - q)) * dx
    actual = diffusion.normal_kl(
        *(jnp.float32(v) for v in (mean1, log_variance1, mean2, log_variance2))
    )
    assert float(actual) == pytest.approx(expected, abs=1e-6 * max(1.0, expected))


@pytest.mark.parametrize("mean, log_scale", [(0.0, -5.0), (0.31, -2.0), (-1.2, -3.0), (0.9, 0.5)])
def test_discretised_likelihood_is_a_distribution_over_256_levels(mean, log_scale):
    levels = np.linspace(-1, 1, 256).astype(np.float32)
    log_p = diffusion.discretized_gaussian_log_likelihood(
        levels, jnp.float32(mean), jnp.float32(log_scale)
    )
    # Each level is a difference of CDFs near one, so its error is an ulp of one. There are 256 of
    # them.
    assert float(jnp.exp(log_p).sum()) == pytest.approx(1.0, abs=256 * 2.0**-23)


def test_discretised_likelihood_matches_the_oracle_and_the_normal_distribution():
    x = np.concatenate([np.linspace(-1, 1, 256), [-1.0, 1.0, -0.9995, 0.9995]]).astype(np.float32)
    mean, log_scale = np.roll(x, 20) * 0.2 + x * 0.8, np.float32(-2.0)
    actual = np.asarray(diffusion.discretized_gaussian_log_likelihood(x, mean, log_scale))
    expected = [
        oracles.discretized_log_likelihood(*args)
        for args in zip(x.astype(float), mean.astype(float), [-2.0] * len(x))
    ]
    # A level's probability (about 0.02 here) is a difference of two CDFs. Its absolute error is an
    # ulp of one.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=8 * 2.0**-23 / 0.002)

    def level_probability(x, mean):
        def cdf(z):
            return 0.5 * (1 + math.erf(z / math.sqrt(2)))

        upper = 1.0 if x > 0.999 else cdf((x + 1 / 255 - mean) / math.exp(-2.0))
        return upper - (0.0 if x < -0.999 else cdf((x - 1 / 255 - mean) / math.exp(-2.0)))

    true = [level_probability(*args) for args in zip(x.astype(float), mean.astype(float))]
    # The tanh form of the CDF is within 3e-4 of the normal one.
    np.testing.assert_allclose(np.exp(actual), true, rtol=0, atol=6e-4)


def test_impossible_levels_have_a_floor_and_no_nan():
    log_p = diffusion.discretized_gaussian_log_likelihood(
        jnp.array([0.5]), jnp.array([-50.0]), jnp.array([-4.0])
    )
    assert float(log_p[0]) == pytest.approx(math.log(1e-12), rel=1e-6)


def test_log_variance_matches_the_oracle():
    _, _, _, output = make_batch()
    actual = PROCESS.log_variance(output[..., 3:], STEPS)
    for i, t in enumerate(STEPS):
        expected = oracles.learned_log_variance(output[i, ..., 3:], t, BETAS, ALPHAS_CUMPROD)
        assert_close(actual[i], expected, what=f"t = {t}")


def test_variance_head_at_its_ends_is_the_posterior_and_beta():
    _, _, x_t, _ = make_batch()
    for v, ends in ((-1.0, 0), (1.0, 1)):
        log_variance = PROCESS.log_variance(jnp.full(x_t.shape, v), STEPS)
        expected = [oracles.log_variance_range(t, BETAS, ALPHAS_CUMPROD)[ends] for t in STEPS]
        assert_close(log_variance[:, 0, 0, 0], expected)


def test_x_start_columns_make_x_start_of_an_output():
    """The two columns of a sampler's table, against the definition of x_t in float64."""
    x_start, noise, _, _ = make_batch()
    a, b = PROCESS.x_start_columns(STEPS)
    assert a.dtype == b.dtype == np.float64
    alphas = ALPHAS_CUMPROD[STEPS][:, None, None, None]
    x_t = np.sqrt(alphas) * x_start.astype(np.float64) + np.sqrt(1 - alphas) * noise
    recovered = a[:, None, None, None] * x_t + b[:, None, None, None] * noise
    np.testing.assert_allclose(recovered, x_start, atol=1e-12)


def test_a_learned_noise_scale_moves_between_its_bounds():
    output = np.concatenate([normal(2, 4, 4, 3), np.full((2, 4, 4, 3), -1.0)], axis=-1)
    bounds = np.array([-4.0, -1.0], np.float32)
    low = PROCESS.learned_noise_scale(output, bounds, 3)
    output[..., 3:] = 1.0
    high = PROCESS.learned_noise_scale(output, bounds, 3)
    np.testing.assert_allclose(low, np.exp(-2.0), rtol=1e-6)
    np.testing.assert_allclose(high, np.exp(-0.5), rtol=1e-6)
    with pytest.raises(ValueError, match="6 output channels for 3 input channels.* 3"):
        PROCESS.learned_noise_scale(output[..., :3], bounds, 3)


def test_timesteps_are_whole_and_reach_both_ends():
    """20,000 draws of 1000 timesteps miss one end with probability 2e-9."""
    t = np.asarray(PROCESS.draw_t(jax.random.key(0), 20_000))
    assert t.dtype == np.int32 and t.min() == 0 and t.max() == 999
    assert abs(t.mean() - 499.5) < 5 * 1000 / np.sqrt(12 * 20_000)


def bound(output, x_start, x_t, noise):
    return PROCESS.loss(output, x_start, x_t, STEPS, noise)["vb"]


def test_the_bound_matches_the_oracle():
    x_start, noise, x_t, output = make_batch()
    actual = bound(output, x_start, x_t, noise)
    for i, t in enumerate(STEPS):
        expected = oracles.variational_bound(
            output[i], x_start[i], x_t[i], int(t), BETAS, ALPHAS_CUMPROD
        )
        # float32 tables give log-variances of about -9 with an error of 1e-6, and t = 0 divides a
        # difference of near-equal means by exp of that: float32 holds 1e-5 of the formula.
        assert float(actual[i]) == pytest.approx(expected, rel=2e-5, abs=1e-7), f"t = {t}"


def test_the_posterior_itself_has_no_divergence():
    x_start, noise, _, _ = make_batch()
    x_t = PROCESS.perturb(x_start, STEPS, noise)
    output = np.concatenate([noise, np.full(noise.shape, -1.0, np.float32)], axis=-1)
    values = bound(output, x_start, x_t, noise)
    assert float(values[0]) > 0.1  # t = 0 is a likelihood, never zero
    np.testing.assert_allclose(values[1:], 0.0, atol=1e-5)


def test_min_snr_counts_what_is_nearly_clean_as_gamma_over_its_ratio():
    x_start, noise, x_t, output = make_batch()
    gamma = 0.05
    plain = PROCESS.loss(output, x_start, x_t, STEPS, noise)
    process = diffusion.GaussianDiffusion(min_snr_gamma=gamma)
    weighted = process.loss(output, x_start, x_t, STEPS, noise)
    # At t = 998 the ratio is 4e-5, at 499 0.09: gamma lies below the one and above the other.
    weights = [min(1.0, gamma * (1 - a) / a) for a in ALPHAS_CUMPROD[STEPS]]
    assert weights[-2:] == [1.0, 1.0] and weights[4] < 1
    # Tables and products are float32.
    np.testing.assert_allclose(weighted["mse"], plain["mse"] * np.array(weights), rtol=1e-6)
    np.testing.assert_array_equal(weighted["vb"], plain["vb"])


def test_the_bound_counts_as_often_as_its_weight_says():
    x_start, noise, x_t, output = make_batch()
    plain = PROCESS.loss(output, x_start, x_t, STEPS, noise)
    weighted = diffusion.GaussianDiffusion(vb_weight=0.25).loss(output, x_start, x_t, STEPS, noise)
    np.testing.assert_array_equal(weighted["vb"], plain["vb"] / 4)
    np.testing.assert_array_equal(weighted["mse"], plain["mse"])


@pytest.mark.parametrize("name", ["min_snr_gamma", "vb_weight"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_an_impossible_weight_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a finite number, at least 0"):
        diffusion.GaussianDiffusion(**{name: value})


def test_formulas_work_under_jit_with_traced_steps():
    x_start, noise, x_t, output = make_batch()
    eager = bound(output, x_start, x_t, noise)
    jitted = jax.jit(PROCESS.loss)(output, x_start, x_t, jnp.asarray(STEPS), noise)["vb"]
    np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-6)

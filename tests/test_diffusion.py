"""The diffusion tables and formulas against float64 oracles that derive them another way, and the properties they must have."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import assert_close

from lit_jax import diffusion

DIFFUSION = diffusion.make_diffusion()
BETAS, ALPHAS_CUMPROD = oracles.linear_schedule(1000)
STEPS = np.array([0, 1, 2, 17, 499, 998, 999])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_batch(seed=0, shape=(4, 4, 3)):
    """x_start in [-1, 1], noise, x_t by the float64 formula, and a model output; one sample for each of STEPS."""
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
    assert DIFFUSION.betas[0] == 1e-4 and DIFFUSION.betas[-1] == 0.02
    expected = {
        "betas": BETAS,
        "alphas_cumprod": ALPHAS_CUMPROD,
        "alphas_cumprod_prev": np.append(1.0, ALPHAS_CUMPROD[:-1]),
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
    expected["posterior_variance"] = np.array([variance for _, variance in posteriors[0]])
    expected["posterior_log_variance_clipped"] = np.array(
        [oracles.log_variance_range(t, BETAS, ALPHAS_CUMPROD)[0] for t in range(1000)]
    )
    for name, table in expected.items():
        actual = getattr(DIFFUSION, name)
        assert actual.dtype == np.float64
        # 1 - alphas_cumprod loses a factor beta_0 = 1e-4 of the last digits, whichever way it is formed.
        np.testing.assert_allclose(actual, table, rtol=1e-11, atol=1e-300, err_msg=name)
    np.testing.assert_array_equal(DIFFUSION.timestep_map, np.arange(1000))


def test_a_short_schedule_ends_where_the_long_one_does():
    short = diffusion.make_diffusion(diffusion.linear_betas(100))
    np.testing.assert_allclose(short.betas[[0, -1]], [1e-3, 0.2], rtol=1e-12)
    assert abs(math.log(short.alphas_cumprod[-1] / DIFFUSION.alphas_cumprod[-1])) < 1.5


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
    with pytest.raises(ValueError, match=rf"\b{num_steps} of 1000\b"):
        diffusion.respaced_timesteps(1000, num_steps)


@pytest.mark.parametrize("num_steps", [2, 10, 250, 1000])
def test_respacing_keeps_the_marginals(num_steps):
    short = diffusion.respace(DIFFUSION, num_steps)
    kept = diffusion.respaced_timesteps(1000, num_steps)
    np.testing.assert_array_equal(short.timestep_map, kept)
    np.testing.assert_allclose(short.alphas_cumprod, ALPHAS_CUMPROD[kept], rtol=1e-12)
    assert short.num_steps == num_steps


def test_respacing_twice_still_names_the_original_timesteps():
    twice = diffusion.respace(diffusion.respace(DIFFUSION, 100), 10)
    np.testing.assert_array_equal(
        twice.timestep_map,
        diffusion.respaced_timesteps(1000, 100)[diffusion.respaced_timesteps(100, 10)],
    )
    np.testing.assert_allclose(twice.alphas_cumprod, ALPHAS_CUMPROD[twice.timestep_map], rtol=1e-12)


@pytest.mark.parametrize("betas", [[0.1], [0.0, 0.1], [0.1, 1.1], [[0.1, 0.1]]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        diffusion.make_diffusion(np.array(betas))


def test_q_sample_matches_the_oracle():
    x_start, noise, x_t, _ = make_batch()
    assert_close(diffusion.q_sample(DIFFUSION, x_start, STEPS, noise), x_t)


def test_the_true_noise_recovers_x_start():
    x_start, noise, _, _ = make_batch()
    x_t = diffusion.q_sample(DIFFUSION, x_start, STEPS, noise)
    recovered = diffusion.predict_x_start(DIFFUSION, x_t, STEPS, noise)
    for i, t in enumerate(STEPS):
        # Dividing by sqrt(alphas_cumprod) magnifies the rounding of x_t: 160 times at the last step.
        assert_close(
            recovered[i], x_start[i], factor=8.0 / np.sqrt(ALPHAS_CUMPROD[t]), what=f"t = {t}"
        )


def test_posterior_mean_is_that_of_bayes_rule():
    x_start, _, x_t, _ = make_batch()
    actual = diffusion.q_posterior_mean(DIFFUSION, x_start, x_t, STEPS)
    for i, t in enumerate(STEPS):
        expected, _ = oracles.posterior(
            x_start[i].astype(np.float64), x_t[i], t, BETAS, ALPHAS_CUMPROD
        )
        assert_close(actual[i], expected, what=f"t = {t}")


def test_true_noise_predicts_the_true_posterior():
    x_start, noise, _, output = make_batch()
    x_t = diffusion.q_sample(DIFFUSION, x_start, STEPS, noise)
    mean, _, _ = diffusion.p_mean_variance(
        DIFFUSION, np.concatenate([noise, output[..., 3:]], -1), x_t, STEPS
    )
    expected = diffusion.q_posterior_mean(DIFFUSION, x_start, x_t, STEPS)
    # Where x_start counts (its coefficient is near one only at small t) its recovery is accurate.
    assert_close(mean, expected, factor=16)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_large", "fixed_small"])
def test_log_variance_matches_the_oracle(variance):
    _, _, x_t, output = make_batch()
    model_output = output if variance == "learned_range" else output[..., :3]
    _, log_variance, _ = diffusion.p_mean_variance(
        DIFFUSION, model_output, x_t, STEPS, variance=variance
    )
    for i, t in enumerate(STEPS):
        low, high = oracles.log_variance_range(t, BETAS, ALPHAS_CUMPROD)
        expected = {
            "learned_range": oracles.learned_log_variance(
                output[i, ..., 3:], t, BETAS, ALPHAS_CUMPROD
            ),
            "fixed_small": np.full(x_t[i].shape, low),
            "fixed_large": np.full(x_t[i].shape, high if t else low),
        }[variance]
        assert_close(log_variance[i], expected, what=f"t = {t}")


def test_variance_head_at_its_ends_is_the_posterior_and_beta():
    _, _, x_t, output = make_batch()
    for v, ends in ((-1.0, 0), (1.0, 1)):
        log_variance = diffusion.learned_range_log_variance(
            DIFFUSION, jnp.full(x_t.shape, v), STEPS
        )
        expected = [oracles.log_variance_range(t, BETAS, ALPHAS_CUMPROD)[ends] for t in STEPS]
        assert_close(log_variance[:, 0, 0, 0], expected)


def test_clipping_bounds_x_start_alone():
    _, _, x_t, output = make_batch()
    _, _, free = diffusion.p_mean_variance(DIFFUSION, output, x_t, STEPS)
    mean, _, clipped = diffusion.p_mean_variance(DIFFUSION, output, x_t, STEPS, clip_denoised=True)
    assert float(jnp.abs(free).max()) > 1.0
    np.testing.assert_array_equal(clipped, np.clip(free, -1, 1))
    np.testing.assert_array_equal(mean, diffusion.q_posterior_mean(DIFFUSION, clipped, x_t, STEPS))


def test_a_missing_variance_head_and_an_unknown_variance_are_named():
    _, _, x_t, output = make_batch()
    with pytest.raises(ValueError, match="6 output channels for 3 input channels.* 3"):
        diffusion.p_mean_variance(DIFFUSION, output[..., :3], x_t, STEPS)
    with pytest.raises(ValueError, match="'medium'"):
        diffusion.p_mean_variance(DIFFUSION, output, x_t, STEPS, variance="medium")


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
    # Each level is a difference of CDFs near one, so its error is an ulp of one; there are 256 of them.
    assert float(jnp.exp(log_p).sum()) == pytest.approx(1.0, abs=256 * 2.0**-23)


def test_discretised_likelihood_matches_the_oracle_and_the_normal_distribution():
    x = np.concatenate([np.linspace(-1, 1, 256), [-1.0, 1.0, -0.9995, 0.9995]]).astype(np.float32)
    mean, log_scale = np.roll(x, 20) * 0.2 + x * 0.8, np.float32(-2.0)
    actual = np.asarray(diffusion.discretized_gaussian_log_likelihood(x, mean, log_scale))
    expected = [
        oracles.discretized_log_likelihood(*args)
        for args in zip(x.astype(float), mean.astype(float), [-2.0] * len(x))
    ]
    # A level's probability (about 0.02 here) is a difference of two CDFs: an absolute error of an ulp of one.
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


def test_vb_terms_match_the_oracle():
    x_start, _, x_t, output = make_batch()
    actual = diffusion.vb_terms(DIFFUSION, output, x_start, x_t, STEPS)
    for i, t in enumerate(STEPS):
        expected = oracles.variational_bound(
            output[i], x_start[i], x_t[i], int(t), BETAS, ALPHAS_CUMPROD
        )
        # float32 tables give log-variances of about -9 with an error of 1e-6, and t = 0 divides a difference of near-equal
        # means by exp of that; 1e-5 relative is what the formula can hold in float32.
        assert float(actual[i]) == pytest.approx(expected, rel=2e-5, abs=1e-7), f"t = {t}"


def test_the_posterior_itself_has_no_divergence():
    x_start, noise, _, _ = make_batch()
    x_t = diffusion.q_sample(DIFFUSION, x_start, STEPS, noise)
    output = np.concatenate([noise, np.full(noise.shape, -1.0, np.float32)], axis=-1)
    bound = diffusion.vb_terms(DIFFUSION, output, x_start, x_t, STEPS)
    assert float(bound[0]) > 0.1  # t = 0 is a likelihood, never zero
    np.testing.assert_allclose(bound[1:], 0.0, atol=1e-5)


def test_formulas_work_under_jit_with_traced_steps():
    x_start, noise, x_t, output = make_batch()
    eager = diffusion.vb_terms(DIFFUSION, output, x_start, x_t, STEPS)
    jitted = jax.jit(lambda *args: diffusion.vb_terms(DIFFUSION, *args))(
        output, x_start, x_t, jnp.asarray(STEPS)
    )
    np.testing.assert_allclose(jitted, eager, rtol=1e-5, atol=1e-6)

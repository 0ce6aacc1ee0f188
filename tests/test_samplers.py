"""Samplers against a float64 DDPM chain, and their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import assert_exact
from tiny_sampler import NULL, PROCESS, SHAPE, make_grid, make_keys, model_fn, run

from lit_jax import diffusion, samplers, sharding


def ddpm_oracle(steps, noises, labels, variance="learned_range", model_fn=model_fn):
    """The respaced chain in float64, one step after another.

    It follows the definition and does not use our tables.

    noises: (steps + 1, B, h, w, C), the first to start from.
    """
    alphas_cumprod = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    kept, position = [], 0.0
    for _ in range(steps):
        kept.append(round(position))
        position += 999 / (steps - 1)
    spaced = alphas_cumprod[kept]
    model_fn = jax.jit(model_fn)
    x, C = np.float64(noises[0]), noises.shape[-1]
    for step, i in enumerate(range(steps)[::-1]):
        t = np.full(len(x), kept[i], np.int32)
        kept_rows = jnp.zeros(len(x), bool)
        out = np.float64(model_fn(jnp.float32(x), jnp.asarray(t), {"label": labels}, kept_rows))
        eps, v = out[..., :C], out[..., C:]
        previous = spaced[i - 1] if i else 1.0
        beta = 1.0 - spaced[i] / previous
        x_start = (x - np.sqrt(1 - spaced[i]) * eps) / np.sqrt(spaced[i])
        mean = (np.sqrt(previous) * beta * x_start + np.sqrt(1 - beta) * (1 - previous) * x) / (
            1 - spaced[i]
        )
        posterior = beta * (1 - previous) / (1 - spaced[i])
        if variance == "learned_range":
            posterior = posterior or 1.0
            variance_t = np.exp((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(posterior))
        else:
            variance_t = posterior if variance == "fixed_small" else beta
        x = mean + (np.sqrt(variance_t) * noises[step + 1] if i else 0.0)
    return x


@pytest.mark.parametrize(
    "steps, variance",
    [(2, "learned_range"), (50, "learned_range"), (7, "fixed_small"), (7, "fixed_large")],
)
def test_ddpm_is_the_respaced_chain(steps, variance):
    grid = make_grid("ddpm", steps, variance=variance)
    keys, labels = make_keys(3), jnp.arange(3)
    noise = jax.jit(samplers.step_noise, static_argnums=2)
    noises = np.stack([noise(keys, s, SHAPE) for s in range(steps + 1)])
    expected = ddpm_oracle(steps, noises, labels, variance)
    actual = run(grid, labels=labels)
    # float32 against float64, along a chain whose first estimate of x_start is 157 times as large
    # as its image.
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def test_ddpm_tables_are_those_of_the_training_diffusion():
    kept = diffusion.respaced_timesteps(1000, 250)
    alphas_cumprod = PROCESS.alphas_cumprod[kept]
    spaced = diffusion.GaussianDiffusion(1.0 - alphas_cumprod / np.append(1, alphas_cumprod[:-1]))
    np.testing.assert_allclose(spaced.alphas_cumprod, alphas_cumprod, rtol=1e-12)
    grid = make_grid("ddpm", 250)
    np.testing.assert_array_equal(grid.timesteps, kept[::-1])
    np.testing.assert_allclose(
        grid.x_start_coefs[:, 0], spaced.posterior_mean_coef1[::-1], rtol=1e-12
    )
    np.testing.assert_allclose(grid.x_coef, spaced.posterior_mean_coef2[::-1], rtol=1e-12)
    np.testing.assert_allclose(
        grid.log_variance_bounds[:, 0], spaced.posterior_log_variance[::-1], rtol=1e-12
    )
    np.testing.assert_allclose(
        grid.log_variance_bounds[:, 1], np.log(spaced.betas)[::-1], rtol=1e-12
    )


EXPECTED_TIMESTEPS = {
    ("ddpm", 4, ""): [999, 666, 333, 0],
    ("ddpm", 5, ""): [999, 749, 500, 250, 0],  # 249.75, 499.5 and 749.25 rounded
    ("ddim", 5, "leading"): [800, 600, 400, 200, 0],
    ("ddim", 4, "trailing"): [999, 749, 499, 249],
    ("ddim", 3, "linspace"): [999, 500, 0],
    ("dpm++", 5, ""): [
        999,
        799,
        599,
        400,
        200,
    ],  # 199.8, 399.6, 599.4 and 799.2 rounded, without 0
    ("dpm++", 4, "leading"): [800, 600, 400, 200],
}


@pytest.mark.parametrize("case", EXPECTED_TIMESTEPS, ids=str)
def test_the_model_sees_exactly_these_timesteps(case):
    sampler, steps, spacing = case
    seen = []

    def recording_model_fn(x, t, condition, drop):
        jax.experimental.io_callback(lambda t: seen.append(t.tolist()), None, t, ordered=True)
        return model_fn(x, t, condition, drop)

    run(make_grid(sampler, steps, spacing=spacing), model_fn=recording_model_fn)
    assert seen == [[t] * 3 for t in EXPECTED_TIMESTEPS[case]]


def test_ddim_with_full_noise_is_ddpm_with_the_small_variance():
    ddim = make_grid("ddim", 20, eta=1.0)
    ddpm = make_grid("ddpm", 20, variance="fixed_small")
    for name in ("timesteps", "x_coef", "x_start_coefs", "noise_scale"):
        np.testing.assert_allclose(getattr(ddim, name), getattr(ddpm, name), rtol=1e-9, atol=1e-14)


def test_dpm_solver_of_order_one_is_ddim():
    timesteps = samplers.space_timesteps(1000, 20, "linspace")
    dpm = make_grid("dpm++", 20, timesteps=timesteps, order=1)
    ddim = make_grid("ddim", 20, timesteps=timesteps)
    np.testing.assert_allclose(dpm.x_coef, ddim.x_coef, rtol=1e-9)
    np.testing.assert_allclose(dpm.x_start_coefs, ddim.x_start_coefs, rtol=1e-9)


@pytest.mark.parametrize("steps, order", [(14, 2), (15, 3), (16, 3)])
def test_a_third_order_drops_early_with_fewer_than_15_steps(steps, order):
    """At the last step but one; diffusers' `lower_order_final` has the same bound."""
    coefs = make_grid("dpm++", steps, order=3).x_start_coefs
    assert np.count_nonzero(coefs[-2]) == order
    assert np.count_nonzero(coefs[-3]) == 3 and np.count_nonzero(coefs[-1]) == 1


def test_estimates_are_mixed_exactly_on_every_device():
    """The weights of a third order are large, and of both signs."""
    grid = make_grid("dpm++", 15, order=3)
    settings = samplers.SamplerSettings(sampler="dpm++", steps=15, order=3)

    def draw(keys, labels):
        return samplers.sample(model_fn, keys, {"label": labels}, SHAPE, grid, settings)

    assert assert_exact(draw, make_keys(2), jnp.arange(2)) == 1


@pytest.mark.parametrize("sampler", PROCESS.samplers)
def test_the_true_noise_recovers_the_image(sampler):
    x_start = jax.random.normal(jax.random.key(3), (2, *SHAPE))
    alphas_cumprod = jnp.asarray(PROCESS.alphas_cumprod, jnp.float32)

    def oracle_model_fn(x, t, condition, drop):
        signal = jnp.sqrt(alphas_cumprod[t])[:, None, None, None]
        eps = (x - signal * x_start) / jnp.sqrt(1.0 - signal**2)
        return jnp.concatenate([eps, jnp.zeros_like(eps)], axis=-1)

    actual = run(make_grid(sampler, 20), 2, oracle_model_fn)
    np.testing.assert_allclose(actual, x_start, atol=2e-4)


def test_higher_orders_come_closer_to_the_exact_flow():
    """For Gaussian data of variance s2 the flow is known.

    x scales as sqrt(alphas_cumprod s2 + 1 - alphas_cumprod).

    Between two timesteps, not to the end: the last stride of every order is of the first.
    """

    def error(order, steps):
        timesteps = np.linspace(900, 100, steps + 1).round()
        grid = make_grid("dpm++", steps + 1, timesteps=timesteps, order=order)
        alphas_cumprod = PROCESS.alphas_cumprod[grid.timesteps]
        s2 = np.array([0.1, 0.3, 1.0, 3.0])  # one image for each variance
        x, past = np.ones(4), np.zeros((order, 4))
        for s, a in enumerate(alphas_cumprod[:-1]):
            past = np.concatenate([[x * np.sqrt(a) * s2 / (a * s2 + 1.0 - a)], past[:-1]])
            x = grid.x_coef[s] * x + grid.x_start_coefs[s] @ past
        first, last = alphas_cumprod[[0, -1]]
        return np.abs(x - np.sqrt((last * s2 + 1.0 - last) / (first * s2 + 1.0 - first))).max()

    first, second, third = ([error(order, steps) for steps in (20, 80)] for order in (1, 2, 3))
    assert first[0] > 3 * second[0] > 6 * third[0] and first[1] > 20 * second[1] > 60 * third[1], (
        first,
        second,
        third,
    )
    assert first[0] > 3.5 * first[1] and second[0] > 10 * second[1] and third[0] > 20 * third[1], (
        first,
        second,
        third,
    )


GRIDS = {"ddpm": dict(steps=6), "ddim": dict(steps=6, eta=0.5), "dpm++": dict(steps=6, order=3)}
assert set(GRIDS) == set(PROCESS.samplers)  # a new one is held to all that is below


@pytest.mark.parametrize("sampler", GRIDS)
def test_an_image_depends_on_its_key_and_label_alone(sampler):
    grid = make_grid(sampler, **GRIDS[sampler])
    settings = samplers.SamplerSettings(cfg_scale=1.5)
    draw = jax.jit(
        lambda keys, labels: samplers.sample(
            model_fn, keys, {"label": labels}, SHAPE, grid, settings
        )
    )
    keys, labels = make_keys(6), jnp.array([1, 2, 3, 4, 5, 6])
    whole = draw(keys, labels)
    split = [draw(keys[i : i + 2], labels[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(whole, np.concatenate(split), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole, draw(keys[::-1], labels[::-1])[::-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_eight_devices_draw_what_one_draws(sampler):
    grid = make_grid(sampler, **GRIDS[sampler])
    keys, labels = make_keys(16), jnp.arange(16) % 10
    one = run(grid, 16, keys=keys, labels=labels, cfg_scale=1.5)
    spread = sharding.batch_sharding(sharding.make_mesh())
    eight = run(
        grid,
        16,
        keys=jax.device_put(keys, spread),
        labels=jax.device_put(labels, spread),
        cfg_scale=1.5,
    )
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)


def test_noise_differs_between_steps_and_images():
    keys = make_keys(4)
    draws = np.stack([samplers.step_noise(keys, s, (64, 64, 1)) for s in range(5)]).reshape(20, -1)
    correlation = np.corrcoef(draws) - np.eye(20)
    assert np.abs(correlation).max() < 0.1 and abs(draws.std() - 1.0) < 0.02


@pytest.mark.parametrize("sampler", GRIDS)
@pytest.mark.parametrize("cfg_channels", ["3", "all"])
def test_guidance_of_one_is_no_guidance(sampler, cfg_channels):
    grid = make_grid(sampler, **GRIDS[sampler])
    guided = run(
        grid, cfg_scale=1.0 + 1e-12, cfg_channels=cfg_channels
    )  # takes the guided path, batch of two halves
    np.testing.assert_allclose(guided, run(grid, cfg_scale=1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg_channels, guided", [("3", 3), ("all", 4)])
def test_guidance_moves_only_the_guided_channels(cfg_channels, guided):
    x, y = jax.random.normal(jax.random.key(0), (3, *SHAPE)), jnp.array([1, 2, 3])
    t = jnp.full((3,), 500)
    condition = {"label": y}
    guide = jax.jit(samplers.guide, static_argnums=(0, 4, 5))
    actual = guide(model_fn, x, t, condition, 4.0, cfg_channels)
    run_model = jax.jit(model_fn)
    cond = np.float64(run_model(x, t, condition, np.zeros(3, bool)))
    uncond = np.float64(run_model(x, t, condition, np.ones(3, bool)))
    expected = cond.copy()
    expected[..., :guided] = uncond[..., :guided] + 4.0 * (cond - uncond)[..., :guided]
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.abs(cond - uncond)[..., :4].min() > 1e-4  # else the test could not tell


@pytest.mark.parametrize("channels", [1, 3])
def test_guidance_of_pixel_models_leaves_the_variance_alone(channels):
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, channels))

    def label_model_fn(x, t, condition, drop):
        y = jnp.where(drop, NULL, condition["label"])
        return jnp.broadcast_to(
            y.astype(jnp.float32)[:, None, None, None], (*x.shape[:-1], 2 * channels)
        )

    out = samplers.guide(
        label_model_fn, x, jnp.zeros(2, jnp.int32), {"label": jnp.array([1, 2])}, 2.0, "3"
    )
    np.testing.assert_array_equal(
        out[0, 0, 0], [10.0 + 2.0 * (1.0 - 10.0)] * channels + [1.0] * channels
    )


def test_guidance_interval_guides_inside_and_costs_nothing_outside():
    batches = []

    def recording_model_fn(x, t, condition, drop):
        jax.experimental.io_callback(
            lambda t: batches.append((int(t[0]), len(t))), None, t, ordered=True
        )
        return model_fn(x, t, condition, drop)

    grid = make_grid("ddim", 5)  # 999, 749, 500, 250, 0
    run(grid, model_fn=recording_model_fn, cfg_scale=2.0, cfg_interval=(250, 749))
    assert batches == [(999, 3), (749, 6), (500, 6), (250, 6), (0, 3)]


def test_a_guidance_interval_at_its_limits_is_all_or_nothing():
    grid = make_grid("ddim", 5)
    nowhere, everywhere = (
        run(grid, cfg_scale=2.0, cfg_interval=interval) for interval in [(600, 601), (0, 999)]
    )
    np.testing.assert_allclose(nowhere, run(grid), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(everywhere, run(grid, cfg_scale=2.0), rtol=1e-5, atol=1e-5)
    assert np.abs(everywhere - nowhere).max() > 1e-2


def test_clipping_bounds_the_estimate_of_pixels():
    images = run(make_grid("ddim", 4), clip_denoised=True)
    assert np.abs(images).max() <= 1.0 + 1e-6


def test_a_model_in_bfloat16_samples_in_float32():
    images = run(
        make_grid("ddpm", 3),
        model_fn=lambda *args: model_fn(*args).astype(jnp.bfloat16),
    )
    assert images.dtype == np.float32 and np.isfinite(images).all()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(sampler="rk4", steps=10), "sampler must be one of ddpm, ddim, dpm.*; got 'rk4'"),
        (
            dict(sampler="ddim", steps=10, spacing="karras"),
            "spacing must be one of respaced, .*; got 'karras'",
        ),
        (dict(sampler="dpm++", steps=10, order=4), "order must be one of 1, 2, 3; got 4"),
        (dict(sampler="ddim", steps=10, eta=1.5), r"eta must be in \[0, 1\]; got 1.5"),
        (
            dict(sampler="ddpm", steps=10, variance="learned"),
            "variance must be one of learned_range, .*; got 'learned'",
        ),
        (dict(sampler="ddpm", steps=1001), "steps = 1001"),
        (dict(sampler="dpm++", steps=1000), "steps = 1000"),
        (
            dict(sampler="ddim", steps=2, timesteps=np.array([1000, 0])),
            r"\[0, 999\], got \[1000, 0\]",
        ),
        (
            dict(sampler="ddim", steps=2, timesteps=np.array([0, 500])),
            "timesteps must be 2 decreasing ones",
        ),
    ],
)
def test_impossible_requests_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_grid(**kwargs)


@pytest.mark.parametrize(
    "interval", [(700.0, 100.0), (700.0,), (0.0, 1.0, 2.0), (float("nan"), 1.0)]
)
def test_an_interval_that_guides_nowhere_by_mistake_is_refused(interval):
    with pytest.raises(
        ValueError, match="cfg_interval must be two numbers, the first not above the second; got "
    ):
        run(make_grid("ddim", 2), cfg_interval=interval)


def test_unknown_guided_channels_and_a_missing_variance_are_named():
    with pytest.raises(ValueError, match="cfg_channels must be one of 3, all; got '2'"):
        run(make_grid("ddim", 2), cfg_channels="2")
    with pytest.raises(ValueError, match="8 output channels for 4 input channels, the model has 4"):
        run(make_grid("ddpm", 2), model_fn=lambda x, t, condition, drop: x)


# PixArt's grid. -----------------------------------------------------------------------------------


def pixart_dpm_solver(eps_fn, x, steps):
    """PixArt-Sigma's sampler, step by step in float64: DPM-Solver++ 2M on a uniform time T.

    Written from arXiv 2211.01095, algorithm 2, with the continuous schedule of its authors' code.
    """
    log_alphas = 0.5 * np.log(np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000)))
    times = np.linspace(1.0, 1e-3, steps + 1)
    log_alpha = np.interp(times, np.arange(1, 1001) / 1000, log_alphas)
    alpha, sigma = np.exp(log_alpha), np.sqrt(1.0 - np.exp(2.0 * log_alpha))
    snr = np.log(alpha / sigma)
    past = None
    for s in range(steps):
        x_start = (x - sigma[s] * eps_fn(x, 1000 * (times[s] - 1e-3), alpha[s])) / alpha[s]
        h = snr[s + 1] - snr[s]
        mixed = x_start
        if s and s < steps - 1:  # the last update is of the first order
            ratio = (snr[s] - snr[s - 1]) / h
            mixed = x_start + (x_start - past) / (2 * ratio)
        x = sigma[s + 1] / sigma[s] * x - alpha[s + 1] * np.expm1(-h) * mixed
        past = x_start
    return x


@pytest.mark.parametrize("steps", [14, 20])
def test_pixarts_grid_is_its_dpm_solver(steps):
    """Given the same outputs, those of images near -1 or 1."""
    grid = make_grid("dpm++", steps, spacing="time_uniform")
    expected = 999.0 - 999.0 / steps * np.arange(steps)
    np.testing.assert_allclose(grid.timesteps, expected, rtol=1e-6)
    assert grid.timesteps.dtype == np.float32
    seen = []

    def exact_eps(x, t, alpha):
        seen.append(t)
        variance = 0.04 * alpha**2 + 1.0 - alpha**2
        x_start = np.tanh(alpha * x / variance)
        return (x - alpha * x_start) / np.sqrt(1.0 - alpha**2)

    log_alphas = jnp.asarray(0.5 * np.log(PROCESS.alphas_cumprod), jnp.float32)

    def model(x, t, condition, drop):
        alpha = jnp.exp(jnp.interp(t, jnp.arange(1000.0), log_alphas))[:, None, None, None]
        variance = 0.04 * alpha**2 + 1.0 - alpha**2
        x_start = jnp.tanh(alpha * x / variance)
        return (x - alpha * x_start) / jnp.sqrt(1.0 - alpha**2)

    noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    actual = run(grid, 2, model, noise=noise)
    wanted = pixart_dpm_solver(exact_eps, noise.astype(np.float64), steps)
    # The logarithm of alpha in float32 moves x_start of the first steps by 1e-5.
    np.testing.assert_allclose(actual, wanted, atol=2e-4)
    np.testing.assert_allclose(seen, expected, rtol=1e-9)
    # It ends on timestep 0, whose noise stays in the image; the clean image would have none of x.
    assert grid.x_coef[-1] > 1e-3


def test_a_grid_between_timesteps_is_refused_outside_the_schedule():
    with pytest.raises(ValueError, match="decreasing ones"):
        make_grid("dpm++", 2, timesteps=np.array([999.5, 3.0]))

"""Velocity models against SiT (arXiv 2401.08740), written again in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close
from tiny_sampler import NULL, PROCESS, SHAPE, make_keys, model_fn, run

from lit_jax import diffusion, losses, samplers

FLOW = diffusion.RectifiedFlow()
C = SHAPE[-1]


def make_grid(sampler, steps, **fields):
    settings = samplers.SamplerSettings(sampler=sampler, steps=steps, **fields)
    return samplers.make_grid(FLOW, settings)


# ---- The loss ------------------------------------------------------------------------------------


def test_the_loss_is_sits():
    rng = np.random.default_rng(0)
    x_start, noise = rng.standard_normal((2, 5, *SHAPE))
    output = rng.standard_normal((5, *SHAPE[:2], 2 * C))
    teacher = rng.standard_normal(output.shape)
    t = np.array([0.0, 0.04, 0.5, 0.9, 1.0])
    x_t = np.stack([t_i * x + (1 - t_i) * n for t_i, x, n in zip(t, x_start, noise)])
    as_float32 = [jnp.asarray(a, jnp.float32) for a in (output, x_start, x_t, t, noise)]
    assert_close(FLOW.perturb(as_float32[1], as_float32[3], as_float32[4]), x_t)

    terms = FLOW.loss(*as_float32)
    expected = ((output[..., :C] - (x_start - noise)) ** 2).mean(axis=(1, 2, 3))
    assert set(terms) == {"mse"}
    assert_close(terms["mse"], expected, reduction=64)
    terms = losses.distillation_terms(
        FLOW, as_float32[0], jnp.asarray(teacher, jnp.float32), t, in_channels=C,
        variance_target="log_variance",
    )  # fmt: skip
    expected = ((output - teacher)[..., :C] ** 2).mean(axis=(1, 2, 3))
    assert set(terms) == {"kd_velocity"}
    assert_close(terms["kd_velocity"], expected, reduction=64)


def test_times_are_uniform_and_the_true_velocity_gives_the_image():
    t = np.asarray(FLOW.draw_t(jax.random.key(0), 20_000))
    assert t.dtype == np.float32 and t.min() >= 0 and t.max() < 1
    deciles = np.histogram(t, 10, (0, 1))[0]
    assert np.abs(deciles - 2000).max() < 5 * np.sqrt(2000)
    x_start, noise = np.random.default_rng(0).standard_normal((2, 3))
    times = np.array([0.0, 0.3, 1.0])
    a, b = FLOW.x_start_columns(times)
    x_t = times * x_start + (1 - times) * noise
    np.testing.assert_allclose(a * x_t + b * (x_start - noise), x_start, atol=1e-14)


# ---- Samplers ------------------------------------------------------------------------------------


def velocity(x, t, labels, scale):
    """The made-up model's velocity in float64, guided on three of the four channels as in SiT."""
    B = len(x)

    def model(y):
        out = model_fn(
            jnp.asarray(x, jnp.float32), jnp.full((B,), t), {"label": y}, jnp.zeros(B, bool)
        )
        return np.float64(out)[..., :C]

    cond, uncond = model(labels), model(jnp.full((B,), NULL))
    return np.concatenate([(uncond + scale * (cond - uncond))[..., :3], cond[..., 3:]], axis=-1)


def sit_ode(method, points, x, v):
    """SiT's ODE sampler: `points` times from 0 to 1, and a step between two of them."""
    times = np.linspace(0, 1, points)
    for t, after in zip(times[:-1], times[1:]):
        h = after - t
        v_0 = v(x, t)
        if method == "euler":
            x = x + h * v_0
        else:
            x = x + h * (v_0 + v(x + h * v_0, after)) / 2
    return x


def sit_sde(points, noises, v):
    """SiT's Euler-Maruyama with diffusion "sigma", and its last step "Mean" of 0.04."""
    x = noises[0]
    times = np.linspace(0, 1 - 0.04, points)
    dt = times[1] - times[0]

    def drift(x, t):
        alpha, sigma = t, 1 - t
        d_alpha, d_sigma = 1.0, -1.0
        v_x = v(x, t)
        ratio = alpha / d_alpha
        score = (ratio * v_x - x) / (sigma**2 - ratio * d_sigma * sigma)
        return v_x + sigma * score

    for i, t in enumerate(times[:-1]):
        x = x + drift(x, t) * dt + np.sqrt(2 * (1 - t)) * np.sqrt(dt) * noises[i + 1]
    return x + drift(x, times[-1]) * 0.04


@pytest.mark.parametrize("sampler, steps", [("euler", 7), ("heun", 10), ("euler_maruyama", 12)])
def test_a_sampler_is_sits(sampler, steps):
    """Heun's ten evaluations are SiT's six points, Euler's seven its eight."""
    keys, labels = make_keys(3), jnp.array([2, 0, 7])
    noises = np.stack([np.float64(samplers.step_noise(keys, s, SHAPE)) for s in range(steps)])

    def v(x, t):
        return velocity(x, t, labels, 1.5)

    if sampler == "euler_maruyama":
        expected = sit_sde(steps, noises, v)
    else:
        points = steps + 1 if sampler == "euler" else steps // 2 + 1
        expected = sit_ode(sampler, points, noises[0], v)
    actual = run(make_grid(sampler, steps), keys=keys, labels=labels, cfg_scale=1.5)
    # float32 along a chain whose last weights on x_start and x nearly cancel.
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_the_published_grid_ends_where_sits_does():
    grid = make_grid("euler_maruyama", 250)
    np.testing.assert_allclose(grid.timesteps, np.linspace(0, 0.96, 250), atol=1e-7)
    assert grid.noise_scale[-1] == 0 and (grid.noise_scale[:-1] > 0).all()
    np.testing.assert_allclose(grid.noise_scale[0], np.sqrt(2 * 0.96 / 249))


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_true_velocity_leads_to_the_image(sampler):
    x_start = jax.random.normal(jax.random.key(3), (2, *SHAPE))
    noise = jax.random.normal(jax.random.key(4), (2, *SHAPE))
    actual = run(make_grid(sampler, 6), 2, lambda *_: x_start - noise, noise=noise)
    np.testing.assert_allclose(actual, x_start, atol=1e-5)


def test_guidance_in_an_interval_of_times():
    """Euler's steps at 0, 0.25, 0.5, 0.75, of which one is guided."""
    grid = make_grid("euler", 4)
    guided = samplers.Guidance.of(grid, 2.0, (0.4, 0.6)).is_guided
    assert guided.tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    "process, fields, message",
    [
        (FLOW, dict(sampler="heun", steps=5), "steps = 5, but sampler = heun calls .* even"),
        (FLOW, dict(sampler="euler_maruyama", steps=1), "steps = 1, but sampler = euler_maru"),
        (FLOW, dict(sampler="euler", spacing="trailing"), "spacing = trailing, but sampler = eul"),
        (FLOW, dict(sampler="heun", clip_denoised=True), "clip_denoised = True, but sampler = heu"),
        (FLOW, dict(sampler="ddim"), "sampler = ddim, but RectifiedFlow offers euler, heun"),
        (PROCESS, dict(sampler="euler"), "sampler = euler, but GaussianDiffusion offers ddpm"),
    ],
)
def test_impossible_requests_are_named(process, fields, message):
    settings = samplers.SamplerSettings(**dict(steps=4) | fields)
    with pytest.raises(ValueError, match=f"^{message}"):
        samplers.make_grid(process, settings)


def test_a_flow_has_no_variance_and_ordered_times():
    assert FLOW.choose_variance("", 4, 8) == ""
    with pytest.raises(ValueError, match="^variance = learned_range, but a model of velocities"):
        FLOW.choose_variance("learned_range", 4, 8)
    settings = samplers.SamplerSettings(sampler="euler", steps=2)
    for times in ([0.5, 0.0], [0.5, 1.5]):
        with pytest.raises(ValueError, match=r"^timesteps must be 2 increasing ones in \[0, 1\]"):
            samplers.make_grid(FLOW, settings, timesteps=np.array(times))

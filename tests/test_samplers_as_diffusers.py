"""Samplers against diffusers' schedulers, on the same noise and with the same model."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_sampler import PROCESS, SHAPE, make_grid, make_keys, model_fn, run

from lit_jax import samplers


@pytest.mark.parametrize("steps", [10, 25, 50, 100, 250])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(steps, spacing):
    ddim = diffusers.DDIMScheduler(beta_schedule="linear", timestep_spacing=spacing)
    ddim.set_timesteps(steps)
    np.testing.assert_array_equal(
        make_grid("ddim", steps, spacing=spacing).timesteps, ddim.timesteps
    )
    dpm = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", timestep_spacing=spacing)
    dpm.set_timesteps(steps)
    np.testing.assert_array_equal(
        make_grid("dpm++", steps, spacing=spacing).timesteps, dpm.timesteps
    )


ALPHAS_CUMPROD = jnp.asarray(PROCESS.alphas_cumprod, jnp.float32)


def two_clusters_eps(x, t, condition, drop):
    """The exact noise prediction for pixels near -1 or 1, with a deviation of 0.2.

    As a model it has bounded estimates of x_start.
    """
    a = ALPHAS_CUMPROD[t][:, None, None, None]
    variance = 0.04 * a + 1.0 - a
    x_start = (0.04 * jnp.sqrt(a) * x + (1.0 - a) * jnp.tanh(jnp.sqrt(a) * x / variance)) / variance
    return (x - jnp.sqrt(a) * x_start) / jnp.sqrt(1.0 - a)


def run_both(scheduler, grid, exact_tables):
    """Our sampler and a diffusers scheduler, in float32, with the same noise and the same model."""
    noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    actual = run(grid, 2, two_clusters_eps, noise=noise)
    if exact_tables:
        scheduler.alphas_cumprod = torch.from_numpy(PROCESS.alphas_cumprod)
    scheduler.set_timesteps(len(grid.timesteps))
    np.testing.assert_array_equal(scheduler.timesteps, grid.timesteps)
    model, x = jax.jit(two_clusters_eps), torch.from_numpy(noise)
    for t in scheduler.timesteps:
        out = np.array(model(x.float().numpy(), jnp.full((2,), int(t)), None, None))
        x = scheduler.step(torch.from_numpy(out), t, x).prev_sample
    return actual, x.double().numpy()


# diffusers computes its betas and their product in float32. With our float64 table in place of its
# table, it agrees to 1e-5. With its table, its alphas_cumprod are wrong by up to 2e-5, and so are
# its images.
TABLES = [(10, True, 1e-5), (50, True, 1e-5), (50, False, 1e-4)]


@pytest.mark.parametrize("steps, exact_tables, tolerance", TABLES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_agrees_with_diffusers(steps, spacing, exact_tables, tolerance):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear", clip_sample=False, timestep_spacing=spacing
    )
    grid = make_grid("ddim", steps, spacing=spacing)
    actual, expected = run_both(scheduler, grid, exact_tables)
    np.testing.assert_allclose(actual, expected, atol=tolerance)


@pytest.mark.parametrize("steps, exact_tables, tolerance", [(2, True, 1e-5), *TABLES])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_agrees_with_diffusers(steps, order, exact_tables, tolerance):
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", solver_order=order)
    actual, expected = run_both(scheduler, make_grid("dpm++", steps, order=order), exact_tables)
    np.testing.assert_allclose(actual, expected, atol=tolerance)


@pytest.mark.parametrize(
    "sampler, kwargs, steps",
    [
        ("ddim", dict(spacing="leading"), 40),
        *[("dpm++", dict(order=order), steps) for order in (1, 2, 3) for steps in (10, 40)],
    ],
)
def test_the_coefficients_agree_with_diffusers_for_arbitrary_outputs(sampler, kwargs, steps):
    """Both sides run in float64, with arbitrary outputs in the place of a model's.

    Nothing corrects a rounding error then, and the first step multiplies it by 157, which is the
    root of 1 / alphas_cumprod at t = 999. Only the image is float32 where
    DPMSolverMultistepScheduler.step casts it.
    """
    grid = make_grid(sampler, steps, **kwargs)
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal((steps, 64))
    x = noise = rng.standard_normal(64)
    x_starts = np.zeros((grid.x_start_coefs.shape[1], 64))
    for s in range(steps):
        a = PROCESS.alphas_cumprod[grid.timesteps[s]]
        x_starts = np.concatenate([[(x - np.sqrt(1 - a) * outputs[s]) / np.sqrt(a)], x_starts[:-1]])
        x = grid.x_coef[s] * x + grid.x_start_coefs[s] @ x_starts

    scheduler = (
        diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
        if sampler == "ddim"
        else diffusers.DPMSolverMultistepScheduler(
            beta_schedule="linear", solver_order=kwargs["order"]
        )
    )
    scheduler.alphas_cumprod = torch.from_numpy(PROCESS.alphas_cumprod)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    if sampler == "dpm++":
        scheduler.sigmas = torch.from_numpy(
            np.append(np.sqrt(1 / PROCESS.alphas_cumprod[grid.timesteps] - 1), 0.0)
        )
    expected = torch.from_numpy(noise)
    for t, output in zip(scheduler.timesteps, outputs):
        expected = scheduler.step(torch.from_numpy(output), t, expected).prev_sample
    assert expected.dtype == torch.float64
    np.testing.assert_allclose(
        x, expected, atol=(1e-9 if sampler == "ddim" else 1e-6) * np.abs(expected).max()
    )


def test_ddim_noise_is_that_of_diffusers():
    eta, steps = 0.7, 20
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    scheduler.alphas_cumprod = torch.from_numpy(PROCESS.alphas_cumprod)
    scheduler.set_timesteps(steps)
    grid = make_grid("ddim", steps, spacing="leading", eta=eta)
    keys = make_keys(2)
    x = torch.from_numpy(np.array(samplers.step_noise(keys, 0, SHAPE)))
    for s, t in enumerate(scheduler.timesteps):
        out = np.array(
            model_fn(
                jnp.asarray(x.float().numpy()),
                jnp.full((2,), int(t)),
                {"label": jnp.arange(2)},
                jnp.zeros(2, bool),
            )
        )[..., :4]
        fresh = torch.from_numpy(np.array(samplers.step_noise(keys, s + 1, SHAPE)))
        x = scheduler.step(torch.from_numpy(out), t, x, eta=eta, variance_noise=fresh).prev_sample
    actual, expected = run(grid, 2), x.numpy()
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())

"""Samplers: guidance; DDPM, DDIM, DPM-Solver++ as one scan over an explicit grid of timesteps.

Every sampler here is one linear multistep rule. With x_start_s the model's estimate of the clean image at step s,

    x_{s+1} = x_coef[s] * x_s + sum_j x_start_coefs[s, j] * x_start_{s-j} + noise_scale[s] * noise_s

so a sampler is a table of coefficients (`Grid`, NumPy float64) and all of them share one `lax.scan`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax import diffusion as diffusion_lib

SAMPLERS = ("ddpm", "ddim", "dpm++")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
# Where each sampler looks by default: DiT's own respacing, and what diffusers' DPMSolverMultistepScheduler does.
DEFAULT_SPACING = {"ddpm": "respaced", "ddim": "respaced", "dpm++": "linspace"}


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a sampler does at each of its S steps, most noise first; NumPy float64 unless said.

    Attributes:
        timesteps: (S,) int32, the training timesteps shown to the model.
        alphas_cumprod: (S,) signal power at those timesteps.
        x_coef: (S,) weight of the current image.
        x_start_coefs: (S, order) weights of this step's estimate of x_start and of those of the steps before it.
        noise_scale: (S,) standard deviation of the fresh noise where the variance is not learned.
        log_variance_bounds: (S, 2) least and largest log variance a learned variance moves between; None where the
            variance is not learned.
    """

    timesteps: np.ndarray
    alphas_cumprod: np.ndarray
    x_coef: np.ndarray
    x_start_coefs: np.ndarray
    noise_scale: np.ndarray
    log_variance_bounds: np.ndarray | None = None


def space_timesteps(
    num_train: int, steps: int, spacing: str, *, skip_zero: bool = False
) -> np.ndarray:
    """The training timesteps a sampler visits, most noise first.

    "respaced" is DiT's rule: a fractional stride from 0 to the last timestep, each value rounded. "leading",
    "trailing" and "linspace" are those of arXiv 2305.08891, table 2, rounded as diffusers rounds them. `skip_zero`
    lays out steps + 1 values and leaves timestep 0 out of "leading" and "linspace", as DPM-Solver's last stride
    goes to the clean image itself.

    Returns: (steps,) int32, strictly decreasing.
    Raises: ValueError for an unknown spacing, or when the schedule has too few timesteps.
    """
    points = steps + 1 if skip_zero and spacing in ("leading", "linspace") else steps
    if not 1 <= steps or points > num_train:
        raise ValueError(
            f"{steps} sampling steps ({spacing}) do not fit a schedule of {num_train} timesteps"
        )
    if spacing == "respaced":
        timesteps = diffusion_lib.respaced_timesteps(num_train, steps)
    elif spacing == "linspace":
        timesteps = np.linspace(0, num_train - 1, points).round()
    elif spacing == "leading":
        timesteps = np.arange(points) * (num_train // points)
    elif spacing == "trailing":
        timesteps = (num_train - np.arange(points) * (num_train / points)).round()[::-1] - 1
    else:
        raise ValueError(
            f"unknown timestep spacing {spacing!r}: expected respaced, leading, trailing or linspace"
        )
    return timesteps[points - steps :][::-1].astype(np.int32)


def _ddpm_coefs(diffusion, variance):
    """Posterior of the respaced chain; arXiv 2006.11239 (7), learned variance by arXiv 2102.09672 (15)."""
    upper = np.log(diffusion.betas)
    lower = diffusion.posterior_log_variance_clipped
    log_variance = lower if variance == "fixed_small" else np.append(lower[0], upper[1:])
    bounds = np.stack([lower, upper], axis=1)[::-1] if variance == "learned_range" else None
    return (
        diffusion.posterior_mean_coef2[::-1],
        diffusion.posterior_mean_coef1[::-1, None],
        np.exp(0.5 * log_variance)[::-1].copy(),
        bounds,
    )


def _ddim_coefs(alphas_cumprod, next_alphas_cumprod, eta):
    """arXiv 2010.02502 (12) and (16), with eps = (x - sqrt(alphas_cumprod) x_start) / sqrt(1 - alphas_cumprod)."""
    noise_scale = (
        eta
        * np.sqrt((1.0 - next_alphas_cumprod) / (1.0 - alphas_cumprod))
        * np.sqrt(1.0 - alphas_cumprod / next_alphas_cumprod)
    )
    x_coef = np.sqrt((1.0 - next_alphas_cumprod - noise_scale**2) / (1.0 - alphas_cumprod))
    x_start_coef = np.sqrt(next_alphas_cumprod) - x_coef * np.sqrt(alphas_cumprod)
    return x_coef, x_start_coef[:, None], noise_scale


def _dpm_solver_coefs(alphas_cumprod, next_alphas_cumprod, order):
    """DPM-Solver++ multistep, data prediction; arXiv 2211.01095, algorithm 2 (2M) and its third-order sibling.

    The first steps build up to `order`. The last step ends on the clean image, where log SNR is infinite and only the
    first order is defined; with fewer than 15 steps the third order drops to two one step earlier.
    """
    steps = len(alphas_cumprod)
    with np.errstate(divide="ignore"):
        log_snr = 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))
        next_log_snr = 0.5 * (np.log(next_alphas_cumprod) - np.log1p(-next_alphas_cumprod))
    alpha, sigma = np.sqrt(next_alphas_cumprod), np.sqrt(1.0 - next_alphas_cumprod)
    x_coef = sigma / np.sqrt(1.0 - alphas_cumprod)
    x_start_coefs = np.zeros((steps, order))
    for s in range(steps):
        step_order = min(order, s + 1, steps - s if steps < 15 or s == steps - 1 else order)
        h = next_log_snr[s] - log_snr[s]
        phi_1 = np.expm1(-h)
        # Divided differences of x_start over log SNR, in units of h, as rows over (x_start_s, x_start_{s-1}, ...).
        rows = np.zeros((3, 3))
        rows[0, 0] = -alpha[s] * phi_1
        if step_order == 2:
            first = np.array([1.0, -1.0, 0.0]) * h / (log_snr[s] - log_snr[s - 1])
            rows[1] = -0.5 * alpha[s] * phi_1 * first
        if step_order == 3:
            h_0, h_1 = log_snr[s] - log_snr[s - 1], log_snr[s - 1] - log_snr[s - 2]
            near = np.array([1.0, -1.0, 0.0]) * h / h_0
            far = np.array([0.0, 1.0, -1.0]) * h / h_1
            first = near + h_0 / (h_0 + h_1) * (near - far)
            second = h / (h_0 + h_1) * (near - far)
            rows[1] = alpha[s] * (phi_1 / h + 1.0) * first
            rows[2] = -alpha[s] * ((phi_1 + h) / h**2 - 0.5) * second
        x_start_coefs[s] = rows.sum(axis=0)[:order]
    return x_coef, x_start_coefs


def make_grid(
    diffusion: diffusion_lib.Diffusion,
    sampler: str,
    steps: int,
    *,
    spacing: str | None = None,
    timesteps: np.ndarray | None = None,
    variance: str = "learned_range",
    eta: float = 0.0,
    order: int = 2,
) -> Grid:
    """Builds the table of a sampler from the training schedule.

    Args:
        diffusion: the process the model was trained on.
        sampler: "ddpm", "ddim" or "dpm++".
        steps: how many model evaluations.
        spacing: rule of `space_timesteps`; None takes the sampler's own (`DEFAULT_SPACING`).
        timesteps: (steps,) decreasing timesteps to visit instead of a rule.
        variance: DDPM's noise: "learned_range" (from the model), "fixed_small" (posterior) or "fixed_large" (beta).
        eta: DDIM's noise, 0 for none, 1 for as much as DDPM.
        order: DPM-Solver++'s, 1 to 3.
    Raises: ValueError for any of these out of its range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: expected one of {SAMPLERS}")
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}: expected one of {VARIANCES}")
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver++ has order 1, 2 or 3, got {order}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"DDIM's eta is between 0 and 1, got {eta}")
    num_train = diffusion.num_steps
    if timesteps is None:
        timesteps = space_timesteps(
            num_train, steps, spacing or DEFAULT_SPACING[sampler], skip_zero=sampler == "dpm++"
        )
    timesteps = np.asarray(timesteps, np.int32)
    # JAX would clamp an index outside the schedule without a word.
    if (
        len(timesteps) != steps
        or timesteps.min() < 0
        or timesteps.max() >= num_train
        or (np.diff(timesteps) >= 0).any()
    ):
        raise ValueError(
            f"expected {steps} decreasing timesteps in [0, {num_train - 1}], got {timesteps.tolist()}"
        )
    alphas_cumprod = diffusion.alphas_cumprod[timesteps]
    next_alphas_cumprod = np.append(
        alphas_cumprod[1:], 1.0
    )  # every sampler ends on the clean image

    bounds, noise_scale = None, np.zeros(steps)
    if sampler == "ddpm":
        betas = 1.0 - alphas_cumprod / next_alphas_cumprod
        spaced = diffusion_lib.make_diffusion(betas[::-1], timesteps[::-1])
        x_coef, x_start_coefs, noise_scale, bounds = _ddpm_coefs(spaced, variance)
    elif sampler == "ddim":
        x_coef, x_start_coefs, noise_scale = _ddim_coefs(alphas_cumprod, next_alphas_cumprod, eta)
    else:
        x_coef, x_start_coefs = _dpm_solver_coefs(alphas_cumprod, next_alphas_cumprod, order)
    noise_scale[-1] = 0.0
    shown = diffusion.timestep_map[timesteps].astype(np.int32)
    return Grid(shown, alphas_cumprod, x_coef, x_start_coefs, noise_scale, bounds)


def check_guidance(cfg_channels: str, cfg_interval: Sequence[float]) -> None:
    """Raises ValueError for channels or an interval of timesteps that `sample` could make no sense of."""
    if cfg_channels not in ("3", "all"):
        raise ValueError(f"cfg_channels is '3' or 'all', got {cfg_channels!r}")
    if len(cfg_interval) != 2 or not cfg_interval[0] <= cfg_interval[1]:
        raise ValueError(
            f"cfg_interval is two timesteps, the lower one first, got {tuple(cfg_interval)}"
        )


def guide(
    model_fn: Callable,
    x: jax.Array,
    t: jax.Array,
    y: jax.Array,
    null_label: int,
    cfg_scale: float,
    cfg_channels: str,
) -> jax.Array:
    """Classifier-free guidance, conditional and unconditional in one batch; arXiv 2207.12598.

    eps = eps_uncond + cfg_scale (eps_cond - eps_uncond) on the guided channels; every other channel, the predicted
    variance among them, is the conditional one's.

    Args:
        model_fn: (x, t, y) -> (2B, h, w, C or 2C).
        x: (B, h, w, C). t: (B,). y: (B,) labels; null_label stands for "no label".
        cfg_channels: "all", or "3": DiT guides the first three channels of four. Its published numbers need that;
            a scale of 1 + s on three channels is about 1 + 3s/4 on all of four.
    Returns: (B, h, w, C or 2C)
    """
    B, C = x.shape[0], x.shape[-1]
    # Pairs side by side, not one half after the other: so both of an image stay on the device that holds it.
    labels = jnp.stack([y, jnp.full_like(y, null_label)], axis=1).reshape(2 * B)
    out = model_fn(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0), labels)
    cond, uncond = jnp.moveaxis(out.reshape(B, 2, *out.shape[1:]), 1, 0)
    guided = C if cfg_channels == "all" else min(3, C)
    eps = uncond[..., :guided] + cfg_scale * (cond - uncond)[..., :guided]
    return jnp.concatenate([eps, cond[..., guided:]], axis=-1)


def step_noise(rng_keys: jax.Array, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise (B, *shape) float32; image i's depends on rng_keys[i] and the step alone.

    Step 0 is the noise that sampling starts from; sampling step s (from 0) adds the noise of step s + 1.
    """
    return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32)
    )(rng_keys)


def sample(
    model_fn: Callable,
    rng_keys: jax.Array,
    shape: tuple[int, ...],
    *,
    grid: Grid,
    labels: jax.Array,
    null_label: int,
    cfg_scale: float = 1.0,
    cfg_channels: str = "3",
    cfg_interval: tuple[float, float] = (-np.inf, np.inf),
    clip_denoised: bool = False,
    noise: jax.Array | None = None,
) -> jax.Array:
    """Draws images; a pure function of its arguments, to be called under jit.

    The image is float32 from first to last, whatever type the model works in.

    Args:
        model_fn: (x (B, h, w, C) float32, t (B,) int32, y (B,) int32) -> (B, h, w, C or 2C): eps, then the
            variance's logits v. It sees 2B images at the steps that are guided.
        rng_keys: (B,) keys, one an image: fold_in(root, image's index).
        shape: (h, w, C) of one image.
        grid: the sampler, from `make_grid`.
        labels: (B,) int32. null_label: the label that stands for none, num_classes for DiT.
        cfg_scale: 1 is no guidance, and the model then sees each image once.
        cfg_interval: guide only where low <= t <= high in training timesteps.
        clip_denoised: clip the estimate of x_start to [-1, 1], for models of pixels.
        noise: (B, h, w, C) to start from, in place of the keys' own.
    Returns: (B, h, w, C) float32.
    Raises: ValueError if cfg_channels or cfg_interval make no sense, or the model gives no variance though the grid
        needs one.
    """
    check_guidance(cfg_channels, cfg_interval)
    B, C = labels.shape[0], shape[-1]
    steps, order = grid.x_start_coefs.shape
    low, high = cfg_interval
    needs_noise = grid.log_variance_bounds is not None or grid.noise_scale.any()
    is_guided = (grid.timesteps >= low) & (grid.timesteps <= high) & (cfg_scale != 1.0)

    def plain(x, t):
        return model_fn(x, t, labels)

    def guided(x, t):
        return guide(model_fn, x, t, labels, null_label, cfg_scale, cfg_channels)

    def step(carry, table):
        x, past_x_starts = carry  # (B, h, w, C), (order - 1, B, h, w, C)
        t = jnp.full((B,), table["timestep"])
        if is_guided.all() or not is_guided.any():
            out = guided(x, t) if is_guided.all() else plain(x, t)
        else:
            out = jax.lax.cond(table["is_guided"], guided, plain, x, t)
        out = out.astype(jnp.float32)
        x_start = table["x_start_from_x"] * x - table["x_start_from_eps"] * out[..., :C]
        if clip_denoised:
            x_start = jnp.clip(x_start, -1.0, 1.0)
        x_starts = jnp.concatenate([x_start[None], past_x_starts])  # (order, B, h, w, C)
        x = table["x_coef"] * x + jnp.einsum(
            "j,jbhwc->bhwc", table["x_start_coefs"], x_starts, precision="highest"
        )
        if grid.log_variance_bounds is not None:
            if out.shape[-1] != 2 * C:
                raise ValueError(
                    f"a learned variance needs {2 * C} output channels for {C} input channels, "
                    f"the model has {out.shape[-1]}"
                )
            min_log, max_log = table["log_variance_bounds"]
            fraction = (out[..., C:] + 1.0) / 2.0  # v in [-1, 1] -> share of the upper bound
            noise_scale = (
                jnp.exp(0.5 * (min_log + fraction * (max_log - min_log))) * table["is_not_last"]
            )
        else:
            noise_scale = table["noise_scale"]
        if needs_noise:
            x = x + noise_scale * step_noise(rng_keys, table["step"] + 1, shape)
        return (x, x_starts[:-1]), None

    table = {
        "step": np.arange(steps, dtype=np.int32),
        "timestep": grid.timesteps,
        "is_guided": is_guided,
        "x_start_from_x": np.sqrt(1.0 / grid.alphas_cumprod),
        "x_start_from_eps": np.sqrt(1.0 / grid.alphas_cumprod - 1.0),
        "x_coef": grid.x_coef,
        "x_start_coefs": grid.x_start_coefs,
        "noise_scale": grid.noise_scale,
        "is_not_last": np.arange(steps) < steps - 1,
    }
    if grid.log_variance_bounds is not None:
        table["log_variance_bounds"] = grid.log_variance_bounds
    table = {
        k: jnp.asarray(v, jnp.float32 if v.dtype == np.float64 else v.dtype)
        for k, v in table.items()
    }
    x = step_noise(rng_keys, 0, shape) if noise is None else jnp.asarray(noise, jnp.float32)
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros((order - 1, *x.shape), jnp.float32)), table)
    return x

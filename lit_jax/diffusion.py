"""Gaussian diffusion with a learned-range variance: float64 tables, respacing, the posterior and its variational bound.

The process is DDPM's (Ho et al. 2020) with the learned variance of Improved DDPM (Nichol & Dhariwal 2021), in the exact
form DiT trains and samples with: 1000 linear betas, epsilon prediction, a variance interpolated between its two bounds.
Tables are NumPy float64; they are cast to float32 when indexed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Diffusion:
    """Float64 tables of one diffusion process with S steps; every array has shape (S,).

    timestep_map holds the timestep of the original process that step i stands for: it is what the model is given.
    """

    betas: np.ndarray
    timestep_map: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.betas)


def linear_betas(num_steps: int = 1000) -> np.ndarray:
    """The linear schedule, 1e-4 to 0.02 at 1000 steps and scaled to keep the same end at other lengths; (S,) float64."""
    scale = 1000 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)


def make_diffusion(
    betas: np.ndarray | None = None, timestep_map: np.ndarray | None = None
) -> Diffusion:
    """Builds the tables from betas (S,), by default the 1000 linear ones; raises ValueError on a beta outside (0, 1]."""
    betas = linear_betas() if betas is None else np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size < 2 or betas.min() <= 0 or betas.max() > 1:
        raise ValueError(
            f"betas must be a vector of at least 2 values in (0, 1], got shape {betas.shape} in "
            f"[{betas.min(initial=np.inf):g}, {betas.max(initial=-np.inf):g}]"
        )
    alphas_cumprod = np.cumprod(1.0 - betas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    return Diffusion(
        betas=betas,
        timestep_map=np.arange(len(betas)) if timestep_map is None else np.asarray(timestep_map),
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=alphas_cumprod_prev,
        posterior_variance=posterior_variance,
        # The variance at step 0 is zero: its logarithm borrows the value of step 1.
        posterior_log_variance_clipped=np.log(
            np.append(posterior_variance[1], posterior_variance[1:])
        ),
        posterior_mean_coef1=betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod),
        posterior_mean_coef2=(1.0 - alphas_cumprod_prev)
        * np.sqrt(1.0 - betas)
        / (1.0 - alphas_cumprod),
    )


def respaced_timesteps(num_original: int, num_steps: int) -> np.ndarray:
    """The timesteps that DiT's `space_timesteps(num_original, str(num_steps))` keeps: rounded, evenly spaced, both ends in."""
    if not 1 < num_steps <= num_original:
        raise ValueError(
            f"cannot keep {num_steps} of {num_original} timesteps: between 2 and {num_original} can be kept"
        )
    stride = (num_original - 1) / (num_steps - 1)
    position, kept = 0.0, []
    for _ in range(
        num_steps
    ):  # accumulated, not multiplied: halves must round the same way as in the reference
        kept.append(round(position))
        position += stride
    return np.array(kept)


def respace(diffusion: Diffusion, num_steps: int) -> Diffusion:
    """The process that visits `num_steps` evenly spaced timesteps of `diffusion`, with betas that keep its marginals."""
    kept = respaced_timesteps(diffusion.num_steps, num_steps)
    alphas_cumprod = diffusion.alphas_cumprod[kept]
    betas = 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
    return make_diffusion(betas, diffusion.timestep_map[kept])


def at(table: np.ndarray, t: jax.Array) -> jax.Array:
    """table (S,) float64 at steps t (B,), float32, shaped (B, 1, 1, 1) to meet an image batch."""
    return jnp.asarray(table, jnp.float32)[t][:, None, None, None]


def q_sample(diffusion: Diffusion, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """Draws x_t ~ q(x_t | x_start) with the given noise; x_start, noise (B, h, w, C), t (B,)."""
    return (
        at(np.sqrt(diffusion.alphas_cumprod), t) * x_start
        + at(np.sqrt(1.0 - diffusion.alphas_cumprod), t) * noise
    )


def predict_x_start(
    diffusion: Diffusion, x_t: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """x_start implied by x_t and the predicted noise, all (B, h, w, C)."""
    return (
        at(np.sqrt(1.0 / diffusion.alphas_cumprod), t) * x_t
        - at(np.sqrt(1.0 / diffusion.alphas_cumprod - 1.0), t) * eps
    )


def q_posterior_mean(
    diffusion: Diffusion, x_start: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """Mean of q(x_{t-1} | x_t, x_start)."""
    return (
        at(diffusion.posterior_mean_coef1, t) * x_start
        + at(diffusion.posterior_mean_coef2, t) * x_t
    )


def learned_range_log_variance(
    diffusion: Diffusion, variance_output: jax.Array, t: jax.Array
) -> jax.Array:
    """log Sigma from the model's raw v: interpolates the posterior's (v = -1) and beta's (v = 1) log-variance."""
    fraction = (variance_output + 1.0) / 2.0
    return fraction * at(np.log(diffusion.betas), t) + (1.0 - fraction) * at(
        diffusion.posterior_log_variance_clipped, t
    )


def p_mean_variance(
    diffusion: Diffusion,
    model_output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    variance: str = "learned_range",
    clip_denoised: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and log-variance of p(x_{t-1} | x_t), and the predicted x_start.

    Args:
      model_output: (B, h, w, 2C) noise then variance values, or (B, h, w, C) when the variance is fixed.
      x_t: (B, h, w, C). t: (B,) int32, steps of `diffusion` (not of the original process).
      variance: "learned_range" (the model's), "fixed_large" (beta) or "fixed_small" (the posterior's).
      clip_denoised: clip the predicted x_start to [-1, 1]; for pixels, not for latents.
    Returns: mean, log_variance, x_start, each (B, h, w, C) float32.
    """
    C = x_t.shape[-1]
    eps = model_output[..., :C]
    if variance == "learned_range":
        if model_output.shape[-1] != 2 * C:
            raise ValueError(
                f"a learned variance needs {2 * C} output channels for {C} input channels, "
                f"the model has {model_output.shape[-1]}"
            )
        log_variance = learned_range_log_variance(diffusion, model_output[..., C:], t)
    elif variance == "fixed_large":  # beta, except at step 0, where it is the posterior's
        table = np.log(np.append(diffusion.posterior_variance[1], diffusion.betas[1:]))
        log_variance = jnp.broadcast_to(at(table, t), x_t.shape)
    elif variance == "fixed_small":
        log_variance = jnp.broadcast_to(at(diffusion.posterior_log_variance_clipped, t), x_t.shape)
    else:
        raise ValueError(
            f"variance must be learned_range, fixed_large or fixed_small, got {variance!r}"
        )
    x_start = predict_x_start(diffusion, x_t, t, eps)
    if clip_denoised:
        x_start = jnp.clip(x_start, -1.0, 1.0)
    return q_posterior_mean(diffusion, x_start, x_t, t), log_variance, x_start


def normal_kl(
    mean1: jax.Array, log_variance1: jax.Array, mean2: jax.Array, log_variance2: jax.Array
) -> jax.Array:
    """Elementwise KL(N1 || N2) in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1.0
        + jnp.exp(log_variance1 - log_variance2)
        + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(
    x: jax.Array, mean: jax.Array, log_scale: jax.Array
) -> jax.Array:
    """log-probability of x in [-1, 1] under a Gaussian discretised to 256 levels, in nats.

    DiT applies it to latents too, where the levels mean nothing; the loss is kept as it was trained. The normal CDF is the
    reference's tanh approximation.
    """

    def cdf(z):
        return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))

    def log(p):
        return jnp.log(jnp.maximum(p, 1e-12))

    inverse_scale = jnp.exp(-log_scale)
    above = cdf(inverse_scale * (x - mean + 1.0 / 255.0))
    below = cdf(inverse_scale * (x - mean - 1.0 / 255.0))
    return jnp.where(
        x < -0.999, log(above), jnp.where(x > 0.999, log(1.0 - below), log(above - below))
    )


def vb_terms(
    diffusion: Diffusion, model_output: jax.Array, x_start: jax.Array, x_t: jax.Array, t: jax.Array
) -> jax.Array:
    """Variational bound of each sample at its step: KL to the posterior, or the decoder's likelihood at t = 0.

    Returns: (B,) in bits per dimension (Improved DDPM, equations 4 to 7).
    """
    mean, log_variance, _ = p_mean_variance(diffusion, model_output, x_t, t)
    true_mean = q_posterior_mean(diffusion, x_start, x_t, t)
    true_log_variance = at(diffusion.posterior_log_variance_clipped, t)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance).mean(axis=(1, 2, 3))
    nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance).mean(
        axis=(1, 2, 3)
    )
    return jnp.where(t == 0, nll, kl) / np.log(2.0)

"""The diffusion process: what x_t is, what the model is trained to predict, what an output means.

A process answers five questions: `draw_t`, `perturb`, `loss`, x_start of an output
(`x_start_columns`), and which `samplers` it has. `Process` lists what else is asked of its outputs.
The step, the losses and the scan that draws ask no process what kind it is; rows of
samplers.SAMPLERS do, which are of one kind.

`GaussianDiffusion` is DDPM's (Ho et al. 2020) with the learned variance of Improved DDPM (Nichol &
Dhariwal 2021), in the exact form DiT trains and samples with: 1000 linear betas, epsilon
prediction, a variance interpolated between its two bounds.

`RectifiedFlow` is the linear path of SiT (Ma et al. 2024): velocity prediction, at times from 0,
the noise, to 1, the image. `PROCESSES` has both by what their models predict.
"""

import dataclasses
import functools
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax import ranges


class Process(Protocol):
    """What the train step and the samplers ask of a process."""

    samplers: ClassVar[tuple[str, ...]]

    @property
    def time_range(self) -> tuple[float, float]:
        """The timesteps that a sampler may visit: from that of most noise to that of least."""

    def draw_t(self, rng: jax.Array, batch_size: int) -> jax.Array: ...

    def perturb(self, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array: ...

    def loss(
        self, output: jax.Array, x_start: jax.Array, x_t: jax.Array, t: jax.Array, noise: jax.Array
    ) -> dict[str, jax.Array]: ...

    def parts(self, output: jax.Array, in_channels: int) -> dict[str, jax.Array]:
        """The named parts of an output, each of which is distilled."""

    def interpret(self, parts: dict[str, jax.Array], t: jax.Array) -> dict[str, jax.Array]:
        """What the values of the parts stand for at t (B,)."""

    def weigh(self, part: str, error: jax.Array, t: jax.Array) -> jax.Array:
        """The mean squared errors (B,) of a part, as much as they count at t (B,)."""

    def x_start_columns(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def choose_variance(self, asked: str, in_channels: int, out_channels: int) -> str: ...


def linear_betas(num_steps: int = 1000) -> np.ndarray:
    """The linear schedule, (S,) float64: 1e-4 to 0.02, scaled to the same end at other lengths."""
    scale = 1000 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """A process of S steps; every table has shape (S,).

    Tables are NumPy float64 and are cast to float32 when they are indexed: jnp would quietly make
    float32 of them before the cumulative product, whose end is then off by a part in a thousand.

    Raises: ValueError for betas that are no vector of two values or more in (0, 1], or a negative
      gamma or weight.
    """

    betas: np.ndarray = dataclasses.field(default_factory=linear_betas)
    # Where the signal-to-noise ratio is above gamma, the loss counts gamma / ratio (Min-SNR, Hang
    # et al. 2023, equation 8 for epsilon); 0: all timesteps count alike.
    min_snr_gamma: float = 0.0
    # Of the variational bound beside the simple loss: lambda of Improved DDPM, equation 16, times
    # the number of steps. 1 is theirs and DiT's.
    vb_weight: float = 1.0

    # The rows of samplers.SAMPLERS that make sense of this process.
    samplers: ClassVar[tuple[str, ...]] = ("ddpm", "ddim", "dpm++")

    def __post_init__(self):
        # The dataclass is frozen, so that a jitted step may close over it.
        betas = np.asarray(self.betas, np.float64)
        object.__setattr__(self, "betas", betas)
        if betas.ndim != 1 or betas.size < 2 or betas.min() <= 0 or betas.max() > 1:
            low = betas.min(initial=np.inf)
            high = betas.max(initial=-np.inf)
            raise ValueError(
                f"betas must be a vector of at least 2 values in (0, 1], got shape {betas.shape} "
                f"in [{low:g}, {high:g}]"
            )
        ranges.check(self, min_snr_gamma=ranges.NOT_NEGATIVE, vb_weight=ranges.NOT_NEGATIVE)

    # ---- Tables ----------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @property
    def time_range(self) -> tuple[float, float]:
        """The last timestep, which is nearly noise, and 0."""
        return self.num_steps - 1, 0

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Signal power of x_t."""
        return np.cumprod(1.0 - self.betas)

    @functools.cached_property
    def loss_weight(self) -> np.ndarray:
        """Of the noise's error at each timestep, (S,) in (0, 1]; see `min_snr_gamma`."""
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        return np.minimum(snr, self.min_snr_gamma or np.inf) / snr

    def weigh(self, part: str, error: jax.Array, t: jax.Array) -> jax.Array:
        """The mean squared errors (B,), those of the noise times `loss_weight` at t (B,)."""
        if part != "noise" or not self.min_snr_gamma:
            return error
        return error * at(self.loss_weight, t)[:, 0, 0, 0]

    @functools.cached_property
    def _alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @functools.cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """log of the variance of q(x_{t-1} | x_t, x_start)."""
        variance = self.betas * (1.0 - self._alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        # The variance at step 0 is zero: its logarithm takes the value of step 1, as DiT's does.
        return np.log(np.append(variance[1], variance[1:]))

    @functools.cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Weight of x_start in the mean of q(x_{t-1} | x_t, x_start)."""
        return self.betas * np.sqrt(self._alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @functools.cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x_start)."""
        return (
            (1.0 - self._alphas_cumprod_prev)
            * np.sqrt(1.0 - self.betas)
            / (1.0 - self.alphas_cumprod)
        )

    # ---- Training --------------------------------------------------------------------------------

    def draw_t(self, rng: jax.Array, batch_size: int) -> jax.Array:
        """Timesteps to train at, (B,) int32, uniform over 0 to S - 1."""
        return jax.random.randint(rng, (batch_size,), 0, self.num_steps)

    def perturb(self, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t ~ q(x_t | x_start) with the given noise; x_start, noise (B, h, w, C), t (B,)."""
        return (
            at(np.sqrt(self.alphas_cumprod), t) * x_start
            + at(np.sqrt(1.0 - self.alphas_cumprod), t) * noise
        )

    def loss(
        self, output: jax.Array, x_start: jax.Array, x_t: jax.Array, t: jax.Array, noise: jax.Array
    ) -> dict[str, jax.Array]:
        """L_simple and, where the model predicts a variance, L_vlb, each times its weight.

        With the default weights their sum is DiT's loss. The bound trains the variance's head and
        what lies below it: the predicted noise enters it detached (Improved DDPM, section 3.1).

        Args: output (B, h, w, C or 2C); x_start, x_t, noise (B, h, w, C); t (B,). All float32.
        Returns: {"mse": (B,)} and, with a variance head, {"vb": (B,) bits per dimension}.
        """
        C = x_start.shape[-1]
        parts = self.parts(output, C)
        # The simple loss of DDPM, equation 14, which weighs all timesteps alike.
        terms = {"mse": self.weigh("noise", mean_square(parts["noise"] - noise), t)}
        if "variance" in parts:
            eps = jax.lax.stop_gradient(parts["noise"])
            bound = self._variational_bound(eps, parts["variance"], x_start, x_t, t)
            terms["vb"] = self.vb_weight * bound
        return terms

    def parts(self, output: jax.Array, in_channels: int) -> dict[str, jax.Array]:
        """The named halves of an output (B, h, w, C or 2C): "noise" and perhaps "variance".

        A student learns from its teacher part by part (`losses.distillation_terms`).
        """
        C = in_channels
        if output.shape[-1] == C:
            return {"noise": output}
        return {"noise": output[..., :C], "variance": output[..., C:]}

    def interpret(self, parts: dict[str, jax.Array], t: jax.Array) -> dict[str, jax.Array]:
        """The parts with `log_variance` in place of the raw v."""
        if "variance" not in parts:
            return parts
        return parts | {"variance": self.log_variance(parts["variance"], t)}

    def log_variance(self, variance: jax.Array, t: jax.Array) -> jax.Array:
        """log Sigma from the model's raw v (Improved DDPM, equation 15).

        v = -1 is the posterior's log-variance, v = 1 is beta's.
        """
        # Not clipped to [0, 1]: DiT lets v leave [-1, 1], and its weights rely on it.
        fraction = (variance + 1.0) / 2.0
        return fraction * at(np.log(self.betas), t) + (1.0 - fraction) * at(
            self.posterior_log_variance, t
        )

    def _variational_bound(self, eps, variance, x_start, x_t, t):
        """KL to the posterior, or the decoder's likelihood at t = 0; (B,) bits per dimension.

        Improved DDPM, equations 4 to 7.
        """
        mean = self.posterior_mean(self.predict_x_start(x_t, t, eps), x_t, t)
        log_variance = self.log_variance(variance, t)
        true_mean = self.posterior_mean(x_start, x_t, t)
        true_log_variance = at(self.posterior_log_variance, t)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance).mean(axis=(1, 2, 3))
        log_likelihood = discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
        nll = -log_likelihood.mean(axis=(1, 2, 3))
        return jnp.where(t == 0, nll, kl) / np.log(2.0)

    def predict_x_start(self, x_t: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
        """x_start implied by x_t and the predicted noise, all (B, h, w, C)."""
        return (
            at(np.sqrt(1.0 / self.alphas_cumprod), t) * x_t
            - at(np.sqrt(1.0 / self.alphas_cumprod - 1.0), t) * eps
        )

    def posterior_mean(self, x_start: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Mean of q(x_{t-1} | x_t, x_start)."""
        return at(self.posterior_mean_coef1, t) * x_start + at(self.posterior_mean_coef2, t) * x_t

    # ---- Sampling --------------------------------------------------------------------------------

    def signal_power(self, timesteps: np.ndarray) -> np.ndarray:
        """alphas_cumprod at timesteps of a sampler, float64; those between two are interpolated.

        The logarithm is linear between whole timesteps, as in the code of DPM-Solver.
        """
        if np.issubdtype(timesteps.dtype, np.integer):
            return self.alphas_cumprod[timesteps]
        return np.exp(np.interp(timesteps, np.arange(self.num_steps), np.log(self.alphas_cumprod)))

    def x_start_columns(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a and b, (S',) float64, of x_start = a x_t + b output at the timesteps of a sampler."""
        alphas_cumprod = self.signal_power(timesteps)
        return np.sqrt(1.0 / alphas_cumprod), -np.sqrt(1.0 / alphas_cumprod - 1.0)

    def choose_variance(self, asked: str, in_channels: int, out_channels: int) -> str:
        """Which variance the noise of a sampling step has; "" asks for the model's if it has one.

        Raises: ValueError where the model's is asked for and it predicts none.
        """
        has_one = out_channels == 2 * in_channels
        if asked == "learned_range" and not has_one:
            raise ValueError(
                "variance = learned_range, but the model predicts no variance (learn_sigma = False)"
            )
        return asked or ("learned_range" if has_one else "fixed_large")

    def learned_noise_scale(
        self, output: jax.Array, log_variance_bounds: jax.Array, in_channels: int
    ) -> jax.Array:
        """Standard deviation of a sampling step's noise from the output's variance half.

        Args: output (B, h, w, 2C); log_variance_bounds (2,), those of the respaced chain.
        Returns: (B, h, w, C).
        Raises: ValueError where the model predicts no variance.
        """
        parts = self.parts(output, in_channels)
        if "variance" not in parts:
            raise ValueError(
                f"a learned variance needs {2 * in_channels} output channels for {in_channels} "
                f"input channels, the model has {output.shape[-1]}"
            )
        min_log, max_log = log_variance_bounds
        fraction = (parts["variance"] + 1.0) / 2.0  # v in [-1, 1]: share of the upper bound
        return jnp.exp(0.5 * (min_log + fraction * (max_log - min_log)))


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """The straight path from noise at t = 0 to an image at t = 1, as SiT trains and samples on it.

        x_t = t x_start + (1 - t) noise,   velocity = x_start - noise

    SiT: arXiv 2401.08740, its linear interpolant with velocity prediction. The model is told t as
    it is, in [0, 1]: of DiT's sinusoids, made for 0 to 999, most hardly move. A velocity model with
    2C output channels (learn_sigma, as SiT's have) leaves the second half unused and untrained.
    """

    # The rows of samplers.SAMPLERS that make sense of this process.
    samplers: ClassVar[tuple[str, ...]] = ("euler", "heun", "euler_maruyama")

    @property
    def time_range(self) -> tuple[float, float]:
        """Noise, and the image."""
        return 0.0, 1.0

    def draw_t(self, rng: jax.Array, batch_size: int) -> jax.Array:
        """Times to train at, (B,) float32, uniform in [0, 1)."""
        return jax.random.uniform(rng, (batch_size,))

    def perturb(self, x_start: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t on the path between the two; x_start, noise (B, h, w, C), t (B,)."""
        t = t[:, None, None, None]
        return t * x_start + (1.0 - t) * noise

    def loss(
        self, output: jax.Array, x_start: jax.Array, x_t: jax.Array, t: jax.Array, noise: jax.Array
    ) -> dict[str, jax.Array]:
        """The squared error of the velocity, unweighted over t: SiT's loss.

        Args: output (B, h, w, C or 2C); x_start, noise (B, h, w, C). All float32.
        Returns: {"mse": (B,)}.
        """
        velocity = self.parts(output, x_start.shape[-1])["velocity"]
        return {"mse": mean_square(velocity - (x_start - noise))}

    def parts(self, output: jax.Array, in_channels: int) -> dict[str, jax.Array]:
        """{"velocity": the first C channels of an output (B, h, w, C or 2C)}."""
        return {"velocity": output[..., :in_channels]}

    def interpret(self, parts: dict[str, jax.Array], t: jax.Array) -> dict[str, jax.Array]:
        """The parts as they are: a velocity stands for itself."""
        return parts

    def weigh(self, part: str, error: jax.Array, t: jax.Array) -> jax.Array:
        """The errors as they are: all times count alike."""
        return error

    def x_start_columns(self, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a and b, (S',) float64, of x_start = a x_t + b output at the times of a sampler."""
        return np.ones(len(timesteps)), 1.0 - np.asarray(timesteps, np.float64)

    def choose_variance(self, asked: str, in_channels: int, out_channels: int) -> str:
        """ "": its samplers know no variance. Raises: ValueError where one is asked for."""
        if asked:
            raise ValueError(
                f"variance = {asked}, but a model of velocities has none; leave it empty"
            )
        return ""


# By what the model predicts: the field `prediction` of its architecture.
PROCESSES = {"noise": GaussianDiffusion, "velocity": RectifiedFlow}


def respaced_timesteps(num_original: int, num_steps: int) -> np.ndarray:
    """The timesteps that DiT's `space_timesteps` keeps: evenly spaced, rounded, both ends in."""
    if not 1 < num_steps <= num_original:
        raise ValueError(
            f"steps = {num_steps}: between 2 and {num_original} of {num_original} timesteps can "
            f"be kept"
        )
    stride = (num_original - 1) / (num_steps - 1)
    position = 0.0
    kept = []
    # Accumulated, not multiplied: halves must round the same way as in the reference.
    for _ in range(num_steps):
        kept.append(round(position))
        position += stride
    return np.array(kept)


def at(table: np.ndarray, t: jax.Array) -> jax.Array:
    """table (S,) float64 at steps t (B,): float32, (B, 1, 1, 1) to meet a batch of images."""
    return jnp.asarray(table, jnp.float32)[t][:, None, None, None]


def mean_square(x: jax.Array) -> jax.Array:
    """(B, h, w, C) to (B,)."""
    return jnp.square(x).mean(axis=(1, 2, 3))


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

    DiT applies it to latents too, where the levels mean nothing. The loss is kept as DiT was
    trained with it. The normal CDF is the reference's tanh approximation.
    """

    def cdf(z):
        return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))

    def log(p):
        return jnp.log(jnp.maximum(p, 1e-12))

    # A level is 2/255 wide, and x lies in its middle.
    inverse_scale = jnp.exp(-log_scale)
    above = cdf(inverse_scale * (x - mean + 1.0 / 255.0))
    below = cdf(inverse_scale * (x - mean - 1.0 / 255.0))
    # The outermost levels take the tails of the distribution.
    inside = jnp.where(x > 0.999, log(1.0 - below), log(above - below))
    return jnp.where(x < -0.999, log(above), inside)

"""Samplers: guidance, and every sampler as one scan over an explicit grid of timesteps.

DDPM, DDIM and DPM-Solver++ are those of a diffusion; Euler, Heun and Euler-Maruyama of a flow.
Every sampler here is one linear multistep rule. With x_start_s the model's estimate of the clean
image at step s,

    x_{s+1} = x_coef[s] x_s + sum_j x_start_coefs[s, j] x_start_{s-j} + noise_scale[s] noise_s

so a sampler is a table of coefficients (`Grid`, NumPy float64), and all of them share one
`lax.scan`. The process (diffusion.py) says how x_start follows from the model's output; a rule that
mixes the outputs themselves has them in the place of x_start. A new sampler is a row of `SAMPLERS`
and its name in the process that it belongs to.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax import ranges
from lit_jax.conditions import Condition
from lit_jax.diffusion import GaussianDiffusion, Process, respaced_timesteps

VARIANCES = ("learned_range", "fixed_small", "fixed_large")
SPACINGS = ("respaced", "leading", "trailing", "linspace", "time_uniform")
CFG_CHANNELS = ("3", "all")
LAST_STEP = 0.04  # of Euler-Maruyama: that of SiT
INTERVAL = ranges.Range(
    "two numbers, the first not above the second",
    lambda x: len(x) == 2 and all(isinstance(end, int | float) for end in x) and x[0] <= x[1],
)


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """What an image depends on besides its number, its condition and the seed.

    Raises: ValueError whose text starts with the field's name.
    """

    sampler: str = "ddpm"  # ddpm, ddim, dpm++; of a velocity: euler, heun, euler_maruyama
    steps: int = 250  # model evaluations an image
    spacing: str = ""  # timesteps: one of SPACINGS; "": the sampler's own
    variance: str = ""  # ddpm's noise: one of VARIANCES; "": the model's if it predicts one
    eta: float = 0.0  # ddim's noise: 0 none, 1 as much as ddpm
    order: int = 2  # of dpm++: 1 to 3
    cfg_scale: float = 1.5  # 1: no guidance, and the model sees each image once
    cfg_channels: str = "3"  # leading channels that are guided: 3 (DiT's), or all
    cfg_interval: tuple[float, float] = (0.0, 1000.0)  # guided where low <= t <= high
    clip_denoised: bool = False  # clip x_start to [-1, 1]: for models of pixels

    def __post_init__(self):
        ranges.check(
            self,
            sampler=ranges.one_of(*SAMPLERS),
            steps=ranges.AT_LEAST_1,
            spacing=ranges.one_of("", *SPACINGS),
            variance=ranges.one_of("", *VARIANCES),
            eta=ranges.UNIT,
            order=ranges.one_of(1, 2, 3),
            cfg_scale=ranges.NOT_NEGATIVE,
            cfg_channels=ranges.one_of(*CFG_CHANNELS),
            cfg_interval=INTERVAL,
        )
        object.__setattr__(self, "cfg_interval", tuple(self.cfg_interval))  # a list has no hash


# ---- Grids ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a sampler does at each of its S steps, most noise first; NumPy float64 unless said."""

    timesteps: np.ndarray  # (S,) what the model sees: int32 or, where one is not whole, float32
    # x_start = x_start_from_x x + x_start_from_output output
    x_start_from_x: np.ndarray  # (S,)
    x_start_from_output: np.ndarray  # (S,)
    x_coef: np.ndarray  # (S,) weight of the current image
    x_start_coefs: np.ndarray  # (S, order) weights of this step's x_start and of those before it
    noise_scale: np.ndarray  # (S,) of the fresh noise, where the variance is not learned
    log_variance_bounds: np.ndarray | None  # (S, 2) that a learned variance moves between, or None
    learned_noise_scale: Callable[..., jax.Array] | None  # (output, bounds, C) to a scale, if any
    mixes_outputs: bool = False  # x_start_coefs are weights of the outputs in place of x_start


class Coefficients(NamedTuple):
    """The columns of a grid that tell samplers apart; see `Grid`."""

    x_coef: np.ndarray
    x_start_coefs: np.ndarray
    noise_scale: np.ndarray
    log_variance_bounds: np.ndarray | None = None
    learned_noise_scale: Callable[..., jax.Array] | None = None


def space_timesteps(
    num_train: int, steps: int, spacing: str, *, skip_zero: bool = False
) -> np.ndarray:
    """The training timesteps a sampler visits, most noise first.

    "respaced" is DiT's rule: a fractional stride from 0 to the last timestep, each value rounded.
    "leading", "trailing" and "linspace" are those of arXiv 2305.08891, table 2, rounded as
    diffusers rounds them. "time_uniform" is that of PixArt's DPM-Solver++: equal strides, which end
    on timestep 0 and not on the clean image, with timesteps between whole ones.

    Args:
      skip_zero: lays out steps + 1 values and leaves timestep 0 out of "leading" and "linspace",
        as DPM-Solver's last stride goes to the clean image itself.
    Returns: (steps,) int32, strictly decreasing; float64 for "time_uniform".
    Raises: ValueError for an unknown spacing, or when the schedule has too few timesteps.
    """
    points = steps + 1 if skip_zero and spacing in ("leading", "linspace") else steps
    if not 1 <= steps or points > num_train:
        raise ValueError(
            f"steps = {steps} ({spacing}) do not fit a schedule of {num_train} timesteps; "
            f"name fewer steps or another spacing"
        )
    if spacing == "respaced":
        timesteps = respaced_timesteps(num_train, steps)
    elif spacing == "linspace":
        timesteps = np.linspace(0, num_train - 1, points).round()
    elif spacing == "leading":
        timesteps = np.arange(points) * (num_train // points)
    elif spacing == "time_uniform":
        return np.linspace(num_train - 1, 0, steps + 1)[:-1]
    elif spacing == "trailing":
        timesteps = (num_train - np.arange(points) * (num_train / points)).round()[::-1] - 1
    else:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}; got {spacing!r}")
    return timesteps[points - steps :][::-1].astype(np.int32)


def _signal_powers(process, settings, timesteps):
    """alphas_cumprod at the timesteps and at those they lead to; the last one is an image's."""
    alphas_cumprod = process.signal_power(timesteps)
    # PixArt's DPM-Solver++ leaves the noise of timestep 0 in the image; the others end without.
    is_uniform = settings.spacing == "time_uniform"
    end = process.signal_power(np.zeros(1, np.int32))[0] if is_uniform else 1.0
    return alphas_cumprod, np.append(alphas_cumprod[1:], end)


def _ddpm(process, settings, timesteps):
    """Posterior of the respaced chain: arXiv 2006.11239 (7), learned variance 2102.09672 (15)."""
    if len(timesteps) < 2:
        raise ValueError("steps = 1, but sampler = ddpm needs at least 2")
    alphas_cumprod, next_alphas_cumprod = _signal_powers(process, settings, timesteps)
    betas = 1.0 - alphas_cumprod / next_alphas_cumprod
    spaced = GaussianDiffusion(betas[::-1])  # a process counts from the clean image
    upper = np.log(spaced.betas)
    lower = spaced.posterior_log_variance
    bounds = None
    log_variance = lower
    if settings.variance != "fixed_small":
        # beta, except at the last step, where it would leave noise in the image.
        log_variance = np.append(lower[0], upper[1:])
    if settings.variance == "learned_range":
        bounds = np.stack([lower, upper], axis=1)[::-1]
    return Coefficients(
        x_coef=spaced.posterior_mean_coef2[::-1],
        x_start_coefs=spaced.posterior_mean_coef1[::-1, None],
        noise_scale=np.exp(0.5 * log_variance)[::-1].copy(),
        log_variance_bounds=bounds,
        learned_noise_scale=process.learned_noise_scale,
    )


def _ddim(process, settings, timesteps):
    """arXiv 2010.02502 (12) and (16), with eps written as a combination of x and x_start."""
    alphas_cumprod, next_alphas_cumprod = _signal_powers(process, settings, timesteps)
    noise_scale = (
        settings.eta
        * np.sqrt((1.0 - next_alphas_cumprod) / (1.0 - alphas_cumprod))
        * np.sqrt(1.0 - alphas_cumprod / next_alphas_cumprod)
    )
    x_coef = np.sqrt((1.0 - next_alphas_cumprod - noise_scale**2) / (1.0 - alphas_cumprod))
    x_start_coef = np.sqrt(next_alphas_cumprod) - x_coef * np.sqrt(alphas_cumprod)
    return Coefficients(x_coef, x_start_coef[:, None], noise_scale)


def _dpm_solver(process, settings, timesteps):
    """DPM-Solver++ multistep, data prediction; arXiv 2211.01095, algorithm 2 and its third order.

    The first steps build up to `order`. The last step ends on the clean image, where log SNR is
    infinite and only the first order is defined. With fewer than 15 steps the third order drops to
    two one step earlier, as in diffusers; on PixArt's grid it always does, as in its code.
    """
    alphas_cumprod, next_alphas_cumprod = _signal_powers(process, settings, timesteps)
    order = settings.order
    steps = len(alphas_cumprod)
    drops_early = steps < 15 or settings.spacing == "time_uniform"
    with np.errstate(divide="ignore"):  # log SNR of the clean image
        log_snr = 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))
        next_log_snr = 0.5 * (np.log(next_alphas_cumprod) - np.log1p(-next_alphas_cumprod))
    alpha = np.sqrt(next_alphas_cumprod)
    sigma = np.sqrt(1.0 - next_alphas_cumprod)
    x_start_coefs = np.zeros((steps, order))
    for s in range(steps):
        left = steps - s if drops_early or s == steps - 1 else order
        step_order = min(order, s + 1, left)
        h = next_log_snr[s] - log_snr[s]
        phi_1 = np.expm1(-h)
        # Divided differences of x_start over log SNR, in units of h, as rows over
        # (x_start_s, x_start_{s-1}, x_start_{s-2}).
        rows = np.zeros((3, 3))
        rows[0, 0] = -alpha[s] * phi_1
        if step_order == 2:
            first = np.array([1.0, -1.0, 0.0]) * h / (log_snr[s] - log_snr[s - 1])
            rows[1] = -0.5 * alpha[s] * phi_1 * first
        elif step_order == 3:
            h_0 = log_snr[s] - log_snr[s - 1]
            h_1 = log_snr[s - 1] - log_snr[s - 2]
            near = np.array([1.0, -1.0, 0.0]) * h / h_0
            far = np.array([0.0, 1.0, -1.0]) * h / h_1
            first = near + h_0 / (h_0 + h_1) * (near - far)
            second = h / (h_0 + h_1) * (near - far)
            rows[1] = alpha[s] * (phi_1 / h + 1.0) * first
            rows[2] = -alpha[s] * ((phi_1 + h) / h**2 - 0.5) * second
        x_start_coefs[s] = rows.sum(axis=0)[:order]
    x_coef = sigma / np.sqrt(1.0 - alphas_cumprod)
    return Coefficients(x_coef, x_start_coefs, np.zeros(steps))


# ---- Samplers of a flow: t goes from 0, the noise, to 1, and velocity = (x_start - x) / (1 - t) --


def _uniform_times(steps):
    """0, 1/S, ... (S - 1)/S: SiT's ODE with --num-sampling-steps S + 1, whose last point is 1."""
    return np.arange(steps) / steps


def _euler(process, settings, timesteps):
    """dx = velocity dt."""
    share = np.diff(timesteps, append=1.0) / (1.0 - timesteps)
    return Coefficients(1.0 - share, share[:, None], np.zeros(len(timesteps)))


def _paired_times(steps):
    """Both ends of each interval, 0, h, h, 2h, ... 1: a step looks at each of them."""
    if steps % 2:
        raise ValueError(
            f"steps = {steps}, but sampler = heun calls the model twice a step; name an even number"
        )
    return np.repeat(np.linspace(0.0, 1.0, steps // 2 + 1), 2)[1:-1]


def _heun(process, settings, timesteps):
    """Heun's rule, x += h (v_0 + v_1) / 2, where v_1 is that at the point that Euler's step finds.

    Its two evaluations are two steps here, and it mixes the model's outputs: at t = 1 the velocity
    does not follow from x_start.
    """
    begin = timesteps[::2]
    end = timesteps[1::2]
    if (begin[1:] != end[:-1]).any():
        raise ValueError(f"timesteps of heun must be both ends of each step, got {timesteps}")
    coefs = np.zeros((len(begin), 2, 2))
    coefs[:, 0, 0] = end - begin  # Euler's step, to v_1's point
    coefs[:, 1] = (end - begin)[:, None] * [0.5, -0.5]  # from there, half of the way back
    steps = len(timesteps)
    return Coefficients(np.ones(steps), coefs.reshape(steps, 2), np.zeros(steps))


def _stochastic_times(steps):
    """SiT's grid for its SDE: `LAST_STEP` is left for the last evaluation."""
    if steps < 2:
        raise ValueError(f"steps = {steps}, but sampler = euler_maruyama needs at least 2")
    return np.linspace(0.0, 1.0 - LAST_STEP, steps)


def _euler_maruyama(process, settings, timesteps):
    """SiT's SDE: dx = (velocity + w score) dt + sqrt(2 w) dW with w = 1 - t.

    The score is (t velocity - x) / (1 - t), which makes the drift (1 + t) velocity - x. The last
    step has no noise.
    """
    dt = np.diff(timesteps, append=1.0)
    share = dt * (1.0 + timesteps) / (1.0 - timesteps)
    return Coefficients(1.0 - dt - share, share[:, None], np.sqrt(2.0 * (1.0 - timesteps) * dt))


class SamplerRow(NamedTuple):
    """A sampler, and the timesteps that it visits by default: those of a spacing, or its own."""

    coefficients: Callable[..., Coefficients]  # of (process, settings, timesteps)
    spacing: str = ""
    skips_zero: bool = False  # see `space_timesteps`
    own_timesteps: Callable[[int], np.ndarray] | None = None  # of the number of steps
    mixes_outputs: bool = False  # the rule is of the model's outputs in place of x_start


# The default timesteps are DiT's own respacing, those of diffusers' DPMSolverMultistepScheduler,
# and SiT's.
SAMPLERS = {
    "ddpm": SamplerRow(_ddpm, "respaced"),
    "ddim": SamplerRow(_ddim, "respaced"),
    "dpm++": SamplerRow(_dpm_solver, "linspace", skips_zero=True),
    "euler": SamplerRow(_euler, own_timesteps=_uniform_times),
    "heun": SamplerRow(_heun, own_timesteps=_paired_times, mixes_outputs=True),
    "euler_maruyama": SamplerRow(_euler_maruyama, own_timesteps=_stochastic_times),
}


def make_grid(
    process: Process, settings: SamplerSettings, *, timesteps: np.ndarray | None = None
) -> Grid:
    """Builds the table of a sampler from the process that the model was trained on.

    Args:
      settings: `variance` must be named for DDPM.
      timesteps: (steps,) to visit instead of those of a spacing, from most noise to least.
    Raises: ValueError for a sampler that the process does not offer, or timesteps that are not
      `steps` ordered ones of the process.
    """
    if settings.sampler not in process.samplers:
        raise ValueError(
            f"sampler = {settings.sampler}, but {type(process).__name__} offers "
            f"{', '.join(process.samplers)}"
        )
    row = SAMPLERS[settings.sampler]
    steps = settings.steps
    first, last = process.time_range
    if row.own_timesteps and settings.spacing:
        raise ValueError(
            f"spacing = {settings.spacing}, but sampler = {settings.sampler} has timesteps of its "
            f"own; leave it empty"
        )
    if row.mixes_outputs and settings.clip_denoised:
        raise ValueError(
            f"clip_denoised = True, but sampler = {settings.sampler} does not look at the "
            f"predicted image; take euler"
        )
    if timesteps is None and row.own_timesteps:
        timesteps = row.own_timesteps(steps)
    elif timesteps is None:
        spacing = settings.spacing or row.spacing
        timesteps = space_timesteps(int(first) + 1, steps, spacing, skip_zero=row.skips_zero)
    timesteps = np.asarray(timesteps)
    is_whole = (timesteps == timesteps.round()).all()
    timesteps = timesteps.astype(np.int32 if is_whole else np.float64)
    # JAX would clamp an index outside the schedule without a word.
    low, high = sorted((first, last))
    is_inside = timesteps.min() >= low and timesteps.max() <= high
    strides = np.diff(timesteps) * np.sign(last - first)
    # Heun's ends of a step are visited once more, as the next one's beginning.
    is_ordered = (strides >= 0 if row.mixes_outputs else strides > 0).all()
    if len(timesteps) != steps or not is_inside or not is_ordered:
        order = "decreasing" if last < first else "increasing"
        raise ValueError(
            f"timesteps must be {steps} {order} ones in [{low:g}, {high:g}], "
            f"got {timesteps.tolist()}"
        )
    table = row.coefficients(process, settings, timesteps)
    table.noise_scale[-1] = 0.0
    x_start_from_x, x_start_from_output = process.x_start_columns(timesteps)
    return Grid(
        # float32 holds them to 3e-5; bfloat16 would round 999 to 1000.
        timesteps=timesteps if is_whole else timesteps.astype(np.float32),
        x_start_from_x=x_start_from_x,
        x_start_from_output=x_start_from_output,
        mixes_outputs=row.mixes_outputs,
        **table._asdict(),
    )


# ---- Guidance and the scan -----------------------------------------------------------------------


class Guidance(NamedTuple):
    """How strong guidance is at each step: what may change without another program.

    Attributes:
        scale: () float32, cfg_scale.
        is_guided: (S,) bool, the steps at which the model sees each image twice.
    """

    scale: Any
    is_guided: Any

    @classmethod
    def of(cls, grid: Grid, scale: float, interval: tuple[float, float]) -> "Guidance":
        """Guidance where low <= t <= high; nowhere for a scale of 1. NumPy arrays."""
        low, high = interval
        is_inside = (grid.timesteps >= low) & (grid.timesteps <= high)
        return cls(np.float32(scale), is_inside & (scale != 1.0))


def guide(
    model_fn: Callable[..., jax.Array],
    x: jax.Array,
    t: jax.Array,
    condition: Condition,
    cfg_scale: float | jax.Array,
    cfg_channels: str,
) -> jax.Array:
    """Classifier-free guidance, both predictions in one batch; arXiv 2207.12598.

    On the guided channels uncond + cfg_scale (cond - uncond). Every other channel, the predicted
    variance among them, is the conditional one's.

    Args:
      model_fn: (x, t, condition, drop) -> (2B, h, w, C or 2C).
      x: (B, h, w, C). t: (B,). condition: arrays (B, ...).
      cfg_channels: "all", or "3": DiT guides the first three channels of four. Its published
        numbers need that; a scale of 1 + s on three channels is about 1 + 3s/4 on all four.
    Returns: (B, h, w, C or 2C).
    """
    B = x.shape[0]
    C = x.shape[-1]
    # Pairs side by side, not one half after the other: both rows of an image stay on the device
    # that holds it.
    pairs = {name: jnp.repeat(value, 2, axis=0) for name, value in condition.items()}
    drop = jnp.tile(jnp.array([False, True]), B)
    out = model_fn(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2, axis=0), pairs, drop)
    cond, uncond = jnp.moveaxis(out.reshape(B, 2, *out.shape[1:]), 1, 0)
    guided = C if cfg_channels == "all" else min(3, C)
    mixed = uncond[..., :guided] + cfg_scale * (cond - uncond)[..., :guided]
    return jnp.concatenate([mixed, cond[..., guided:]], axis=-1)


def step_noise(rng_keys: jax.Array, step: jax.Array | int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise (B, *shape) float32; image i's depends on rng_keys[i] and the step.

    Step 0 is the noise that sampling starts from. Sampling step s, from 0, adds that of s + 1.
    """

    def one(key):
        return jax.random.normal(jax.random.fold_in(key, step), shape, jnp.float32)

    return jax.vmap(one)(rng_keys)


def sample(
    model_fn: Callable[..., jax.Array],
    rng_keys: jax.Array,
    condition: Condition,
    shape: tuple[int, ...],
    grid: Grid,
    settings: SamplerSettings,
    *,
    guidance: Guidance | None = None,
    noise: jax.Array | None = None,
) -> jax.Array:
    """Draws images; a pure function of its arguments, to be called under jit.

    The image is float32 from first to last, whatever type the model works in.

    Args:
      model_fn: (x (B, h, w, C) float32, t (B,), condition, drop (B,) bool) to an output of
        the process. It sees 2B images at the steps that are guided.
      rng_keys: (B,) keys, one an image: fold_in(root, the image's number).
      condition: arrays (B, ...). shape: (h, w, C) of one image.
      grid: the sampler, from `make_grid`. settings: guidance and clipping are read here.
      guidance: in place of that of the settings; may be traced.
      noise: (B, h, w, C) to start from, in place of the keys' own.
    Returns: (B, h, w, C) float32.
    Raises: ValueError if the grid needs a variance that the model does not give.
    """
    if guidance is None:
        guidance = Guidance.of(grid, settings.cfg_scale, settings.cfg_interval)
    # Known when it is traced: then a sampler that always guides, or never, needs no branch.
    is_guided = guidance.is_guided
    always = None
    if isinstance(is_guided, np.ndarray) and is_guided.all() == is_guided.any():
        always = bool(is_guided.all())
    step = make_step(
        model_fn,
        rng_keys,
        condition,
        StepKind.of(grid, settings),
        scale=guidance.scale,
        is_guided=always,
    )
    x = step_noise(rng_keys, 0, shape) if noise is None else jnp.asarray(noise, jnp.float32)

    def without_x_start(carry, row):
        return step(carry, row)[0], None

    start = Progress(x, no_past(x, grid.x_start_coefs.shape[1]))
    end, _ = jax.lax.scan(without_x_start, start, table_of(grid, guidance))
    return end.x


# ---- One step, which the scan runs, and whoever wants to see the image on its way ----------------


class Progress(NamedTuple):
    """An image between two steps."""

    x: jax.Array  # (B, h, w, C) float32
    # (order - 1, B, h, w, C) float32, of the steps before, newest first; outputs where the
    # rule mixes these
    past_x_starts: jax.Array


class StepKind(NamedTuple):
    """What the program of a step depends on; all else are numbers, which it takes as arguments."""

    learned_noise_scale: Callable[..., jax.Array] | None  # None: the noise is that of the table
    needs_noise: bool
    order: int  # x_starts that a step mixes
    mixes_outputs: bool  # it mixes the model's outputs in their place
    clip_denoised: bool
    cfg_channels: str

    @classmethod
    def of(cls, grid: Grid, settings: SamplerSettings) -> "StepKind":
        is_learned = grid.log_variance_bounds is not None
        return cls(
            grid.learned_noise_scale if is_learned else None,
            bool(is_learned or grid.noise_scale.any()),
            grid.x_start_coefs.shape[1],
            grid.mixes_outputs,
            settings.clip_denoised,
            settings.cfg_channels,
        )


def no_past(x: jax.Array, order: int) -> jax.Array:
    """What stands for the x_starts before the first step."""
    return jnp.zeros((order - 1, *x.shape), jnp.float32)


def table_of(grid: Grid, guidance: Guidance) -> dict[str, jax.Array]:
    """The rows of a grid, (S, ...), by name: what `make_step`'s function takes one of."""
    steps = len(grid.timesteps)
    table: dict[str, Any] = {
        "step": np.arange(steps, dtype=np.int32),
        "timestep": grid.timesteps,
        "is_guided": guidance.is_guided,
        "is_not_last": np.arange(steps) < steps - 1,
        "x_start_from_x": grid.x_start_from_x,
        "x_start_from_output": grid.x_start_from_output,
        "x_coef": grid.x_coef,
        "x_start_coefs": grid.x_start_coefs,
        "noise_scale": grid.noise_scale,
    }
    if grid.log_variance_bounds is not None:
        table["log_variance_bounds"] = grid.log_variance_bounds
    return {name: _on_device(column) for name, column in table.items()}


def make_step(
    model_fn: Callable[..., jax.Array],
    rng_keys: jax.Array,
    condition: Condition,
    kind: StepKind,
    *,
    scale: Any,
    is_guided: bool | None = None,
) -> Callable[[Progress, dict[str, jax.Array]], tuple[Progress, jax.Array]]:
    """The step of every sampler, (progress, row of the table) to (progress, x_start).

    Args:
      model_fn, rng_keys, condition: as for `sample`.
      scale: of guidance. is_guided: at every step, or at none; None: the row says it.
    Returns: a function for `lax.scan`; x_start (B, h, w, C) is the model's estimate of the image.
    """
    B = rng_keys.shape[0]  # may be symbolic: `len` would want a number

    def plain(x, t):
        return model_fn(x, t, condition, jnp.zeros((B,), bool))

    def guided(x, t):
        return guide(model_fn, x, t, condition, scale, kind.cfg_channels)

    def step(progress, row):
        x = progress.x
        C = x.shape[-1]
        t = jnp.full((B,), row["timestep"])
        if is_guided is None:
            out = jax.lax.cond(row["is_guided"], guided, plain, x, t)
        else:
            out = guided(x, t) if is_guided else plain(x, t)
        out = out.astype(jnp.float32)
        x_start = row["x_start_from_x"] * x + row["x_start_from_output"] * out[..., :C]
        if kind.clip_denoised:
            x_start = jnp.clip(x_start, -1.0, 1.0)
        newest = out[..., :C] if kind.mixes_outputs else x_start
        x_starts = jnp.concatenate([newest[None], progress.past_x_starts])  # (order, B, h, w, C)
        mixed = jnp.einsum("j,jbhwc->bhwc", row["x_start_coefs"], x_starts, precision="highest")
        x = row["x_coef"] * x + mixed
        if kind.learned_noise_scale:
            noise_scale = kind.learned_noise_scale(out, row["log_variance_bounds"], C)
            noise_scale = noise_scale * row["is_not_last"]
        else:
            noise_scale = row["noise_scale"]
        if kind.needs_noise:
            x = x + noise_scale * step_noise(rng_keys, row["step"] + 1, x.shape[1:])
        return Progress(x, x_starts[:-1]), x_start

    return step


def _on_device(column: np.ndarray) -> jax.Array:
    return jnp.asarray(column, jnp.float32 if column.dtype == np.float64 else column.dtype)

"""The train state, its birth, and the one train step.

Plain diffusion is the step without a teacher; distillation is the same step with one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax import came, losses, ranges, sharding
from lit_jax.diffusion import Process
from lit_jax.models import Model, param_shapes
from lit_jax.models.autoencoder import sample_posterior
from lit_jax.models.blocks import ATTENTION, attention_error, feature_error


@flax.struct.dataclass
class TrainState:
    """Everything a run continues from; float32 but for the integer scalars."""

    step: jax.Array  # int32: steps taken, skipped ones included
    skipped: jax.Array  # int32: steps whose loss or gradient was not finite
    skipped_in_a_row: jax.Array  # int32: how many of them came last without a good one between
    params: Any
    ema_params: Any
    opt_state: Any

    def items(self) -> dict[str, Any]:
        """The trees that checkpoint.py saves, by name."""
        counters = {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        return {
            "params": self.params,
            "ema_params": self.ema_params,
            "opt_state": self.opt_state,
            "train": counters,
        }

    @classmethod
    def from_items(cls, items: dict[str, Any]) -> "TrainState":
        return cls(
            params=items["params"],
            ema_params=items["ema_params"],
            opt_state=items["opt_state"],
            **items["train"],
        )


# ---- The optimizer -------------------------------------------------------------------------------


# Steps after which the first update of CAME, of 11.1 learning rates, is not above one any more.
CAME_WARMUP = 12


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """AdamW or CAME, its schedule and clipping.

    Raises: ValueError whose text starts with the field's name.
    """

    steps: int  # of the whole run
    name: str = "adamw"  # or came, PixArt-Sigma's
    learning_rate: float = 1e-4
    inherited_rate: float = 1.0  # times that, of parameters that were inherited
    text_rate: float = 1.0  # times that, of a text encoder that is trained with the model
    b1: float = 0.9
    b2: float = 0.999
    b3: float = 0.9999  # came: of the residual
    epsilon: float = 1e-8  # adamw
    weight_decay: float = 0.0
    clip_norm: float = 0.0  # of the global gradient; 0: no clipping
    schedule: str = "constant"  # constant, or cosine to zero at `steps`
    warmup: int = 0  # steps of linear warm-up

    def __post_init__(self):
        ranges.check(
            self,
            steps=ranges.between(1, 2**31 - 2),  # the state counts them in int32
            name=ranges.one_of("adamw", "came"),
            learning_rate=ranges.NOT_NEGATIVE,
            inherited_rate=ranges.NOT_NEGATIVE,
            text_rate=ranges.NOT_NEGATIVE,
            b1=ranges.BELOW_1,
            b2=ranges.BELOW_1,
            b3=ranges.BELOW_1,
            epsilon=ranges.POSITIVE,
            weight_decay=ranges.NOT_NEGATIVE,
            clip_norm=ranges.NOT_NEGATIVE,
            schedule=ranges.one_of("constant", "cosine"),
            warmup=ranges.AT_LEAST_0,
        )
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup} is not shorter than steps = {self.steps}")
        if self.name == "came" and self.warmup < CAME_WARMUP:
            raise ValueError(
                f"warmup = {self.warmup}, but the first update of came is 11 times the learning "
                f"rate: at least {CAME_WARMUP} steps keep it below; PixArt-Sigma's warm-up is of "
                f"1000"
            )

    def remark(self, parameters: int) -> str:
        """What a user should know of these settings for a model of so many parameters, or ""."""
        # Of a gradient of the largest norm, spread evenly.
        rms = self.clip_norm * parameters**-0.5
        if self.name != "adamw" or not self.clip_norm or self.epsilon <= rms / 100:
            return ""
        return (
            f"epsilon = {self.epsilon:g} of adamw is not small beside gradients that "
            f"clip_norm = {self.clip_norm:g} leaves an rms of {rms:.1g} an element, and "
            f"shortens every update: set epsilon below {rms / 100:.0e}, or clip_norm=1.0"
        )

    def rates(self) -> optax.Schedule:
        """The learning rate of an update, by the number of good steps before it."""
        rate = self.learning_rate
        after = optax.constant_schedule(rate)
        if self.schedule == "cosine":
            after = optax.cosine_decay_schedule(rate, self.steps - self.warmup)
        if not self.warmup:
            return after
        # One step in, the rate is already rate / warmup: a first step at zero would be wasted.
        ramp = optax.linear_schedule(rate / self.warmup, rate, max(self.warmup - 1, 1))
        return optax.join_schedules([ramp, after], [self.warmup])


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The optimizer with an optional warm-up, a schedule, and clipping by the global norm."""
    # A schedule even where the rate is constant: optax then keeps a count, and the layout of the
    # optimizer state, which checkpoints hold, is the same for every run.
    if settings.name == "came":
        optimizer = optax.chain(
            came.scale_by_came(settings.b1, settings.b2, settings.b3),
            optax.add_decayed_weights(settings.weight_decay),
            optax.scale_by_learning_rate(settings.rates()),
        )
    else:
        optimizer = optax.adamw(
            settings.rates(),
            settings.b1,
            settings.b2,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
    if not settings.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


# ---- The birth of a state ------------------------------------------------------------------------


def new_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0; the EMA starts as a copy of the parameters."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        skipped=zero,
        skipped_in_a_row=zero,
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
    )


def state_shapes(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes of the whole state; nothing is computed."""
    return jax.eval_shape(lambda params: new_state(params, optimizer), param_shapes(model.config))


def with_sharding(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry their sharding.

    Orbax restores onto them, and ahead-of-time compilation takes them.
    """
    return jax.tree.map(
        lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings
    )


# ---- The step ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the step does besides the models, the process and the optimizer.

    Raises: ValueError whose text starts with the field's name.
    """

    dropout: float = 0.1  # share of conditions that are dropped, once, here
    accumulation: int = 1  # microbatches a step
    ema_decay: float = 0.9999
    ema_warmup: bool = False  # decay min(decay, (1 + step) / (10 + step)): for short runs
    noise_weight: float = 0.5  # lambda_1 of the paper's hybrid loss: of the predicted noise
    variance_weight: float = 0.05  # lambda_2
    variance_target: str = "raw"  # see losses.distillation_terms
    teacher_sees_dropped: bool = False  # False, the paper's code: the teacher is told everything
    denoising_weight: float = 1.0  # of the process's own loss
    attention_weight: float = 0.0  # of the layer-wise regression, see `blocks.attention_error`
    feature_weight: float = 0.0  # of the student's attentions in it, see `blocks.feature_error`
    inherited: tuple[str, ...] = ()  # paths whose updates the optimizer's inherited_rate scales
    scaling_factor: float = 1.0  # of latents, see `images_to_model`
    shift_factor: float = 0.0

    def __post_init__(self):
        ranges.check(
            self,
            dropout=ranges.BELOW_1,
            accumulation=ranges.AT_LEAST_1,
            ema_decay=ranges.BELOW_1,
            noise_weight=ranges.NOT_NEGATIVE,
            denoising_weight=ranges.NOT_NEGATIVE,
            attention_weight=ranges.NOT_NEGATIVE,
            feature_weight=ranges.NOT_NEGATIVE,
            variance_weight=ranges.NOT_NEGATIVE,
            variance_target=ranges.one_of(*losses.VARIANCE_TARGETS),
        )
        if not self.runs_student and not self.attention_weight:
            raise ValueError(
                "denoising_weight = 0, and so are all other weights: nothing would be learned"
            )

    def ema_of_start(self, steps: int) -> float:
        """The share that the first parameters have in the EMA after `steps` steps."""
        # The decays of a warm-up multiply to 1/2002 in five steps.
        return 0.0 if self.ema_warmup else self.ema_decay**steps

    def distillation_weight(self, term: str) -> float:
        """Of a distillation term: lambda_2 for the variance, lambda_1 for all else."""
        return self.variance_weight if term == "kd_variance" else self.noise_weight

    @property
    def runs_student(self) -> bool:
        """Whether a term needs a pass through the student: not if all are of its layers alone."""
        outputs = self.denoising_weight + self.noise_weight + self.variance_weight
        return outputs + self.feature_weight > 0


def images_to_model(
    batch: dict[str, jax.Array],
    rng: jax.Array,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> jax.Array:
    """What the model is trained on, (B, h, w, C) float32.

    Pixels in [-1, 1], or draws from the latents' posteriors as (latent - shift) * scale.

    Args: batch: "image" uint8, or "mean" and "log_variance" of latents.
    """
    if "image" in batch:
        return batch["image"].astype(jnp.float32) / 127.5 - 1.0
    mean = batch["mean"].astype(jnp.float32)
    log_variance = batch["log_variance"].astype(jnp.float32)
    return (sample_posterior(mean, log_variance, rng) - shift_factor) * scaling_factor


def make_train_step(
    model: Model,
    teacher: Model | None,
    process: Process,
    optimizer: OptimizerSettings,
    settings: StepSettings,
    mesh: jax.sharding.Mesh,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the jitted step (state, teacher_params, batch, rng) -> (state, metrics).

    The state is donated. Every draw (timestep, noise, dropped conditions, latents) is made for the
    whole batch from fold_in(rng, step): it depends neither on the mesh nor on the number of
    microbatches. A step whose loss or gradient is not finite leaves parameters, EMA and optimizer
    as they were and is counted.

    Args:
      teacher: the frozen model, or None for plain training; teacher_params is then None too.
    Returns: the step. Metrics are float32 scalars: loss, its unweighted terms, grad_norm,
      param_norm, update_norm, learning_rate.
    """
    rows = sharding.batch_sharding(mesh)
    tx = make_optimizer(optimizer)
    condition_fields = tuple(model.config.condition_shapes(1))
    teacher_apply: Any = jax.named_scope("teacher")(teacher.apply) if teacher else None
    compares_features = teacher is not None and settings.feature_weight > 0
    compares_layers = teacher is not None and settings.attention_weight > 0

    def loss_fn(params, teacher_params, x_start, noise, t, condition, drop):
        x_t = process.perturb(x_start, t, noise)
        terms: dict[str, jax.Array] = {}
        weights: dict[str, float] = {}
        output: Any = None
        own: Any = {}
        # A regression of the layers alone needs no pass through the student.
        if teacher is None or settings.runs_student:
            told = ({"params": params}, x_t, t, condition, drop)
            output, own = _apply(model.apply, told, watch=compares_features)
            terms = process.loss(output, x_start, x_t, t, noise)
            weights = dict.fromkeys(terms, settings.denoising_weight if teacher else 1.0)

        seen: Any = {}
        teacher_output: Any = None
        if teacher is not None:
            frozen = {"params": jax.lax.stop_gradient(teacher_params)}
            teacher_drop = drop if settings.teacher_sees_dropped else jnp.zeros_like(drop)
            told = (frozen, x_t, t, condition, teacher_drop)
            watch = compares_features or compares_layers
            teacher_output, seen = _apply(teacher_apply, told, watch=watch)
        if compares_layers:
            patch = model.config.patch_size
            grid = (x_t.shape[1] // patch, x_t.shape[2] // patch)
            terms["kd_attention"] = attention_error(model, params, seen[ATTENTION], grid)
            weights["kd_attention"] = settings.attention_weight
        if compares_features:
            terms["kd_features"] = feature_error(own[ATTENTION], seen[ATTENTION])
            weights["kd_features"] = settings.feature_weight
        if teacher is not None and output is not None:
            distillation: dict[str, jax.Array] = losses.distillation_terms(
                process,
                output,
                teacher_output,
                t,
                in_channels=x_t.shape[-1],
                variance_target=settings.variance_target,
            )
            terms |= distillation
            weights |= {name: settings.distillation_weight(name) for name in distillation}
        means = {name: value.mean() for name, value in terms.items()}
        loss = sum(weights[name] * value for name, value in means.items())
        return loss, {"loss": loss} | means

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def train_step(state, teacher_params, batch, rng):
        # ---- Draws: of the whole batch, before it is split ---------------------------------------
        step_rng = jax.random.fold_in(rng, state.step)
        t_rng, noise_rng, dropout_rng, latent_rng = jax.random.split(step_rng, 4)
        x_start = images_to_model(batch, latent_rng, settings.scaling_factor, settings.shift_factor)
        condition = {name: batch[name] for name in condition_fields}
        B = len(x_start)
        t = process.draw_t(t_rng, B)
        noise = jax.random.normal(noise_rng, x_start.shape)
        drop = jax.random.bernoulli(dropout_rng, settings.dropout, (B,))
        draws = (x_start, noise, t, condition, drop)
        draws = jax.lax.with_sharding_constraint(draws, rows)

        # ---- Gradients: at once, or microbatch by microbatch -------------------------------------
        if settings.accumulation == 1:
            grads, terms = grad_fn(state.params, teacher_params, *draws)
        else:
            grads, terms = _accumulate(
                grad_fn, settings.accumulation, state.params, teacher_params, draws
            )
        grads = jax.lax.with_sharding_constraint(grads, sharding.fsdp_sharding(grads, mesh))

        # ---- Update: kept only if loss and gradient are finite -----------------------------------
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(terms["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        updates = _scaled(updates, settings.inherited, optimizer.inherited_rate)
        if (name := model.config.text_encoder_name) and optimizer.text_rate != 1:
            scaled = jax.tree.map(lambda x: optimizer.text_rate * x, updates[name])
            updates = updates | {name: scaled}
        params = optax.apply_updates(state.params, updates)
        # Neither weight decay nor the rounding of an average may move what is not trained.
        params = _with_leaves_of(params, state.params, model.config.frozen)
        decay = jnp.float32(settings.ema_decay)
        if settings.ema_warmup:
            decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = jax.tree.map(
            lambda e, p: decay * e + (1.0 - decay) * p, state.ema_params, params
        )
        ema_params = _with_leaves_of(ema_params, state.ema_params, model.config.frozen)

        def keep_if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        bad = (~finite).astype(jnp.int32)
        good_steps = state.step - state.skipped  # a skipped step does not advance the schedule
        # The norm of the parameters is that before the update. That of the new ones changes how
        # XLA fuses the update on a CPU, and with it the last bits of the EMA.
        metrics = terms | {
            "grad_norm": grad_norm,
            "param_norm": optax.global_norm(state.params),
            "update_norm": optax.global_norm(updates),
            "learning_rate": jnp.float32(optimizer.rates()(good_steps)),
        }
        new = TrainState(
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
            params=keep_if_finite(params, state.params),
            ema_params=keep_if_finite(ema_params, state.ema_params),
            opt_state=keep_if_finite(opt_state, state.opt_state),
        )
        new = jax.lax.with_sharding_constraint(new, sharding.fsdp_sharding(new, mesh))
        return new, metrics

    return jax.jit(
        sharding.on_mesh(train_step, mesh),
        donate_argnums=0,
        compiler_options=sharding.compiler_options(mesh),
    )


def _apply(apply: Any, told: tuple, *, watch: bool) -> tuple[jax.Array, Any]:
    """A model's output, and where it is watched what its attentions read and gave."""
    # Of Flax: it returns the collections that are asked for beside the output.
    return apply(*told, mutable=[ATTENTION]) if watch else (apply(*told), {})


def _scaled(tree: Any, paths: tuple[str, ...], factor: float) -> Any:
    """The tree with the leaves at some paths multiplied by a factor."""
    leaves = flatten_dict(tree, sep="/")
    return unflatten_dict(leaves | {path: factor * leaves[path] for path in paths}, sep="/")


def _with_leaves_of(tree: Any, other: Any, paths: tuple[str, ...]) -> Any:
    """The tree with the leaves at some paths taken from another one."""
    if not paths:
        return tree
    leaves = flatten_dict(other, sep="/")
    return unflatten_dict(
        flatten_dict(tree, sep="/") | {path: leaves[path] for path in paths}, sep="/"
    )


def _accumulate(grad_fn, count, params, teacher_params, draws):
    """Means of gradients and terms over `count` microbatches, one after the other."""

    def split(x):
        # Microbatch i takes every count-th row: each device keeps working on rows that it holds.
        return x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1)

    micro = jax.tree.map(split, draws)
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(grad_fn, params, teacher_params, *first)

    def add(total, rows):
        return jax.tree.map(jnp.add, total, grad_fn(params, teacher_params, *rows)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), micro)
    return jax.tree.map(lambda x: x / count, total)

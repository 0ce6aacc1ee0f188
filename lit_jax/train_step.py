"""The train state, its birth on the mesh, and the one train step: plain diffusion, or distillation when a teacher is given."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lit_jax import losses, sharding
from lit_jax.diffusion import Diffusion, q_sample
from lit_jax.models.autoencoder import sample_posterior
from lit_jax.models.dit import DiT


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


def make_optimizer(
    *,
    learning_rate: float,
    b1: float,
    b2: float,
    epsilon: float,
    weight_decay: float,
    clip_norm: float,
    schedule: str,
    warmup: int,
    steps: int,
) -> optax.GradientTransformation:
    """AdamW with an optional linear warm-up, a constant or cosine schedule, and global-norm clipping.

    Raises: ValueError for an unknown schedule or a warm-up that is longer than the run.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"optimizer.schedule must be constant or cosine, got {schedule!r}")
    if not 0 <= warmup < steps:
        raise ValueError(f"optimizer.warmup = {warmup} is not shorter than train.steps = {steps}")
    after = (
        optax.constant_schedule(learning_rate)
        if schedule == "constant"
        else optax.cosine_decay_schedule(learning_rate, steps - warmup)
    )
    # One step in, the rate is already rate / warmup: a first step at zero would be wasted.
    ramp = optax.linear_schedule(learning_rate / max(warmup, 1), learning_rate, max(warmup - 1, 1))
    rate = optax.join_schedules([ramp, after], [warmup]) if warmup else after
    adamw = optax.adamw(rate, b1, b2, eps=epsilon, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw


def init_params(model: DiT, rng: jax.Array, input_size: int) -> Any:
    """Fresh parameters, float32."""
    x = jnp.zeros((1, input_size, input_size, model.in_channels))
    return model.init(rng, x, jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32))["params"]


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


def state_shapes(
    model: DiT, optimizer: optax.GradientTransformation, input_size: int
) -> TrainState:
    """Shapes of the whole state, without computing anything."""
    return jax.eval_shape(
        lambda: new_state(init_params(model, jax.random.key(0), input_size), optimizer)
    )


def with_sharding(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry their sharding: what Orbax restores onto and what ahead-of-time compilation takes."""
    return jax.tree.map(
        lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings
    )


def images_to_model(
    batch: dict[str, jax.Array],
    rng: jax.Array,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> jax.Array:
    """What the model is trained on, (B, h, w, C) float32: pixels in [-1, 1], or scaled draws from the latents' posteriors.

    Args: batch: "image" uint8, or "mean" and "log_variance" of latents, which become (latent - shift) * scale.
    """
    if "image" in batch:
        return batch["image"].astype(jnp.float32) / 127.5 - 1.0
    mean, log_variance = (batch[name].astype(jnp.float32) for name in ("mean", "log_variance"))
    return (sample_posterior(mean, log_variance, rng) - shift_factor) * scaling_factor


def make_train_step(
    model: DiT,
    optimizer: optax.GradientTransformation,
    diffusion: Diffusion,
    *,
    teacher: DiT | None,
    noise_weight: float,
    variance_weight: float,
    variance_target: str,
    teacher_sees_dropped_labels: bool,
    label_dropout: float,
    accumulation: int,
    ema_decay: float,
    ema_warmup: bool,
    mesh: jax.sharding.Mesh,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> Callable:
    """Builds the jitted step (state, teacher_params, batch, rng) -> (state, metrics); the state is donated.

    Every draw (timestep, noise, dropped labels, latents) is made for the whole batch from fold_in(rng, step): they
    depend neither on the mesh nor on the number of microbatches. A step whose loss or gradient is not finite
    leaves parameters, EMA and optimizer as they were and is counted.

    Args:
      teacher: the frozen model, or None for plain diffusion training; teacher_params is then None.
      noise_weight, variance_weight: lambda_1 and lambda_2 of the paper's hybrid loss.
      label_dropout: share of labels that become the null class, once, here.
      scaling_factor, shift_factor: of latents, see `images_to_model`.
    Returns: the step; metrics are float32 scalars: loss, its unweighted terms, grad_norm.
    """
    weights = {"mse": 1.0, "vb": 1.0, "kd_noise": noise_weight, "kd_variance": variance_weight}
    rows = sharding.batch_sharding(mesh)

    def loss_fn(params, teacher_params, x_start, noise, t, y, label):
        x_t = q_sample(diffusion, x_start, t, noise)
        output = model.apply({"params": params}, x_t, t, y)
        terms = losses.denoising_loss(diffusion, output, x_start, x_t, t, noise)
        if teacher is not None:
            teacher_y = y if teacher_sees_dropped_labels else label
            teacher_output = teacher.apply(
                {"params": jax.lax.stop_gradient(teacher_params)}, x_t, t, teacher_y
            )
            terms |= losses.distillation_loss(
                diffusion,
                output,
                teacher_output,
                t,
                in_channels=model.in_channels,
                variance_target=variance_target,
            )
        terms = {name: value.mean() for name, value in terms.items()}
        loss = sum(weights[name] * value for name, value in terms.items())
        return loss, {"loss": loss} | terms

    value_and_grad = jax.grad(loss_fn, has_aux=True)

    def train_step(state, teacher_params, batch, rng):
        t_rng, noise_rng, dropout_rng, latent_rng = jax.random.split(
            jax.random.fold_in(rng, state.step), 4
        )
        x_start, label = (
            images_to_model(batch, latent_rng, scaling_factor, shift_factor),
            batch["label"],
        )
        B = len(label)
        t = jax.random.randint(t_rng, (B,), 0, diffusion.num_steps)
        noise = jax.random.normal(noise_rng, x_start.shape)
        y = jnp.where(
            jax.random.bernoulli(dropout_rng, label_dropout, (B,)), model.num_classes, label
        )
        draws = jax.lax.with_sharding_constraint((x_start, noise, t, y, label), rows)

        if accumulation == 1:
            grads, terms = value_and_grad(state.params, teacher_params, *draws)
        else:
            # Microbatch i takes every accumulation-th row, so that each device keeps working on rows it holds.
            micro = jax.tree.map(
                lambda x: x.reshape(B // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1),
                draws,
            )
            zeros = jax.tree.map(
                jnp.zeros_like,
                jax.eval_shape(
                    value_and_grad,
                    state.params,
                    teacher_params,
                    *jax.tree.map(lambda x: x[0], micro),
                ),
            )

            def accumulate(total, rows):
                return jax.tree.map(
                    jnp.add, total, value_and_grad(state.params, teacher_params, *rows)
                ), None

            total, _ = jax.lax.scan(accumulate, zeros, micro)
            grads, terms = jax.tree.map(lambda x: x / accumulation, total)

        grads = jax.lax.with_sharding_constraint(grads, sharding.fsdp_sharding(grads, mesh))
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(terms["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.float32(ema_decay)
        if ema_warmup:
            decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = jax.tree.map(
            lambda e, p: decay * e + (1.0 - decay) * p, state.ema_params, params
        )

        def keep_if_finite(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        bad = (~finite).astype(jnp.int32)
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
            params=keep_if_finite(params, state.params),
            ema_params=keep_if_finite(ema_params, state.ema_params),
            opt_state=keep_if_finite(opt_state, state.opt_state),
        )
        return jax.lax.with_sharding_constraint(
            state, sharding.fsdp_sharding(state, mesh)
        ), terms | {"grad_norm": grad_norm}

    return jax.jit(sharding.on_mesh(train_step, mesh), donate_argnums=0)

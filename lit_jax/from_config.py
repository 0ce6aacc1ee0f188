"""What a config describes, built: the models, the optimizer, the train step, the generators. All jobs build them here."""
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from lit_jax import generate, sharding, step
from lit_jax.diffusion import Diffusion
from lit_jax.models.dit import SIZES, DiT, make_dit

# What a teacher must share with the student, whatever its size.
SHARED_FIELDS = ("in_channels", "num_classes", "learn_sigma")
# What it has like the student as long as no checkpoint says otherwise.
TEACHER_DEFAULTS = ("patch_size", "qkv_bias", "timestep_freq_shift", "mlp_norm_epsilon")


def check_fields(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for values that cannot work, naming the field and both values."""
    train = config.train
    sharding.check_batch(train.batch_size, mesh)
    for name in ("steps", "accumulation", "log_every"):
        if train[name] < 1:
            raise ValueError(f"train.{name} must be at least 1, got {train[name]}")
    if train.batch_size % (mesh.size * train.accumulation):
        raise ValueError(f"train.batch_size = {train.batch_size} is not a multiple of train.accumulation = "
                         f"{train.accumulation} times the {mesh.size} devices of the mesh")
    if not 0 <= train.label_dropout < 1:
        raise ValueError(f"train.label_dropout must be in [0, 1), got {train.label_dropout}")
    if not 0 <= config.ema.decay < 1:
        raise ValueError(f"ema.decay must be in [0, 1), got {config.ema.decay}")


def student(config: ConfigDict) -> DiT:
    """The model that is trained."""
    fields = {name: value for name, value in config.model.items() if name != "input_size"}
    model = make_dit(remat=config.train.remat, **fields)
    if config.model.input_size % model.patch_size:
        raise ValueError(f"model.patch_size = {model.patch_size} does not divide model.input_size = "
                         f"{config.model.input_size}")
    return model


def teacher(config: ConfigDict, model: DiT, architecture: dict[str, Any] | None = None) -> DiT:
    """The teacher of `model`: what its checkpoint's architecture says or, without one, a DiT of the config's size.

    Raises: ValueError where checkpoint, config and student contradict each other.
    """
    stated = config.teacher
    if architecture is None:
        size = {"size": stated.size or config.model.size}
        if not stated.size:
            size |= {"depth": config.model.depth, "width": config.model.width}
        fields = {name: getattr(model, name) for name in TEACHER_DEFAULTS + SHARED_FIELDS}
        return make_dit(attention="softmax", num_heads=stated.num_heads, dtype=stated.dtype,
                        implementation=stated.implementation, **size, **fields)
    fields = {name: value for name, value in architecture.items() if name != "grid"}
    if stated.num_heads:
        fields["num_heads"] = stated.num_heads
    if not fields["num_heads"]:
        raise ValueError(f"{stated.checkpoint} does not say how many heads its width of {fields['width']} has; "
                         f"set teacher.num_heads")
    if stated.size:
        wanted = SIZES.get(stated.size)
        if wanted is None or wanted[:2] != (fields["depth"], fields["width"]):
            raise ValueError(f"teacher.size = {stated.size}, but {stated.checkpoint} has {fields['depth']} blocks of width "
                             f"{fields['width']}")
    for name in SHARED_FIELDS:
        if fields[name] != getattr(model, name):
            raise ValueError(f"model.{name} = {getattr(model, name)}, but the teacher {stated.checkpoint} has "
                             f"{fields[name]}")
    return make_dit(size="XL", dtype=stated.dtype, implementation=stated.implementation, **fields)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    return step.make_optimizer(steps=config.train.steps, **config.optimizer)


def train_step(config: ConfigDict, model: DiT, teacher: DiT | None, optimizer: optax.GradientTransformation,
               diffusion: Diffusion, mesh: jax.sharding.Mesh) -> Callable:
    """The jitted step; see `step.make_train_step`."""
    return step.make_train_step(
        model, optimizer, diffusion, teacher=teacher, mesh=mesh, label_dropout=config.train.label_dropout,
        accumulation=config.train.accumulation, ema_decay=config.ema.decay, ema_warmup=config.ema.warmup, **config.distill)


def generators(config: ConfigDict, models: dict[str, DiT], diffusion: Diffusion,
               mesh: jax.sharding.Mesh, batch_size: int) -> dict[str, generate.Generator]:
    """A generator for each model, with the config's sampler."""
    sample = config.sample
    return {name: generate.Generator(
        model, diffusion, mesh, size=config.model.input_size, seed=config.seed, batch_size=batch_size,
        sampler=sample.sampler, steps=sample.steps, cfg_scale=sample.cfg_scale, cfg_channels=sample.cfg_channels,
        cfg_interval=tuple(sample.cfg_interval), clip_denoised=sample.clip_denoised) for name, model in models.items()}

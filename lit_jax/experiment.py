"""What a config describes, built: the models, the optimizer, the train step, the generators. All jobs build them here."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from lit_jax import sampling, sharding
from lit_jax.data import dataset
from lit_jax.diffusion import Diffusion
from lit_jax.models.autoencoder import Autoencoder, make_autoencoder
from lit_jax.models.dit import SIZES, DiT, make_dit
from lit_jax.porting.read import checksum, load_params, read_autoencoder
from lit_jax.train_step import make_optimizer, make_train_step

# What a teacher must share with the student, whatever its size.
SHARED_FIELDS = ("in_channels", "num_classes", "learn_sigma")
# What it has like the student as long as no checkpoint says otherwise.
TEACHER_DEFAULTS = ("patch_size", "qkv_bias", "timestep_freq_shift", "mlp_norm_epsilon")
# Where the attentions that are written for one kind of device run.
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}


def check_batches(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for a batch that the devices do not divide, naming the field and both values."""
    train = config.train
    sharding.check_batch(train.batch_size, mesh)
    if train.batch_size % (mesh.size * train.accumulation):
        raise ValueError(
            f"train.batch_size = {train.batch_size} is not a multiple of train.accumulation = "
            f"{train.accumulation} times the {mesh.size} devices of the mesh"
        )
    if config.report.num_images or config.evaluate.every:
        sharding.check_batch(config.sample.batch_size, mesh, "sample.batch_size")


def check_platform(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Raises ValueError for an attention that is asked for by name and that the devices of the mesh cannot run."""
    platform = mesh.devices.flat[0].platform
    for field, name in (
        ("model", config.model.implementation),
        ("teacher", config.teacher.implementation),
    ):
        wanted = PLATFORMS.get(name, platform)
        if wanted != platform:
            raise ValueError(
                f"{field}.implementation = {name} runs on {wanted} devices, these are {platform} devices"
            )


def student(config: ConfigDict) -> DiT:
    """The model that is trained."""
    fields = {name: value for name, value in config.model.items() if name != "input_size"}
    model = make_dit(remat=config.train.remat, **fields)
    if config.model.input_size % model.patch_size:
        raise ValueError(
            f"model.patch_size = {model.patch_size} does not divide model.input_size = "
            f"{config.model.input_size}"
        )
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
        return make_dit(
            attention="softmax",
            num_heads=stated.num_heads,
            dtype=stated.dtype,
            implementation=stated.implementation,
            **size,
            **fields,
        )
    fields = {name: value for name, value in architecture.items() if name != "grid"}
    if stated.num_heads:
        fields["num_heads"] = stated.num_heads
    if not fields["num_heads"]:
        raise ValueError(
            f"{stated.checkpoint} does not say how many heads its width of {fields['width']} has; "
            f"set teacher.num_heads"
        )
    if fields["width"] % fields["num_heads"]:
        raise ValueError(
            f"teacher.num_heads = {fields['num_heads']} does not divide the width {fields['width']} of "
            f"{stated.checkpoint}"
        )
    if stated.size:
        wanted = SIZES.get(stated.size)
        if wanted is None or wanted[:2] != (fields["depth"], fields["width"]):
            raise ValueError(
                f"teacher.size = {stated.size}, but {stated.checkpoint} has {fields['depth']} blocks of width "
                f"{fields['width']}"
            )
    for name in SHARED_FIELDS:
        if fields[name] != getattr(model, name):
            raise ValueError(
                f"model.{name} = {getattr(model, name)}, but the teacher {stated.checkpoint} has "
                f"{fields[name]}"
            )
    return make_dit(size="XL", dtype=stated.dtype, implementation=stated.implementation, **fields)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    return make_optimizer(steps=config.train.steps, **config.optimizer)


def train_step(
    config: ConfigDict,
    model: DiT,
    teacher: DiT | None,
    optimizer: optax.GradientTransformation,
    diffusion: Diffusion,
    mesh: jax.sharding.Mesh,
    scaling_factor: float = 1.0,
    shift_factor: float = 0.0,
) -> Callable:
    """The jitted step; see `train_step.make_train_step`. The two factors are those of the data (`dataset.Dataset`)."""
    return make_train_step(
        model,
        optimizer,
        diffusion,
        teacher=teacher,
        mesh=mesh,
        label_dropout=config.train.label_dropout,
        accumulation=config.train.accumulation,
        ema_decay=config.ema.decay,
        ema_warmup=config.ema.warmup,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        **config.distill,
    )


def autoencoder(
    config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Autoencoder | None, dict[str, Any] | None]:
    """The autoencoder, its parameters on every device of the mesh, and what identifies it; (None, None) for pixels.

    Latents depend on the encoder alone, so it has a hash of its own: decoders fine-tuned for one encoder share latents.
    """
    wanted = config.autoencoder
    if not wanted.checkpoint:
        return None, None
    source = read_autoencoder(wanted.checkpoint, scaling_factor=wanted.scaling_factor)
    channels = source.architecture["latent_channels"]
    if channels != config.model.in_channels:
        raise ValueError(
            f"model.in_channels = {config.model.in_channels}, but the latents of autoencoder.checkpoint = "
            f"{wanted.checkpoint} have {channels} channels"
        )
    encoder = {
        name: tree for name, tree in source.params.items() if name in ("encoder", "quant_conv")
    }
    params = load_params(
        source.params, jax.tree.map(lambda _: sharding.replicated(mesh), source.params)
    )
    built = make_autoencoder(
        params,
        source.architecture,
        dtype=wanted.dtype,
        slice_size=wanted.slice_size,
        tile_size=wanted.tile_size,
    )
    return built, {
        "name": pathlib.Path(wanted.checkpoint).name,
        "sha256": source.report.checksum,
        "encoder_sha256": checksum(encoder),
        "scaling_factor": built.scaling_factor,
        "shift_factor": built.shift_factor,
        "dtype": wanted.dtype,
        "tile_size": wanted.tile_size,
    }


def check_data(
    config: ConfigDict,
    source: dataset.ImageDataset | dataset.LatentDataset,
    identity: dict[str, Any] | None,
) -> None:
    """Raises ValueError where the data are not what model and autoencoder (`identity`, see `autoencoder`) work on."""
    wanted = (config.model.input_size, config.model.input_size, config.model.in_channels)
    latents = isinstance(source, dataset.LatentDataset)
    kind = "latents" if latents else "images"
    if source.image_shape != wanted:
        raise ValueError(
            f"model.input_size and model.in_channels make images of {wanted}, the {kind} of "
            f"data.name = {source.name} are {source.image_shape}"
        )
    if source.num_classes != config.model.num_classes:
        raise ValueError(
            f"model.num_classes = {config.model.num_classes}, but data.name = {source.name} has "
            f"{source.num_classes} classes"
        )
    checkpoint = config.autoencoder.checkpoint
    if not latents:
        if identity:
            raise ValueError(
                f"autoencoder.checkpoint = {checkpoint}, but data.name = {source.name} holds images, not "
                f"latents; --mode=prepare encodes them, or clear autoencoder.checkpoint to train on pixels"
            )
        return
    if identity is None:
        shown = [
            name
            for name, count in (
                ("train.preview_every", config.train.preview_every),
                ("report.num_images", config.report.num_images),
                ("evaluate.every", config.evaluate.every),
            )
            if count
        ]
        if shown:
            raise ValueError(
                f"data.name = {source.name} holds latents of {source.autoencoder['name']}, but "
                f"autoencoder.checkpoint is empty: name it, or set {' and '.join(shown)} to 0"
            )
    encoder = source.autoencoder["name"]
    for name in ("encoder_sha256", "scaling_factor", "shift_factor"):
        stored = source.autoencoder[name]
        asked = identity[name] if identity else config.autoencoder.get(name) or stored
        if asked != stored:
            raise ValueError(
                f"data.name = {source.name} holds latents of {encoder} with {name} {stored}, but "
                f"the autoencoder of the config ({checkpoint or 'no checkpoint'}) has {asked}"
            )
    if config.report.read_labels:
        raise ValueError(
            f"report.read_labels needs images, but data.name = {source.name} holds latents"
        )


def generators(
    config: ConfigDict,
    models: dict[str, DiT],
    diffusion: Diffusion,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    autoencoder: Autoencoder | None = None,
) -> dict[str, sampling.Sampler]:
    """A generator for each model, with the config's sampler; with an autoencoder it decodes what they draw."""
    settings = {name: config.sample[name] for name in sampling.SETTINGS}
    return {
        name: sampling.Sampler(
            model,
            diffusion,
            mesh,
            size=config.model.input_size,
            seed=config.seed,
            batch_size=batch_size,
            autoencoder=autoencoder,
            **settings,
        )
        for name, model in models.items()
    }

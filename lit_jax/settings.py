"""What a config asks for, checked once: every mistake is told before anything is read.

The library takes values and speaks of its own arguments; here, in the experiment and in the jobs,
the config's fields have their names (`naming`).
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lit_jax import fields, ranges, samplers
from lit_jax.data.raw_images import ImageSettings
from lit_jax.diffusion import PROCESSES, GaussianDiffusion, Process
from lit_jax.evaluation.evaluator import EvaluationSettings
from lit_jax.models import FAMILIES
from lit_jax.models.architecture import Architecture
from lit_jax.models.attention import ATTENTIONS, make_attention
from lit_jax.models.autoencoder import AutoencoderSettings
from lit_jax.porting.read import KEY_TABLES
from lit_jax.samplers import SamplerSettings
from lit_jax.text import TextSettings
from lit_jax.train_step import OptimizerSettings, StepSettings

# Fields of config.model that are not of the architecture.
NOT_ARCHITECTURE = ("family", "input_size", "dtype", "implementation")


@contextlib.contextmanager
def naming(group: str, **names: str) -> Iterator[None]:
    """Errors of the library that start with an argument's name get the field's name.

    `steps = 0 ...` becomes `sample.steps = 0 ...` within naming("sample").

    Args: names: the whole name of a field where it is not the group's, by the argument's.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        argument = re.match(r"([a-z]\w*)(?= = | must )", text)
        if argument is None:
            raise
        field = names.get(argument[1], f"{group}.{argument[1]}")
        rest = text[argument.end() :]
        for name, whole in names.items():  # where the error compares two of them
            rest = re.sub(rf"\b{name}(?= = )", whole, rest)
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(field + rest) from error


def check_exists(field: str, path: epath.PathLike, advice: str) -> None:
    """Raises FileNotFoundError naming the field whose file or folder is not there."""
    if not epath.Path(path).exists():
        raise FileNotFoundError(f"{field} = {path}: no such file or folder; {advice}")


@contextlib.contextmanager
def reading(field: str, path: epath.PathLike, advice: str, **names: str) -> Iterator[None]:
    """Errors of what reads the file or folder that a field names get the field's name.

    `PATH: no tensors` becomes `teacher.checkpoint = PATH: no tensors`.

    Args:
      advice: what a file is that is not there.
      names: those of `naming`; the reader's argument `path` is the field.
    Raises: FileNotFoundError naming the field.
    """
    check_exists(field, path, advice)
    try:
        with naming(field.split(".")[0], path=field, **names):
            yield
    except (ValueError, FileNotFoundError) as error:
        if not re.match(re.escape(str(epath.Path(path))) + r"[:/ ]", str(error)):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{field} = {error}") from error


def evaluation_settings(config: ConfigDict) -> EvaluationSettings:
    """What config.evaluate says of scores; --mode=evaluate asks for it without a model."""
    return of_group(EvaluationSettings, config.evaluate, "evaluate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The groups of a config, each as the dataclass that checks itself."""

    model: Any  # an Architecture
    process: Process  # that of what the model predicts
    sampler: SamplerSettings
    optimizer: OptimizerSettings
    step: StepSettings  # without the scale of the data, which the data tell
    text: TextSettings
    autoencoder: AutoencoderSettings
    images: ImageSettings  # of --mode=prepare; the channels are those of the autoencoder
    port: Any  # the family's Overrides


def read_settings(config: ConfigDict) -> Settings:
    """All settings of a config: a mistake in sample.* is told before hours of training.

    Raises: ValueError naming the field, before any device or file is touched.
    """
    fields.check(config)
    model = _model_config(config)
    _check_implementations(config, model)
    process = _process(config, model)
    sampler = of_group(SamplerSettings, config.sample, "sample")
    with naming("sample"):
        _check_grid(sampler, model, process)
    with naming("optimizer", steps="train.steps"):
        optimizer = OptimizerSettings(steps=config.train.steps, **config.optimizer)
    if optimizer.text_rate != 1 and not model.text_encoder_name:
        raise ValueError(
            f"optimizer.text_rate = {optimizer.text_rate:g}, but model.family = "
            f"{config.model.family} has no text encoder that is trained with it; set it to 1"
        )
    evaluation_settings(config)
    return Settings(
        model=model,
        process=process,
        sampler=sampler,
        optimizer=optimizer,
        step=_step_settings(config),
        text=of_group(TextSettings, config.text, "text"),
        autoencoder=of_group(AutoencoderSettings, config.autoencoder, "autoencoder"),
        images=_image_settings(config),
        port=_port_overrides(config, model),
    )


def of_group(settings: type, group: ConfigDict, name: str) -> Any:
    """Settings whose fields are all fields of one group of the config."""
    with naming(name):
        return settings(**{f.name: group[f.name] for f in dataclasses.fields(settings)})


def _model_config(config: ConfigDict) -> Any:
    model = config.model
    if model.family not in FAMILIES:
        raise ValueError(f"model.family must be one of {', '.join(FAMILIES)}; got {model.family!r}")
    family = FAMILIES[model.family].config
    # None: not asked for. So one config holds the fields of all families.
    asked = {n: value for n, value in model.items() if value is not None}
    architecture = {n: value for n, value in asked.items() if n not in NOT_ARCHITECTURE}
    known = {"size"} | {field.name for field in dataclasses.fields(family)}
    if unknown := sorted(architecture.keys() - known):
        name = unknown[0]
        raise ValueError(
            f"model.{name} = {model[name]}, but model.family = {model.family} has no "
            f"{name}; set model.{name}=None"
        )
    with naming("model"):
        found = family.of_size(**architecture)
    h, w = ranges.sides(model.input_size)
    if h % found.patch_size or w % found.patch_size:
        raise ValueError(
            f"model.patch_size = {found.patch_size} does not divide model.input_size = "
            f"{model.input_size}"
        )
    # The model takes any grid; this one is what checkpoints say it was trained on.
    grid = (h // found.patch_size, w // found.patch_size)
    if found.num_heads and (
        reason := make_attention(found, parent=None).refusal("xla", found.width, grid)
    ):
        raise ValueError(f"model.attention = {found.attention}: {reason}")
    return dataclasses.replace(found, grid=grid)


def _check_implementations(config: ConfigDict, model: Architecture) -> None:
    # The names only. Whether the devices can run one is asked once they are known.
    known = {
        "model": ATTENTIONS[model.attention].implementations,
        "teacher": ATTENTIONS["softmax"].implementations,
    }
    for group, names in known.items():
        with naming(group):
            ranges.check(config[group], implementation=ranges.one_of(None, *names))


def _process(config: ConfigDict, model: Architecture) -> Process:
    """That of what the model predicts."""
    weights = {name: config.train[name] for name in ("min_snr_gamma", "vb_weight")}
    if PROCESSES[model.prediction] is GaussianDiffusion:
        with naming("train"):
            return GaussianDiffusion(**weights)
    for name, weight in weights.items():
        neutral = getattr(GaussianDiffusion, name)  # its default
        if weight != neutral:
            raise ValueError(
                f"train.{name} = {weight:g} weighs the loss of a predicted noise, but "
                f"model.prediction = {model.prediction}; set it to {neutral:g}"
            )
    return PROCESSES[model.prediction]()


def _check_grid(settings: SamplerSettings, model: Architecture, process: Process) -> None:
    """Raises ValueError for steps that the sampler's timesteps cannot be."""
    channels = (model.in_channels, model.out_channels)
    variance = process.choose_variance(settings.variance, *channels)
    samplers.make_grid(process, dataclasses.replace(settings, variance=variance))
    low, high = settings.cfg_interval
    first, last = sorted(process.time_range)
    if settings.cfg_scale != 1 and (low > last or high < first):
        raise ValueError(
            f"cfg_interval = ({low}, {high}) holds none of the timesteps {first:g} to {last:g}, so "
            f"nothing would be guided; set sample.cfg_scale=1 for that"
        )


def _step_settings(config: ConfigDict) -> StepSettings:
    # These live in other groups of the config than the rest.
    names = {
        "dropout": "train.label_dropout",
        "accumulation": "train.accumulation",
        "ema_decay": "ema.decay",
    }
    with naming("distill", **names):
        return StepSettings(
            dropout=config.train.label_dropout,
            accumulation=config.train.accumulation,
            ema_decay=config.ema.decay,
            ema_warmup=config.ema.warmup,
            noise_weight=config.distill.noise_weight,
            variance_weight=config.distill.variance_weight,
            variance_target=config.distill.variance_target,
            denoising_weight=config.distill.denoising_weight,
            attention_weight=config.distill.attention_weight,
            feature_weight=config.distill.feature_weight,
            teacher_sees_dropped=config.distill.teacher_sees_dropped_labels,
        )


def _image_settings(config: ConfigDict) -> ImageSettings:
    prepare = config.prepare
    size = prepare.image_size
    if size == 0:  # those that the model works on; a latent stands for 8 pixels a side
        pixels = 8 if config.autoencoder.checkpoint else 1
        h, w = ranges.sides(config.model.input_size)
        size = h * pixels if h == w else (h * pixels, w * pixels)
    with naming("prepare", size="prepare.image_size"):
        return ImageSettings(
            size=size,
            background=prepare.background,
            exif_orientation=prepare.exif_orientation,
            max_pixels=prepare.max_pixels,
        )


def _port_overrides(config: ConfigDict, model: Architecture) -> Any:
    """What the config knows better than the checkpoint of a port, for its family."""
    port = config.port
    overrides = KEY_TABLES[type(model)].Overrides
    names = {field.name for field in dataclasses.fields(overrides)}
    # A side of 0 keeps the table that the checkpoint has; a null caption is read by the job.
    sides = ranges.sides(port.input_size) if port.input_size else None
    asked = dict(port) | {"input_size": sides, "seed": config.seed, "null_caption": None}
    asked["caption_length"] = getattr(model, "caption_length", 0)
    for table in KEY_TABLES.values():
        for field in dataclasses.fields(table.Overrides):
            if field.name not in names and field.name in port and port[field.name]:
                raise ValueError(
                    f"port.{field.name} = {port[field.name]}, but model.family = "
                    f"{config.model.family} has no {field.name}"
                )
    with naming("port"):
        return overrides(**{name: asked[name] for name in names})

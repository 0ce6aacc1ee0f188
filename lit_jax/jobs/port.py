"""The porting job: a checkpoint of any layout in, another layout out.

    python -m lit_jax.main --config=configs/default.py --mode=port \
        --config.port.source=DiT-XL-2-256x256.pt --config.port.target=teacher

Every key is accounted for. Nothing is written unless the whole source is read,
explained, finite and what the config describes.
"""

import dataclasses
import os
import resource
import time

import jax
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lit_jax import sharding
from lit_jax.diffusion import GaussianDiffusion
from lit_jax.experiment import Experiment
from lit_jax.models.pixart import PixArtConfig
from lit_jax.models.pixart_t5 import PixArtT5Config
from lit_jax.porting import lit_pipeline, model_card, pipeline, pixart
from lit_jax.porting.matching import Report, plain
from lit_jax.porting.read import (
    AutoencoderCheckpoint,
    Checkpoint,
    is_autoencoder,
    read_autoencoder,
    read_checkpoint,
)
from lit_jax.porting.untrusted import is_remote
from lit_jax.porting.write import (
    export_autoencoder,
    export_diffusers,
    export_official,
    export_orbax,
)
from lit_jax.settings import naming, reading

LAYOUTS = ("orbax", "dit", "diffusers")
TORCH_SUFFIXES = (".pth", ".ckpt", ".bin")  # read, but written as .pt
# A source with another attention than the config's model is its teacher.
OF_ATTENTION = (
    "attention",
    "num_heads",
    "qkv_bias",
    "conv_size",
    "kernel_function",
    "num_blocks",
    "softmax_every",
    "softmax_heads",
)


def run(config: ConfigDict, workdir: epath.PathLike) -> Report:
    """Ports `port.source` to `port.target`; leaves port_report.json in the workdir.

    Several processes write an Orbax folder together, each its shards; process 0
    writes everything else.

    Returns: the report, whose summary goes to the log.
    """
    # ---- What is asked for -----------------------------------------------------------------------

    start = time.monotonic()
    experiment = Experiment(config)
    port = config.port
    source = _path(port.source, "port.source")
    target = _path(port.target, "port.target")
    is_file = target.suffix in (".safetensors", ".pt")
    layout = port.layout or ("dit" if is_file else "orbax")
    if layout not in LAYOUTS:
        choices = ", ".join(LAYOUTS)
        raise ValueError(f"port.layout must be one of {choices}; got {layout!r}")
    if not port.layout and target.suffix in TORCH_SUFFIXES:
        raise ValueError(
            f"port.target = {target}: files are written as .pt or .safetensors, not {target.suffix}"
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"port.target = {target} exists; a port never overwrites")
    workdir = epath.Path(workdir)
    _check_place(workdir)

    # ---- Read ------------------------------------------------------------------------------------

    checkpoint: Checkpoint | AutoencoderCheckpoint
    # The library speaks of its arguments, which are the fields of config.port.
    with reading("port.source", source, "it is a download", family="model.family"):
        if is_autoencoder(source):
            if layout == "dit":
                raise ValueError(
                    f"layout = {layout}, but {source} is an autoencoder, "
                    "which is ported to orbax or diffusers"
                )
            checkpoint = read_autoencoder(
                source,
                weights=port.weights,
                scaling_factor=port.scaling_factor,
            )
        else:
            checkpoint = _read_model(experiment, source)
    if isinstance(checkpoint, Checkpoint) and port.check_model:
        _check_model(experiment, checkpoint)

    # ---- Write -----------------------------------------------------------------------------------

    writes = jax.process_index() == 0
    report = checkpoint.report
    with naming("port"):
        if layout == "orbax":
            shardings = sharding.fsdp_sharding(checkpoint.params, experiment.mesh)
            export_orbax(checkpoint, target, shardings=shardings, consume=True)
        elif not writes:
            pass
        elif isinstance(checkpoint, AutoencoderCheckpoint):
            export_autoencoder(checkpoint.params, target, checkpoint.architecture)
        elif layout == "diffusers":
            _export_diffusers(experiment, checkpoint, source, target)
        else:
            written = export_official(
                checkpoint.params, target, checkpoint.config, checkpoint.class_names
            )
            names = [path.name for path in written]
            report.notes.append(f"wrote {', '.join(names)}")

    # ---- Report ----------------------------------------------------------------------------------

    if writes:
        # Made at the end: a port that fails leaves no folder.
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "port_report.json").write_text(report.to_json() + "\n")
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        logging.info(
            "ported to %s (%s) in %.1f s, peak memory %.2f GB for %.2f GB of float32 parameters",
            target,
            layout,
            time.monotonic() - start,
            peak / 1e9,
            4 * report.parameters / 1e9,
        )
        logging.info("%s", report.summary())
    multihost_utils.sync_global_devices("ported")
    return report


def _export_diffusers(experiment, checkpoint, source, target):
    found = checkpoint.config
    if found.prediction != "noise" or found.softmax_every:
        raise ValueError(
            f"layout = diffusers, but {source} has prediction = {found.prediction} and "
            f"softmax_every = {found.softmax_every}, and the pipelines draw with models that "
            f"predict noise and have one attention; export it as .safetensors or .pt"
        )
    if isinstance(found, PixArtConfig):
        _export_pipeline(experiment, checkpoint, source, target)
    elif found.attention == "linear":
        _export_lit(experiment, checkpoint, source, target)
    else:
        export_diffusers(checkpoint.params, target, found)


def _export_pipeline(experiment, checkpoint, source, target):
    """A text-to-image model as a pipeline's folder, with the parts that the config names.

    A PixArt without any is the folder of its transformer alone.
    """
    asked = experiment.config
    params = checkpoint.params
    found = checkpoint.config
    report = checkpoint.report
    tokenizer = None
    text_encoder = None
    if isinstance(found, PixArtT5Config):
        tokenizer = experiment.tokenizer
        text_encoder = (params["text_encoder"], found.text_encoder)
        params = params["transformer"]
        found = found.transformer
    elif asked.text.checkpoint:
        tokenizer, read = experiment.read_text_encoder()
        text_encoder = (read.params, read.config)
    elif asked.text.tokenizer:
        tokenizer = experiment.tokenizer
    vae = experiment.read_autoencoder()
    is_lit = found.attention == "linear"
    if not (is_lit or tokenizer or vae):
        export_diffusers(params, target, found)
        return

    def note(text):
        report.notes.append(text)
        logging.warning("%s", text)

    if text_encoder is None:
        note("no text_encoder/ was written: text.checkpoint is empty")
    if vae is None and (found.in_channels not in (1, 3) or not is_lit):
        note("no vae/ was written: autoencoder.checkpoint is empty")
    settings = experiment.sampler_settings
    if settings.spacing == "time_uniform":
        note(
            "scheduler/ has timestep_spacing = linspace, as PixArt's published pipelines: no "
            "scheduler of diffusers has sample.spacing = time_uniform"
        )
    parts = pipeline.Parts(
        settings,
        experiment.process.num_steps,
        tokenizer,
        text_encoder,
        (vae.params, vae.architecture) if vae else None,
        cleaning=asked.text.cleaning,
        card=_make_card(target, source, found, settings, report),
    )
    with naming("sample"):
        pipeline.check_sampler(found, parts)
    pipeline.export_pipeline(params, target, found, parts)


def _export_lit(experiment, checkpoint, source, target):
    """A folder of diffusers that draws as config.sample says."""
    config = experiment.config
    found = checkpoint.config
    report = checkpoint.report
    channels = (found.in_channels, found.out_channels)
    settings = experiment.sampler_settings
    process = experiment.process
    if not isinstance(process, GaussianDiffusion) or found.prediction != "noise":
        raise ValueError(
            f"layout = diffusers, but {source} predicts the {found.prediction} and the config's "
            f"model the {experiment.model_config.prediction}; the pipeline draws with a model "
            f"that predicts noise; export a velocity as .safetensors"
        )
    variance = process.choose_variance(settings.variance, *channels)
    settings = dataclasses.replace(settings, variance=variance)
    with naming("sample"):
        lit_pipeline.scheduler_config(settings, process.num_steps)
    asked = config.autoencoder
    folder = None
    about_vae = ""
    if asked.checkpoint:
        _ = experiment.autoencoder  # reads what is copied, and checks it
        folder = lit_pipeline.autoencoder_folder(asked.checkpoint)
        about_vae = f"vae/ is a copy of `{epath.Path(asked.checkpoint).name}`."
    if folder is None and found.in_channels not in (1, 3):
        why = (
            f"autoencoder.checkpoint = {asked.checkpoint} is no folder of diffusers with one file"
            if asked.checkpoint
            else "autoencoder.checkpoint names none"
        )
        about_vae = "It draws latents, and the folder has no vae/: pass one to `from_pretrained`."
        report.notes.append(f"no vae/ was written: {why}")
        logging.warning("no vae/ was written: %s", why)
    card = _make_card(target, source, found, settings, report, about_vae)
    lit_pipeline.export_lit(
        checkpoint.params,
        target,
        found,
        lit_pipeline.PipelineSettings(
            settings,
            process.num_steps,
            card,
            folder,
            asked.scaling_factor,
            tuple(checkpoint.class_names),
        ),
    )


def _make_card(target, source, found, settings, report, about_vae=""):
    return model_card.make_card(
        target.name,
        model_card.read_run(source),
        found,
        settings,
        parameters=report.parameters,
        checksum=report.checksum,
        vae=about_vae,
    )


def _read_model(experiment, source):
    """The source, with the null caption that the config names, or else its text encoder makes."""
    config = experiment.config
    overrides = experiment.port_overrides
    path = config.port.null_caption
    null_caption = None
    if path and not epath.Path(path).is_dir():
        with reading("port.null_caption", path, "it is a file of features"):
            null_caption = pixart.read_null_caption(path)
    elif path:
        # Two rows tell all: the end of the text, and one of padding.
        null_caption = experiment.load_text_encoder(path, "port.null_caption").null_features(2)
    if null_caption is not None:
        overrides = dataclasses.replace(overrides, null_caption=null_caption)

    def read(overrides):
        family = config.model.family
        return read_checkpoint(
            source, weights=config.port.weights, overrides=overrides, family=family
        )

    try:
        return read(overrides)
    except pixart.NoNullCaptionError:
        experiment.check_null_caption("port.source", source)
    return read(dataclasses.replace(overrides, null_caption=experiment.null_caption))


def _path(value, field):
    if not value:
        raise ValueError(f"{field} is empty; name a file or folder")
    return epath.Path(value)


def _check_place(workdir):
    """Raises where the report will have no place: such a port is not begun."""
    if is_remote(workdir):
        return  # an object store tells only when it is written to
    above = os.path.abspath(workdir)
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        raise ValueError(f"workdir = {workdir}: {above} is not a folder that can be written to")


def _check_model(experiment, checkpoint):
    """Raises ValueError naming a field in which the checkpoint is another model."""
    expected = experiment.port_overrides.of_model(experiment.model_config)
    found = checkpoint.config
    # The checkpoint says how its own code computes; the config's model need not compute so.
    skipped: tuple[str, ...] = found.conventions
    if found.attention != expected.attention:
        skipped += OF_ATTENTION
    for field in dataclasses.fields(found):
        ours = getattr(expected, field.name)
        theirs = getattr(found, field.name)
        # None: the source does not tell.
        if field.name in skipped or theirs is None or ours == theirs:
            continue
        raise ValueError(
            f"{checkpoint.report.source} has {field.name} = {plain(theirs)}, "
            f"the config's model has {plain(ours)}; name its model, "
            "or set port.check_model=False"
        )

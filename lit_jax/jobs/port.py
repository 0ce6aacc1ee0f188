"""The porting job: a checkpoint of any layout in, another layout out, with a report that accounts for every key.

    python -m lit_jax.main --config=configs/default.py --mode=port \
        --config.port.source=DiT-XL-2-256x256.pt --config.port.target=teacher

Nothing is written unless the whole source is read, explained, finite and what the config describes.
"""

import os
import pathlib
import resource
import time

import jax
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lit_jax import sharding
from lit_jax.models import dit
from lit_jax.porting.read import (
    Report,
    is_autoencoder,
    read_autoencoder,
    read_checkpoint,
    require_architecture,
)
from lit_jax.porting.write import export_diffusers, export_official, export_orbax

LAYOUTS = ("orbax", "dit", "diffusers")
TORCH_SUFFIXES = (".pth", ".ckpt", ".bin")  # read, but written as .pt


def run(config: ConfigDict, workdir: pathlib.Path) -> Report:
    """Ports `port.source` to `port.target`; leaves port_report.json in the workdir and logs its summary.

    Several processes write an Orbax folder together, each its shards; process 0 writes everything else.
    """
    port, start = config.port, time.monotonic()
    source, target = _path(port.source, "port.source"), _path(port.target, "port.target")
    layout = port.layout or ("dit" if target.suffix in (".safetensors", ".pt") else "orbax")
    if layout not in LAYOUTS:
        raise ValueError(f"port.layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if not port.layout and target.suffix in TORCH_SUFFIXES:
        raise ValueError(
            f"port.target = {target}: files are written as .pt or .safetensors, not {target.suffix}"
        )
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"port.target = {target} exists; a port never overwrites")
    if not source.exists():
        raise FileNotFoundError(f"port.source = {source}: no such file or folder")

    workdir = pathlib.Path(
        workdir
    )  # made at the end; a port whose report has no place is not begun
    above = next(
        path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists()
    )
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"workdir = {workdir}: {above} is not a folder that can be written to")

    if is_autoencoder(source):
        if layout != "orbax":
            raise ValueError(
                f"port.layout = {layout}, but {source} is an autoencoder, which is ported to orbax only"
            )
        checkpoint = read_autoencoder(
            source, weights=port.weights, scaling_factor=port.scaling_factor
        )
    else:
        checkpoint = _read_dit(config, source)
    writes = jax.process_index() == 0
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    if layout == "orbax":
        shardings = sharding.fsdp_sharding(checkpoint.params, mesh)
        export_orbax(checkpoint, target, shardings=shardings, consume=True)
    elif layout == "diffusers" and writes:
        export_diffusers(checkpoint.params, target, checkpoint.architecture)
    elif writes:
        written = export_official(checkpoint.params, target, checkpoint.architecture)
        checkpoint.report.notes.append(f"wrote {', '.join(path.name for path in written)}")

    if writes:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "port_report.json").write_text(checkpoint.report.to_json() + "\n")
        size, peak = (
            4 * checkpoint.report.parameters,
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        )
        logging.info(
            "ported to %s (%s) in %.1f s, peak memory %.2f GB for %.2f GB of float32 parameters\n%s",
            target,
            layout,
            time.monotonic() - start,
            peak / 1e9,
            size / 1e9,
            checkpoint.report.summary(),
        )
    multihost_utils.sync_global_devices("ported")
    return checkpoint.report


def _path(value, field):
    if not value:
        raise ValueError(f"{field} is empty; name a file or folder")
    return pathlib.Path(value)


def _read_dit(config, source):
    """Reads a DiT or LiT with what the config asks for, and checks it against `model`."""
    port = config.port
    checkpoint = read_checkpoint(
        source,
        weights=port.weights,
        num_heads=port.num_heads,
        num_classes=port.num_classes,
        input_size=(port.input_size,) * 2 if port.input_size else None,
        timestep_freq_shift=port.timestep_freq_shift,
        mlp_norm_epsilon=port.mlp_norm_epsilon,
        seed=config.seed,
    )
    if port.check_model:
        require_architecture(checkpoint, _expected(config, checkpoint.architecture))
    return checkpoint


def _expected(config, found):
    """What `model` says of a checkpoint; of attention only if it is the same kind, else the source is the teacher."""
    model = config.model
    if model.size not in dit.SIZES:
        raise ValueError(f"model.size must be one of {', '.join(dit.SIZES)}; got {model.size!r}")
    depth, width, softmax_heads, linear_heads = dit.SIZES[model.size]
    expected = {"depth": model.depth or depth, "width": model.width or width}
    expected |= {
        name: model[name] for name in ("patch_size", "in_channels", "num_classes", "learn_sigma")
    }
    if config.port.num_classes:
        expected["num_classes"] = config.port.num_classes
    if found["grid"]:
        size = config.port.input_size or model.input_size
        expected["grid"] = (size // model.patch_size,) * 2
    if found["attention"] == model.attention:
        expected["qkv_bias"] = model.qkv_bias
        if model.attention == "linear":
            expected |= {"conv_size": model.conv_size, "kernel_function": model.kernel_function}
        if found["num_heads"]:
            heads = softmax_heads if model.attention == "softmax" else linear_heads
            expected["num_heads"] = model.num_heads or heads
    return expected

"""--mode=export: the sampler as one program of StableHLO that runs without lit_jax.

    python -m lit_jax.main --config=configs/NAME.py --mode=export --workdir=DIR

Leaves a folder with sampler.jax_export, about.json and, where the weights are not inside the
program, weights.safetensors. examples/draw_with_jax.py draws from it with jax alone.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jaxlib
import numpy as np
from absl import logging
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from lit_jax import sampling, sharding
from lit_jax.experiment import Experiment
from lit_jax.porting.read import load_params
from lit_jax.porting.torch_file import NewTensor, write_safetensors
from lit_jax.porting.write import whole_folder

PROGRAM = "sampler.jax_export"
WEIGHTS = "weights.safetensors"
PLATFORMS = ("cpu", "tpu", "cuda")
# The devices that an implementation by name is written for.
RUNS_ON = {"pallas_tpu": "tpu", "pallas_gpu": "cuda", "cudnn": "cuda"}
# A flatbuffer, which the program is, addresses 2 GiB.
MOST_INSIDE = 1_900_000_000
PROMISE = (
    "JAX promises to read this with a jaxlib that was built up to 6 months after the one named "
    "here, or up to 3 weeks before it: "
    "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"
)
MEANINGS = {
    "seed": "the root of all noise",
    "index": "numbers of the images: image i depends on (seed, i) and its condition alone",
    "cfg_scale": "the strength of guidance; 1 is none",
    "label": "numbers of classes",
    "caption": "features of the text encoder",
    "caption_mask": "true for tokens",
    "caption_ids": "tokens",
}


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes the sampler of config.sample, as a whole or not at all.

    Raises: ValueError for a checkpoint of another model, a platform that an attention by name
      does not run on, weights too large to be inside, or a target that exists.
    """
    # ---- What is asked for ---------------------------------------------------
    asked = config.export
    workdir = epath.Path(workdir)
    target = epath.Path(asked.target) if asked.target else workdir / "export"
    if target.exists():
        raise ValueError(f"export.target = {target} exists; an export never overwrites")
    platforms = tuple(asked.platforms)
    check_platforms(platforms, config.model.implementation)
    if not asked.batch_size and config.model.implementation in RUNS_ON:
        raise ValueError(
            f"export.batch_size = 0, any number, but model.implementation = "
            f"{config.model.implementation} is compiled for one; name it"
        )
    experiment = Experiment(config)
    # One device: whoever runs it chooses how many take part.
    experiment.mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
    if not asked.batch_size:
        # Slices would need to know the size; without them pixels are the same.
        experiment.autoencoder_settings = dataclasses.replace(
            experiment.autoencoder_settings, slice_size=0
        )

    # ---- The model and its checkpoint ----------------------------------------
    checkpoint = experiment.read_sampled(workdir)
    model = experiment.model
    model = model.clone(implementation=model.implementation or "xla")
    model = experiment.for_drawing(model)
    sampler = experiment.sampler(model, batch_size=asked.batch_size or 1)
    weights = {"model": experiment.drawn_params(model, load_params(checkpoint.params))}
    if experiment.autoencoder:
        weights["decoder"] = experiment.autoencoder.params
    flat = flatten_dict(weights, sep="/")
    inside = asked.weights_inside
    size = sum(leaf.nbytes for leaf in flat.values())
    if inside and size > MOST_INSIDE:
        raise ValueError(
            f"export.weights_inside = True, but the weights are {size:,} bytes and a program holds "
            f"at most {MOST_INSIDE:,}; set export.weights_inside=False"
        )

    # ---- Trace ---------------------------------------------------------------
    batch = asked.batch_size or jax.export.symbolic_shape("batch")[0]
    inputs = input_shapes(experiment, sampler, batch)
    logging.info("tracing the sampler for %s", ", ".join(platforms))
    exported = export_sampler(sampler, flat, inputs, platforms, inside=inside)
    program = bytes(exported.serialize())

    # ---- Write ---------------------------------------------------------------
    about = {
        "what": f"a sampler of lit_jax, {checkpoint.config.attention} attention: "
        f"{', '.join(inputs)} to images",
        "program": PROGRAM,
        "format": "jax.export: StableHLO as a portable artifact, called with (weights, inputs)",
        "sha256": hashlib.sha256(program).hexdigest(),
        "platforms": platforms,
        "weights": "inside" if inside else WEIGHTS,
        "batch": asked.batch_size or "any",
        "inputs": {
            name: describe(leaf, MEANINGS.get(name, "of the condition"))
            for name, leaf in inputs.items()
        },
        "output": describe(
            exported.out_avals[0], "about [-1, 1]; as uint8 clip(127.5 x + 128), truncated"
        ),
        "model": checkpoint.config.to_json(),
        "quantize": config.sample.quantize,
        "protocol": sampling.protocol(
            experiment.sampler_settings,
            input_size=experiment.sample_size,
            seed=config.seed,
            dtype=config.model.dtype,
            weights=checkpoint.report.checksum,
            autoencoder=experiment.autoencoder_identity,
            labels="an input",
        ),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "readable": PROMISE,
    }
    write_folder(target, program, about, {} if inside else flat)
    logging.info("%s: %s bytes of program for %s", target, f"{len(program):,}", platforms)


def check_platforms(platforms: tuple[str, ...], implementation: str | None) -> None:
    """Raises ValueError for platforms that are not known, or not the attention's own."""
    if not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(
            f"export.platforms must be some of {', '.join(PLATFORMS)}; got {platforms!r}"
        )
    runs_on = RUNS_ON.get(implementation or "xla")
    if runs_on and set(platforms) != {runs_on}:
        raise ValueError(
            f"model.implementation = {implementation} runs on {runs_on} alone, but "
            f"export.platforms = {platforms}; set model.implementation=xla, or name {runs_on} alone"
        )


def input_shapes(
    experiment: Experiment, sampler: sampling.Sampler, batch: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the program is told, by name: seed, numbers, condition, guidance."""
    shapes = {
        "seed": jax.ShapeDtypeStruct((), np.uint32),
        "index": jax.ShapeDtypeStruct((batch,), np.int32),
    }
    shapes |= experiment.model_config.condition_shapes(batch)
    if sampler.is_guided:
        shapes["cfg_scale"] = jax.ShapeDtypeStruct((), np.float32)
    return shapes


def export_sampler(
    sampler: sampling.Sampler,
    weights: Mapping[str, jax.Array],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    platforms: tuple[str, ...],
    *,
    inside: bool,
) -> jax.export.Exported:
    """The program (weights, inputs) -> images (B, h, w, C) float32.

    Args:
      weights: by path, "model/..." and perhaps "decoder/...".
      inside: they are constants of the program, whose first argument is {} then.
    """

    def lit_jax_sampler(passed, told):
        tree = unflatten_dict(dict(weights) if inside else passed, sep="/")
        condition = {
            name: value
            for name, value in told.items()
            if name not in ("seed", "index", "cfg_scale")
        }
        return sampler.trace(
            tree["model"],
            tree.get("decoder"),
            told["index"],
            condition,
            told["seed"],
            told.get("cfg_scale"),
        )

    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in weights.items()}
    export = jax.export.export(jax.jit(lit_jax_sampler), platforms=platforms)
    return export({} if inside else shapes, dict(inputs))


def describe(leaf: Any, meaning: str) -> dict[str, Any]:
    """An input or output for about.json; a dimension of any size by its name."""
    shape = [side if isinstance(side, int) else str(side) for side in leaf.shape]
    return {"shape": shape, "dtype": str(leaf.dtype), "meaning": meaning}


def write_folder(
    target: epath.Path, program: bytes, about: dict[str, Any], weights: Mapping[str, jax.Array]
) -> None:
    """Writes the files; the folder appears when it is whole."""
    with whole_folder(target) as folder:
        (folder / PROGRAM).write_bytes(program)
        if weights:
            tensors = [
                NewTensor(
                    name,
                    leaf.shape,
                    functools.partial(np.asarray, leaf),
                    "I8" if leaf.dtype == np.int8 else "F32",
                )
                for name, leaf in weights.items()
            ]
            write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
        (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n")

"""AutoencoderKL: three spellings of one set of tensors, and what tells its architecture.

Today's diffusers is the common spelling. The others are diffusers before 0.18 (`query`,
`key`, `value`, `proj_attn`) and latent diffusion's code, which is also inside a whole
Stable Diffusion file.
"""

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from lit_jax.models.autoencoder import AutoencoderKL
from lit_jax.porting.matching import (
    INDEX,
    Entry,
    Parts,
    Report,
    check_tree,
    count_indices,
    match,
    shape_of,
)
from lit_jax.porting.torch_checkpoint import (
    PortingError,
    TorchCheckpoint,
    check_diffusers_class,
    check_diffusers_config,
    is_count,
)
from lit_jax.porting.torch_file import NewTensor

DIFFUSERS_CLASSES = ("AutoencoderKL",)
# Of the autoencoder's keys in a file that has the diffusion model and text
# encoder too.
STABLE_DIFFUSION_PREFIX = "first_stage_model."
# The attention's parts in each older spelling.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LDM_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
# Latent diffusion's names of everything else. Its `up` also counts down, from
# the lowest resolution, which is no matter of names (`_from_ldm`).
LDM_NAMES = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^(decoder\.up_blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"^(decoder\.up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
# Of blocks, and of layers in each. Published ones have 4 of 2; the model is
# traced for its shapes, and a stranger's thousand blocks would take a minute.
MAX_BLOCKS = 8


def recognises(keys: Collection[str]) -> bool:
    """Whether the keys of a checkpoint are an autoencoder's, in any spelling."""
    pattern = r"(first_stage_model\.)?(encoder|decoder)\.conv_in\."
    return any(re.match(pattern, key.replace("/", ".")) for key in keys)


def entries(architecture: Mapping[str, Any]) -> tuple[Entry, ...]:
    """All leaves of an architecture with their keys.

    Args: architecture: the fields of `AutoencoderKL`, scaling_factor and shift_factor.
    """
    fields = {
        name: value
        for name, value in architecture.items()
        if name not in ("scaling_factor", "shift_factor")
    }
    fields["block_out_channels"] = tuple(fields["block_out_channels"])
    return _entries(AutoencoderKL(**fields))


@functools.cache
def _entries(module):
    # One latent cell: the size of the images decides no shape.
    side = module.factor
    images = jax.ShapeDtypeStruct((1, side, side, module.in_channels), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    found = []
    for path, leaf in flatten_dict(shapes, sep="/").items():
        parent, _, name = path.rpartition("/")
        # Our modules are theirs, with `_` in place of `.` before an index.
        key = re.sub(r"_(\d+)", r".\1", parent).replace("/", ".")
        found.append(Entry(path, (f"{key}.{leaves[name]}",), leaf.shape))
    return tuple(found)


# ---- Reading -------------------------------------------------------------------------------------


def read_torch(source: TorchCheckpoint, report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of a checkpoint of the PyTorch world, by path, and its architecture.

    Returns: of the architecture, scaling_factor is None where nothing tells it.
    Raises: PortingError for anything unexplained; see `matching.match`.
    """
    path = source.path
    named = _common_names(source, report)
    architecture = _told({name: parts.shape for name, parts in named.items()}, path)
    widths = architecture["block_out_channels"]
    groups = architecture["norm_num_groups"]
    # A single file names neither groups nor scale. What would be a wrong guess
    # is refused: the pictures would be bad, and no error would say why.
    if source.config is not None:
        architecture |= _diffusers_fields(source, architecture)
    elif any(width % groups for width in widths):
        raise PortingError(
            f"{path}: nothing in it tells the groups of its norms, and {groups}, what published "
            f"ones have, does not divide the widths {widths}; put it into a folder with its "
            "config.json"
        )
    elif architecture["latent_channels"] == 16:
        raise PortingError(
            f"{path}: 16 latent channels, as those of SD3 and Flux, which also shift their "
            "latents, and nothing in it tells by how much; give the diffusers folder with its "
            "config.json"
        )
    return match(named, entries(architecture), source, report), architecture


def read_tree(flat: Mapping[str, Any], stored: Any, report: Report) -> dict[str, Any]:
    """The architecture of our own parameters, by path, which must be all that it has.

    Args: stored: what the checkpoint's metadata say of the autoencoder, not yet checked.
    Raises: PortingError naming the field, or listing both sides.
    """
    architecture = _checked(stored, report.source)
    check_tree(flat, entries(architecture), report)
    return architecture


def _common_names(source, report):
    """Today's diffusers names from any of the three spellings."""
    is_whole = any(key.startswith(STABLE_DIFFUSION_PREFIX) for key in source.tensors)
    prefix = STABLE_DIFFUSION_PREFIX if is_whole else ""
    for key in source.tensors:
        if is_whole and not key.startswith(prefix):
            report.left_out[key] = "not of the autoencoder"
        elif not is_whole and key.startswith("loss."):
            report.left_out[key] = "loss of its training"
    keys = [key for key in source.tensors if key not in report.left_out]

    # Only latent diffusion has numbers right after `up`.
    pattern = rf"{re.escape(prefix)}decoder\.up\.{INDEX}\."
    ups = [int(found[1]) for key in keys if (found := re.match(pattern, key))]
    is_ldm = bool(ups)
    report.layout = "LDM" if is_ldm else "diffusers"

    named: dict[str, Parts] = {}
    for key in keys:
        tensor = source.tensors[key]
        name = key.removeprefix(prefix)
        if is_ldm:
            name = _from_ldm(name, max(ups))
        attention = re.fullmatch(r"(.*\.attentions\.0)\.(\w+)\.(weight|bias)", name)
        if attention:
            module, part, leaf = attention.groups()
            part = (LDM_ATTENTION if is_ldm else OLD_ATTENTION).get(part, part)
            name = f"{module}.{part}.{leaf}"
            # Latent diffusion has linear maps as 1 x 1 convolutions.
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        # A file with two spellings of one tensor has two values of it.
        if name in named:
            other = named[name].keys[0]
            raise PortingError(f"{source.path}: {key} and {other} both mean {name}")
        named[name] = Parts((tensor,), (key,))
    return named


def _from_ldm(name, last_up):
    def up(found):
        return f"decoder.up_blocks.{last_up - int(found[1])}."

    name = re.sub(rf"^decoder\.up\.{INDEX}\.", up, name)
    for pattern, replacement in LDM_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


# ---- Writing -------------------------------------------------------------------------------------


def diffusers_tensors(params: Any, architecture: Mapping[str, Any]) -> list[NewTensor]:
    """Every tensor of diffusers' AutoencoderKL.

    Args: params: the tree of `models.autoencoder`, arrays or leaves.
    Raises: PortingError with both sides unless the tree is that of the architecture.
    """
    flat = flatten_dict(params, sep="/")
    expected = entries(architecture)
    check_tree(flat, expected, Report("the parameters", "orbax"))
    tensors = []
    for entry in expected:
        read = functools.partial(entry.to_torch, flat[entry.path], 0)
        tensors.append(NewTensor(entry.keys[0], entry.torch_shape, read))
    return tensors


def diffusers_config(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of diffusers' AutoencoderKL."""
    widths = list(architecture["block_out_channels"])
    return dict(architecture) | {
        "_class_name": DIFFUSERS_CLASSES[0],
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        # Of a tile, where tiling is asked for; it decides nothing else.
        "sample_size": 512,
    }


# ---- The architecture ----------------------------------------------------------------------------


def _told(shapes, path):
    """What the shapes tell; the rest is as in all published ones, or None."""

    def shape(key):
        return shape_of(shapes, key, 4, path, "an AutoencoderKL checkpoint")

    blocks = count_indices(shapes, rf"encoder\.down_blocks\.{INDEX}\.", path)
    layers = count_indices(shapes, rf"encoder\.down_blocks\.0\.resnets\.{INDEX}\.", path)
    if max(blocks, layers) > MAX_BLOCKS:
        raise PortingError(
            f"{path}: {blocks} blocks of {layers} layers, the limit is {MAX_BLOCKS} of each"
        )
    first_convs = [f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(blocks)]
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "block_out_channels": tuple(shape(key)[0] for key in first_convs),
        "layers_per_block": layers,
        "norm_num_groups": 32,
        # SD3's and Flux's have no quant convolutions.
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
        "scaling_factor": None,
        "shift_factor": None,
    }


def _is_number(value):
    return isinstance(value, float | int) and not isinstance(value, bool)


def _is_scale(value):
    return _is_number(value) and 0 < value < 1e6


def _is_shift(value):
    return value is None or (_is_number(value) and abs(value) < 1e6)


def _is_few(value):
    return is_count(value, 1, MAX_BLOCKS)


def _are_widths(value):
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_BLOCKS
    return is_list and all(map(is_count, value))


def _is_flag(value):
    return isinstance(value, bool)


# A module is made of a stranger's metadata, so every field is checked.
_CHECKS = {
    "in_channels": is_count,
    "out_channels": is_count,
    "latent_channels": is_count,
    "block_out_channels": _are_widths,
    "layers_per_block": _is_few,
    "norm_num_groups": is_count,
    "use_quant_conv": _is_flag,
    "use_post_quant_conv": _is_flag,
    "mid_block_add_attention": _is_flag,
    "scaling_factor": _is_scale,
    "shift_factor": _is_shift,
}


def _checked(stored, path):
    """The architecture that an Orbax checkpoint names, so that a model can be made of it."""
    if not isinstance(stored, dict) or stored.keys() != _CHECKS.keys():
        raise PortingError(f"{path}: its metadata describe no autoencoder: {str(stored)[:80]}")
    for field, value in stored.items():
        if not _CHECKS[field](value):
            raise PortingError(f"{path}: its metadata say {field} = {str(value)[:40]}")
    groups = stored["norm_num_groups"]
    widths = stored["block_out_channels"]
    if any(width % groups for width in widths):
        raise PortingError(
            f"{path}: its metadata say norm_num_groups = {groups}, which does not divide "
            f"the widths {widths}"
        )
    return stored | {"block_out_channels": tuple(widths)}


def _diffusers_fields(source, architecture):
    """Checks config.json against the shapes; returns what only the config knows."""
    config = source.config
    path = source.path
    check_diffusers_class(config, DIFFUSERS_CLASSES, path)
    widths = architecture["block_out_channels"]
    told = (
        "in_channels",
        "out_channels",
        "latent_channels",
        "layers_per_block",
        "mid_block_add_attention",
        "use_quant_conv",
        "use_post_quant_conv",
    )
    expected = {name: architecture[name] for name in told} | {
        "block_out_channels": list(widths),
        # What our module computes, and no shape tells.
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        # Others scale each channel of the latents by itself.
        "latents_mean": None,
        "latents_std": None,
    }
    check_diffusers_config(config, expected, path)

    groups = config.get("norm_num_groups", 32)
    if not is_count(groups) or any(width % groups for width in widths):
        raise PortingError(
            f"{path}: config.json says norm_num_groups = {str(groups)[:20]}, which does not divide "
            f"the widths {widths}"
        )
    scale = config.get("scaling_factor", 0.18215)
    shift = config.get("shift_factor")
    if not _is_scale(scale) or not _is_shift(shift):
        raise PortingError(
            f"{path}: config.json says scaling_factor = {str(scale)[:20]}, shift_factor = "
            f"{str(shift)[:20]}"
        )
    if "scaling_factor" not in config:
        source.notes.append("config.json names no scaling_factor: diffusers' default 0.18215")
    return {"norm_num_groups": groups, "scaling_factor": scale, "shift_factor": shift}

"""PixArt-Sigma and its LiT: the keys of every layout, and what tells the architecture.

Three layouts are read: the official one (.pth, and our exports), that of diffusers'
PixArtTransformer2DModel, and our own tree in an Orbax checkpoint. The first two are
written. The official keys are the common spelling. PixArt-alpha without
micro-conditions is the same model, with shorter captions.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from lit_jax import ranges
from lit_jax.models import param_shapes
from lit_jax.models.dit import position_embedding
from lit_jax.models.pixart import PixArtConfig
from lit_jax.porting.dit import LIT_TORCH
from lit_jax.porting.matching import (
    FLOATS,
    INDEX,
    Entry,
    Parts,
    Report,
    check_tree,
    count_indices,
    match,
    plain,
    shape_of,
    tree_entries,
)
from lit_jax.porting.told import (
    agreeing,
    checked_depth,
    checked_fields,
    heads_of_shapes,
    make_config,
    published_heads,
    told_by_shapes,
)
from lit_jax.porting.torch_checkpoint import (
    PortingError,
    TorchCheckpoint,
    abridged,
    any_state_dict,
    check_diffusers_class,
    check_diffusers_config,
    is_count,
)
from lit_jax.porting.torch_file import NewTensor

# Our module and its official name; of others the path is the name.
MODULES = {
    "t_embedder/mlp_0": "t_embedder.mlp.0",
    "t_embedder/mlp_2": "t_embedder.mlp.2",
    "t_block": "t_block.1",
}
# The official module, and its name in diffusers' PixArtTransformer2DModel.
DIFFUSERS_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
DIFFUSERS_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
# An official module that diffusers splits: the parts are its rows, in this order.
DIFFUSERS_SPLIT = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
DIFFUSERS_CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
# A key of another model that shares most of the rest, and what it is.
OTHER_MODELS = {
    r"csize_embedder\.|ar_embedder\.|adaln_single\.emb\.(resolution|aspect_ratio)_embedder\.": (
        "it is told the image's size and aspect ratio (PixArt-alpha 1024-MS); "
        "PixArt-Sigma is not, nor is our model"
    ),
    r".*attn1?\.sr\.": (
        "its attention compresses keys and values; no released PixArt-Sigma does, "
        "and LiT's linear attention takes its place"
    ),
    r".*attn1?\.(q_norm|k_norm|norm_q|norm_k)\.": (
        "it normalises queries and keys; no released PixArt-Sigma does"
    ),
}
# Of the model in the assets, that diffusers runs; sample_size and out_channels go along.
LIT_CLASS = "LiTTextTransformer2DModel"
LIT_FIELDS = (
    "attention", "depth", "width", "num_heads", "patch_size", "in_channels", "out_channels",
    "learn_sigma", "qkv_bias", "conv_size", "kernel_function", "cross_heads", "caption_channels",
    "caption_length", "position_base", "position_scale",
)  # fmt: skip
NULL_CAPTION = "y_embedder/y_embedding"
WHAT = "a PixArt-Sigma checkpoint"
MAX_SIDE = 1 << 10  # tokens: images of 16384 pixels


class NoNullCaptionError(PortingError):
    """A checkpoint lacks the null caption, which `Overrides.null_caption` gives it.

    `channels` is the width of the features that the model takes.
    """

    def __init__(self, path: Any, channels: int):
        super().__init__(
            f"null_caption must be named: {path} has no y_embedder.y_embedding, the text "
            'encoder\'s features of "" that guidance compares with'
        )
        self.channels = channels


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What a caller knows better than a checkpoint; defaults leave all as it is.

    Attributes:
        num_heads: of a softmax model, and of its attention to the caption, where nothing in
            the source tells it. 0: as it says, or the published size's.
        input_size: (h, w) of the latents at the nominal size that the position table is for,
            such as (128, 128) for 1024 pixels. None: as the source says.
        null_caption: the text encoder's features of "", (n, caption_channels) float, for a
            source without them; rows after the last one are equal to it. None: the source's.
        caption_length: rows of the null caption of a source without it. 0: 300.
    Raises: ValueError whose text starts with the field's name.
    """

    num_heads: int = 0
    input_size: tuple[int, int] | None = None
    null_caption: np.ndarray | None = None
    caption_length: int = 0

    def __post_init__(self):
        ranges.check(self, num_heads=ranges.AT_LEAST_0, caption_length=ranges.AT_LEAST_0)
        size = self.input_size
        if size is not None and (size[0] != size[1] or not 0 < size[0] <= 2 * MAX_SIDE):
            raise ValueError(
                f"input_size = {plain(size)}: the nominal size of a PixArt is square, with sides "
                f"from 1 to {2 * MAX_SIDE}; images of any aspect come from it"
            )

    @classmethod
    def of_student(cls, config: PixArtConfig, seed: int) -> "Overrides":
        """Those of a checkpoint that a model inherits from: none, as no leaf follows the model."""
        del config, seed
        return cls()

    def of_model(self, config: PixArtConfig) -> PixArtConfig:
        """What a checkpoint of a model should be after these changes of it."""
        if self.input_size is None:
            return config
        return dataclasses.replace(config, **_position(self.input_size[0] // config.patch_size))


def _position(side):
    """The fields of the position table of a nominal grid: 32 tokens are 512 pixels."""
    return {"position_base": side, "position_scale": side / 32, "grid": (side, side)}


def recognises(keys: Collection[str]) -> bool:
    """Whether the keys of a checkpoint are a PixArt's."""
    marks = ("y_embedder.y_proj.", "caption_projection.")
    # Our own tree, not that of a model that has a PixArt within it.
    ours = any(key.startswith("y_embedder/y_proj/") for key in keys)
    return ours or any(mark in key for key in keys for mark in marks)


def entries(config: PixArtConfig) -> tuple[Entry, ...]:
    """All leaves of an architecture, with their official keys."""
    # Fields that decide no shape are set alike: one trace of the model serves all.
    heads = heads_of_shapes(config)
    return _entries(
        dataclasses.replace(
            config, num_heads=heads, cross_heads=1, kernel_function="relu", grid=None,
            position_base=1, position_scale=1.0,
        )
    )  # fmt: skip


@functools.cache
def _entries(config):
    leaves = flatten_dict(param_shapes(config), sep="/")
    return tree_entries(leaves, MODULES, config.depth)


# ---- Reading -------------------------------------------------------------------------------------


def read_torch(
    source: TorchCheckpoint, report: Report, overrides: Overrides
) -> tuple[dict[str, Any], PixArtConfig]:
    """A checkpoint of the PyTorch world: its leaves by path, and its architecture.

    Raises: PortingError for anything unexplained; see `matching.match`.
    """
    path = source.path
    _refuse_other_models(source.tensors, path)
    if any(key.startswith("transformer_blocks.") for key in source.tensors):
        report.layout = "diffusers"
        named = _from_diffusers(source.tensors)
    else:
        report.layout = "pixart"
        named = {key: Parts((tensor,), (key,)) for key, tensor in source.tensors.items()}
    shapes = {name: parts.shape for name, parts in named.items()}

    stored = checked_fields(PixArtConfig, source.stored, path)
    told = _told(shapes, stored, path)
    told["depth"] = checked_depth(count_indices(shapes, rf"blocks\.{INDEX}\.", path), path)
    fields = _assumed(told) | told
    if report.layout == "diffusers":
        fields |= agreeing(told, _diffusers_says(source, told), path, "config.json")
    fields |= agreeing(told, stored, path, "its metadata")
    fields.setdefault("caption_length", overrides.caption_length or 300)
    if "y_embedder.y_embedding" not in named:
        if (null := overrides.null_caption) is not None:
            table = _null_table(null, fields["caption_length"], told["caption_channels"])
            named["y_embedder.y_embedding"] = Parts((table,), ("null_caption",))
    if "y_embedder.y_embedding" not in named:
        raise NoNullCaptionError(path, told["caption_channels"])

    checked = set()
    if "pos_embed" in named:
        table = named["pos_embed"]
        checked.add("pos_embed")
        config, report.keys[table.keys[0]] = _check_pos_embed(table, fields, overrides, path)
    else:
        fields |= _nominal(fields, overrides, path)
        config = make_config(PixArtConfig, fields, path)
    for field, heads in (("num_heads", config.num_heads), ("cross_heads", config.cross_heads)):
        if heads and field not in stored and report.layout == "pixart":
            report.notes.append(
                f"{field} = {heads} is that of the published size of this depth and width"
            )
    return match(named, entries(config), source, report, checked=checked), config


def read_tree(flat: Mapping[str, Any], stored: Any, report: Report) -> PixArtConfig:
    """The architecture of our own parameters, which must be all that it has.

    Args:
        flat: the parameters by path.
        stored: what the checkpoint's metadata say of the model, not yet checked.
    Raises: PortingError with both sides.
    """
    # Shapes tell neither the heads nor the position table, and every checkpoint of ours
    # has had these fields.
    path = report.source
    config = make_config(PixArtConfig, checked_fields(PixArtConfig, stored, path), path)
    checked_depth(config.depth, path)
    check_tree(flat, entries(config), report)
    return config


def override(
    params: dict[str, Any], config: PixArtConfig, overrides: Overrides, report: Report
) -> PixArtConfig:
    """The architecture that a caller asks for.

    Args: params: the leaves by path, which get the null caption that was asked for.
    Raises: PortingError whose text starts with the name of the override that cannot be.
    """
    changes: dict[str, Any] = {}
    if heads := overrides.num_heads:
        fields = ("cross_heads",) if config.attention == "linear" else ("num_heads", "cross_heads")
        for field in fields:
            if (known := getattr(config, field)) != heads:
                changes[field] = heads
                report.notes.append(f"{field} = {heads} was asked for, the source has {known}")
    if overrides.input_size:
        position = _position(overrides.input_size[0] // config.patch_size)
        if position["position_base"] != config.position_base:
            report.notes.append(
                f"the position table is that of {plain(overrides.input_size)} latents, the "
                f"source has a base of {config.position_base} tokens"
            )
        changes |= position
    if overrides.null_caption is not None:
        # A source without one was read with it.
        if "null_caption" not in report.keys:
            params[NULL_CAPTION] = _null_table(
                overrides.null_caption, config.caption_length, config.caption_channels
            )
        report.notes.append("the null caption is the one that was asked for")
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise PortingError(str(error)) from error


def read_null_caption(path: epath.PathLike) -> np.ndarray:
    """The features of "" in a file: .npy, or the one float tensor of a .safetensors or .pth.

    PixArt's null_embed_diffusers_300token.pth is such a file.

    Returns: (n, caption_channels) float32.
    Raises: PortingError for a file that holds something else; FileNotFoundError.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".npy":
        try:
            found = {path.name: np.load(path, allow_pickle=False)}
        except (ValueError, OSError, EOFError, MemoryError) as error:
            raise PortingError(f"{path}: no array of NumPy: {error}") from error
    else:
        found = any_state_dict(path)
    floats = {
        name: array
        for name, array in found.items()
        # Some files have the axis of a batch of one.
        if array.dtype in FLOATS and array.ndim in (2, 3) and array.shape[:-2] in ((), (1,))
    }
    if len(floats) != 1:
        raise PortingError(
            f"{path}: one float tensor of (n, channels) was expected, found "
            f"{abridged(f'{name} {array.shape}' for name, array in found.items())}"
        )
    (array,) = floats.values()
    return np.array(array, np.float32).reshape(array.shape[-2:])


def _null_table(rows, length, channels):
    """(length, channels) float32 of the features of "": the last row stands for all others."""
    rows = np.asarray(rows, np.float32)
    if rows.ndim != 2 or not 0 < len(rows) <= length or rows.shape[1] != channels:
        raise PortingError(
            f"null_caption has shape {rows.shape}, expected up to {length} rows of {channels}"
        )
    if not np.isfinite(rows).all():
        raise PortingError("null_caption holds values that are not finite")
    return np.concatenate([rows, np.repeat(rows[-1:], length - len(rows), axis=0)])


def _refuse_other_models(keys, path):
    for pattern, why in OTHER_MODELS.items():
        found = [key for key in keys if re.match(pattern, key)]
        if found:
            raise PortingError(f"{path}: {found[0]}: not a PixArt-Sigma: {why}")


# ---- From diffusers to the official keys ---------------------------------------------------------


def _from_diffusers(tensors):
    """Official names of a PixArtTransformer2DModel."""
    top = {theirs: ours for ours, theirs in DIFFUSERS_TOP.items()}
    block = {theirs: ours for ours, theirs in DIFFUSERS_BLOCK.items()}
    split = {part: ours for ours, parts in DIFFUSERS_SPLIT.items() for part in parts}
    named = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        found = re.fullmatch(rf"transformer_blocks\.{INDEX}\.?(.*)", module)
        prefix = f"blocks.{found[1]}" if found else ""
        if found and found[2] in split:
            ours = split[found[2]]
            names = DIFFUSERS_SPLIT[ours]
            keys = [f"transformer_blocks.{found[1]}.{name}.{leaf}" for name in names]
            there = tuple(each for each in keys if each in tensors)
            # With a part missing the rows are too few, and the shape is refused.
            named[f"{prefix}.{ours}.{leaf}"] = Parts(tuple(tensors[k] for k in there), there)
        elif found and found[2] in block:
            named[f"{prefix}.{block[found[2]]}.{leaf}"] = Parts((tensor,), (key,))
        elif found and key.endswith(".scale_shift_table"):
            named[f"{prefix}.scale_shift_table"] = Parts((tensor,), (key,))
        elif key == "scale_shift_table":
            named["final_layer.scale_shift_table"] = Parts((tensor,), (key,))
        elif key == "pos_embed.pos_embed":
            named["pos_embed"] = Parts((tensor,), (key,))
        elif module in top:
            named[f"{top[module]}.{leaf}"] = Parts((tensor,), (key,))
        else:
            # A name that no entry has: it can neither replace another nor be lost.
            named[f"{key} (not of diffusers)"] = Parts((tensor,), (key,))
    return named


# ---- The architecture ----------------------------------------------------------------------------


def _told(shapes, stored, path):
    """The fields that the shapes of official keys tell, but for the depth."""
    told = told_by_shapes(shapes, stored, path, WHAT)
    projection = shape_of(shapes, "y_embedder.y_proj.fc1.weight", 2, path, WHAT)
    told["caption_channels"] = projection[1]
    if "y_embedder.y_embedding" in shapes:
        null = shape_of(shapes, "y_embedder.y_embedding", 2, path, WHAT)
        told["caption_length"] = null[0]
    return told


def _assumed(told):
    """The fields that no shape tells, as they are unless the checkpoint says more."""
    heads = published_heads(told)
    is_softmax = told["attention"] == "softmax"
    return {"num_heads": heads if is_softmax else None, "cross_heads": heads}


def _diffusers_says(source, told):
    """What config.json says: heads and the position table."""
    config = source.config
    path = source.path
    if config is None:
        source.notes.append("no config.json beside it: heads are those of the published size")
        return {}
    check_diffusers_class(config, DIFFUSERS_CLASSES, path)
    heads = config.get("num_attention_heads", 16)
    head_dim = config.get("attention_head_dim", 72)
    are_counts = is_count(heads) and is_count(head_dim)
    if not are_counts or heads * head_dim != told["width"]:
        raise PortingError(
            f"{path}: config.json says {str(heads)[:20]} heads of {str(head_dim)[:20]}, the "
            f"width is {told['width']}"
        )
    expected = {
        "num_layers": told["depth"],
        "patch_size": told["patch_size"],
        "in_channels": told["in_channels"],
        "attention_bias": told["qkv_bias"],
        "caption_channels": told["caption_channels"],
        "cross_attention_dim": told["width"],
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    check_diffusers_config(config, expected, path)
    p = told["patch_size"]
    size = config.get("sample_size", 128)
    if not is_count(size, high=2 * MAX_SIDE) or size % p:
        raise PortingError(
            f"{path}: config.json says sample_size = {str(size)[:20]}, the patch size is {p}"
        )
    # None: diffusers takes the size's own, but never less than 1.
    scale = config.get("interpolation_scale")
    scale = max(size // 64, 1) if scale is None else scale
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not 0.01 <= scale <= 100:
        raise PortingError(f"{path}: config.json says interpolation_scale = {str(scale)[:20]}")
    side = size // p
    return {
        "num_heads": heads,
        "cross_heads": heads,
        "position_base": side,
        "position_scale": float(scale),
        "grid": (side, side),
    }


# ---- The position table --------------------------------------------------------------------------


def _nominal(fields, overrides, path):
    """The fields of the position table where no table is stored."""
    if overrides.input_size:
        return _position(overrides.input_size[0] // fields["patch_size"])
    if "position_base" not in fields:
        raise PortingError(
            f"input_size must be named: {path} has no position table; 32, 64, 128 and 256 are "
            f"the latents of 256, 512, 1024 and 2048 pixels"
        )
    return {}


def _check_pos_embed(table, fields, overrides, path):
    """Finds what the stored table is of; returns the config and what to report."""
    positions, width = shape_of({"t": table.shape}, "t", 3, path, WHAT)[1:]
    side = math.isqrt(positions)
    if side**2 != positions or side > MAX_SIDE or width != fields["width"]:
        raise PortingError(
            f"{path}: pos_embed has {positions} positions of {width} channels; a square of at "
            f"most {MAX_SIDE} x {MAX_SIDE} of {fields['width']} was expected"
        )
    stored = np.asarray(table.arrays[0][0], np.float64)
    # PixArt-alpha spreads 256 pixels as 512; all others follow the size.
    scales = dict.fromkeys([fields.get("position_scale", side / 32), side / 32, 1.0])
    errors = {}
    for scale in scales:
        computed = position_embedding((side, side), width, side, scale)
        errors[scale] = float(np.max(np.abs(stored - computed)))
    scale = min(errors, key=lambda each: errors[each])
    # As for DiT: an average of the table drifts, and half precision rounds it.
    if not errors[scale] <= 5e-3:
        raise PortingError(
            f"{path}: pos_embed differs from the computed {side} x {side} table by "
            f"{errors[scale]:.3g}: it is another table, and our model has a fixed one"
        )
    fields = fields | {"position_base": side, "position_scale": scale, "grid": (side, side)}
    said = (
        f"equal to the computed table of the {side} x {side} grid, scale {scale:g} "
        f"(largest difference {errors[scale]:.2g})"
    )
    return make_config(PixArtConfig, fields, path), said


# ---- Writing -------------------------------------------------------------------------------------


def check_official(config: PixArtConfig) -> None:
    """Raises PortingError unless official code computes what the model computes."""
    _need_heads(config)


def torch_module(config: PixArtConfig) -> pathlib.Path | None:
    """The PyTorch module to go with an export; None: official code can read it."""
    is_lit = config.attention == "linear" and not config.softmax_every
    return LIT_TORCH if is_lit else None


def official_tensors(params: Any, config: PixArtConfig) -> list[NewTensor]:
    """Every tensor of the official layout, the position table and the null caption among them.

    Args: params: the tree of `models.pixart`, arrays or leaves.
    Raises: PortingError with both sides unless the tree is that of the config.
    """
    flat = flatten_dict(params, sep="/")
    check_tree(flat, entries(config), Report("the parameters", "orbax"))
    side = config.position_base
    D = config.width
    table = functools.partial(_stored_table, side, D, config.position_scale)
    tensors = [NewTensor("pos_embed", (1, side * side, D), table)]
    for entry in entries(config):
        for layer, key in enumerate(entry.keys):
            read = functools.partial(entry.to_torch, flat[entry.path], layer)
            tensors.append(NewTensor(key, entry.torch_shape, read))
    return tensors


def check_diffusers(config: PixArtConfig) -> None:
    """Raises PortingError unless diffusers computes what the model computes."""
    if config.attention != "softmax":
        raise PortingError(
            f"diffusers has no {config.attention} attention; the folder of a LiT's pipeline brings "
            "the code for it"
        )
    _need_heads(config)
    if config.num_heads != config.cross_heads:
        raise PortingError(
            f"diffusers has one number of heads, the model num_heads = {config.num_heads} and "
            f"cross_heads = {config.cross_heads}"
        )


def diffusers_tensors(params: Any, config: PixArtConfig) -> list[NewTensor]:
    """Every tensor of a PixArtTransformer2DModel, which has no place for the null caption.

    Args and Raises: as `official_tensors`.
    """
    D = config.width
    tensors = []
    for key, shape, read, _ in official_tensors(params, config):
        module, _, leaf = key.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.?(.*)", module)
        if key in ("pos_embed", "y_embedder.y_embedding"):
            continue
        if module == "final_layer" and leaf == "scale_shift_table":
            tensors.append(NewTensor(leaf, shape, read))
        elif not block:
            tensors.append(NewTensor(f"{DIFFUSERS_TOP[module]}.{leaf}", shape, read))
        elif block[2] in DIFFUSERS_SPLIT:
            for part, name in enumerate(DIFFUSERS_SPLIT[block[2]]):
                rows = functools.partial(_rows, read, part * D, (part + 1) * D)
                name = f"transformer_blocks.{block[1]}.{name}.{leaf}"
                tensors.append(NewTensor(name, (D, *shape[1:]), rows))
        else:
            name = f"{DIFFUSERS_BLOCK[block[2]]}.{leaf}" if block[2] else leaf
            tensors.append(NewTensor(f"transformer_blocks.{block[1]}.{name}", shape, read))
    return tensors


def diffusers_config(config: PixArtConfig) -> dict[str, Any]:
    """The config.json of a PixArtTransformer2DModel."""
    num_heads = config.num_heads or 1
    return {
        "_class_name": DIFFUSERS_CLASSES[0],
        "activation_fn": "gelu-approximate",
        "attention_bias": config.qkv_bias,
        "attention_head_dim": config.width // num_heads,
        "attention_type": "default",
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.width,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "interpolation_scale": config.position_scale,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_single",
        "num_attention_heads": num_heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.position_base * config.patch_size,
        "upcast_attention": False,
        # diffusers' default is True at 1024 pixels, for PixArt-alpha.
        "use_additional_conditions": False,
    }


def lit_config(config: PixArtConfig) -> dict[str, Any]:
    """The config.json of the LiTTextTransformer2DModel in the assets.

    Raises: PortingError where the config does not tell the heads.
    """
    _need_heads(config)
    size = config.position_base * config.patch_size
    told = {name: getattr(config, name) for name in LIT_FIELDS}
    return {"_class_name": LIT_CLASS, "sample_size": size} | told


def _need_heads(config):
    for field in ("num_heads", "cross_heads"):
        if getattr(config, field) is None:
            raise PortingError(
                "num_heads must be named: the checkpoint does not tell it, and the export needs it"
            )


def _stored_table(side, width, scale):
    return position_embedding((side, side), width, side, scale)[None]


def _rows(read, begin, end):
    return read()[begin:end]

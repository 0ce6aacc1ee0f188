"""Checkpoints of the PyTorch world, and our own, into our parameter trees, every key accounted for.

A checkpoint is read as views of a mapped file (`torch_file`, `sources`). Its keys are first renamed to one spelling: that of
the official DiT checkpoints, or of today's diffusers for autoencoders. The rules of `layouts` then lead from there to the
tree; `exporting` goes the other way.

Leaves stay in their file until they are indexed, so a sharded load reads only what each device holds.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax import checkpoint
from lit_jax.kernels.linear_attention import KERNEL_FUNCTIONS
from lit_jax.models.dit import SIZES, position_embedding
from lit_jax.porting import layouts, torch_checkpoint, torch_file
from lit_jax.porting.torch_checkpoint import PortingError

_DIFFUSERS_CLASSES = {  # of config.json; Transformer2DModel is what DiT was before it had a class of its own
    "dit": ("DiTTransformer2DModel", "Transformer2DModel"),
    "autoencoder": ("AutoencoderKL",),
}
_HOW = {"conv": "axes to (h, w, I, O)", "linear": "transposed"}
_FLOATS = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)))
_LABEL_STD = 0.02  # of new label rows, as DiT draws them
_INDEX = "(0|[1-9][0-9]{0,5})"  # in a key; "01" and other scripts' digits are other names
_MAX_POSITIONS = 1 << 20  # of a grid: images of 16384 x 16384 at 16 pixels a patch
# What no shape tells: how the source's own code computes, or what it says of itself.
_CONVENTIONS = ("timestep_freq_shift", "mlp_norm_epsilon", "kernel_function")


@dataclasses.dataclass
class Report:
    """What became of every key of the source."""

    source: str
    layout: str  # spelling of the keys
    keys: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # source key -> where it went, and how
    left_out: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # source key -> why it is not needed
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    reinitialised: list[str] = dataclasses.field(
        default_factory=list
    )  # parts of leaves that are new
    notes: list[str] = dataclasses.field(default_factory=list)
    architecture: dict = dataclasses.field(default_factory=dict)
    parameters: int = 0  # elements in the tree
    checksum: str = ""  # `checksum` of the tree

    def to_json(self) -> str:
        counts = {
            name: len(getattr(self, name))
            for name in ("keys", "left_out", "missing", "unexpected", "reinitialised")
        }
        return json.dumps({"counts": counts} | dataclasses.asdict(self), indent=1)

    def summary(self) -> str:
        """The report in a few lines for a terminal."""
        lines = [
            f"{self.source} ({self.layout} layout)",
            "  " + ", ".join(f"{name} {plain(value)}" for name, value in self.architecture.items()),
            f"  {len(self.keys)} keys matched, {len(self.left_out)} left out, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, {len(self.reinitialised)} re-initialised; "
            f"{self.parameters:,} parameters",
            f"  sha256 {self.checksum}",
        ]
        reasons = collections.Counter(self.left_out.values())
        lines += [f"  left out: {count} keys, {reason}" for reason, count in reasons.items()]
        lines += [f"  re-initialised: {name}" for name in self.reinitialised]
        return "\n".join(
            map(torch_file.one_line, lines + [f"  note: {note}" for note in self.notes])
        )


def plain(value):
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else value


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """`params` is a nested dict of leaves, `architecture` what shapes, metadata and caller say of the model."""

    params: dict
    architecture: dict
    report: Report

    @property
    def config(self):
        from lit_jax.models.dit import DiTConfig

        return DiTConfig(**self.architecture)


class Leaf:
    """One parameter still in its file, as float32 in our layout; `leaf[index]`, `np.asarray(leaf)` read it.

    `layers` holds one list of torch arrays a layer (a single one for a leaf without layer axis); the arrays of a
    list are concatenated on torch's first axis, then the axes are permuted.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        layers: list[list[np.ndarray]],
        axes: tuple[int, ...],
        stacked: bool,
        release: Callable[[], None] = lambda: None,
    ):
        self._layers, self._axes, self._stacked, self._release = layers, axes, stacked, release
        first = layers[0]
        shape = _joined_shape(first)
        shape = tuple(shape[axis] for axis in axes)
        self.shape = (len(layers), *shape) if stacked else shape
        self.ndim, self.size = len(self.shape), math.prod(self.shape)

    def _layer(self, index):
        pieces = self._layers[index]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return whole.transpose(self._axes)

    def __getitem__(self, index) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        with np.errstate(over="ignore"):  # a float64 that becomes infinite: `checksum` finds it
            if not self._stacked:
                out = np.array(self._layer(0)[index], np.float32, order="C")
            elif isinstance(index[0], slice):
                layers = range(*index[0].indices(len(self._layers)))
                shape = np.broadcast_to(np.False_, self.shape[1:])[index[1:]].shape
                out = np.empty((len(layers), *shape), np.float32)
                for row, layer in enumerate(layers):
                    out[row] = self._layer(layer)[index[1:]]
            else:
                out = np.array(self._layer(index[0])[index[1:]], np.float32, order="C")
        self._release()  # a mapped page that stays counts as memory in use
        return out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def __repr__(self):
        return f"Leaf{self.shape}"


def _joined_shape(pieces):
    shape = pieces[0].shape
    return shape if len(pieces) == 1 else (sum(piece.shape[0] for piece in pieces), *shape[1:])


def load_params(params: Any, shardings: Any = None, *, consume: bool = False) -> Any:
    """Reads a tree of leaves into device arrays, one leaf at a time.

    Args:
        params: nested dict of `Leaf` or arrays.
        shardings: the same tree of shardings; each device then reads only its part. None: the default device.
        consume: takes each leaf out of `params` once it is loaded, so that those in memory are not there twice.
    """
    loaded = {}
    for name in list(params):
        leaf = params.pop(name) if consume else params[name]
        sharding = None if shardings is None else shardings[name]
        if isinstance(leaf, dict):
            loaded[name] = load_params(leaf, sharding, consume=consume)
        elif sharding is None:
            loaded[name] = jnp.asarray(np.asarray(leaf))
        else:
            loaded[name] = jax.make_array_from_callback(
                leaf.shape, sharding, functools.partial(_read_part, leaf)
            )
    return loaded


def _read_part(leaf, index):
    return np.asarray(leaf[index])


def checksum(params: Any) -> str:
    """SHA-256 over path, shape and float32 bytes of every leaf in path order: the same in every file layout.

    Raises PortingError naming the first leaf that holds a value that is not finite.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{path}{tuple(leaf.shape)}".encode())
        rows = range(leaf.shape[0]) if path.startswith("blocks/") else [slice(None)]
        for row in rows:
            part = np.ascontiguousarray(leaf[row], np.dtype("<f4"))
            if not np.isfinite(part).all():
                where = f"{path}[{row}]" if len(rows) > 1 else path
                raise PortingError(f"{where} holds values that are not finite in float32")
            digest.update(part)
    return digest.hexdigest()


# From a source's keys to the one spelling: names to lists of arrays that are concatenated on axis 0.


def _check_config(config, fields, path):
    """Raises unless config.json agrees with `fields`: name -> value, or what diffusers defaults to if absent."""
    for name, value in fields.items():
        if name in config and config[name] != value:
            raise PortingError(
                f"{path}: config.json says {name} = {str(config[name])[:60]}, expected {value}"
            )


def _from_diffusers(source, report):
    """Official DiT names from a DiTTransformer2DModel's; the embedders of all blocks must be equal.

    A key that is not of diffusers gets a name that no rule has, so that it can neither replace another nor be lost.
    """
    top = {theirs: ours for ours, theirs in layouts.DIFFUSERS_TOP.items()}
    block = {theirs: ours for ours, theirs in layouts.DIFFUSERS_BLOCK.items()}
    embedders = {theirs: ours for ours, theirs in layouts.DIFFUSERS_EMBEDDERS.items()}
    named, origin = {}, {}
    depth = _indices(source.tensors, rf"transformer_blocks\.{_INDEX}\.", source.path)
    for key, tensor in source.tensors.items():
        module, _, leaf = key.rpartition(".")
        match = re.fullmatch(rf"transformer_blocks\.{_INDEX}\.(.+)", module)
        layer, part = (
            (int(match[1]), match[2]) if match and leaf in ("weight", "bias") else (0, None)
        )
        first = f"transformer_blocks.0.{part}.{leaf}"
        if part in layouts.DIFFUSERS_QKV:
            name, place = f"blocks.{layer}.attn.qkv.{leaf}", layouts.DIFFUSERS_QKV.index(part)
            named.setdefault(name, [None] * 3)[place] = tensor
            origin[name] = [
                f"transformer_blocks.{layer}.{each}.{leaf}" for each in layouts.DIFFUSERS_QKV
            ]
            continue
        if part in embedders and layer > 0 and first in source.tensors:
            if not np.array_equal(tensor, source.tensors[first]):
                raise PortingError(
                    f"{source.path}: {key} differs from block 0's; DiT has one for all blocks"
                )
            report.left_out[key] = "equal to block 0's"
            source.release()
            continue
        if part in embedders and layer == 0:
            name = f"{embedders[part]}.{leaf}"
        elif part in block:
            name = f"blocks.{layer}.{block[part]}.{leaf}"
        elif key == "pos_embed.pos_embed":
            name = "pos_embed"
        elif module in top:
            name = f"{top[module]}.{leaf}"
        else:
            name = f"{key} (not of diffusers)"
        named[name], origin[name] = [tensor], [key]
    for theirs in embedders:
        for leaf in ("weight",) if "class" in theirs else ("weight", "bias"):
            keys = [f"transformer_blocks.{layer}.{theirs}.{leaf}" for layer in range(1, depth)]
            report.missing += [key for key in keys if key not in source.tensors]
    for name in [name for name, pieces in named.items() if any(piece is None for piece in pieces)]:
        report.missing += [
            key for key, piece in zip(origin[name], named.pop(name)) if piece is None
        ]
    return named, origin


def _diffusers_dit_fields(source, architecture):
    """Checks config.json of a DiT against the shapes; returns what only the config knows."""
    config, path, D = source.config, source.path, architecture["width"]
    _check_class(config, "dit", path)
    heads, head_dim = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
    if (
        not torch_checkpoint.is_count(heads)
        or not torch_checkpoint.is_count(head_dim)
        or heads * head_dim != D
    ):
        raise PortingError(
            f"{path}: config.json says {str(heads)[:20]} heads of {str(head_dim)[:20]}, "
            f"the width is {D}"
        )
    C = architecture["in_channels"]
    _check_config(
        config,
        {
            "num_layers": architecture["depth"],
            "patch_size": architecture["patch_size"],
            "in_channels": C,
            "num_embeds_ada_norm": architecture["num_classes"],
            "attention_bias": architecture["qkv_bias"],
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        },
        path,
    )
    if (config.get("out_channels") or C) != C * (2 if architecture["learn_sigma"] else 1):
        raise PortingError(
            f"{path}: config.json says out_channels = {str(config.get('out_channels'))[:20]}, "
            f"the tensors have {C * (2 if architecture['learn_sigma'] else 1)}"
        )
    size, p = config.get("sample_size", 32), architecture["patch_size"]
    epsilon = config.get("norm_eps", 1e-5)
    if not torch_checkpoint.is_count(size) or size % p:
        raise PortingError(
            f"{path}: config.json says sample_size = {str(size)[:20]}, the patch size is {p}"
        )
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise PortingError(f"{path}: config.json says norm_eps = {str(epsilon)[:20]}")
    return {
        "num_heads": heads,
        "grid": (size // p, size // p),
        "timestep_freq_shift": 1,
        "mlp_norm_epsilon": epsilon,
    }


def _check_class(config, kind, path):
    name = config.get("_class_name")
    if name is not None and name not in _DIFFUSERS_CLASSES[kind]:
        raise PortingError(
            f"{path}: config.json describes a {str(name)[:60]}, expected "
            f"{' or '.join(_DIFFUSERS_CLASSES[kind])}"
        )


def _autoencoder_names(source, report):
    """Today's diffusers names from any of the three spellings of an AutoencoderKL."""
    tensors = source.tensors
    if any(key.startswith("first_stage_model.") for key in tensors):
        report.left_out |= {
            key: "not of the autoencoder"
            for key in tensors
            if not key.startswith("first_stage_model.")
        }
        prefix = "first_stage_model."
    else:
        report.left_out |= {
            key: "loss of its training" for key in tensors if key.startswith("loss.")
        }
        prefix = ""
    tensors = {key: tensor for key, tensor in tensors.items() if key not in report.left_out}
    ups = [
        int(match[1])
        for key in tensors
        if (match := re.match(rf"{prefix}decoder\.up\.{_INDEX}\.", key))
    ]
    ldm, last_up = bool(ups), max(ups, default=0)
    named, origin = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        if ldm:
            name = re.sub(
                r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name
            )
            name = re.sub(
                r"^encoder\.down\.(\d+)\.downsample\.",
                r"encoder.down_blocks.\1.downsamplers.0.",
                name,
            )
            name = re.sub(
                rf"^decoder\.up\.{_INDEX}\.",
                lambda m: f"decoder.up_blocks.{last_up - int(m[1])}.",
                name,
            )
            name = re.sub(r"^(decoder\.up_blocks\.\d+)\.block\.", r"\1.resnets.", name)
            name = re.sub(r"^(decoder\.up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0.", name)
            name = re.sub(
                r"\.mid\.block_(1|2)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name
            )
            name = re.sub(r"\.mid\.attn_1\.", ".mid_block.attentions.0.", name)
            name = name.replace(".norm_out.", ".conv_norm_out.").replace(
                ".nin_shortcut.", ".conv_shortcut."
            )
            parts = {
                "norm": "group_norm",
                "q": "to_q",
                "k": "to_k",
                "v": "to_v",
                "proj_out": "to_out.0",
            }
        else:
            parts = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        match = re.fullmatch(r"(.*\.attentions\.0)\.(\w+)\.(weight|bias)", name)
        if match:
            name = f"{match[1]}.{parts.get(match[2], match[2])}.{match[3]}"
            if tensor.ndim == 4 and tensor.shape[2:] == (
                1,
                1,
            ):  # LDM: linear maps as 1 x 1 convolutions
                tensor = tensor[:, :, 0, 0]
        if name in named:
            raise PortingError(f"{source.path}: {key} and {origin[name][0]} both mean {name}")
        named[name], origin[name] = [tensor], [key]
    report.layout = "LDM" if ldm else "diffusers"
    return named, origin


# Architectures from shapes.


def _check_stored(stored, path):
    """Validates architecture fields that a file names; unknown fields are refused."""
    checks = {
        "attention": lambda v: v in ("softmax", "linear"),
        "kernel_function": lambda v: v in KERNEL_FUNCTIONS,
        "learn_sigma": lambda v: isinstance(v, bool),
        "qkv_bias": lambda v: isinstance(v, bool),
        "conv_size": lambda v: torch_checkpoint.is_count(v, 0),
        "timestep_freq_shift": lambda v: torch_checkpoint.is_count(v, 0, 1),
        "mlp_norm_epsilon": lambda v: isinstance(v, float) and 0 < v < 1,
        "grid": lambda v: (
            isinstance(v, list | tuple) and len(v) == 2 and all(map(torch_checkpoint.is_count, v))
        ),
    } | dict.fromkeys(
        ("depth", "width", "num_heads", "patch_size", "in_channels", "num_classes"),
        torch_checkpoint.is_count,
    )
    if not isinstance(stored, dict):
        raise PortingError(f"{path}: its architecture is a {type(stored).__name__}, not an object")
    for field, value in stored.items():
        optional = field in ("num_heads", "grid") and value is None
        if field not in checks or not (optional or checks[field](value)):
            raise PortingError(
                f"{path}: its architecture says {str(field)[:40]} = {str(value)[:40]}"
            )
    return {
        field: tuple(value) if field == "grid" else value
        for field, value in stored.items()
        if value is not None
    }


def _shape_of(shapes, key, ndim, path, what):
    if key not in shapes:
        raise PortingError(
            f"{path}: not {what}: {key} is missing "
            f"(found {len(shapes)} keys: {torch_checkpoint.abridged(sorted(shapes), 4)})"
        )
    if len(shapes[key]) != ndim or not all(shapes[key]):
        raise PortingError(
            f"{path}: {key} has shape {shapes[key]}, expected {ndim} non-empty dimensions"
        )
    return shapes[key]


def _indices(shapes, pattern, path):
    """The numbers at the start of matching keys, which must count up from 0."""
    found = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    if found != set(range(len(found))) or not found:
        what = pattern.replace("\\", "").replace(_INDEX, "N")
        raise PortingError(
            f"{path}: the numbers in {what} do not count up from 0: "
            f"{torch_checkpoint.abridged(map(str, sorted(found)))}"
        )
    return len(found)


def _dit_architecture(shapes, path):
    """What the shapes of official keys tell; num_heads and grid are None where they do not."""

    def shape(key, ndim):
        return _shape_of(shapes, key, ndim, path, "a DiT or LiT checkpoint")

    D, C, p, _ = shape("x_embedder.proj.weight", 4)
    rows = shape("y_embedder.embedding_table.weight", 2)[0]
    if rows < 2:
        raise PortingError(
            f"{path}: a label table of {rows} row has no room for a class and the null class"
        )
    if D % 4:
        raise PortingError(f"{path}: the width is {D}; the position table needs one that 4 divides")
    depth = _indices(shapes, rf"blocks\.{_INDEX}\.", path)
    out_features = shape("final_layer.linear.weight", 2)[0]
    if out_features not in (p * p * C, 2 * p * p * C):
        raise PortingError(
            f"{path}: final_layer.linear has {out_features} outputs; patch {p} and {C} channels "
            f"need {p * p * C}, or {2 * p * p * C} with learned variance"
        )
    attention = "linear" if "blocks.0.attn.q.weight" in shapes else "softmax"
    first = "q" if attention == "linear" else "qkv"
    architecture = {
        "attention": attention,
        "depth": depth,
        "width": D,
        "num_heads": None,
        "patch_size": p,
        "in_channels": C,
        "num_classes": rows - 1,
        "learn_sigma": out_features == 2 * p * p * C,
        "qkv_bias": f"blocks.0.attn.{first}.bias" in shapes,
        "conv_size": 0,
        "kernel_function": "relu",
        "grid": None,
        "timestep_freq_shift": 0,
        "mlp_norm_epsilon": 1e-6,
    }
    if attention == "softmax":
        heads = {size[:2]: size[2] for size in SIZES.values()}
        architecture["num_heads"] = heads.get((depth, D))
    elif "blocks.0.attn.dwc.weight" in shapes:
        H, _, _, K = shape("blocks.0.attn.dwc.weight", 4)
        if D % H or K % 2 == 0:
            raise PortingError(
                f"{path}: {H} filters of size {K} in the convolution: the filters must divide the "
                f"width {D}, the size must be odd"
            )
        architecture["num_heads"], architecture["conv_size"] = D // H, K
    if "pos_embed" in shapes:
        T = shape("pos_embed", 3)[1]
        architecture["grid"] = (math.isqrt(T),) * 2 if math.isqrt(T) ** 2 == T else None
    return architecture


def _merge_fields(architecture, fields, path, who):
    """Adds what `who` says; it must agree with what the tensors say."""
    for field, value in fields.items():
        known = architecture[field]
        # Published head counts and a square grid are guesses, which a statement overrides.
        guessed = (
            field in _CONVENTIONS
            or field == "grid"
            or (field == "num_heads" and architecture["attention"] == "softmax")
        )
        if known is not None and known != value and not guessed:
            raise PortingError(f"{path}: {who} says {field} = {value}, the tensors say {known}")
        architecture[field] = value
    D, heads = architecture["width"], architecture["num_heads"]
    if heads and D % heads:
        raise PortingError(
            f"{path}: {who} says num_heads = {heads}, which does not divide the width {D}"
        )
    return architecture


def _autoencoder_architecture(shapes, path):

    def shape(key, ndim=4):
        return _shape_of(shapes, key, ndim, path, "an AutoencoderKL checkpoint")

    blocks = _indices(shapes, rf"encoder\.down_blocks\.{_INDEX}\.", path)
    layers = _indices(shapes, rf"encoder\.down_blocks\.0\.resnets\.{_INDEX}\.", path)
    widths = [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(blocks)]
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
        "scaling_factor": None,
        "shift_factor": None,
    }


def _is_scale(value):
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < 1e6


def _is_shift(value):
    return value is None or (
        isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < 1e6
    )


def _check_autoencoder(stored, path):
    """Validates the architecture that an Orbax checkpoint names, so that its rules can be made of it."""
    checks = {
        "block_out_channels": lambda v: (
            isinstance(v, list) and 0 < len(v) < 100 and all(map(torch_checkpoint.is_count, v))
        ),
        "layers_per_block": lambda v: torch_checkpoint.is_count(v, 1, 1000),
        "scaling_factor": _is_scale,
        "shift_factor": _is_shift,
    } | dict.fromkeys(
        ("in_channels", "out_channels", "latent_channels", "norm_num_groups"),
        torch_checkpoint.is_count,
    )
    checks |= dict.fromkeys(
        ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
        lambda v: isinstance(v, bool),
    )
    if not isinstance(stored, dict) or stored.keys() != checks.keys():
        raise PortingError(f"{path}: its metadata describe no autoencoder: {str(stored)[:80]}")
    for field, value in stored.items():
        if not checks[field](value):
            raise PortingError(f"{path}: its metadata say {field} = {str(value)[:40]}")
    groups, widths = stored["norm_num_groups"], stored["block_out_channels"]
    if any(width % groups for width in widths):
        raise PortingError(
            f"{path}: its metadata say norm_num_groups = {groups}, which does not divide the widths {widths}"
        )
    return stored | {"block_out_channels": tuple(widths)}


def _diffusers_autoencoder_fields(source, architecture):
    """Checks config.json of an AutoencoderKL against the shapes; returns what only the config knows."""
    config, path = source.config, source.path
    _check_class(config, "autoencoder", path)
    checked = {
        name: architecture[name]
        for name in (
            "in_channels",
            "out_channels",
            "latent_channels",
            "layers_per_block",
            "mid_block_add_attention",
            "use_quant_conv",
            "use_post_quant_conv",
        )
    }
    blocks = len(architecture["block_out_channels"])
    _check_config(
        config,
        checked
        | {
            "block_out_channels": list(architecture["block_out_channels"]),
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * blocks,
            "up_block_types": ["UpDecoderBlock2D"] * blocks,
            "latents_mean": None,
            "latents_std": None,
        },
        path,
    )
    groups = config.get("norm_num_groups", 32)
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    if not torch_checkpoint.is_count(groups) or any(
        width % groups for width in architecture["block_out_channels"]
    ):
        raise PortingError(
            f"{path}: config.json says norm_num_groups = {str(groups)[:20]}, which does not divide "
            f"the widths {architecture['block_out_channels']}"
        )
    if not _is_scale(scale) or not _is_shift(shift):
        raise PortingError(
            f"{path}: config.json says scaling_factor = {str(scale)[:20]}, shift_factor = "
            f"{str(shift)[:20]}"
        )
    if "scaling_factor" not in config:
        source.notes.append("config.json names no scaling_factor: diffusers' default 0.18215")
    return {"norm_num_groups": groups, "scaling_factor": scale, "shift_factor": shift}


# Matching.


def _match(named, origin, rules, source, report, checked=()):
    """The tree of leaves; raises with both sides unless keys and shapes are exactly those of the rules."""
    params, wrong, used = {}, [], set(checked)
    for path, keys, kind, shape in rules:
        layers = []
        for layer, key in enumerate(keys):
            if key not in named:
                report.missing += [key]
                continue
            used.add(key)
            pieces, names = named[key], origin[key]
            rows = {piece.shape[:1] for piece in pieces}
            tails = {piece.shape[1:] for piece in pieces}
            if (
                any(piece.ndim == 0 for piece in pieces)
                or len(rows) > 1
                or len(tails) > 1
                or (_joined_shape(pieces) != shape)
            ):
                wrong.append(
                    f"{' + '.join(names)} {' + '.join(str(piece.shape) for piece in pieces)}, "
                    f"expected {shape}"
                )
                continue
            for piece, name in zip(pieces, names):
                if piece.dtype not in _FLOATS:
                    wrong.append(f"{name} of {piece.dtype}, expected a float")
                where = f"{path}[{layer}]" if path.startswith("blocks/") else path
                part = f" part {names.index(name) + 1} of {len(names)}" if len(names) > 1 else ""
                cast = "" if piece.dtype == np.float32 else f", cast from {piece.dtype}"
                report.keys[name] = f"{where}{part}: {_HOW.get(kind, 'as it is')}{cast}"
            layers.append(pieces)
        if len(layers) == len(keys):
            params[path] = Leaf(
                layers, layouts.TO_FLAX[kind], path.startswith("blocks/"), source.release
            )
    report.unexpected = sorted(name for key in set(named) - used for name in origin[key])
    if report.missing or report.unexpected or wrong:
        parts = [
            f"{name}: {torch_checkpoint.abridged(keys, width=240 if name == 'wrong' else 80)}"
            for name, keys in (
                ("missing", report.missing),
                ("unexpected", report.unexpected),
                ("wrong", wrong),
            )
            if keys
        ]
        raise PortingError(f"{source.path}: {'; '.join(parts)}", report)
    if unexplained := sorted(source.tensors.keys() - report.keys.keys() - report.left_out.keys()):
        raise PortingError(
            f"{source.path}: nothing explains {torch_checkpoint.abridged(unexplained)}", report
        )
    source.verify()
    return params


def _check_pos_embed(table, grid, D, path):
    """Checks the stored position table against the computed one; returns what to report."""
    if grid is None or grid[0] * grid[1] != table.shape[1]:
        raise PortingError(
            f"{path}: pos_embed has {table.shape[1]} positions, the grid is "
            f"{'unknown' if grid is None else f'{grid[0]} x {grid[1]}'}; name the input size"
        )
    computed = position_embedding(grid, D)[None]
    if table.shape != computed.shape or table.dtype not in _FLOATS:
        raise PortingError(
            f"{path}: pos_embed is {table.shape} of {table.dtype}, the {grid[0]} x {grid[1]} grid "
            f"needs {computed.shape}"
        )
    error = float(np.max(np.abs(np.asarray(table, np.float64) - computed)))
    # Rounding of the stored value; and some writers compute the angle, up to the largest position, in float32.
    unit = {2: 2.0**-8 if table.dtype == ml_dtypes.bfloat16 else 2.0**-11}.get(
        table.dtype.itemsize, 2.0**-24
    )
    tolerance = unit + 2.0**-23 * max(grid)
    if not error <= tolerance:
        raise PortingError(
            f"{path}: pos_embed differs from the computed {grid[0]} x {grid[1]} table by {error:.3g} "
            f"(tolerance {tolerance:.3g}): it was trained or scaled, and our model has a fixed one"
        )
    return f"equal to the computed table of the {grid[0]} x {grid[1]} grid (largest difference {error:.2g})"


def _resize_labels(params, architecture, num_classes, seed, report):
    """Keeps the first classes and the null class; rows of further classes are drawn as in a fresh DiT."""
    path = "y_embedder/embedding_table/embedding"
    table, old = np.asarray(params[path]), architecture["num_classes"]
    kept = min(old, num_classes)
    new = np.random.default_rng(seed).normal(0, _LABEL_STD, (num_classes - kept, table.shape[1]))
    params[path] = np.concatenate([table[:kept], new.astype(np.float32), table[-1:]])
    report.notes.append(
        f"the label table went from {old} to {num_classes} classes: the first {kept} and the null "
        f"class are kept"
    )
    if num_classes > old:
        report.reinitialised.append(
            f"{path}[{kept}:{num_classes}], normal with std {_LABEL_STD}, seed {seed}"
        )
    architecture["num_classes"] = num_classes


# What the rest of the program calls.


def read_checkpoint(
    path: str | pathlib.Path,
    *,
    weights: str = "ema",
    num_heads: int = 0,
    num_classes: int = 0,
    input_size: tuple[int, int] | None = None,
    timestep_freq_shift: int | None = None,
    mlp_norm_epsilon: float | None = None,
    seed: int = 0,
) -> Checkpoint:
    """Opens a DiT or LiT checkpoint of any layout; the leaves of a torch file are still in the file.

    Reads official DiT files (.pt, .safetensors), training checkpoints (DiT, fast-DiT, REPA), diffusers folders, our
    own exports, and Orbax checkpoints or workdirs. Every value is read once, for the checksum.

    Args:
        path: file or folder.
        weights: "ema" or "model", where a training checkpoint has both.
        num_heads: where nothing in the file tells it; 0: as the file says, or the published size's.
        num_classes: resizes the label table; 0 keeps it.
        input_size: (h, w) of the images or latents that the new position table is for, or a stored one that is not
            square; None keeps it.
        timestep_freq_shift, mlp_norm_epsilon: override how the source's own code computes (official DiT 0 and
            1e-6; diffusers 1 and norm_eps).
        seed: of new label rows.

    Raises:
        PortingError: a key is missing, unexpected, of the wrong shape or dtype, not finite, or unexplained.
        torch_file.TensorFileError: the file is damaged or hostile. FileNotFoundError: it is not there.
    """
    if weights not in ("ema", "model"):
        raise ValueError(
            f"weights must be ema or model (port.weights, teacher.weights, student.weights); got {weights!r}"
        )
    for field, value in (
        ("num_heads", num_heads),
        ("num_classes", num_classes),
        ("input_size", min(input_size or (0,))),
    ):
        if value < 0:
            raise ValueError(f"port.{field} must not be negative; got {value}")
    if timestep_freq_shift not in (None, 0, 1):
        raise ValueError(f"port.timestep_freq_shift must be 0 or 1; got {timestep_freq_shift}")
    if mlp_norm_epsilon is not None and not 0 < mlp_norm_epsilon < 1:
        raise ValueError(f"port.mlp_norm_epsilon must be between 0 and 1; got {mlp_norm_epsilon}")
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if checkpoint.is_checkpoint(path):
        params, architecture, report = _read_orbax_dit(path, weights)
    else:
        params, architecture, report = _read_torch_dit(path, weights, input_size)
    asked = {
        "timestep_freq_shift": timestep_freq_shift,
        "mlp_norm_epsilon": mlp_norm_epsilon,
        "num_heads": num_heads or None,
    }
    for field, value in asked.items():
        if value is not None and architecture[field] != value:
            if (
                field == "num_heads"
                and architecture["attention"] == "linear"
                and architecture["conv_size"]
            ):
                raise PortingError(
                    f"{path}: num_heads = {value} was asked for, the convolution has the filters of "
                    f"{architecture[field]}"
                )
            report.notes.append(
                f"{field} = {value} was asked for, the source has {architecture[field]}"
            )
            architecture[field] = value
    if architecture["num_heads"] and architecture["width"] % architecture["num_heads"]:
        raise PortingError(
            f"{path}: num_heads = {architecture['num_heads']} does not divide the width "
            f"{architecture['width']}"
        )
    if num_classes and num_classes != architecture["num_classes"]:
        _resize_labels(params, architecture, num_classes, seed, report)
    grid, own_grid = input_size and _grid(input_size, architecture, path), architecture["grid"]
    if grid and grid != own_grid:
        report.notes.append(
            f"the position table is recomputed for the {grid[0]} x {grid[1]} grid"
            + (f", the source has {own_grid[0]} x {own_grid[1]}" if own_grid else "")
        )
        architecture["grid"] = grid
    if math.prod(architecture["grid"] or ()) > _MAX_POSITIONS:
        raise PortingError(
            f"{path}: a grid of {plain(architecture['grid'])} positions, the limit is {_MAX_POSITIONS}"
        )
    return _checkpoint(params, architecture, report)


def _checkpoint(params, architecture, report):
    params = unflatten_dict(params, sep="/")
    try:
        report.checksum = checksum(params)
    except PortingError as error:
        raise PortingError(f"{report.source}: {error}", report) from None
    report.architecture = architecture
    report.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Checkpoint(params, architecture, report)


def _grid(input_size, architecture, path):
    p = architecture["patch_size"]
    if any(side % p for side in input_size):
        raise PortingError(
            f"{path}: input_size = {plain(input_size)} was asked for, its patches are {p} wide"
        )
    return tuple(side // p for side in input_size)


def _read_torch_dit(path, weights, input_size):
    source = torch_checkpoint.open_torch_checkpoint(path, weights)
    report = Report(str(path), "dit", notes=source.notes)
    if any(key.startswith("transformer_blocks.") for key in source.tensors):
        report.layout = "diffusers"
        named, origin = _from_diffusers(source, report)
    else:
        named = {
            key: [tensor]
            for key, tensor in source.tensors.items()
            if not key.startswith("projectors.")
        }
        origin = {key: [key] for key in named}
        aside = [key for key in source.tensors if key not in named]
        report.left_out = dict.fromkeys(aside, "projectors of REPA's training loss")
        if aside:
            report.notes.append(
                "a REPA model: it predicts the velocity of SiT's linear path, at times in [0, 1]"
            )
    shapes = {
        key: _joined_shape(pieces)
        for key, pieces in named.items()
        if len(pieces) == 1 or all(piece.ndim for piece in pieces)
    }
    architecture = _dit_architecture(shapes, path)
    if report.layout == "diffusers":
        fields = (
            _diffusers_dit_fields(source, architecture)
            if source.config is not None
            else {"timestep_freq_shift": 1, "mlp_norm_epsilon": 1e-5}
        )
        _merge_fields(architecture, fields, path, "config.json")
        if source.config is None:
            report.notes.append(
                "no config.json beside it: diffusers' defaults are taken, "
                + ", ".join(f"{field} = {value}" for field, value in fields.items())
            )
    stored = _check_stored(source.stored, path)
    if (
        architecture["num_heads"]
        and architecture["attention"] == "softmax"
        and source.config is None
        and ("num_heads" not in stored)
    ):
        report.notes.append(
            f"num_heads = {architecture['num_heads']} is that of the published size of this depth and width"
        )
    _merge_fields(architecture, stored, path, "its metadata")
    if architecture["attention"] == "linear" and "kernel_function" not in stored:
        report.notes.append("nothing in the file tells the kernel function: relu is taken")
    if "pos_embed" in shapes:
        own_grid, asked = architecture["grid"], input_size and _grid(input_size, architecture, path)
        if asked and asked[0] * asked[1] == shapes["pos_embed"][1]:
            own_grid = asked
        report.keys[origin["pos_embed"][0]] = _check_pos_embed(
            named["pos_embed"][0], own_grid, architecture["width"], path
        )
        architecture["grid"] = own_grid
    if (
        architecture["attention"] == "linear"
        and architecture["conv_size"] == 0
        and not architecture["num_heads"]
    ):
        report.notes.append("without convolution nothing in the file tells the number of heads")
    params = _match(
        named,
        origin,
        layouts.dit_rules(architecture),
        source,
        report,
        {"pos_embed"} & shapes.keys(),
    )
    return params, architecture, report


def _read_orbax_dit(path, weights):
    params, metadata = checkpoint.restore_params(path, ema=weights == "ema")
    flat = flatten_dict(params, sep="/")
    report = Report(str(path), "orbax", notes=[f"read {metadata['weights']} of {metadata['path']}"])
    shapes = {}
    for module, official, kind in layouts.DIT_MODULES:
        for ours, theirs in ((layouts.WEIGHT_NAME[kind], "weight"), ("bias", "bias")):
            leaf = flat.get(f"{module}/{ours}")
            if leaf is None:
                continue
            one = leaf.shape[1:] if module.startswith("blocks/") else leaf.shape
            axes = layouts.TO_TORCH[kind] if theirs == "weight" else (0,)
            if len(one) != len(axes):
                raise PortingError(f"{path}: {module}/{ours} has shape {leaf.shape}")
            for layer in range(leaf.shape[0] if module.startswith("blocks/") else 1):
                shapes[f"{official.format(layer)}.{theirs}"] = tuple(one[axis] for axis in axes)
    architecture = _dit_architecture(shapes, path)
    stored = _check_stored(metadata.get("model") or {}, path)
    _merge_fields(architecture, stored, path, "its metadata")
    expected = layouts.tree_shapes(layouts.dit_rules(architecture))
    check_tree(flat, expected, path, report)
    return flat, architecture, report


def check_tree(flat, expected, path, report=None):
    """Raises PortingError listing both sides unless the leaves have the expected paths and shapes, and are floats."""
    report = report or Report(str(path), "")
    report.missing = sorted(expected.keys() - flat.keys())
    report.unexpected = sorted(flat.keys() - expected.keys())
    wrong = [
        f"{name} {flat[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in flat and tuple(flat[name].shape) != shape
    ]
    wrong += [
        f"{name} of {leaf.dtype}, expected a float"
        for name, leaf in flat.items()
        if leaf.dtype not in _FLOATS
    ]
    if report.missing or report.unexpected or wrong:
        parts = [
            f"{name}: {torch_checkpoint.abridged(keys, width=240 if name == 'wrong' else 80)}"
            for name, keys in (
                ("missing", report.missing),
                ("unexpected", report.unexpected),
                ("wrong", wrong),
            )
            if keys
        ]
        raise PortingError(f"{path}: {'; '.join(parts)}", report)
    report.keys = dict.fromkeys(sorted(flat), "as it is")


def is_autoencoder(path: str | pathlib.Path) -> bool:
    """Whether a checkpoint is an AutoencoderKL, by its keys."""
    path = pathlib.Path(path)
    if checkpoint.is_checkpoint(path):
        params = path / "params"
        return params.is_dir() and "decoder/conv_in/kernel" in checkpoint.shapes_of(params)
    if path.is_dir() and torch_checkpoint.component(path, "transformer", "vae") == path / "vae":
        return True
    keys = torch_checkpoint.open_torch_checkpoint(
        path, "ema" if path.is_dir() else _some_weights(path)
    ).tensors
    return any(re.match(r"(first_stage_model\.)?(encoder|decoder)\.conv_in\.", key) for key in keys)


def _some_weights(path):
    tree = torch_checkpoint.open_file(path).tensors
    return "ema" if isinstance(tree.get("ema"), dict) else "model"


def read_autoencoder(
    path: str | pathlib.Path, *, weights: str = "ema", scaling_factor: float = 0.0
) -> Checkpoint:
    """Opens an AutoencoderKL: a diffusers folder, a file in any of the three key spellings, or our Orbax folder.

    Args:
        path: file or folder. weights: "ema" or "model", where a training checkpoint has both.
        scaling_factor: overrides what the source says; needed where it says nothing (no config.json): 0.18215 for
            Stable Diffusion, 0.13025 for SDXL, whose tensors have the same names and shapes.

    Raises: as `read_checkpoint`.
    """
    if scaling_factor < 0:
        raise ValueError(f"scaling_factor must not be negative; got {scaling_factor}")
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if checkpoint.is_checkpoint(path):
        params, metadata = checkpoint.restore_params(path)
        flat, report = flatten_dict(params, sep="/"), Report(str(path), "orbax")
        if "autoencoder" not in metadata:
            raise PortingError(f"{path}: not the checkpoint of an autoencoder")
        architecture = _check_autoencoder(metadata["autoencoder"], path)
        check_tree(flat, layouts.tree_shapes(layouts.autoencoder_rules(architecture)), path, report)
    else:
        source = torch_checkpoint.open_torch_checkpoint(
            torch_checkpoint.component(path, "vae"), weights
        )
        report = Report(str(path), "diffusers", notes=source.notes)
        named, origin = _autoencoder_names(source, report)
        shapes = {key: pieces[0].shape for key, pieces in named.items()}
        architecture = _autoencoder_architecture(shapes, path)
        if source.config is not None:
            architecture |= _diffusers_autoencoder_fields(source, architecture)
        elif any(
            width % architecture["norm_num_groups"] for width in architecture["block_out_channels"]
        ):
            raise PortingError(
                f"{path}: nothing in it tells the groups of its norms, and {architecture['norm_num_groups']}, "
                f"what published ones have, does not divide the widths {architecture['block_out_channels']}; "
                "put it into a folder with its config.json"
            )
        elif architecture["latent_channels"] == 16:
            raise PortingError(
                f"{path}: 16 latent channels, as those of SD3 and Flux, which also shift their latents, and "
                "nothing in it tells by how much; give the diffusers folder with its config.json"
            )
        flat = _match(named, origin, layouts.autoencoder_rules(architecture), source, report)
    if scaling_factor:
        architecture["scaling_factor"] = scaling_factor
    if architecture["scaling_factor"] is None:
        raise PortingError(
            f"{path}: nothing in it tells the scale of the latents; set autoencoder.scaling_factor, in a port "
            "port.scaling_factor (Stable Diffusion 0.18215, SDXL 0.13025)"
        )
    return _checkpoint(flat, architecture, report)


def require_architecture(checkpoint: Checkpoint, expected: dict) -> None:
    """Raises PortingError naming the first field in which a checkpoint is not what is expected."""
    for field, value in expected.items():
        if checkpoint.architecture[field] != value:
            raise PortingError(
                f"{checkpoint.report.source} has {field} = {plain(checkpoint.architecture[field])}, "
                f"the config's model has {plain(value)}; name its model, or set port.check_model=False"
            )

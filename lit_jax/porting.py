"""Checkpoints of the PyTorch world into our parameter trees and back, every key accounted for.

A checkpoint is read as views of a mapped file (`torch_file`). Its keys are first renamed to one spelling: that of
the official DiT checkpoints, or of today's diffusers for autoencoders. Rules then lead from there to the tree:

    Linear         weight (out, in)      <-> kernel (in, out)
    convolution    weight (O, I, h, w)   <-> kernel (h, w, I, O)
    blocks.i.*                           <-> blocks/*, stacked on a leading layer axis

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
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax import checkpoint as orbax
from lit_jax import torch_file
from lit_jax.kernels.linear_attention import KERNEL_FUNCTIONS
from lit_jax.models.dit import FREQUENCIES, SIZES, position_embedding

# Our module, its name in an official checkpoint, and the kind of its weight.
_DIT_MODULES = (
    ("x_embedder/proj", "x_embedder.proj", "conv"),
    ("t_embedder/mlp_0", "t_embedder.mlp.0", "linear"),
    ("t_embedder/mlp_2", "t_embedder.mlp.2", "linear"),
    ("y_embedder/embedding_table", "y_embedder.embedding_table", "embedding"),
    ("blocks/attn/qkv", "blocks.{}.attn.qkv", "linear"),
    ("blocks/attn/q", "blocks.{}.attn.q", "linear"),
    ("blocks/attn/kv", "blocks.{}.attn.kv", "linear"),
    ("blocks/attn/proj", "blocks.{}.attn.proj", "linear"),
    ("blocks/attn/dwc", "blocks.{}.attn.dwc", "conv"),
    ("blocks/mlp/fc1", "blocks.{}.mlp.fc1", "linear"),
    ("blocks/mlp/fc2", "blocks.{}.mlp.fc2", "linear"),
    ("blocks/adaLN_modulation", "blocks.{}.adaLN_modulation.1", "linear"),
    ("final_layer/adaLN_modulation", "final_layer.adaLN_modulation.1", "linear"),
    ("final_layer/linear", "final_layer.linear", "linear"),
)
# The official module and its name in diffusers' DiTTransformer2DModel.
_DIFFUSERS_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_DIFFUSERS_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_DIFFUSERS_EMBEDDERS = {    # stored again in every block
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_DIFFUSERS_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_DIFFUSERS_CLASSES = {      # of config.json; Transformer2DModel is what DiT was before it had a class of its own
    "dit": ("DiTTransformer2DModel", "Transformer2DModel"),
    "autoencoder": ("AutoencoderKL",),
}

_WEIGHT_NAME = {"conv": "kernel", "linear": "kernel", "embedding": "embedding", "norm": "scale"}
# From torch's axis order to ours, and back.
_TO_FLAX = {"conv": (2, 3, 1, 0), "linear": (1, 0), "embedding": (0, 1), "norm": (0,), "bias": (0,)}
_TO_TORCH = {"conv": (3, 2, 0, 1), "linear": (1, 0), "embedding": (0, 1), "norm": (0,), "bias": (0,)}
_HOW = {"conv": "axes to (h, w, I, O)", "linear": "transposed"}
_FLOATS = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)))
_LABEL_STD = 0.02           # of new label rows, as DiT draws them
# What no shape tells: how the source's own code computes, or what it says of itself.
_CONVENTIONS = ("timestep_freq_shift", "mlp_norm_epsilon", "kernel_function")


class PortingError(ValueError):
    """A checkpoint that cannot be taken as it is; `report` says what was found, key by key."""

    def __init__(self, message: str, report: "Report | None" = None):
        super().__init__(message)
        self.report = report


@dataclasses.dataclass
class Report:
    """What became of every key of the source."""
    source: str
    layout: str                                                         # spelling of the keys
    keys: dict[str, str] = dataclasses.field(default_factory=dict)      # source key -> where it went, and how
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)  # source key -> why it is not needed
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    reinitialised: list[str] = dataclasses.field(default_factory=list)  # parts of leaves that are new
    notes: list[str] = dataclasses.field(default_factory=list)
    architecture: dict = dataclasses.field(default_factory=dict)
    parameters: int = 0                                                 # elements in the tree
    checksum: str = ""                                                  # `checksum` of the tree

    def to_json(self) -> str:
        counts = {name: len(getattr(self, name))
                  for name in ("keys", "left_out", "missing", "unexpected", "reinitialised")}
        return json.dumps({"counts": counts} | dataclasses.asdict(self), indent=1)

    def summary(self) -> str:
        """The report in a few lines for a terminal."""
        lines = [f"{self.source} ({self.layout} layout)",
                 "  " + ", ".join(f"{name} {_plain(value)}" for name, value in self.architecture.items()),
                 f"  {len(self.keys)} keys matched, {len(self.left_out)} left out, {len(self.missing)} missing, "
                 f"{len(self.unexpected)} unexpected, {len(self.reinitialised)} re-initialised; "
                 f"{self.parameters:,} parameters",
                 f"  sha256 {self.checksum}"]
        reasons = collections.Counter(self.left_out.values())
        lines += [f"  left out: {count} keys, {reason}" for reason, count in reasons.items()]
        lines += [f"  re-initialised: {name}" for name in self.reinitialised]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _plain(value):
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else value


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """`params` is a nested dict of leaves, `architecture` what shapes, metadata and caller say of the model."""
    params: dict
    architecture: dict
    report: Report


class Leaf:
    """One parameter still in its file, as float32 in our layout; `leaf[index]`, `np.asarray(leaf)` read it.

    `layers` holds one list of torch arrays a layer (a single one for a leaf without layer axis); the arrays of a
    list are concatenated on torch's first axis, then the axes are permuted.
    """
    dtype = np.dtype(np.float32)

    def __init__(self, layers: list[list[np.ndarray]], axes: tuple[int, ...], stacked: bool,
                 release: Callable[[], None] = lambda: None):
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
        with np.errstate(over="ignore"):    # a float64 that becomes infinite: `checksum` finds it
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
        self._release()     # a mapped page that stays counts as memory in use
        return out

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def __repr__(self):
        return f"Leaf{self.shape}"


def _joined_shape(pieces):
    shape = pieces[0].shape
    return shape if len(pieces) == 1 else (sum(piece.shape[0] for piece in pieces), *shape[1:])


def load_params(params: Any, shardings: Any = None) -> Any:
    """Reads a tree of leaves into device arrays, one leaf at a time.

    Args:
        params: nested dict of `Leaf` or arrays.
        shardings: the same tree of shardings; each device then reads only its part. None: the default device.
    """
    if shardings is None:
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)

    def load(leaf, sharding):
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(leaf[index]))

    return jax.tree.map(load, params, shardings)


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


def _abridged(names, limit=6):
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# Rules: (path in the tree, key of each layer, kind, torch shape of one layer) for every leaf of an architecture.

Rule = tuple[str, list[str], str, tuple[int, ...]]


def dit_rules(architecture: dict) -> Iterator[Rule]:
    """The rules of DiT and LiT; keys are those of the official checkpoints."""
    D, L, p = architecture["width"], architecture["depth"], architecture["patch_size"]
    C, K = architecture["in_channels"], architecture["conv_size"]
    linear = architecture["attention"] == "linear"
    shapes = {
        "x_embedder/proj": (D, C, p, p), "t_embedder/mlp_0": (D, FREQUENCIES), "t_embedder/mlp_2": (D, D),
        "y_embedder/embedding_table": (architecture["num_classes"] + 1, D),
        "blocks/attn/proj": (D, D), "blocks/mlp/fc1": (4 * D, D), "blocks/mlp/fc2": (D, 4 * D),
        "blocks/adaLN_modulation": (6 * D, D), "final_layer/adaLN_modulation": (2 * D, D),
        "final_layer/linear": (p * p * C * (2 if architecture["learn_sigma"] else 1), D),
    }
    if linear:
        shapes |= {"blocks/attn/q": (D, D), "blocks/attn/kv": (2 * D, D)}
    else:
        shapes["blocks/attn/qkv"] = (3 * D, D)
    if linear and K:
        shapes["blocks/attn/dwc"] = (D // architecture["num_heads"], 1, K, K)
    unbiased = () if architecture["qkv_bias"] else ("blocks/attn/qkv", "blocks/attn/q", "blocks/attn/kv")
    for module, official, kind in _DIT_MODULES:
        if module not in shapes:
            continue
        names = [official.format(layer) for layer in range(L)] if "{}" in official else [official]
        yield f"{module}/{_WEIGHT_NAME[kind]}", [f"{name}.weight" for name in names], kind, shapes[module]
        if kind != "embedding" and module not in unbiased:
            yield f"{module}/bias", [f"{name}.bias" for name in names], "bias", shapes[module][:1]


def autoencoder_rules(architecture: dict) -> Iterator[Rule]:
    """The rules of AutoencoderKL; keys are those of today's diffusers."""
    widths, layers = architecture["block_out_channels"], architecture["layers_per_block"]
    Z = architecture["latent_channels"]

    def module(name, kind, shape):
        path = re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/")
        yield f"{path}/{_WEIGHT_NAME[kind]}", [f"{name}.weight"], kind, shape
        yield f"{path}/bias", [f"{name}.bias"], "bias", shape[:1]

    def resnet(name, width_in, width):
        yield from module(f"{name}.norm1", "norm", (width_in,))
        yield from module(f"{name}.conv1", "conv", (width, width_in, 3, 3))
        yield from module(f"{name}.norm2", "norm", (width,))
        yield from module(f"{name}.conv2", "conv", (width, width, 3, 3))
        if width_in != width:
            yield from module(f"{name}.conv_shortcut", "conv", (width, width_in, 1, 1))

    def mid(name, width):
        yield from resnet(f"{name}.resnets.0", width, width)
        if architecture["mid_block_add_attention"]:
            yield from module(f"{name}.attentions.0.group_norm", "norm", (width,))
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                yield from module(f"{name}.attentions.0.{part}", "linear", (width, width))
        yield from resnet(f"{name}.resnets.1", width, width)

    yield from module("encoder.conv_in", "conv", (widths[0], architecture["in_channels"], 3, 3))
    width_in = widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            yield from resnet(f"encoder.down_blocks.{i}.resnets.{j}", width_in, width)
            width_in = width
        if i < len(widths) - 1:
            yield from module(f"encoder.down_blocks.{i}.downsamplers.0.conv", "conv", (width, width, 3, 3))
    yield from mid("encoder.mid_block", widths[-1])
    yield from module("encoder.conv_norm_out", "norm", (widths[-1],))
    yield from module("encoder.conv_out", "conv", (2 * Z, widths[-1], 3, 3))
    if architecture["use_quant_conv"]:
        yield from module("quant_conv", "conv", (2 * Z, 2 * Z, 1, 1))
    if architecture["use_post_quant_conv"]:
        yield from module("post_quant_conv", "conv", (Z, Z, 1, 1))
    yield from module("decoder.conv_in", "conv", (widths[-1], Z, 3, 3))
    yield from mid("decoder.mid_block", widths[-1])
    width_in = widths[-1]
    for i, width in enumerate(widths[::-1]):
        for j in range(layers + 1):
            yield from resnet(f"decoder.up_blocks.{i}.resnets.{j}", width_in, width)
            width_in = width
        if i < len(widths) - 1:
            yield from module(f"decoder.up_blocks.{i}.upsamplers.0.conv", "conv", (width, width, 3, 3))
    yield from module("decoder.conv_norm_out", "norm", (widths[0],))
    yield from module("decoder.conv_out", "conv", (architecture["out_channels"], widths[0], 3, 3))


def tree_shapes(rules: Iterator[Rule]) -> dict[str, tuple[int, ...]]:
    """Path -> shape in our layout."""
    shapes = {}
    for path, keys, kind, shape in rules:
        ours = tuple(shape[axis] for axis in _TO_FLAX[kind])
        shapes[path] = (len(keys), *ours) if path.startswith("blocks/") else ours
    return shapes


# Opening a source.

@dataclasses.dataclass
class _Source:
    """Tensors by key, with what was stored beside them."""
    path: pathlib.Path
    tensors: dict[str, np.ndarray]
    stored: dict            # architecture fields that the file itself names
    config: dict | None     # a diffusers config.json
    notes: list[str]
    files: list[torch_file.TensorFile]

    def release(self):
        for file in self.files:
            file.release()

    def verify(self):
        """Compares the checksums that the files carry of the tensors; says so in the notes."""
        count = sum(file.verify(self.tensors.values()) for file in self.files if file.records)
        if count:
            self.notes.append(f"the CRC-32 of {count} records is that of the archive")


def _read_json(path):
    try:
        if path.stat().st_size > torch_file.MAX_HEADER_BYTES:
            raise ValueError(f"larger than {torch_file.MAX_HEADER_BYTES} bytes")
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=torch_file.unique_keys)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        return value
    except (ValueError, RecursionError) as error:
        raise PortingError(f"{path}: not valid JSON: {error}") from error


def _inside(folder, name, index):
    """The file `name` of a folder; an index must not lead out of it (the Hub cache's own links may)."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise PortingError(f"{index}: names the file {name!r:.80}, which is not a plain file name")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{index}: names {name}, which is not in the folder")
    roots = [folder.resolve()]
    roots += [parent.parent.resolve() / "blobs" for parent in folder.absolute().parents
              if parent.name == "snapshots"]
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise PortingError(f"{path}: a link to {path.resolve()}, outside the folder")
    return path


def _open_file(path):
    return torch_file.read_safetensors(path) if path.suffix == ".safetensors" else torch_file.read_torch(path)


def _state_dict(file, weights):
    """The flat dict of tensors in a file, and notes; `weights` picks "ema" or "model" where both are there."""
    tree, notes = file.tensors, []
    if not tree:
        raise PortingError(f"{file.path}: no tensors")
    if not all(isinstance(value, np.ndarray) for value in tree.values()):
        inner = [name for name in (weights, "state_dict") if isinstance(tree.get(name), dict)]
        if not inner:
            offer = [name for name in ("ema", "model") if isinstance(tree.get(name), dict)]
            raise PortingError(f"{file.path}: no {weights!r} weights in it, only {_abridged(map(repr, tree))}"
                               + (f"; choose weights={offer[0]} (port.weights, teacher.weights or student.weights)"
                                  if offer else ""))
        beside = [name for name in tree if name != inner[0]]
        notes.append(f"took {inner[0]!r} from a training checkpoint and left {', '.join(map(repr, beside[:8]))}")
        notes += _notes_of_arguments(tree.get("args"))
        tree = tree[inner[0]]
    for key, value in tree.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise PortingError(f"{file.path}: {str(key)[:80]!r} is a {type(value).__name__}, not a tensor")
    if not tree:
        raise PortingError(f"{file.path}: no tensors")
    for prefix in ("module.", "_orig_mod.", "module.", "_orig_mod."):   # wrappers may be nested either way
        if all(key.startswith(prefix) for key in tree):
            tree = {key.removeprefix(prefix): value for key, value in tree.items()}
            notes.append(f"removed the prefix {prefix!r} of every key")
    return tree, notes


def _notes_of_arguments(arguments):
    if not isinstance(arguments, dict):
        return []
    known = [f"{name}={arguments[name]}" for name in ("model", "image_size", "resolution", "num_classes", "vae")
             if isinstance(arguments.get(name), str | int)]
    return [f"its training arguments: {', '.join(known)}"] if known else []


def _open(path, weights):
    path = pathlib.Path(path)
    if path.is_dir():
        return _open_folder(path)
    file = _open_file(path)
    tensors, notes = _state_dict(file, weights)
    stored = {}
    sidecar = path.with_name(path.name + ".json")
    if "architecture" in file.metadata:
        try:
            stored = json.loads(file.metadata["architecture"])
        except (ValueError, RecursionError) as error:
            raise PortingError(f"{path}: its architecture is not valid JSON: {error}") from error
    elif path.suffix != ".safetensors" and sidecar.is_file():
        stored = _read_json(sidecar).get("architecture", {})
    return _Source(path, tensors, _check_stored(stored, path), None, notes, [file])


def _component(path, *names):
    """The first of the models `names` in a diffusers pipeline folder; any other path as it is."""
    if (path / "config.json").is_file():
        return path
    return next((path / name for name in names if (path / name / "config.json").is_file()), path)


def _open_folder(path):
    """A diffusers model folder, or the `transformer` of a pipeline folder."""
    path = _component(path, "transformer")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: neither an Orbax checkpoint nor a diffusers folder (no config.json)")
    config = _read_json(path / "config.json")
    stem = "diffusion_pytorch_model"
    files, tensors = [], {}
    for suffix in (".safetensors", ".bin"):
        index = path / f"{stem}{suffix}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise PortingError(f"{index}: no weight_map")
            for name in weight_map.values():
                _inside(path, name, index)
            for name in sorted(set(weight_map.values())):
                files.append(_open_file(_inside(path, name, index)))
                shard, _ = _state_dict(files[-1], "model")
                listed = {key for key, value in weight_map.items() if value == name}
                if listed != set(shard):
                    raise PortingError(f"{index} and {name} disagree on {_abridged(sorted(listed ^ set(shard)))}")
                tensors |= shard
            break
        if (path / f"{stem}{suffix}").exists():
            files.append(_open_file(_inside(path, f"{stem}{suffix}", path)))
            tensors, _ = _state_dict(files[-1], "model")
            break
    else:
        raise FileNotFoundError(f"{path}: no {stem}.safetensors or .bin, single or with an index")
    return _Source(path, tensors, {}, config, [], files)


def _is_count(value, low=1, high=10**6):
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check_stored(stored, path):
    """Validates architecture fields that a file names; unknown fields are refused."""
    checks = {
        "attention": lambda v: v in ("softmax", "linear"), "kernel_function": lambda v: v in KERNEL_FUNCTIONS,
        "learn_sigma": lambda v: isinstance(v, bool), "qkv_bias": lambda v: isinstance(v, bool),
        "conv_size": lambda v: _is_count(v, 0), "timestep_freq_shift": lambda v: _is_count(v, 0, 1),
        "mlp_norm_epsilon": lambda v: isinstance(v, float) and 0 < v < 1,
        "grid": lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(map(_is_count, v)),
    } | dict.fromkeys(("depth", "width", "num_heads", "patch_size", "in_channels", "num_classes"), _is_count)
    if not isinstance(stored, dict):
        raise PortingError(f"{path}: its architecture is a {type(stored).__name__}, not an object")
    for field, value in stored.items():
        optional = field in ("num_heads", "grid") and value is None
        if field not in checks or not (optional or checks[field](value)):
            raise PortingError(f"{path}: its architecture says {str(field)[:40]} = {str(value)[:40]}")
    return {field: tuple(value) if field == "grid" else value for field, value in stored.items()
            if value is not None}


# From a source's keys to the one spelling: names to lists of arrays that are concatenated on axis 0.

def _check_config(config, fields, path):
    """Raises unless config.json agrees with `fields`: name -> value, or what diffusers defaults to if absent."""
    for name, value in fields.items():
        if name in config and config[name] != value:
            raise PortingError(f"{path}: config.json says {name} = {str(config[name])[:60]}, expected {value}")


def _from_diffusers(source, report):
    """Official DiT names from a DiTTransformer2DModel's; the embedders of all blocks must be equal."""
    top = {theirs: ours for ours, theirs in _DIFFUSERS_TOP.items()}
    block = {theirs: ours for ours, theirs in _DIFFUSERS_BLOCK.items()}
    embedders = {theirs: ours for ours, theirs in _DIFFUSERS_EMBEDDERS.items()}
    named, origin = {}, {}
    depth = _indices(source.tensors, r"transformer_blocks\.(\d{1,6})\.", source.path)
    for key, tensor in source.tensors.items():
        module, _, leaf = key.rpartition(".")
        match = re.fullmatch(r"transformer_blocks\.(\d{1,6})\.(.+)", module)
        if match and match[2] in _DIFFUSERS_QKV:
            name, place = f"blocks.{int(match[1])}.attn.qkv.{leaf}", _DIFFUSERS_QKV.index(match[2])
            named.setdefault(name, [None] * 3)[place] = tensor
            origin.setdefault(name, [f"{key.replace(match[2], part)}" for part in _DIFFUSERS_QKV])
            continue
        if match and match[2] in embedders:
            if int(match[1]) > 0:
                continue
            name = f"{embedders[match[2]]}.{leaf}"
        elif match and match[2] in block:
            name = f"blocks.{int(match[1])}.{block[match[2]]}.{leaf}"
        elif key == "pos_embed.pos_embed":
            name = "pos_embed"
        else:
            name = f"{top.get(module, module)}.{leaf}"
        named[name], origin[name] = [tensor], [key]
    for theirs in embedders:
        for leaf in ("weight",) if "class" in theirs else ("weight", "bias"):
            first = source.tensors.get(f"transformer_blocks.0.{theirs}.{leaf}")
            for layer in range(1, depth):
                key = f"transformer_blocks.{layer}.{theirs}.{leaf}"
                if key not in source.tensors:
                    report.missing.append(key)
                elif first is not None and not np.array_equal(source.tensors[key], first):
                    raise PortingError(f"{source.path}: {key} differs from block 0's; DiT has one for all blocks")
                else:
                    report.left_out[key] = "equal to block 0's"
                source.release()
    for name in [name for name, pieces in named.items() if any(piece is None for piece in pieces)]:
        report.missing += [key for key, piece in zip(origin[name], named.pop(name)) if piece is None]
    return named, origin


def _diffusers_dit_fields(source, architecture):
    """Checks config.json of a DiT against the shapes; returns what only the config knows."""
    config, path, D = source.config, source.path, architecture["width"]
    _check_class(config, "dit", path)
    heads, head_dim = config.get("num_attention_heads", 16), config.get("attention_head_dim", 72)
    if not _is_count(heads) or not _is_count(head_dim) or heads * head_dim != D:
        raise PortingError(f"{path}: config.json says {str(heads)[:20]} heads of {str(head_dim)[:20]}, "
                           f"the width is {D}")
    C = architecture["in_channels"]
    _check_config(config, {
        "num_layers": architecture["depth"], "patch_size": architecture["patch_size"], "in_channels": C,
        "num_embeds_ada_norm": architecture["num_classes"], "attention_bias": architecture["qkv_bias"],
        "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
    }, path)
    if (config.get("out_channels") or C) != C * (2 if architecture["learn_sigma"] else 1):
        raise PortingError(f"{path}: config.json says out_channels = {str(config.get('out_channels'))[:20]}, "
                           f"the tensors have {C * (2 if architecture['learn_sigma'] else 1)}")
    size, p = config.get("sample_size", 32), architecture["patch_size"]
    epsilon = config.get("norm_eps", 1e-5)
    if not _is_count(size) or size % p:
        raise PortingError(f"{path}: config.json says sample_size = {str(size)[:20]}, the patch size is {p}")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise PortingError(f"{path}: config.json says norm_eps = {str(epsilon)[:20]}")
    return {"num_heads": heads, "grid": (size // p, size // p), "timestep_freq_shift": 1,
            "mlp_norm_epsilon": epsilon}


def _check_class(config, kind, path):
    name = config.get("_class_name")
    if name is not None and name not in _DIFFUSERS_CLASSES[kind]:
        raise PortingError(f"{path}: config.json describes a {str(name)[:60]}, expected "
                           f"{' or '.join(_DIFFUSERS_CLASSES[kind])}")


def _autoencoder_names(source, report):
    """Today's diffusers names from any of the three spellings of an AutoencoderKL."""
    tensors = source.tensors
    if any(key.startswith("first_stage_model.") for key in tensors):
        report.left_out |= {key: "not of the autoencoder" for key in tensors
                            if not key.startswith("first_stage_model.")}
        prefix = "first_stage_model."
    else:
        report.left_out |= {key: "loss of its training" for key in tensors if key.startswith("loss.")}
        prefix = ""
    tensors = {key: tensor for key, tensor in tensors.items() if key not in report.left_out}
    ups = [int(match[1]) for key in tensors if (match := re.match(rf"{prefix}decoder\.up\.(\d{{1,4}})\.", key))]
    ldm, last_up = bool(ups), max(ups, default=0)
    named, origin = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(prefix)
        if ldm:
            name = re.sub(r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
            name = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
            name = re.sub(r"^decoder\.up\.(\d{1,4})\.", lambda m: f"decoder.up_blocks.{last_up - int(m[1])}.", name)
            name = re.sub(r"^(decoder\.up_blocks\.\d+)\.block\.", r"\1.resnets.", name)
            name = re.sub(r"^(decoder\.up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0.", name)
            name = re.sub(r"\.mid\.block_(1|2)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
            name = re.sub(r"\.mid\.attn_1\.", ".mid_block.attentions.0.", name)
            name = name.replace(".norm_out.", ".conv_norm_out.").replace(".nin_shortcut.", ".conv_shortcut.")
            parts = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        else:
            parts = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        match = re.fullmatch(r"(.*\.attentions\.0)\.(\w+)\.(weight|bias)", name)
        if match:
            name = f"{match[1]}.{parts.get(match[2], match[2])}.{match[3]}"
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):     # LDM: linear maps as 1 x 1 convolutions
                tensor = tensor[:, :, 0, 0]
        if name in named:
            raise PortingError(f"{source.path}: {key} and {origin[name][0]} both mean {name}")
        named[name], origin[name] = [tensor], [key]
    report.layout = "LDM" if ldm else "diffusers"
    return named, origin


# Architectures from shapes.

def _shape_of(shapes, key, ndim, path, what):
    if key not in shapes:
        raise PortingError(f"{path}: not {what}: {key} is missing "
                           f"(found {len(shapes)} keys: {_abridged(sorted(shapes), 4)})")
    if len(shapes[key]) != ndim or not all(shapes[key]):
        raise PortingError(f"{path}: {key} has shape {shapes[key]}, expected {ndim} non-empty dimensions")
    return shapes[key]


def _indices(shapes, pattern, path):
    """The numbers at the start of matching keys, which must count up from 0."""
    found = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    if found != set(range(len(found))) or not found:
        raise PortingError(f"{path}: the numbers in {pattern.replace(chr(92), '')} do not count up from 0: "
                           f"{_abridged(map(str, sorted(found)))}")
    return len(found)


def _dit_architecture(shapes, path):
    """What the shapes of official keys tell; num_heads and grid are None where they do not."""

    def shape(key, ndim):
        return _shape_of(shapes, key, ndim, path, "a DiT or LiT checkpoint")

    D, C, p, _ = shape("x_embedder.proj.weight", 4)
    rows = shape("y_embedder.embedding_table.weight", 2)[0]
    if rows < 2:
        raise PortingError(f"{path}: a label table of {rows} row has no room for a class and the null class")
    if D % 4:
        raise PortingError(f"{path}: the width is {D}; the position table needs one that 4 divides")
    depth = _indices(shapes, r"blocks\.(\d{1,6})\.", path)
    out_features = shape("final_layer.linear.weight", 2)[0]
    if out_features not in (p * p * C, 2 * p * p * C):
        raise PortingError(f"{path}: final_layer.linear has {out_features} outputs; patch {p} and {C} channels "
                           f"need {p * p * C}, or {2 * p * p * C} with learned variance")
    attention = "linear" if "blocks.0.attn.q.weight" in shapes else "softmax"
    first = "q" if attention == "linear" else "qkv"
    architecture = {
        "attention": attention, "depth": depth, "width": D, "num_heads": None, "patch_size": p,
        "in_channels": C, "num_classes": rows - 1, "learn_sigma": out_features == 2 * p * p * C,
        "qkv_bias": f"blocks.0.attn.{first}.bias" in shapes, "conv_size": 0, "kernel_function": "relu",
        "grid": None, "timestep_freq_shift": 0, "mlp_norm_epsilon": 1e-6,
    }
    if attention == "softmax":
        heads = {size[:2]: size[2] for size in SIZES.values()}
        architecture["num_heads"] = heads.get((depth, D))
    elif "blocks.0.attn.dwc.weight" in shapes:
        H, _, _, K = shape("blocks.0.attn.dwc.weight", 4)
        if D % H or K % 2 == 0:
            raise PortingError(f"{path}: {H} filters of size {K} in the convolution: the filters must divide the "
                               f"width {D}, the size must be odd")
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
        guessed = field in _CONVENTIONS or field == "grid" or (
            field == "num_heads" and architecture["attention"] == "softmax")
        if known is not None and known != value and not guessed:
            raise PortingError(f"{path}: {who} says {field} = {value}, the tensors say {known}")
        architecture[field] = value
    D, heads = architecture["width"], architecture["num_heads"]
    if heads and D % heads:
        raise PortingError(f"{path}: {who} says num_heads = {heads}, which does not divide the width {D}")
    return architecture


def _autoencoder_architecture(shapes, path):

    def shape(key, ndim=4):
        return _shape_of(shapes, key, ndim, path, "an AutoencoderKL checkpoint")

    blocks = _indices(shapes, r"encoder\.down_blocks\.(\d{1,4})\.", path)
    layers = _indices(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d{1,4})\.", path)
    widths = [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(blocks)]
    return {
        "in_channels": shape("encoder.conv_in.weight")[1], "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("decoder.conv_in.weight")[1], "block_out_channels": tuple(widths),
        "layers_per_block": layers, "norm_num_groups": 32, "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
        "scaling_factor": None, "shift_factor": None,
    }


def _check_autoencoder(stored, path):
    """Validates the architecture that an Orbax checkpoint names, so that its rules can be made of it."""
    def is_number(value):
        return isinstance(value, float | int) and not isinstance(value, bool)

    checks = {
        "block_out_channels": lambda v: isinstance(v, list) and 0 < len(v) < 100 and all(map(_is_count, v)),
        "layers_per_block": lambda v: _is_count(v, 1, 1000),
        "scaling_factor": lambda v: is_number(v) and 0 < v < 1e6, "shift_factor": lambda v: v is None or is_number(v),
    } | dict.fromkeys(("in_channels", "out_channels", "latent_channels", "norm_num_groups"), _is_count)
    checks |= dict.fromkeys(("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
                            lambda v: isinstance(v, bool))
    if not isinstance(stored, dict) or stored.keys() != checks.keys():
        raise PortingError(f"{path}: its metadata describe no autoencoder: {str(stored)[:80]}")
    for field, value in stored.items():
        if not checks[field](value):
            raise PortingError(f"{path}: its metadata say {field} = {str(value)[:40]}")
    groups, widths = stored["norm_num_groups"], stored["block_out_channels"]
    if any(width % groups for width in widths):
        raise PortingError(f"{path}: its metadata say norm_num_groups = {groups}, which does not divide the widths {widths}")
    return stored | {"block_out_channels": tuple(widths)}


def _diffusers_autoencoder_fields(source, architecture):
    """Checks config.json of an AutoencoderKL against the shapes; returns what only the config knows."""
    config, path = source.config, source.path
    _check_class(config, "autoencoder", path)
    checked = {name: architecture[name] for name in (
        "in_channels", "out_channels", "latent_channels", "layers_per_block", "mid_block_add_attention",
        "use_quant_conv", "use_post_quant_conv")}
    blocks = len(architecture["block_out_channels"])
    _check_config(config, checked | {
        "block_out_channels": list(architecture["block_out_channels"]), "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "latents_mean": None, "latents_std": None,
    }, path)
    groups = config.get("norm_num_groups", 32)
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    if not _is_count(groups) or any(width % groups for width in architecture["block_out_channels"]):
        raise PortingError(f"{path}: config.json says norm_num_groups = {str(groups)[:20]}, which does not divide "
                           f"the widths {architecture['block_out_channels']}")
    if not isinstance(scale, float | int) or not 0 < scale < 1e6 or not isinstance(shift, float | int | None):
        raise PortingError(f"{path}: config.json says scaling_factor = {str(scale)[:20]}, shift_factor = "
                           f"{str(shift)[:20]}")
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
            if any(piece.ndim == 0 for piece in pieces) or len(rows) > 1 or len(tails) > 1 or (
                    _joined_shape(pieces) != shape):
                wrong.append(f"{' + '.join(names)} {' + '.join(str(piece.shape) for piece in pieces)}, "
                             f"expected {shape}")
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
            params[path] = Leaf(layers, _TO_FLAX[kind], path.startswith("blocks/"), source.release)
    report.unexpected = sorted(name for key in set(named) - used for name in origin[key])
    if report.missing or report.unexpected or wrong:
        parts = [f"{name}: {_abridged(keys)}" for name, keys in (
            ("missing", report.missing), ("unexpected", report.unexpected), ("wrong", wrong)) if keys]
        raise PortingError(f"{source.path}: {'; '.join(parts)}", report)
    source.verify()
    return params


def _check_pos_embed(table, grid, D, path):
    """Checks the stored position table against the computed one; returns what to report."""
    if grid is None or grid[0] * grid[1] != table.shape[1]:
        raise PortingError(f"{path}: pos_embed has {table.shape[1]} positions, the grid is "
                           f"{'unknown' if grid is None else f'{grid[0]} x {grid[1]}'}; name the input size")
    computed = position_embedding(grid, D)[None]
    if table.shape != computed.shape or table.dtype not in _FLOATS:
        raise PortingError(f"{path}: pos_embed is {table.shape} of {table.dtype}, the {grid[0]} x {grid[1]} grid "
                           f"needs {computed.shape}")
    error = float(np.max(np.abs(np.asarray(table, np.float64) - computed)))
    # Rounding of the stored value; and some writers compute the angle, up to the largest position, in float32.
    unit = {2: 2.0**-8 if table.dtype == ml_dtypes.bfloat16 else 2.0**-11}.get(table.dtype.itemsize, 2.0**-24)
    tolerance = unit + 2.0**-23 * max(grid)
    if not error <= tolerance:
        raise PortingError(f"{path}: pos_embed differs from the computed {grid[0]} x {grid[1]} table by {error:.3g} "
                           f"(tolerance {tolerance:.3g}): it was trained or scaled, and our model has a fixed one")
    return f"equal to the computed table of the {grid[0]} x {grid[1]} grid (largest difference {error:.2g})"


def _resize_labels(params, architecture, num_classes, seed, report):
    """Keeps the first classes and the null class; rows of further classes are drawn as in a fresh DiT."""
    path = "y_embedder/embedding_table/embedding"
    table, old = np.asarray(params[path]), architecture["num_classes"]
    kept = min(old, num_classes)
    new = np.random.default_rng(seed).normal(0, _LABEL_STD, (num_classes - kept, table.shape[1]))
    params[path] = np.concatenate([table[:kept], new.astype(np.float32), table[-1:]])
    report.notes.append(f"the label table went from {old} to {num_classes} classes: the first {kept} and the null "
                        f"class are kept")
    if num_classes > old:
        report.reinitialised.append(f"{path}[{kept}:{num_classes}], normal with std {_LABEL_STD}, seed {seed}")
    architecture["num_classes"] = num_classes


# What the rest of the program calls.

def read_checkpoint(path: str | pathlib.Path, *, weights: str = "ema", num_heads: int = 0, num_classes: int = 0,
                    input_size: tuple[int, int] | None = None, timestep_freq_shift: int | None = None,
                    mlp_norm_epsilon: float | None = None, seed: int = 0) -> Checkpoint:
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
        raise ValueError(f"weights must be ema or model (port.weights, teacher.weights, student.weights); got {weights!r}")
    for field, value in (("num_heads", num_heads), ("num_classes", num_classes), ("input_size", min(input_size or (0,)))):
        if value < 0:
            raise ValueError(f"port.{field} must not be negative; got {value}")
    if timestep_freq_shift not in (None, 0, 1):
        raise ValueError(f"port.timestep_freq_shift must be 0 or 1; got {timestep_freq_shift}")
    if mlp_norm_epsilon is not None and not 0 < mlp_norm_epsilon < 1:
        raise ValueError(f"port.mlp_norm_epsilon must be between 0 and 1; got {mlp_norm_epsilon}")
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if orbax.is_checkpoint(path):
        params, architecture, report = _read_orbax_dit(path, weights)
    else:
        params, architecture, report = _read_torch_dit(path, weights, input_size)
    asked = {"timestep_freq_shift": timestep_freq_shift, "mlp_norm_epsilon": mlp_norm_epsilon,
             "num_heads": num_heads or None}
    for field, value in asked.items():
        if value is not None and architecture[field] != value:
            if field == "num_heads" and architecture["attention"] == "linear" and architecture["conv_size"]:
                raise PortingError(f"{path}: num_heads = {value} was asked for, the convolution has the filters of "
                                   f"{architecture[field]}")
            report.notes.append(f"{field} = {value} was asked for, the source has {architecture[field]}")
            architecture[field] = value
    if architecture["num_heads"] and architecture["width"] % architecture["num_heads"]:
        raise PortingError(f"{path}: num_heads = {architecture['num_heads']} does not divide the width "
                           f"{architecture['width']}")
    if num_classes and num_classes != architecture["num_classes"]:
        _resize_labels(params, architecture, num_classes, seed, report)
    grid, own_grid = input_size and _grid(input_size, architecture, path), architecture["grid"]
    if grid and grid != own_grid:
        report.notes.append(f"the position table is recomputed for the {grid[0]} x {grid[1]} grid"
                            + (f", the source has {own_grid[0]} x {own_grid[1]}" if own_grid else ""))
        architecture["grid"] = grid
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
        raise PortingError(f"{path}: input_size = {_plain(input_size)} was asked for, its patches are {p} wide")
    return tuple(side // p for side in input_size)


def _read_torch_dit(path, weights, input_size):
    source = _open(path, weights)
    report = Report(str(path), "dit", notes=source.notes)
    if any(key.startswith("transformer_blocks.") for key in source.tensors):
        report.layout = "diffusers"
        named, origin = _from_diffusers(source, report)
    else:
        named = {key: [tensor] for key, tensor in source.tensors.items() if not key.startswith("projectors.")}
        origin = {key: [key] for key in named}
        aside = [key for key in source.tensors if key not in named]
        report.left_out = dict.fromkeys(aside, "projectors of REPA's training loss")
        if aside:
            report.notes.append("a REPA model: it predicts the velocity of SiT's linear path, at times in [0, 1]")
    shapes = {key: _joined_shape(pieces) for key, pieces in named.items() if all(p.ndim for p in pieces)}
    architecture = _dit_architecture(shapes, path)
    if report.layout == "diffusers":
        fields = _diffusers_dit_fields(source, architecture) if source.config is not None else {
            "timestep_freq_shift": 1, "mlp_norm_epsilon": 1e-5}
        _merge_fields(architecture, fields, path, "config.json")
    _merge_fields(architecture, source.stored, path, "its metadata")
    if architecture["attention"] == "linear" and "kernel_function" not in source.stored:
        report.notes.append("nothing in the file tells the kernel function: relu is taken")
    if "pos_embed" in shapes:
        own_grid, asked = architecture["grid"], input_size and _grid(input_size, architecture, path)
        if asked and asked[0] * asked[1] == shapes["pos_embed"][1]:
            own_grid = asked
        report.keys[origin["pos_embed"][0]] = _check_pos_embed(named["pos_embed"][0], own_grid,
                                                               architecture["width"], path)
        architecture["grid"] = own_grid
    if architecture["attention"] == "linear" and architecture["conv_size"] == 0 and not architecture["num_heads"]:
        report.notes.append("without convolution nothing in the file tells the number of heads")
    params = _match(named, origin, dit_rules(architecture), source, report, ("pos_embed",))
    return params, architecture, report


def _read_orbax_dit(path, weights):
    params, metadata = orbax.restore_params(path, ema=weights == "ema")
    flat = flatten_dict(params, sep="/")
    report = Report(str(path), "orbax", notes=[f"read {metadata['weights']} of {metadata['path']}"])
    shapes = {}
    for module, official, kind in _DIT_MODULES:
        for ours, theirs in ((_WEIGHT_NAME[kind], "weight"), ("bias", "bias")):
            leaf = flat.get(f"{module}/{ours}")
            if leaf is None:
                continue
            one = leaf.shape[1:] if module.startswith("blocks/") else leaf.shape
            axes = _TO_TORCH[kind] if theirs == "weight" else (0,)
            if len(one) != len(axes):
                raise PortingError(f"{path}: {module}/{ours} has shape {leaf.shape}")
            for layer in range(leaf.shape[0] if module.startswith("blocks/") else 1):
                shapes[f"{official.format(layer)}.{theirs}"] = tuple(one[axis] for axis in axes)
    architecture = _dit_architecture(shapes, path)
    stored = _check_stored(metadata.get("model") or {}, path)
    _merge_fields(architecture, stored, path, "its metadata")
    expected = tree_shapes(dit_rules(architecture))
    _check_tree(flat, expected, path, report)
    return flat, architecture, report


def _check_tree(flat, expected, path, report):
    report.missing = sorted(expected.keys() - flat.keys())
    report.unexpected = sorted(flat.keys() - expected.keys())
    wrong = [f"{name} {flat[name].shape}, expected {shape}" for name, shape in expected.items()
             if name in flat and tuple(flat[name].shape) != shape]
    wrong += [f"{name} of {leaf.dtype}, expected a float" for name, leaf in flat.items() if leaf.dtype not in _FLOATS]
    if report.missing or report.unexpected or wrong:
        parts = [f"{name}: {_abridged(keys)}" for name, keys in (
            ("missing", report.missing), ("unexpected", report.unexpected), ("wrong", wrong)) if keys]
        raise PortingError(f"{path}: {'; '.join(parts)}", report)
    report.keys = dict.fromkeys(sorted(flat), "as it is")


def is_autoencoder(path: str | pathlib.Path) -> bool:
    """Whether a checkpoint is an AutoencoderKL, by its keys."""
    path = pathlib.Path(path)
    if orbax.is_checkpoint(path):
        params = path / "params"
        return params.is_dir() and "decoder/conv_in/kernel" in orbax.shapes_of(params)
    if path.is_dir() and _component(path, "transformer", "vae") == path / "vae":
        return True
    keys = _open(path, "ema" if path.is_dir() else _some_weights(path)).tensors
    return any(re.match(r"(first_stage_model\.)?(encoder|decoder)\.conv_in\.", key) for key in keys)


def _some_weights(path):
    tree = _open_file(path).tensors
    return "ema" if isinstance(tree.get("ema"), dict) else "model"


def read_autoencoder(path: str | pathlib.Path, *, weights: str = "ema", scaling_factor: float = 0.0) -> Checkpoint:
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
    if orbax.is_checkpoint(path):
        params, metadata = orbax.restore_params(path)
        flat, report = flatten_dict(params, sep="/"), Report(str(path), "orbax")
        if "autoencoder" not in metadata:
            raise PortingError(f"{path}: not the checkpoint of an autoencoder")
        architecture = _check_autoencoder(metadata["autoencoder"], path)
        _check_tree(flat, tree_shapes(autoencoder_rules(architecture)), path, report)
    else:
        source = _open(_component(path, "vae"), weights)
        report = Report(str(path), "diffusers", notes=source.notes)
        named, origin = _autoencoder_names(source, report)
        shapes = {key: pieces[0].shape for key, pieces in named.items()}
        architecture = _autoencoder_architecture(shapes, path)
        if source.config is not None:
            architecture |= _diffusers_autoencoder_fields(source, architecture)
        flat = _match(named, origin, autoencoder_rules(architecture), source, report)
    if scaling_factor:
        architecture["scaling_factor"] = scaling_factor
    if architecture["scaling_factor"] is None:
        raise PortingError(f"{path}: nothing in it tells the scale of the latents; set autoencoder.scaling_factor "
                           "(Stable Diffusion 0.18215, SDXL 0.13025)")
    return _checkpoint(flat, architecture, report)


def require_architecture(checkpoint: Checkpoint, expected: dict) -> None:
    """Raises PortingError naming the first field in which a checkpoint is not what is expected."""
    for field, value in expected.items():
        if checkpoint.architecture[field] != value:
            raise PortingError(f"{checkpoint.report.source} has {field} = {_plain(checkpoint.architecture[field])}, "
                               f"the config's model has {_plain(value)}; name its model, or set port.check_model=False")


# Out.

def official_tensors(params: Any, architecture: dict) -> list[tuple[str, tuple[int, ...], Callable]]:
    """(key, shape, read) of every tensor of the official layout; `read()` gives the array.

    A LiT has `attn.q`, `attn.kv` and `attn.dwc` (H, 1, K, K) where a DiT has `attn.qkv`.
    """
    flat = flatten_dict(params, sep="/")
    rules = list(dit_rules(architecture))
    _check_tree(flat, tree_shapes(rules), "the parameters", Report("", ""))
    D, grid = architecture["width"], architecture["grid"]
    result = [("pos_embed", (1, grid[0] * grid[1], D), lambda: position_embedding(grid, D)[None])]
    for path, keys, kind, shape in rules:
        for layer, key in enumerate(keys):
            result.append((key, shape, functools.partial(_read_layer, flat[path], path, layer, kind)))
    return result


def _read_layer(leaf, path, layer, kind):
    """One layer of a leaf in torch's axis order."""
    return np.asarray(leaf[layer] if path.startswith("blocks/") else leaf).transpose(_TO_TORCH[kind])


def _require_for_export(architecture, path, **needed):
    for field in ("num_heads", "grid"):
        if not architecture.get(field):
            raise PortingError(f"{path}: the export needs {field}, which the source does not tell; set port."
                               f"{'num_heads' if field == 'num_heads' else 'input_size'}")
    for field, value in needed.items():
        if architecture[field] != value:
            raise PortingError(f"{path}: the model has {field} = {_plain(architecture[field])}, code of that layout "
                               f"computes with {_plain(value)}; set port.{field}={_plain(value)} to accept that")


def export_official(params: Any, path: str | pathlib.Path, architecture: dict) -> list[pathlib.Path]:
    """Writes the official DiT layout as .safetensors or .pt (a flat state dict); returns the files written.

    A .safetensors names the architecture in its metadata, a .pt in PATH.json. Beside a LiT goes `lit_torch.py`, the
    PyTorch module that computes the same function.

    Args:
        params: the tree of `models.dit`, arrays or leaves.
        architecture: as in `Checkpoint`, with num_heads and grid.
    Raises: PortingError if official DiT code would compute another function (timestep_freq_shift,
        mlp_norm_epsilon), or what goes beside it would replace another file.
    """
    path = pathlib.Path(path)
    linear = architecture["attention"] == "linear"
    _require_for_export(architecture, path, **({} if linear else {
        "timestep_freq_shift": 0, "mlp_norm_epsilon": 1e-6}))
    if path.suffix not in (".safetensors", ".pt"):
        raise PortingError(f"{path}: the official layout is written as .safetensors or .pt, not {path.suffix!r}")
    beside = {}
    if path.suffix == ".pt":
        beside[path.name + ".json"] = json.dumps({"architecture": architecture}, indent=1) + "\n"
    if linear:
        beside["lit_torch.py"] = (pathlib.Path(__file__).parent / "assets" / "lit_torch.py").read_text()
    beside = {path.with_name(name): text for name, text in beside.items()}
    for file, text in beside.items():
        if file.exists() and file.read_bytes() != text.encode():
            raise PortingError(f"{file} exists and is another than would be written beside {path.name}; "
                               "a port never overwrites")
    tensors = official_tensors(params, architecture)
    if path.suffix == ".pt":
        torch_file.write_torch(path, tensors)
    else:
        torch_file.write_safetensors(path, tensors, {"format": "pt", "architecture": json.dumps(architecture)})
    for file, text in beside.items():
        file.write_text(text)
    return [path, *beside]


def export_diffusers(params: Any, path: str | pathlib.Path, architecture: dict) -> None:
    """Writes a folder that diffusers.DiTTransformer2DModel.from_pretrained loads.

    Raises: PortingError if the model is no DiT, its grid is not square, or diffusers would compute another function:
        it shifts the timestep frequencies by 1.
    """
    path = pathlib.Path(path)
    if architecture["attention"] != "softmax":
        raise PortingError(f"{path}: diffusers has no LiT; export it as .safetensors with its torch module")
    _require_for_export(architecture, path, timestep_freq_shift=1)
    grid, C, D = architecture["grid"], architecture["in_channels"], architecture["width"]
    if grid[0] != grid[1]:
        raise PortingError(f"{path}: diffusers needs a square grid, the model has {grid[0]} x {grid[1]}")
    config = {
        "_class_name": "DiTTransformer2DModel", "activation_fn": "gelu-approximate",
        "attention_bias": architecture["qkv_bias"], "attention_head_dim": D // architecture["num_heads"],
        "dropout": 0.0, "in_channels": C, "norm_elementwise_affine": False,
        "norm_eps": architecture["mlp_norm_epsilon"], "norm_num_groups": 32, "norm_type": "ada_norm_zero",
        "num_attention_heads": architecture["num_heads"], "num_embeds_ada_norm": architecture["num_classes"],
        "num_layers": architecture["depth"], "out_channels": C * (2 if architecture["learn_sigma"] else 1),
        "patch_size": architecture["patch_size"], "sample_size": grid[0] * architecture["patch_size"],
        "upcast_attention": False,
    }
    tensors = []
    for key, shape, read in official_tensors(params, architecture)[1:]:
        module, _, leaf = key.rpartition(".")
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if module in _DIFFUSERS_EMBEDDERS:
            tensors += [(f"transformer_blocks.{i}.{_DIFFUSERS_EMBEDDERS[module]}.{leaf}", shape, read)
                        for i in range(architecture["depth"])]
        elif match and match[2] == "attn.qkv":
            third = (D, *shape[1:])
            for part, name in enumerate(_DIFFUSERS_QKV):
                tensors.append((f"transformer_blocks.{match[1]}.{name}.{leaf}", third,
                                lambda read=read, part=part: read()[part * D : (part + 1) * D]))
        elif match:
            tensors.append((f"transformer_blocks.{match[1]}.{_DIFFUSERS_BLOCK[match[2]]}.{leaf}", shape, read))
        else:
            tensors.append((f"{_DIFFUSERS_TOP[module]}.{leaf}", shape, read))
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)      # of an export that was killed
    try:
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        torch_file.write_safetensors(partial / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
        if path.is_dir():
            path.rmdir()    # only an empty one goes
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_orbax(checkpoint: Checkpoint, path: str | pathlib.Path, *, shardings: Any = None) -> None:
    """Writes an Orbax parameter checkpoint, float32; `shardings` spreads the arrays over devices on the way."""
    kind = "autoencoder" if "latent_channels" in checkpoint.architecture else "model"
    metadata = {kind: checkpoint.architecture, "source": checkpoint.report.source,
                "checksum": checkpoint.report.checksum}
    orbax.save_params(path, load_params(checkpoint.params, shardings), metadata)

"""Checkpoints of the PyTorch world into our parameter tree and back, every key accounted for.

A checkpoint is read as views of a mapped file (`torch_file`). Its keys are first renamed to those of the official
DiT checkpoints; one table then leads from there to the tree of `models.dit` and back:

    Linear         weight (out, in)      -> kernel (in, out)
    convolution    weight (O, I, h, w)   -> kernel (h, w, I, O)
    blocks.i.*                           -> blocks/* stacked on a leading layer axis

Leaves stay in their file until they are indexed, so a sharded load reads only what each device holds.
"""
import dataclasses
import hashlib
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax import torch_file

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
_WEIGHT_NAME = {"conv": "kernel", "linear": "kernel", "embedding": "embedding"}
# From torch's axis order to ours, and back.
_TO_FLAX = {"conv": (2, 3, 1, 0), "linear": (1, 0), "embedding": (0, 1), "bias": (0,)}
_TO_TORCH = {"conv": (3, 2, 0, 1), "linear": (1, 0), "embedding": (0, 1), "bias": (0,)}
# Heads cannot be told from softmax shapes; the published sizes are known by (depth, width).
_SOFTMAX_HEADS = {(12, 384): 6, (12, 768): 12, (24, 1024): 16, (28, 1152): 16}


class PortingError(ValueError):
    """A checkpoint that cannot be taken as it is; `report` says what was found, key by key."""

    def __init__(self, message, report=None):
        super().__init__(message)
        self.report = report


@dataclasses.dataclass
class Report:
    """What became of every key. `keys` maps each key of the source to how it was used."""
    source: str
    layout: str
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)
    unexpected: list[str] = dataclasses.field(default_factory=list)
    reinitialised: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    architecture: dict = dataclasses.field(default_factory=dict)
    num_parameters: int = 0
    checksum: str = ""

    def to_json(self):
        return json.dumps(dataclasses.asdict(self), indent=1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """`params` is a nested dict of `Leaf`; `architecture` what its shapes and metadata tell."""
    params: dict
    architecture: dict
    report: Report


class Leaf:
    """One parameter still in its file, as float32 in our layout; `leaf[index]` or `np.asarray(leaf)` reads it.

    `layers` holds one list of torch arrays a layer (a single one for a leaf without layer axis); the arrays of a list
    are concatenated on torch's first axis, then the axes are permuted.
    """
    dtype = np.dtype(np.float32)

    def __init__(self, layers, axes, stacked, release=lambda: None):
        self._layers, self._axes, self._stacked, self._release = layers, axes, stacked, release
        first = layers[0]
        shape = (sum(piece.shape[0] for piece in first), *first[0].shape[1:])
        shape = tuple(shape[axis] for axis in axes)
        self.shape = (len(layers), *shape) if stacked else shape
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = 4 * self.size

    def _layer(self, index):
        pieces = self._layers[index]
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return whole.transpose(self._axes)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if not self._stacked:
            out = np.array(self._layer(0)[index], np.float32, order="C")
        elif isinstance(index[0], slice):
            layers = range(*index[0].indices(len(self._layers)))
            out = np.empty((len(layers), *np.empty(self.shape[1:], np.bool_)[index[1:]].shape), np.float32)
            for row, layer in zip(out, layers):
                row[...] = self._layer(layer)[index[1:]]
        else:
            out = np.array(self._layer(index[0])[index[1:]], np.float32, order="C")
        self._release()
        return out

    def __array__(self, dtype=None, copy=None):
        return self[:] if dtype is None else self[:].astype(dtype)

    def __repr__(self):
        return f"Leaf(shape={self.shape}, float32)"


def position_table(grid, width):
    """The fixed 2-D sine-cosine position table of DiT, (T, width) float32, computed in float64.

    The first half of the width encodes the column, the second the row; each is sin then cos of the position times
    10000^(-i / (width/4)).
    """
    omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (columns, rows)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def load_params(params, shardings=None):
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


def checksum(params):
    """SHA-256 over path, shape and float32 bytes of every leaf in path order: the same in every file layout."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{path}{tuple(leaf.shape)}".encode())
        for row in range(leaf.shape[0]):
            digest.update(np.ascontiguousarray(leaf[row], np.dtype("<f4")))
    return digest.hexdigest()


def _abridged(names, limit=6):
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _official_rules(architecture):
    """Yields (our path, list of official keys, kind, torch shape) for every leaf of the architecture."""
    D, L, p = architecture["width"], architecture["depth"], architecture["patch_size"]
    C, K = architecture["in_channels"], architecture["conv_size"]
    linear = architecture["attention"] == "linear"
    H = D // architecture["num_heads"] if linear and K else 0
    out_features = p * p * C * (2 if architecture["learn_sigma"] else 1)
    shapes = {
        "x_embedder/proj": (D, C, p, p), "t_embedder/mlp_0": (D, 256), "t_embedder/mlp_2": (D, D),
        "y_embedder/embedding_table": (architecture["num_classes"] + 1, D),
        "blocks/attn/proj": (D, D), "blocks/mlp/fc1": (4 * D, D), "blocks/mlp/fc2": (D, 4 * D),
        "blocks/adaLN_modulation": (6 * D, D), "final_layer/adaLN_modulation": (2 * D, D),
        "final_layer/linear": (out_features, D),
    }
    shapes |= {"blocks/attn/q": (D, D), "blocks/attn/kv": (2 * D, D)} if linear else {"blocks/attn/qkv": (3 * D, D)}
    if linear and K:
        shapes["blocks/attn/dwc"] = (H, 1, K, K)
    unbiased = () if architecture["qkv_bias"] else ("blocks/attn/qkv", "blocks/attn/q", "blocks/attn/kv")
    for module, official, kind in _DIT_MODULES:
        if module not in shapes:
            continue
        names = [official.format(layer) for layer in range(L)] if "{}" in official else [official]
        yield f"{module}/{_WEIGHT_NAME[kind]}", [f"{name}.weight" for name in names], kind, shapes[module]
        if kind != "embedding" and module not in unbiased:
            yield f"{module}/bias", [f"{name}.bias" for name in names], "bias", shapes[module][:1]


def _infer_architecture(shapes, stored, path):
    """The architecture from official keys -> torch shapes; `stored` holds what the file said in words."""

    def shape(key, ndim):
        if key not in shapes:
            raise PortingError(f"{path}: not a DiT or LiT checkpoint: {key} is missing "
                               f"(found {len(shapes)} keys: {_abridged(sorted(shapes), 4)})")
        if len(shapes[key]) != ndim or not all(shapes[key]):
            raise PortingError(f"{path}: {key} has shape {shapes[key]}, expected {ndim} non-empty dimensions")
        return shapes[key]

    D, C, p, _ = shape("x_embedder.proj.weight", 4)
    num_classes = shape("y_embedder.embedding_table.weight", 2)[0] - 1
    layers = {int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d{1,6})\.", key))}
    if layers != set(range(len(layers))) or not layers:
        raise PortingError(f"{path}: the block numbers {_abridged(map(str, sorted(layers)))} do not count up from 0")
    out_features, C_out = shape("final_layer.linear.weight", 2)[0], None
    for learn_sigma in (True, False):
        if out_features == p * p * C * (2 if learn_sigma else 1):
            C_out = C * (2 if learn_sigma else 1)
            break
    if C_out is None:
        raise PortingError(f"{path}: final_layer.linear has {out_features} outputs, expected patch {p} x {p} times "
                           f"{C} or {2 * C} channels = {p * p * C} or {2 * p * p * C}")
    attention = "linear" if "blocks.0.attn.q.weight" in shapes else "softmax"
    first = "q" if attention == "linear" else "qkv"
    architecture = {
        "attention": attention, "depth": len(layers), "width": D, "num_heads": None, "patch_size": p,
        "in_channels": C, "num_classes": num_classes, "learn_sigma": C_out == 2 * C,
        "qkv_bias": f"blocks.0.attn.{first}.bias" in shapes, "conv_size": 0, "kernel_function": "relu",
        "grid": None, "timestep_freq_shift": 0, "mlp_norm_epsilon": 1e-6,
    }
    if attention == "softmax":
        architecture["num_heads"] = _SOFTMAX_HEADS.get((len(layers), D))
    elif "blocks.0.attn.dwc.weight" in shapes:
        H, _, K, _ = shape("blocks.0.attn.dwc.weight", 4)
        if D % H:
            raise PortingError(f"{path}: the convolution has {H} filters, which do not divide the width {D}")
        architecture["num_heads"], architecture["conv_size"] = D // H, K
    if "pos_embed" in shapes:
        T = shape("pos_embed", 3)[1]
        if math.isqrt(T) ** 2 == T:
            architecture["grid"] = (math.isqrt(T), math.isqrt(T))
    for field, value in stored.items():
        known = architecture.get(field)
        if field == "grid" or field not in architecture or known is None or field in _CONVENTIONS:
            continue
        if known != value:
            raise PortingError(f"{path}: the file says {field} = {value!r}, its tensors say {known!r}")
    architecture |= {field: value for field, value in stored.items() if field in architecture}
    if architecture["num_heads"] and D % architecture["num_heads"]:
        raise PortingError(f"{path}: {architecture['num_heads']} heads do not divide the width {D}")
    return architecture


_CONVENTIONS = ("timestep_freq_shift", "mlp_norm_epsilon", "kernel_function")


def _check_pos_embed(table, architecture, path):
    """Checks the stored position table against the computed one; returns a note for the report."""
    grid, D = architecture["grid"], architecture["width"]
    if grid is None:
        raise PortingError(f"{path}: pos_embed has {table.shape[1]} positions, which is no square grid; name the grid")
    computed = position_table(grid, D)[None]
    if table.shape != computed.shape:
        raise PortingError(f"{path}: pos_embed has shape {table.shape}, the {grid[0]} x {grid[1]} grid needs "
                           f"{computed.shape}")
    error = float(np.max(np.abs(np.asarray(table, np.float64) - computed)))
    # Some writers compute the angles (up to the largest position) in float32, and some store the table in 16 bits.
    unit = 2.0**-24 if table.dtype.itemsize >= 4 else float(np.ldexp(1.0, -8 if table.dtype.kind == "V" else -11))
    tolerance = unit * (2 + max(grid)) if table.dtype.itemsize >= 4 else unit
    if not error <= tolerance:
        raise PortingError(f"{path}: pos_embed differs from the computed {grid[0]} x {grid[1]} table by {error:.3g} "
                           f"(tolerance {tolerance:.3g}): a learned or rescaled table, which the model does not have")
    return f"checked against the computed table of the {grid[0]} x {grid[1]} grid (largest difference {error:.3g})"


def read_checkpoint(path):
    """Opens a DiT or LiT checkpoint; returns a `Checkpoint` whose leaves are still in the file.

    Raises PortingError, naming both sides, if a key is missing, unexpected or of the wrong shape, or a value is not
    finite.
    """
    path = pathlib.Path(path)
    file = torch_file.read_safetensors(path)
    stored = json.loads(file.extra.get("architecture", "{}"))
    if "grid" in stored and stored["grid"] is not None:
        stored["grid"] = tuple(stored["grid"])
    report = Report(str(path), "dit")
    shapes = {key: tensor.shape for key, tensor in file.tensors.items()}
    architecture = _infer_architecture(shapes, stored, path)
    params, wrong, used = {}, [], set()
    for leaf_path, keys, kind, shape in _official_rules(architecture):
        found = [key for key in keys if key in shapes]
        report.missing += [key for key in keys if key not in shapes]
        wrong += [f"{key} {shapes[key]}, expected {shape}" for key in found if shapes[key] != shape]
        used |= set(found)
        for index, key in enumerate(found):
            where = f"{leaf_path}[{index}]" if len(keys) > 1 else leaf_path
            report.keys[key] = f"{where}, {'as it is' if kind in ('bias', 'embedding') else 'transposed'}"
        if len(found) == len(keys):
            layers = [[file.tensors[key]] for key in keys]
            params[leaf_path] = Leaf(layers, _TO_FLAX[kind], leaf_path.startswith("blocks/"), file.release)
    report.unexpected = sorted(set(shapes) - used - {"pos_embed"})
    if report.missing or report.unexpected or wrong:
        parts = [f"{name}: {_abridged(keys)}" for name, keys in
                 (("missing", report.missing), ("unexpected", report.unexpected), ("wrong shape", wrong)) if keys]
        raise PortingError(f"{path}: {'; '.join(parts)}", report)
    if "pos_embed" in shapes:
        report.keys["pos_embed"] = _check_pos_embed(file.tensors["pos_embed"], architecture, path)
    for leaf_path, leaf in params.items():
        for row in range(leaf.shape[0]):
            if not np.isfinite(leaf[row]).all():
                raise PortingError(f"{path}: {leaf_path}: values that are not finite")
    params = unflatten_dict(params, sep="/")
    report.architecture, report.checksum = architecture, checksum(params)
    report.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Checkpoint(params, architecture, report)


def official_tensors(params, architecture):
    """(key, shape, read) of every tensor of the official layout, in its order; `read()` gives the float32 array."""
    flat = flatten_dict(params, sep="/")
    D, grid = architecture["width"], architecture["grid"]
    result = [("pos_embed", (1, grid[0] * grid[1], D), lambda: position_table(grid, D)[None])]
    used = set()
    for leaf_path, keys, kind, shape in _official_rules(architecture):
        if leaf_path not in flat:
            raise PortingError(f"{leaf_path} is missing from the parameters")
        leaf = flat[leaf_path]
        stacked = leaf_path.startswith("blocks/")
        expected = tuple(shape[axis] for axis in _TO_FLAX[kind])
        expected = (len(keys), *expected) if stacked else expected
        if tuple(leaf.shape) != expected:
            raise PortingError(f"{leaf_path} has shape {tuple(leaf.shape)}, the architecture needs {expected}")
        used.add(leaf_path)
        for layer, key in enumerate(keys):
            def read(leaf=leaf, layer=layer, stacked=stacked, axes=_TO_TORCH[kind]):
                return np.asarray(leaf[layer] if stacked else leaf).transpose(axes)
            result.append((key, shape, read))
    if set(flat) - used:
        raise PortingError(f"parameters that the architecture does not have: {_abridged(sorted(set(flat) - used))}")
    return result


def export_dit(params, path, architecture):
    """Writes parameters in the official layout (.safetensors), the architecture in the metadata.

    Args:
        params: the tree of `models.dit` (arrays or leaves).
        architecture: as in `Checkpoint`; `num_heads` and `grid` must be set, for no shape tells them.
    """
    for field in ("num_heads", "grid"):
        if not architecture.get(field):
            raise PortingError(f"the architecture must name {field}: no shape in the file tells it")
    metadata = {"format": "pt", "architecture": json.dumps(architecture)}
    torch_file.write_safetensors(path, official_tensors(params, architecture), metadata)

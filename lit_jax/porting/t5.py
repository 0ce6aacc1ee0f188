"""The encoder of T5 v1.1: read from the Hub's files, written as a transformers folder.

Folders (single or sharded, .safetensors or .bin), the `text_encoder` of a pipeline, and
single files with the same keys are read, also of a whole T5, whose decoder is left out.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax import sharding
from lit_jax.models.t5 import BUCKETS, DTYPES, EPSILON, MAX_DISTANCE, T5Config, param_shapes
from lit_jax.porting.matching import (
    INDEX,
    Entry,
    Parts,
    Report,
    check_tree,
    checksum,
    count_indices,
    match,
    shape_of,
)
from lit_jax.porting.read import load_params
from lit_jax.porting.torch_checkpoint import (
    TRANSFORMERS_FILES,
    PortingError,
    TorchCheckpoint,
    check_diffusers_config,
    component,
    open_torch_checkpoint,
)
from lit_jax.porting.torch_file import NewTensor
from lit_jax.porting.write import write_folder

# The table of tokens, under the name of the whole model and that of the encoder.
SHARED = "shared.weight"
TIED = "encoder.embed_tokens.weight"
# Of the model around the encoder.
OTHERS = ("decoder.", "lm_head.")
# In a config.json, and ours.
CONFIG_NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "width",
    "num_layers": "depth",
    "num_heads": "num_heads",
    "d_kv": "head_width",
    "d_ff": "mlp_width",
}
# What our module computes, and no shape tells.
CONVENTIONS = {
    "model_type": "t5",
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": BUCKETS,
    "relative_attention_max_distance": MAX_DISTANCE,
    "layer_norm_epsilon": EPSILON,
}
CHUNK_ROWS = 4096  # of the table of tokens, compared at once


@dataclasses.dataclass(frozen=True)
class T5Checkpoint:
    """A text encoder that was read.

    Attributes:
        params: nested dict of leaves, which are read when they are indexed.
        report: what became of every key. Its checksum identifies the weights.
    """

    params: dict[str, Any]
    config: T5Config
    report: Report


@functools.cache
def entries(config: T5Config) -> tuple[Entry, ...]:
    """All leaves of an architecture with their keys in a checkpoint."""
    found = []
    for path, leaf in flatten_dict(param_shapes(config), sep="/").items():
        # Our modules are theirs, with `_` in place of `.` before an index.
        name = re.sub(r"layer_(\d)", r"layer.\1", path.rpartition("/")[0]).replace("/", ".")
        if name == "shared":
            keys = [SHARED]
        elif name == "relative_attention_bias":
            # Theirs is a part of the first block, whose bias all others use.
            keys = [f"encoder.block.0.layer.0.SelfAttention.{name}.weight"]
        elif name.startswith("blocks."):
            part = name.removeprefix("blocks.")
            keys = [f"encoder.block.{layer}.{part}.weight" for layer in range(config.depth)]
        else:
            keys = [f"encoder.{name}.weight"]
        found.append(Entry(path, tuple(keys), leaf.shape))
    return tuple(found)


# ---- Reading ---------------------------------------------------------------------------


def read_text_encoder(path: epath.PathLike) -> T5Checkpoint:
    """Opens the encoder of a T5 v1.1.

    Args: path: a file, a transformers folder, or the folder of a pipeline around it.
    Returns: with leaves that are still in their file.
    Raises:
        PortingError: it is another model, or a key is missing, unexpected, of the wrong
            shape or dtype, or not finite.
        TensorFileError: the file is damaged, hostile or quantised.
        FileNotFoundError: it is not there.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    folder = component(path, "text_encoder")
    source = open_torch_checkpoint(folder, "model", files=TRANSFORMERS_FILES)
    report = Report(str(path), "T5", notes=source.notes)
    flat, config = _read_torch(source, report)
    params = unflatten_dict(flat, sep="/")

    # Every value is read once here, so a checkpoint with a NaN is refused.
    try:
        report.checksum = checksum(params)
    except PortingError as error:
        raise PortingError(f"{path}: {error}", report) from None
    report.architecture = config.to_json()
    report.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return T5Checkpoint(params, config, report)


def _read_torch(source, report):
    """The leaves by path, and the architecture."""
    path = source.path
    # Before the keys: those of another model would be a long list of what is missing.
    model_type = (source.config or {}).get("model_type", "t5")
    if model_type != "t5":
        what = str(model_type)[:40]
        raise PortingError(f"{path}: config.json describes a model of type {what}, expected t5")
    named = {}
    for key, tensor in source.tensors.items():
        if key.startswith(OTHERS):
            report.left_out[key] = "not of the encoder"
        else:
            named[key] = Parts((tensor,), (key,))
    _untie(named, source, report)
    config = _told({key: parts.shape for key, parts in named.items()}, path)

    if source.config is not None:
        sizes = {theirs: getattr(config, ours) for theirs, ours in CONFIG_NAMES.items()}
        check_diffusers_config(source.config, sizes | CONVENTIONS, path)
    return match(named, entries(config), source, report), config


def _untie(named: dict[str, Parts], source: TorchCheckpoint, report: Report) -> None:
    """Leaves one of the two names of the table of tokens.

    Raises: PortingError where the two tables differ.
    """
    if TIED not in named:
        return
    if SHARED not in named:
        named[SHARED] = named.pop(TIED)
        return
    one = named[SHARED].arrays[0]
    other = named.pop(TIED).arrays[0]
    # In parts: a table of the XXL has half a gigabyte.
    same = one.shape == other.shape
    for start in range(0, len(one) if same and one.ndim else 0, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        same = same and np.array_equal(one[rows], other[rows])
        source.release()
    if not same:
        raise PortingError(f"{source.path}: {TIED} and {SHARED} differ, but are one table")
    report.left_out[TIED] = f"the same as {SHARED}"


def _told(shapes: Mapping[str, tuple[int, ...]], path: epath.Path) -> T5Config:
    """The architecture, all of which the shapes tell."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    mlp = "encoder.block.0.layer.1.DenseReluDense"
    if f"{mlp}.wi.weight" in shapes:
        raise PortingError(
            f"{path}: {mlp}.wi.weight is of T5's first version, whose MLP has no gate; "
            "give a T5 v1.1"
        )

    def shape(key):
        return shape_of(shapes, key, 2, path, "the encoder of a T5 v1.1")

    vocab_size, width = shape(SHARED)
    _, num_heads = shape(f"{attention}.relative_attention_bias.weight")
    rows, _ = shape(f"{attention}.q.weight")
    # The heads together need not be as wide as the model: small T5s' are not.
    if rows % num_heads:
        raise PortingError(f"{path}: {num_heads} heads do not divide the {rows} rows of q")
    fields = {
        "vocab_size": vocab_size,
        "width": width,
        "depth": count_indices(shapes, rf"encoder\.block\.{INDEX}\.", path),
        "num_heads": num_heads,
        "head_width": rows // num_heads,
        "mlp_width": shape(f"{mlp}.wi_0.weight")[0],
    }
    try:
        return T5Config.from_json(fields)
    except ValueError as error:
        raise PortingError(f"{path}: {error}") from error


# ---- Into memory -----------------------------------------------------------------------


def load_encoder_params(params: Any, dtype: str, mesh: jax.sharding.Mesh) -> Any:
    """The leaves of a `T5Checkpoint` on a mesh, spread over its `fsdp` axis.

    One leaf is read at a time, and of that one layer: beside the result there are never
    more than a leaf in `dtype` and a layer of it in float32.

    Args: dtype: "float32" or "bfloat16", of the matrices. Norms stay float32.
    Raises: ValueError for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    cast = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        # As the model uses them: it casts matrices alone.
        is_matrix = path.endswith("/kernel") or path == "shared/embedding"
        cast[path] = _Cast(leaf, jnp.dtype(dtype) if is_matrix else np.dtype(np.float32))
    tree = unflatten_dict(cast, sep="/")
    return load_params(tree, sharding.fsdp_sharding(tree, mesh))


class _Cast:
    """A leaf in another dtype. Its layers are read one by one."""

    def __init__(self, leaf, dtype):
        self._leaf = leaf
        self.dtype = dtype
        self.shape = leaf.shape
        self.ndim = leaf.ndim
        self.size = leaf.size

    def __getitem__(self, index):
        first, *rest = index
        if self.ndim < 3:
            return np.asarray(self._leaf[index]).astype(self.dtype)
        # Of the whole leaf a float32 copy would be twice the result.
        layers = range(*first.indices(self.shape[0]))
        inner = np.broadcast_to(np.False_, self.shape[1:])[tuple(rest)].shape
        out = np.empty((len(layers), *inner), self.dtype)
        for row, layer in enumerate(layers):
            out[row] = self._leaf[(layer, *rest)]
        return out


# ---- Writing ---------------------------------------------------------------------------


def export_text_encoder(params: Any, path: epath.PathLike, config: T5Config) -> None:
    """Writes a folder that transformers.T5EncoderModel.from_pretrained loads, float32.

    Args: params: the tree of `models.t5`, arrays or leaves.
    Raises: PortingError with both sides unless the tree is that of the config, or where
      the folder holds something already.
    """
    path = epath.Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise PortingError(f"{path} exists; an export never overwrites")
    flat = flatten_dict(params, sep="/")
    check_tree(flat, entries(config), Report("the parameters", "T5"))
    tensors = []
    for entry in entries(config):
        for layer, key in enumerate(entry.keys):
            read = functools.partial(entry.to_torch, flat[entry.path], layer)
            tensors.append(NewTensor(key, entry.torch_shape, read))
    fields = {theirs: getattr(config, ours) for theirs, ours in CONFIG_NAMES.items()}
    about = {
        "architectures": ["T5EncoderModel"],
        "num_decoder_layers": config.depth,
        "dropout_rate": 0.1,
        "is_encoder_decoder": True,
        # False would leave the encoder's table at random.
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",
    }
    write_folder(path, about | CONVENTIONS | fields, "model.safetensors", tensors)

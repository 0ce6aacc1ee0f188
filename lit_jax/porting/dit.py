"""DiT and LiT: the keys of every layout, and what tells the architecture.

Three layouts are read: the official one (DiT, fast-DiT, SiT, REPA and our exports),
that of diffusers, and our own tree in an Orbax checkpoint. The first two are
written. The official keys are the common spelling, to which those of diffusers
are renamed.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from lit_jax import ranges
from lit_jax.diffusion import PROCESSES
from lit_jax.models import param_shapes
from lit_jax.models.architecture import MAX_COUNT
from lit_jax.models.dit import DiTConfig, position_embedding, timestep_frequencies
from lit_jax.porting.matching import (
    FLOATS,
    GROUP,
    INDEX,
    LEAVES,
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
    check_diffusers_class,
    check_diffusers_config,
    is_count,
)
from lit_jax.porting.torch_file import NewTensor
from lit_jax.porting.untrusted import describe

# Our module and its name in an official checkpoint, in the order of those. The
# position table is not among them: it is computed.
MODULES = {
    "x_embedder/proj": "x_embedder.proj",
    "t_embedder/mlp_0": "t_embedder.mlp.0",
    "t_embedder/mlp_2": "t_embedder.mlp.2",
    "y_embedder/embedding_table": "y_embedder.embedding_table",
    "blocks/attn/qkv": "blocks.{}.attn.qkv",
    "blocks/attn/q": "blocks.{}.attn.q",
    "blocks/attn/kv": "blocks.{}.attn.kv",
    "blocks/attn/proj": "blocks.{}.attn.proj",
    "blocks/attn/dwc": "blocks.{}.attn.dwc",
    "blocks/mlp/fc1": "blocks.{}.mlp.fc1",
    "blocks/mlp/fc2": "blocks.{}.mlp.fc2",
    "blocks/adaLN_modulation": "blocks.{}.adaLN_modulation.1",
    "final_layer/adaLN_modulation": "final_layer.adaLN_modulation.1",
    "final_layer/linear": "final_layer.linear",
}
# The official module, and its name in diffusers' DiTTransformer2DModel.
DIFFUSERS_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
DIFFUSERS_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
DIFFUSERS_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
# The embedders are the model's, but diffusers stores them again in every block.
DIFFUSERS_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_OFFICIAL_TOP = {theirs: ours for ours, theirs in DIFFUSERS_TOP.items()}
_OFFICIAL_BLOCK = {theirs: ours for ours, theirs in DIFFUSERS_BLOCK.items()}
_OFFICIAL_EMBEDDERS = {theirs: ours for ours, theirs in DIFFUSERS_EMBEDDERS.items()}
# As SiT and REPA name a velocity in their arguments, described.
_VELOCITY = ("'velocity'", "'v'")
# Transformer2DModel is what DiT was before diffusers gave it a class.
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")

# DiT and LiT in PyTorch, and its name and fields where diffusers runs it.
LIT_CLASS = "LiTTransformer2DModel"
LIT_FIELDS = (
    "attention",
    "depth",
    "width",
    "num_heads",
    "patch_size",
    "in_channels",
    "num_classes",
    "learn_sigma",
    "qkv_bias",
    "conv_size",
    "kernel_function",
    "grid",
    "timestep_freq_shift",
    "mlp_norm_epsilon",
)
LIT_TORCH = pathlib.Path(__file__).parents[1] / "assets" / "lit_torch.py"

# How the code of a layout computes. No shape tells it, and a model that
# computes by the other convention gives pictures that are nearly right.
# What a model predicts is a convention of the weights: see `_prediction`.
OFFICIAL_CONVENTIONS: dict[str, Any] = {
    "timestep_freq_shift": 0,
    "mlp_norm_epsilon": 1e-6,
}
DIFFUSERS_CONVENTIONS: dict[str, Any] = {
    "timestep_freq_shift": 1,
    "mlp_norm_epsilon": 1e-5,
}

WHAT = "a DiT or LiT checkpoint"
LABEL_TABLE = "y_embedder/embedding_table/embedding"
LABEL_STD = 0.02  # of new label rows, as DiT draws them
# A stranger's checkpoint may name any size, and lists of keys and tables are
# made of it.
MAX_POSITIONS = 1 << 20  # of a grid: images of 16384 x 16384 at 16 pixels a patch
# Of the stored position table, whose values are up to 1. DiT's EMA averages the
# frozen table too, which drifts by 2e-4; bfloat16 rounds it by 2e-3.
TABLE_TOLERANCE = 5e-3


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What a caller knows better than a checkpoint; defaults leave all as it is.

    Attributes:
        num_heads: where nothing in the source tells it. 0: as it says, or the
            published size's.
        num_classes: resizes the label table. 0: keeps it.
        input_size: (h, w) of the images or latents that the position table is
            for: a new one, or the stored one where that is not square. None:
            keeps it.
        timestep_freq_shift, mlp_norm_epsilon: how the source's code computes.
            None: as that of its layout.
        prediction: what the source was trained to predict. None: what it tells.
        seed: of new label rows.
    Raises: ValueError whose text starts with the field's name.
    """

    num_heads: int = 0
    num_classes: int = 0
    input_size: tuple[int, int] | None = None
    timestep_freq_shift: int | None = None
    mlp_norm_epsilon: float | None = None
    prediction: str | None = None
    seed: int = 0

    def __post_init__(self):
        ranges.check(
            self,
            num_heads=ranges.AT_LEAST_0,
            num_classes=ranges.between(0, MAX_COUNT),
            input_size=_SIDES,
            timestep_freq_shift=ranges.Range("0 or 1", lambda x: x in (None, 0, 1)),
            mlp_norm_epsilon=ranges.Range("between 0 and 1", lambda x: x is None or 0 < x < 1),
            prediction=ranges.one_of(None, *PROCESSES),
        )

    @classmethod
    def of_student(cls, config: DiTConfig, seed: int) -> "Overrides":
        """Those of a checkpoint that a model inherits from: its label table gets the classes."""
        return cls(num_classes=config.num_classes, seed=seed)

    def of_model(self, config: DiTConfig) -> DiTConfig:
        """What a checkpoint of a model should be after these changes of it."""
        changes: dict[str, Any] = {}
        if self.num_classes:
            changes["num_classes"] = self.num_classes
        if self.input_size:
            height, width = self.input_size
            changes["grid"] = (height // config.patch_size, width // config.patch_size)
        return dataclasses.replace(config, **changes)


_SIDES = ranges.Range("at least 0", lambda x: x is None or min(x) >= 0)


def recognises(keys: Collection[str]) -> bool:
    """Whether the keys of a checkpoint are a DiT's."""
    # All layouts call the label table so.
    return any("embedding_table" in key for key in keys)


def entries(config: DiTConfig) -> tuple[Entry, ...]:
    """All leaves of an architecture, with their official keys and in that order."""
    # Fields that decide no shape are set alike: one trace of the model serves all.
    shaped = dataclasses.replace(
        config,
        num_heads=heads_of_shapes(config),
        kernel_function="relu",
        grid=None,
        prediction="noise",
        **OFFICIAL_CONVENTIONS,
    )
    return _entries(shaped)


@functools.cache
def _entries(config):
    leaves = flatten_dict(param_shapes(config), sep="/")
    return tree_entries(leaves, MODULES, config.depth)


# ---- Reading -------------------------------------------------------------------------------------


def read_torch(
    source: TorchCheckpoint, report: Report, overrides: Overrides
) -> tuple[dict[str, Any], DiTConfig]:
    """A checkpoint of the PyTorch world: its leaves by path, and its architecture.

    Args: overrides: the input size alone is used, to understand the stored table.
    Raises: PortingError for anything unexplained; see `matching.match`.
    """
    path = source.path
    if any(key.startswith("transformer_blocks.") for key in source.tensors):
        report.layout = "diffusers"
        named = _from_diffusers(source, report)
    else:
        named = _from_official(source, report)
    shapes = {name: parts.shape for name, parts in named.items()}

    # What the tensors tell stands. The rest is assumed until the checkpoint
    # says more.
    stored = checked_fields(DiTConfig, source.stored, path)
    told = _told(shapes, stored, path)
    depth = count_indices(shapes, rf"blocks\.{INDEX}\.", path)
    told["depth"] = checked_depth(depth, path)
    fields = _assumed(told, shapes, path) | told
    fields["prediction"] = _prediction(named, told, stored, source, report)
    if report.layout == "diffusers":
        says = _diffusers_conventions(source, told)
        fields |= agreeing(told, says, path, "config.json")
    fields |= agreeing(told, stored, path, "its metadata")
    config = make_config(DiTConfig, fields, path)
    report.notes += _notes_of_guesses(config, stored, source)

    # The position table is computed, not loaded: the stored one must be the
    # same.
    checked = set()
    if "pos_embed" in named:
        table = named["pos_embed"]
        checked.add("pos_embed")
        config = _with_stored_grid(config, table.shape[1], overrides, path)
        report.keys[table.keys[0]] = _check_pos_embed(table.arrays[0], config, report)
    params: dict[str, Any] = match(named, entries(config), source, report, checked=checked)
    if _is_repa(source):
        params |= _turned_round(params)
    return params, config


def _is_repa(source):
    return any(key.startswith("projectors.") for key in source.tensors)


def _turned_round(params):
    """The leaves of a REPA model that differ in the SiT of the same path.

    REPA (arXiv 2410.06940) writes SiT's path the other way round, from the image at t = 0 to the
    noise at t = 1: its velocity is noise - image. So v(x, t) = -v_repa(x, 1 - t). The sign goes
    into the last layer; the time, since cos w(1 - t) = cos w cos wt + sin w sin wt and
    sin w(1 - t) = sin w cos wt - cos w sin wt, into the first layer that reads its sinusoids.
    """
    kernel = np.asarray(params["t_embedder/mlp_0/kernel"], np.float64)
    of_cos, of_sin = np.split(kernel, 2)  # as the embedding has them
    frequencies = timestep_frequencies()[:, None]
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    turned = [cos * of_cos + sin * of_sin, sin * of_cos - cos * of_sin]
    last = {f"final_layer/linear/{leaf}" for leaf in ("kernel", "bias")}
    return {path: -np.asarray(params[path]) for path in last} | {
        "t_embedder/mlp_0/kernel": np.concatenate(turned).astype(np.float32)
    }


def _prediction(named, told, stored, source, report):
    """What the weights were trained to predict: noise, unless something tells a velocity.

    SiT's and DiT's checkpoints have the same keys and shapes.
    Raises: PortingError where a SiT was trained on another path, or to predict anything else.
    """
    if "prediction" in stored:
        return stored["prediction"]
    # DiT's programs have no such arguments. A stranger's may be anything: their names are compared.
    path_type = source.arguments.get("path_type")
    trained = source.arguments.get("prediction")
    if path_type is not None:
        if describe(path_type).lower() != "'linear'" or describe(trained) not in _VELOCITY:
            raise PortingError(
                f"{source.path}: its training arguments say path_type = {describe(path_type)}, "
                f"prediction = {describe(trained)}; of SiT's models those on the linear path that "
                "predict a velocity are supported",
                report,
            )
        why = "its training arguments say a velocity"
    elif _is_repa(source):
        why = "a REPA model"
    elif _has_unused_half(named, told):
        # A flow has no variance: these rows stay at zero, where every DiT has them at first.
        why = "the half of final_layer.linear for a variance is zero"
    else:
        return "noise"
    report.notes.append(
        f"{why}: it predicts the velocity of SiT's linear path, at times in [0, 1]; "
        "if not, name port.prediction"
    )
    if _is_repa(source):
        report.notes.append(
            "REPA's time runs from the image to the noise: t_embedder.mlp.0 and "
            "final_layer.linear were turned round, so that it is a SiT"
        )
    return "velocity"


def _has_unused_half(named, told):
    """Whether the last layer has two halves, of which the second alone is zero."""
    parts = [named.get(f"final_layer.linear.{leaf}") for leaf in ("weight", "bias")]
    C = told["in_channels"]
    rows = told["patch_size"] ** 2 * 2 * C
    if not told["learn_sigma"] or not all(part and part.shape[0] == rows for part in parts):
        return False
    halves = [np.asarray(part.arrays[0]).reshape(-1, 2, C, *part.shape[1:]) for part in parts]
    return not any(half[:, 1].any() for half in halves) and halves[0][:, 0].any()


def _notes_of_guesses(config, stored, source):
    """What is taken though the checkpoint does not tell it, for the report."""
    notes = []
    if config.attention == "linear":
        if "kernel_function" not in stored:
            notes.append("nothing in the file tells the kernel function: relu is taken")
        if config.num_heads is None:
            notes.append("without convolution nothing in the file tells the number of heads")
    elif config.num_heads and source.config is None and "num_heads" not in stored:
        notes.append(
            f"num_heads = {config.num_heads} is that of the published size of this depth and width"
        )
    return notes


def read_tree(flat: Mapping[str, Any], stored: Any, report: Report) -> DiTConfig:
    """The architecture of our own parameters, which must be all that it has.

    Args:
        flat: the parameters by path.
        stored: what the checkpoint's metadata say of the model, not yet checked.
    Raises: PortingError with both sides.
    """
    path = report.source
    # The shapes tell the same as in the official layout, so they get its names:
    # those of the first block are enough.
    shapes = {}
    first = f"{GROUP}0/"
    plain = {name.replace(first, "blocks/"): leaf for name, leaf in flat.items()}
    for module, official in MODULES.items():
        for ours, theirs in LEAVES.items():
            name = f"{module}/{ours}"
            if name not in plain:
                continue
            shape = tuple(plain[name].shape)
            entry = Entry(name, (), shape)
            ndims = (2, 4) if ours == "kernel" else (1, 2)
            if len(shape) - entry.is_stacked not in ndims:
                raise PortingError(f"{path}: {name} has shape {shape}")
            shapes[f"{official.format(0)}.{theirs}"] = entry.torch_shape

    stored = checked_fields(DiTConfig, stored, path)
    told = _told(shapes, stored, path)
    blocks = [leaf for name, leaf in flat.items() if name.startswith("blocks/")]
    depths = [leaf.shape[0] for leaf in blocks if leaf.ndim]
    layers = len({name.split("/")[1] for name in flat if name.startswith(GROUP)}) or 1
    told["depth"] = checked_depth(max(depths, default=0) * layers, path)
    fields = _assumed(told, shapes, path) | told
    fields |= agreeing(told, stored, path, "its metadata")
    config = make_config(DiTConfig, fields, path)
    check_tree(flat, entries(config), report)
    return config


def override(
    params: dict[str, Any], config: DiTConfig, overrides: Overrides, report: Report
) -> DiTConfig:
    """The architecture that a caller asks for.

    Args: params: the leaves by path, which get the label table that it needs.
    Raises: PortingError whose text starts with the name of the override that cannot be.
    """
    asked = {
        "timestep_freq_shift": overrides.timestep_freq_shift,
        "mlp_norm_epsilon": overrides.mlp_norm_epsilon,
        "prediction": overrides.prediction,
        "num_heads": overrides.num_heads or None,
    }
    changes: dict[str, Any] = {}
    for field, value in asked.items():
        known = getattr(config, field)
        if value is not None and value != known:
            changes[field] = value
            note = f"{field} = {value} was asked for, the source has {known}"
            report.notes.append(note)
    if overrides.num_classes and overrides.num_classes != config.num_classes:
        _resize_labels(params, config.num_classes, overrides, report)
        changes["num_classes"] = overrides.num_classes
    grid = _asked_grid(overrides, config.patch_size, report.source)
    if grid and grid != config.grid:
        changes["grid"] = grid
        note = f"the position table is recomputed for the {grid[0]} x {grid[1]} grid"
        if config.grid:
            note += f", the source has {config.grid[0]} x {config.grid[1]}"
        report.notes.append(note)
    heads = config.num_heads
    try:
        config = dataclasses.replace(config, **changes)
    except ValueError as error:
        raise PortingError(str(error)) from error
    # Projections fit any number of heads; a design's own leaves may not.
    shapes = flatten_dict(param_shapes(config), sep="/") if "num_heads" in changes else {}
    for path, leaf in shapes.items():
        if path.startswith("blocks/") and leaf.shape != params[path].shape:
            raise PortingError(
                f"num_heads = {config.num_heads} was asked for, but {path} of {report.source} is "
                f"that of {heads} heads: it has shape {params[path].shape} in place of {leaf.shape}"
            )
    if math.prod(config.grid or ()) > MAX_POSITIONS:
        size = overrides.input_size
        whose = f"input_size = {plain(size)}" if size else str(report.source)
        raise PortingError(
            f"{whose}: a grid of {plain(config.grid)} positions, the limit is {MAX_POSITIONS}"
        )
    return config


def _resize_labels(params, old, overrides, report):
    """Keeps the first classes and the null class; draws further rows as DiT does."""
    new = overrides.num_classes
    seed = overrides.seed
    table = np.asarray(params[LABEL_TABLE])
    kept = min(old, new)
    shape = (new - kept, table.shape[1])
    drawn = np.random.default_rng(seed).normal(0, LABEL_STD, shape)
    rows = [table[:kept], drawn.astype(np.float32), table[-1:]]
    params[LABEL_TABLE] = np.concatenate(rows)
    report.notes.append(
        f"the label table went from {old} to {new} classes: the first {kept} and "
        "the null class are kept"
    )
    if new > old:
        where = f"{LABEL_TABLE}[{kept}:{new}]"
        report.reinitialised.append(f"{where}, normal with std {LABEL_STD}, seed {seed}")


# ---- From each layout to the official keys -------------------------------------------------------


def _from_official(source, report):
    projectors = [key for key in source.tensors if key.startswith("projectors.")]
    if projectors:
        why = "projectors of REPA's training loss"
        report.left_out |= dict.fromkeys(projectors, why)
    return {
        key: Parts((tensor,), (key,))
        for key, tensor in source.tensors.items()
        if key not in report.left_out
    }


def _from_diffusers(source, report):
    """Official names of a DiTTransformer2DModel, whose embedders must be equal."""
    tensors = source.tensors
    depth = count_indices(tensors, rf"transformer_blocks\.{INDEX}\.", source.path)
    named = {}
    # Of each qkv the three keys that make it, whichever of them are there.
    thirds = {}
    for key, tensor in tensors.items():
        layer, part, leaf = _split_block_key(key)
        first = f"transformer_blocks.0.{part}.{leaf}"
        if part in DIFFUSERS_QKV:
            block = f"transformer_blocks.{layer}"
            keys = tuple(f"{block}.{each}.{leaf}" for each in DIFFUSERS_QKV)
            thirds[f"blocks.{layer}.attn.qkv.{leaf}"] = keys
        elif part in _OFFICIAL_EMBEDDERS and layer > 0 and first in tensors:
            if not np.array_equal(tensor, tensors[first]):
                raise PortingError(
                    f"{source.path}: {key} differs from block 0's; DiT has one for all blocks"
                )
            report.left_out[key] = "equal to block 0's"
            source.release()  # both were read as a whole
        else:
            named[_official_name(key, layer, part, leaf)] = Parts((tensor,), (key,))

    for name, keys in thirds.items():
        missing = [key for key in keys if key not in tensors]
        report.missing += missing
        if not missing:
            named[name] = Parts(tuple(tensors[key] for key in keys), keys)
    for theirs in _OFFICIAL_EMBEDDERS:
        for leaf in ("weight",) if "class" in theirs else ("weight", "bias"):
            for layer in range(1, depth):
                copy = f"transformer_blocks.{layer}.{theirs}.{leaf}"
                if copy not in tensors:
                    report.missing.append(copy)
    return named


def _split_block_key(key):
    """Layer, part and leaf of a key in a block; of another key the part is None."""
    module, _, leaf = key.rpartition(".")
    found = re.fullmatch(rf"transformer_blocks\.{INDEX}\.(.+)", module)
    if found and leaf in ("weight", "bias"):
        return int(found[1]), found[2], leaf
    return 0, None, leaf


def _official_name(key, layer, part, leaf):
    module = key.rpartition(".")[0]
    if part in _OFFICIAL_EMBEDDERS and layer == 0:
        return f"{_OFFICIAL_EMBEDDERS[part]}.{leaf}"
    if part in _OFFICIAL_BLOCK:
        return f"blocks.{layer}.{_OFFICIAL_BLOCK[part]}.{leaf}"
    if key == "pos_embed.pos_embed":
        return "pos_embed"
    if module in _OFFICIAL_TOP:
        return f"{_OFFICIAL_TOP[module]}.{leaf}"
    # A name that no entry has: the key can neither replace another nor be lost.
    return f"{key} (not of diffusers)"


# ---- The architecture ----------------------------------------------------------------------------


def _told(shapes, stored, path):
    """The fields that the shapes of official keys tell, but for the depth."""
    told = told_by_shapes(shapes, stored, path, WHAT)
    # The last row is the null class.
    rows = shape_of(shapes, "y_embedder.embedding_table.weight", 2, path, WHAT)[0]
    if rows < 2:
        raise PortingError(
            f"{path}: a label table of {rows} row has no room for a class and the null class"
        )
    return told | {"num_classes": rows - 1}


def _assumed(told, shapes, path):
    """The fields that no shape tells, as they are unless the checkpoint says more."""
    # Depth and width are those of a published size, or the heads are not known.
    heads = published_heads(told) if told["attention"] == "softmax" else None
    grid = None
    if "pos_embed" in shapes:
        T = shape_of(shapes, "pos_embed", 3, path, WHAT)[1]
        side = math.isqrt(T)
        grid = (side, side) if side**2 == T else None
    guesses = {"num_heads": heads, "kernel_function": "relu", "grid": grid}
    return OFFICIAL_CONVENTIONS | guesses


def _diffusers_conventions(source, told):
    """What only config.json knows; without one, the defaults of diffusers."""
    config = source.config
    path = source.path
    if config is None:
        taken = [f"{field} = {value}" for field, value in DIFFUSERS_CONVENTIONS.items()]
        source.notes.append(
            "no config.json beside it: diffusers' defaults are taken, " + ", ".join(taken)
        )
        return DIFFUSERS_CONVENTIONS
    check_diffusers_class(config, DIFFUSERS_CLASSES, path)

    # Where a field is left out, diffusers' default is DiT-XL/2's.
    heads = config.get("num_attention_heads", 16)
    head_dim = config.get("attention_head_dim", 72)
    are_counts = is_count(heads) and is_count(head_dim)
    if not are_counts or heads * head_dim != told["width"]:
        raise PortingError(
            f"{path}: config.json says {str(heads)[:20]} heads of "
            f"{str(head_dim)[:20]}, the width is {told['width']}"
        )
    expected = {
        "num_layers": told["depth"],
        "patch_size": told["patch_size"],
        "in_channels": told["in_channels"],
        "num_embeds_ada_norm": told["num_classes"],
        "attention_bias": told["qkv_bias"],
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }
    check_diffusers_config(config, expected, path)
    C_out = told["in_channels"] * (2 if told["learn_sigma"] else 1)
    # None stands for as many as the input has.
    says = config.get("out_channels")
    if (says or told["in_channels"]) != C_out:
        raise PortingError(
            f"{path}: config.json says out_channels = {str(says)[:20]}, the tensors have {C_out}"
        )

    size = config.get("sample_size", 32)
    p = told["patch_size"]
    if not is_count(size) or size % p:
        raise PortingError(
            f"{path}: config.json says sample_size = {str(size)[:20]}, the patch size is {p}"
        )
    epsilon = config.get("norm_eps", 1e-5)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise PortingError(f"{path}: config.json says norm_eps = {str(epsilon)[:20]}")
    return {
        "num_heads": heads,
        "grid": (size // p, size // p),
        "timestep_freq_shift": 1,
        "mlp_norm_epsilon": epsilon,
    }


# ---- The position table --------------------------------------------------------------------------


def _asked_grid(overrides, patch_size, path):
    if overrides.input_size is None:
        return None
    if any(side % patch_size for side in overrides.input_size):
        raise PortingError(
            f"input_size = {plain(overrides.input_size)} was asked for, "
            f"but the patches of {path} are {patch_size} wide"
        )
    h, w = overrides.input_size
    return h // patch_size, w // patch_size


def _with_stored_grid(config, positions, overrides, path):
    """The config with the stored table's grid: the asked one, where that fits."""
    asked = _asked_grid(overrides, config.patch_size, path)
    grid = asked if asked and math.prod(asked) == positions else config.grid
    if grid is None or math.prod(grid) != positions:
        name = "unknown" if grid is None else f"{grid[0]} x {grid[1]}"
        raise PortingError(
            f"input_size must be named: pos_embed of {path} has {positions} positions, "
            f"the grid is {name}"
        )
    return dataclasses.replace(config, grid=grid)


def _check_pos_embed(table, config, report):
    """Compares the stored table with the computed one; reports their difference."""
    path = report.source
    h, w = config.grid
    # Before one is computed: a small file may ask for a table of any size.
    shape = (1, h * w, config.width)
    if table.shape != shape or table.dtype not in FLOATS:
        raise PortingError(
            f"{path}: pos_embed is {table.shape} of {table.dtype}, the {h} x {w} grid needs {shape}"
        )
    computed = position_embedding(config.grid, config.width)[None]
    stored = np.asarray(table, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.max(np.abs(stored - computed)))
        scale = float(np.vdot(stored, computed) / np.vdot(computed, computed))
        is_scaled = np.max(np.abs(stored - scale * computed)) <= TABLE_TOLERANCE
    # So written, a NaN is an error too.
    if not error <= TABLE_TOLERANCE:
        what = f"is {scale:.4g} times the computed" if is_scaled else "differs from the computed"
        kind = "a scaled table" if is_scaled else "another table (learned, or of another grid)"
        raise PortingError(
            f"{path}: pos_embed {what} {h} x {w} table, by up to {error:.3g} (tolerance "
            f"{TABLE_TOLERANCE}): this is {kind}, and our model has the computed one"
        )
    difference = f"largest difference {error:.2g}"
    # Some writers compute the angle, up to the largest position, in float32.
    if error > 2.0**-22 * max(h, w):
        report.notes.append(
            f"the stored position table is the computed one but for rounding ({difference}), "
            "as in an EMA or a half precision; the computed one is used"
        )
    return f"the computed table of the {h} x {w} grid ({difference})"


# ---- Writing -------------------------------------------------------------------------------------


def check_official(config: DiTConfig) -> None:
    """Raises PortingError unless official code computes what the model computes."""
    # The module that goes with a LiT takes any convention.
    conventions = {} if torch_module(config) else OFFICIAL_CONVENTIONS
    _require(config, conventions, "official DiT code")


def torch_module(config: DiTConfig) -> pathlib.Path | None:
    """The PyTorch module to go with an export; None: official code can read it."""
    is_lit = config.attention == "linear" and not config.softmax_every
    return LIT_TORCH if is_lit else None


def official_tensors(params: Any, config: DiTConfig) -> list[NewTensor]:
    """Every tensor of the official layout, in its order.

    A LiT has `attn.q`, `attn.kv` and `attn.dwc` (H, 1, K, K) for a DiT's `attn.qkv`.

    Args: params: the tree of `models.dit`, arrays or leaves.
    Raises: PortingError with both sides unless the tree is that of the config, or where
      the config does not tell the grid.
    """
    flat = flatten_dict(params, sep="/")
    check_tree(flat, entries(config), Report("the parameters", "orbax"))
    h, w = _needed(config, "grid")
    D = config.width
    table = functools.partial(_stored_table, (h, w), D)
    tensors = [NewTensor("pos_embed", (1, h * w, D), table)]
    for entry in entries(config):
        for layer, key in enumerate(entry.keys):
            read = functools.partial(entry.to_torch, flat[entry.path], layer)
            tensors.append(NewTensor(key, entry.torch_shape, read))
    return tensors


def check_diffusers(config: DiTConfig) -> None:
    """Raises PortingError unless diffusers computes what the model computes."""
    if config.attention != "softmax":
        raise PortingError(
            f"diffusers has no {config.attention} attention; LiT's goes into a pipeline with its "
            "torch module"
        )
    # Of the two conventions one is fixed: the norm's epsilon stands in
    # config.json.
    shift = {"timestep_freq_shift": DIFFUSERS_CONVENTIONS["timestep_freq_shift"]}
    _require(config, shift, "diffusers")
    h, w = _needed(config, "grid")
    if h != w:
        raise PortingError(f"diffusers needs a square grid, the model has {h} x {w}")


def diffusers_tensors(params: Any, config: DiTConfig) -> list[NewTensor]:
    """Every tensor of a DiTTransformer2DModel.

    Args and Raises: as `official_tensors`.
    """
    D = config.width
    tensors = []
    # Not the first one, the position table: diffusers computes it.
    for key, shape, read, _ in official_tensors(params, config)[1:]:
        module, _, leaf = key.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if module in DIFFUSERS_EMBEDDERS:
            theirs = DIFFUSERS_EMBEDDERS[module]
            names = [f"transformer_blocks.{i}.{theirs}" for i in range(config.depth)]
            tensors += [NewTensor(f"{name}.{leaf}", shape, read) for name in names]
        elif block and block[2] == "attn.qkv":
            for part, name in enumerate(DIFFUSERS_QKV):
                third = functools.partial(_rows, read, part * D, (part + 1) * D)
                name = f"transformer_blocks.{block[1]}.{name}.{leaf}"
                tensors.append(NewTensor(name, (D, *shape[1:]), third))
        elif block:
            name = f"transformer_blocks.{block[1]}.{DIFFUSERS_BLOCK[block[2]]}.{leaf}"
            tensors.append(NewTensor(name, shape, read))
        else:
            tensors.append(NewTensor(f"{DIFFUSERS_TOP[module]}.{leaf}", shape, read))
    return tensors


def diffusers_config(config: DiTConfig) -> dict[str, Any]:
    """The config.json of a DiTTransformer2DModel.

    Raises: PortingError where the config does not tell the grid or the heads.
    """
    num_heads = _needed(config, "num_heads")
    return {
        "_class_name": DIFFUSERS_CLASSES[0],
        "activation_fn": "gelu-approximate",
        "attention_bias": config.qkv_bias,
        "attention_head_dim": config.width // num_heads,
        "dropout": 0.0,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": config.mlp_norm_epsilon,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": _needed(config, "grid")[0] * config.patch_size,
        "upcast_attention": False,
    }


def lit_config(config: DiTConfig) -> dict[str, Any]:
    """The config.json of the LiTTransformer2DModel in the assets: every field that it takes.

    Raises: PortingError where the config does not tell the grid or the heads.
    """
    if config.prediction != "noise":
        raise PortingError(
            f"the pipeline draws with a model that predicts noise, this one predicts the "
            f"{config.prediction}; export it as .safetensors or .pt"
        )
    if config.softmax_every:
        raise PortingError(
            f"the pipeline has no model of two attentions, this one has softmax_every = "
            f"{config.softmax_every}; export it as .safetensors or .pt"
        )
    _require(config, {}, "diffusers")
    fields = config.to_json()
    return {"_class_name": LIT_CLASS} | {name: fields[name] for name in LIT_FIELDS}


def _needed(config, field):
    value = getattr(config, field)
    if value is None:
        # Callers name the size of the images, which gives the grid.
        argument = "input_size" if field == "grid" else field
        raise PortingError(
            f"{argument} must be named: the checkpoint does not tell it, and the export needs it"
        )
    return value


def _require(config, conventions, who):
    """Raises unless `who`, who reads the layout, computes what the model computes."""
    for field in ("num_heads", "grid"):
        _needed(config, field)
    for field, value in conventions.items():
        ours = getattr(config, field)
        if ours != value:
            raise PortingError(
                f"{field} = {ours} is what the model computes with, but {who} "
                f"computes with {value}; set it to {value} to accept that"
            )


def _stored_table(grid, width):
    return position_embedding(grid, width)[None]


def _rows(read, begin, end):
    return read()[begin:end]

"""Tensors of a source matched to the leaves of a tree, every key accounted for.

Linear         weight (out, in)      <-> kernel (in, out)
convolution    weight (O, I, h, w)   <-> kernel (h, w, I, O)
blocks.i.*                           <-> blocks/*, stacked on a leading layer axis

Leaves stay in their file until they are indexed, so a sharded load reads what each
device needs.
"""

import collections
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from lit_jax.porting.torch_checkpoint import PortingError, TorchCheckpoint, abridged
from lit_jax.porting.untrusted import one_line

FLOATS = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)))
# A number in a key. "01" and other scripts' digits would be second names of one
# layer.
INDEX = "(0|[1-9][0-9]{0,5})"
# Of a kernel, by its number of dimensions: torch's axes in our order, and in
# words.
_KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}
_KERNEL_WORDS = {2: "transposed", 4: "axes to (h, w, I, O)"}


# ---- The account ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """What became of every key of the source."""

    source: str  # the path
    layout: str  # the spelling of the keys
    # Keys of the source: where each went and how, or why it is not needed.
    keys: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)  # parts of leaves
    notes: list[str] = field(default_factory=list)
    architecture: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0  # elements in the tree
    checksum: str = ""  # `checksum` of the tree

    def to_json(self) -> str:
        """All of it, with the number of keys of each kind first."""
        counted = ("keys", "left_out", "missing", "unexpected", "reinitialised")
        counts = {name: len(getattr(self, name)) for name in counted}
        return json.dumps({"counts": counts} | dataclasses.asdict(self), indent=1)

    def summary(self) -> str:
        """The report in a few lines for a terminal."""
        fields = (f"{name} {plain(value)}" for name, value in self.architecture.items())
        counts = {
            "matched": self.keys,
            "left out": self.left_out,
            "missing": self.missing,
            "unexpected": self.unexpected,
            "re-initialised": self.reinitialised,
        }
        counted = ", ".join(f"{len(keys)} {what}" for what, keys in counts.items())
        lines = [
            f"{self.source} ({self.layout} layout)",
            f"  {', '.join(fields)}",
            f"  keys: {counted}; {self.parameters:,} parameters",
            f"  sha256 {self.checksum}",
        ]
        reasons = collections.Counter(self.left_out.values())
        lines += [f"  left out: {count} keys, {reason}" for reason, count in reasons.items()]
        lines += [f"  re-initialised: {name}" for name in self.reinitialised]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(map(one_line, lines))


def plain(value: Any) -> Any:
    """A value as messages show it: (4, 4) is 4x4."""
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else value


# ---- Keys and leaves -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parts:
    """One tensor under its name of the common spelling.

    Attributes:
        arrays: joined on torch's first axis. Several where a layout splits a tensor, as
            diffusers splits qkv.
        keys: theirs in the source.
    """

    arrays: tuple[np.ndarray, ...]
    keys: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the joined tensor; () where the arrays have no axis to join."""
        if len(self.arrays) == 1:
            return self.arrays[0].shape
        if not all(array.ndim for array in self.arrays):
            return ()
        rows = sum(array.shape[0] for array in self.arrays)
        return (rows, *self.arrays[0].shape[1:])

    @property
    def is_even(self) -> bool:
        """Whether the arrays have one shape, as parts of one tensor have."""
        return len({array.shape for array in self.arrays}) == 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """A leaf of a tree, and where it is in a source.

    Attributes:
        path: in the tree.
        keys: in the common spelling, one for each layer of a stacked leaf, else one.
        shape: in our layout, with the layer axis.
    """

    path: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether our leaf holds all layers, and the file a tensor of each."""
        return self.path.startswith("blocks/")

    @property
    def axes(self) -> tuple[int, ...]:
        """Torch's axes of one layer, in our order."""
        ndim = len(self._layer_shape)
        return _KERNEL_AXES[ndim] if self._is_kernel else tuple(range(ndim))

    @property
    def how(self) -> str:
        """What is done to a layer on its way to us, in words."""
        return _KERNEL_WORDS[len(self._layer_shape)] if self._is_kernel else "as it is"

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Of one layer in torch's layout."""
        return tuple(self._layer_shape[axis] for axis in np.argsort(self.axes))

    def to_torch(self, leaf: Any, layer: int) -> np.ndarray:
        """One layer of a leaf in torch's layout."""
        array = np.asarray(leaf[layer] if self.is_stacked else leaf)
        return array.transpose(np.argsort(self.axes))

    @property
    def _layer_shape(self):
        return self.shape[1:] if self.is_stacked else self.shape

    @property
    def _is_kernel(self):
        return self.path.endswith("/kernel")


GROUP = "blocks/layer_"  # of models whose layers follow a pattern
# Our leaf of a module, and torch's; of others the name is the same.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def tree_entries(
    leaves: Mapping[str, Any], modules: Mapping[str, str], depth: int
) -> tuple[Entry, ...]:
    """The entries of a tree, in the order of `modules`, then of their paths.

    Args:
        leaves: the tree by path; their shapes are read.
        modules: the official name of a module, with {} for the number of a block. A module
            that is not there is spelt as its path: blocks/attn/q is blocks.{}.attn.q.
        depth: the number of blocks. Those of a pattern, blocks/layer_1/ of k such layers, are the
            blocks 1, 1 + k, and so on.
    """
    found = {}
    pattern = {path.split("/")[1] for path in leaves if path.startswith(GROUP)}
    places = {}
    for path, leaf in leaves.items():
        layers = range(depth if path.startswith("blocks/") else 1)
        plain = path
        if path.startswith(GROUP):
            first, _, rest = path.removeprefix(GROUP).partition("/")
            layers = range(int(first), depth, len(pattern))
            plain = f"blocks/{rest}"
        places[path] = plain
        module, _, name = plain.rpartition("/")
        spelt = module.replace("/", ".")
        if f"{module}/".startswith("blocks/"):
            spelt = "blocks.{}" + spelt.removeprefix("blocks")
        official = f"{modules.get(module, spelt)}.{LEAVES.get(name, name)}"
        keys = tuple(official.format(layer) for layer in layers)
        found[path] = Entry(path, keys, tuple(leaf.shape))
    order = list(modules)
    kinds = list(LEAVES)

    def place(path):
        module, _, name = places[path].rpartition("/")
        known = order.index(module) if module in order else len(order)
        kind = kinds.index(name) if name in kinds else len(kinds)
        return known, module, kind, name, path

    return tuple(found[path] for path in sorted(found, key=place))


class Leaf:
    """One parameter that is still in its file, as float32 in our layout.

    `leaf[index]` and `np.asarray(leaf)` read it.

    Args:
        layers: in torch's layout; one alone for a leaf without layer axis.
        axes: torch's axes in our order.
        stacked: whether the leaf has a layer axis.
        release: gives the pages that were read back to the system.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        layers: Sequence[Parts],
        axes: tuple[int, ...],
        stacked: bool,
        release: Callable[[], None],
    ):
        self._layers = layers
        self._axes = axes
        self._stacked = stacked
        self._release = release
        shape = tuple(layers[0].shape[axis] for axis in axes)
        self.shape = (len(layers), *shape) if stacked else shape
        self.ndim = len(self.shape)
        self.size = math.prod(self.shape)

    def _layer(self, index):
        arrays = self._layers[index].arrays
        # One array stays a view of the file; several have to be copied to be
        # joined.
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return whole.transpose(self._axes)

    def __getitem__(self, index: Any) -> np.ndarray:
        # The first index chooses layers, and only those are read.
        first, *rest = index if isinstance(index, tuple) else (index,)
        inner = tuple(rest)
        # A float64 may become infinite in float32; `checksum` finds it.
        with np.errstate(over="ignore"):
            if not self._stacked:
                out = np.array(self._layer(0)[first, *inner], np.float32, order="C")
            elif isinstance(first, slice):
                layers = range(*first.indices(len(self._layers)))
                # The shape of what the index takes of a layer, without reading
                # it.
                shape = np.broadcast_to(np.False_, self.shape[1:])[inner].shape
                out = np.empty((len(layers), *shape), np.float32)
                for row, layer in enumerate(layers):
                    out[row] = self._layer(layer)[inner]
            else:
                out = np.array(self._layer(first)[inner], np.float32, order="C")
        # A mapped page that stays counts as memory in use.
        self._release()
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def __repr__(self) -> str:
        return f"Leaf{self.shape}"


# ---- Matching ------------------------------------------------------------------------------------


def match(
    named: Mapping[str, Parts],
    entries: Iterable[Entry],
    source: TorchCheckpoint,
    report: Report,
    *,
    checked: Collection[str] = (),
) -> dict[str, Leaf]:
    """The leaves of a tree, by path, out of the tensors of a source.

    Args:
        named: the tensors in the common spelling.
        entries: all leaves of the tree.
        report: gets what became of every key.
        checked: names that the caller accounts for; they have no leaf.
    Raises: PortingError with both sides unless keys and shapes are exactly those of the
      entries; TensorFileError where a stored checksum is another.
    """
    params = {}
    wrong: list[str] = []
    used = set(checked)
    for entry in entries:
        missing = [key for key in entry.keys if key not in named]
        layers = [named[key] for key in entry.keys if key in named]
        misfits = _misfits(layers, entry.torch_shape)
        used.update(entry.keys)
        report.missing += missing
        wrong += misfits
        # One error tells of all keys, so the others are still looked at.
        if missing or misfits:
            continue
        for layer, parts in enumerate(layers):
            wrong += _account(entry, layer, parts, report)
        params[entry.path] = Leaf(layers, entry.axes, entry.is_stacked, source.release)

    unknown = set(named) - used
    report.unexpected = sorted(key for name in unknown for key in named[name].keys)
    _refuse(source.path, report, wrong)
    # A family that renames a key and forgets it would lose a weight in silence.
    unexplained = source.tensors.keys() - report.keys.keys() - report.left_out.keys()
    if unexplained:
        names = abridged(sorted(unexplained))
        raise PortingError(f"{source.path}: nothing explains {names}", report)
    source.verify()
    return params


def _misfits(layers, expected):
    """Texts of the layers that have another shape."""
    texts = []
    for parts in layers:
        if not parts.is_even or parts.shape != expected:
            shapes = " + ".join(str(array.shape) for array in parts.arrays)
            texts.append(f"{' + '.join(parts.keys)} {shapes}, expected {expected}")
    return texts


def _account(entry, layer, parts, report):
    """Reports where each key of a layer goes; returns those that hold no floats."""
    where = f"{entry.path}[{layer}]" if entry.is_stacked else entry.path
    count = len(parts.keys)
    wrong = []
    for number, (array, key) in enumerate(zip(parts.arrays, parts.keys), 1):
        if array.dtype not in FLOATS:
            wrong.append(f"{key} of {array.dtype}, expected a float")
        part = f" part {number} of {count}" if count > 1 else ""
        cast = "" if array.dtype == np.float32 else f", cast from {array.dtype}"
        report.keys[key] = f"{where}{part}: {entry.how}{cast}"
    return wrong


def check_tree(flat: Mapping[str, Any], entries: Iterable[Entry], report: Report) -> None:
    """Compares the leaves of a tree, by path, with the entries' paths and shapes.

    Raises: PortingError with both sides unless they are the same, and leaves are floats.
    """
    expected = {entry.path: entry.shape for entry in entries}
    report.missing = sorted(expected.keys() - flat.keys())
    report.unexpected = sorted(flat.keys() - expected.keys())
    wrong = [
        f"{name} {flat[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in flat and tuple(flat[name].shape) != shape
    ]
    # Orbax restores what was saved, and a cast would hide that it was no
    # weight.
    wrong += [
        f"{name} of {leaf.dtype}, expected a float"
        for name, leaf in flat.items()
        if leaf.dtype not in FLOATS
    ]
    _refuse(report.source, report, wrong)
    report.keys = dict.fromkeys(sorted(flat), "as it is")


def _refuse(path, report, wrong):
    sides = (
        ("missing", report.missing, 80),
        ("unexpected", report.unexpected, 80),
        ("wrong", wrong, 240),
    )
    texts = [f"{name}: {abridged(keys, width=width)}" for name, keys, width in sides if keys]
    if texts:
        raise PortingError(f"{path}: {'; '.join(texts)}", report)


# ---- What shapes tell ----------------------------------------------------------------------------


def shape_of(
    shapes: Mapping[str, tuple[int, ...]], key: str, ndim: int, path: Any, what: str
) -> tuple[int, ...]:
    """The shape of a key that a source must have: of `ndim` axes, none empty.

    Raises: PortingError, which says that `path` is not `what`.
    """
    if key not in shapes:
        found = f"found {len(shapes)} keys: {abridged(sorted(shapes), 4)}"
        raise PortingError(f"{path}: not {what}: {key} is missing ({found})")
    shape = shapes[key]
    if len(shape) != ndim or not all(shape):
        raise PortingError(f"{path}: {key} has shape {shape}, expected {ndim} non-empty dimensions")
    return shape


def count_indices(keys: Iterable[str], pattern: str, path: Any) -> int:
    """How many numbers the keys that match have where the pattern has `INDEX`.

    Raises: PortingError unless these count up from 0.
    """
    found = {int(match[1]) for key in keys if (match := re.match(pattern, key))}
    if not found or found != set(range(len(found))):
        what = pattern.replace("\\", "").replace(INDEX, "N")
        numbers = abridged(map(str, sorted(found)))
        raise PortingError(f"{path}: the numbers in {what} do not count up from 0: {numbers}")
    return len(found)


def checksum(params: Any) -> str:
    """SHA-256 over path, shape and float32 bytes of every leaf, in the paths' order.

    One model has the same in every layout.

    Args: params: nested dict of `Leaf` or arrays.
    Raises: PortingError naming the first leaf that holds a value that is not finite.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(f"{path}{tuple(leaf.shape)}".encode())
        # Layer by layer, so that no stacked leaf is in memory as a whole.
        is_stacked = path.startswith("blocks/")
        rows = range(leaf.shape[0]) if is_stacked else [slice(None)]
        for row in rows:
            # float32 as we use it, whatever the file has.
            part = np.ascontiguousarray(leaf[row], np.dtype("<f4"))
            if not np.isfinite(part).all():
                where = f"{path}[{row}]" if len(rows) > 1 else path
                raise PortingError(f"{where} holds values that are not finite in float32")
            digest.update(part.data)
    return digest.hexdigest()

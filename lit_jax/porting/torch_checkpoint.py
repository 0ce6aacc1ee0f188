"""A file or a diffusers folder of the PyTorch world, opened as one flat dict.

Nothing here knows a model; everything here distrusts what it reads, as
`torch_file` does below it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from lit_jax.porting import torch_file
from lit_jax.porting.untrusted import describe, is_remote, is_size, one_line, unique_keys

WEIGHTS = ("ema", "model")  # of a training checkpoint
# Where a file has them, in this order. Lightning and others have one state
# dict, whichever weights it holds; PixArt names its average state_dict_ema.
_NAMES = {
    "ema": ("ema", "ema_state_dict", "state_dict_ema", "state_dict", "model_state_dict"),
    "model": ("model", "state_dict", "model_state_dict"),
}
# Averages keep the weights below one of these names.
_INNER = ("shadow", "shadow_params", "state_dict")
# Numbers that averages keep among the weights: torch's AveragedModel, timm.
_COUNTERS = ("n_averaged", "num_updates", "decay")
# DataParallel, compile, Lightning and wrappers rename all parameters, each
# around the others.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "ema_model.")
_MAX_PREFIXES = 6
# The weights in a folder of each library. safetensors first, as they choose.
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
# In a training checkpoint the report repeats what these arguments were.
_ARGUMENTS = ("model", "image_size", "resolution", "num_classes", "vae", "path_type", "prediction")


class PortingError(ValueError):
    """A checkpoint that cannot be taken as it is.

    `report` says what was found, key by key, where that is known.
    """

    def __init__(self, message: str, report: Any = None):
        super().__init__(one_line(message))
        self.report = report


@dataclasses.dataclass
class TorchCheckpoint:
    """Tensors by key, and what was stored with them.

    Attributes:
        path: the file or the folder.
        tensors: views of mapped files.
        stored: the architecture that the file itself names, not yet checked.
        config: a diffusers config.json, not yet checked; None: there is none.
        notes: for the report.
        files: those that the tensors are views of.
    """

    path: epath.Path
    tensors: dict[str, np.ndarray]
    stored: Any
    config: dict[str, Any] | None
    notes: list[str]
    files: list[torch_file.TensorFile]

    @property
    def class_names(self) -> Any:
        """As `stored`: of the labels, where the file tells them."""
        return _stored(self.files[0], "class_names") if self.files else None

    @property
    def arguments(self) -> dict[str, Any]:
        """Of a training checkpoint the arguments of its training, not checked; else none."""
        return _arguments(self.files[0].tensors) if self.files else {}

    def release(self) -> None:
        """Gives the pages read so far back to the system."""
        for file in self.files:
            file.release()

    def verify(self) -> None:
        """Compares the checksums that files have of the tensors, and notes it.

        Raises: TensorFileError for a record that is not what was written.
        """
        arrays = self.tensors.values()
        count = sum(file.verify(arrays) for file in self.files)
        if count:
            note = f"the CRC-32 of {count} records is that of the archive"
            self.notes.append(note)


def open_torch_checkpoint(
    path: epath.PathLike,
    weights: str,
    *,
    files: Sequence[str] = DIFFUSERS_FILES,
) -> TorchCheckpoint:
    """The tensors of a file, a diffusers folder, or the pipeline folder above it.

    Args:
        weights: "ema" or "model", where a training checkpoint has both.
        files: what the weights in a folder may be called; the first that is there,
            whole or as shards with an index, is taken.
    Raises: PortingError for what is no checkpoint, or whose parts contradict
      each other; TensorFileError for a damaged or hostile file;
      FileNotFoundError.
    """
    path = epath.Path(path)
    if path.is_dir():
        return _open_folder(path, files)
    file = torch_file.read_tensors(path)
    tensors, notes = _state_dict(file, weights)
    stored = _stored(file, "architecture")
    return TorchCheckpoint(path, tensors, stored, None, notes, [file])


def any_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, whichever weights it has: for their keys.

    Raises: as `open_torch_checkpoint`.
    """
    path = epath.Path(path)
    if path.is_dir():
        return _open_folder(path, DIFFUSERS_FILES).tensors
    file = torch_file.read_tensors(path)
    weights = "ema" if isinstance(file.tensors.get("ema"), dict) else "model"
    return _state_dict(file, weights)[0]


def component(path: epath.PathLike, *names: str) -> epath.Path:
    """The first of some models in a pipeline's folder; another path as it is."""
    path = epath.Path(path)
    if (path / "config.json").is_file():
        return path
    for name in names:
        if (path / name / "config.json").is_file():
            # A pipeline from a stranger could lead to a folder of the user's.
            _check_link(path, path / name)
            return path / name
    return path


def _state_dict(file, weights):
    """The flat dict of tensors in a file, and notes of how it was found."""
    tree = file.tensors
    notes = []
    if not tree:
        raise PortingError(f"{file.path}: no tensors")
    if any(isinstance(value, dict) for value in tree.values()):
        tree, notes = _chosen_weights(file, weights)
    counters = [name for name in _COUNTERS if _is_number(tree.get(name))]
    if counters:
        tree = {key: value for key, value in tree.items() if key not in counters}
        notes.append(f"left {abridged(counters)}, which the average counts by")
    for key, value in tree.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            kind = type(value).__name__
            text = f"{str(key)[:80]!r} is a {kind}, not a tensor"
            raise PortingError(f"{file.path}: {text}")
    if not tree:
        raise PortingError(f"{file.path}: no tensors")

    # A key may be long, and each round copies all of them.
    for _ in range(_MAX_PREFIXES):
        shared = [each for each in _PREFIXES if all(key.startswith(each) for key in tree)]
        if not shared:
            break
        size = len(shared[0])
        tree = {key[size:]: value for key, value in tree.items()}
        notes.append(f"removed the prefix {shared[0]!r} of every key")
    return tree, notes


def _is_number(value):
    is_scalar = isinstance(value, np.ndarray) and value.size == 1
    return is_scalar or isinstance(value, int | float)


def _chosen_weights(file, weights):
    """The state dict in a training checkpoint, and notes of what was left."""
    tree = file.tensors
    dicts = [name for name, value in tree.items() if isinstance(value, dict)]
    wanted = [name for name in _NAMES[weights] if name in dicts]
    if not wanted:
        offered = [each for each in WEIGHTS if set(_NAMES[each]) & set(dicts)]
        advice = f"; choose weights={offered[0]}" if offered else ""
        raise PortingError(
            f"weights = {weights}, but {file.path} has no such weights, only "
            f"{abridged(map(describe, tree))}{advice}"
        )
    chosen = wanted[0]
    # The optimizer's state among them: two thirds of the file.
    left = abridged((describe(name) for name in tree if name != chosen), 8)
    notes = [f"took {chosen!r} from a training checkpoint and left {left or 'nothing'}"]

    arguments = _arguments(tree)
    told = []
    for name in _ARGUMENTS:
        value = arguments.get(name)
        if isinstance(value, str) or is_size(value):
            told.append(f"{name}={str(value)[:80]}")
    if told:
        notes.append(f"its training arguments: {', '.join(told)}")

    state = tree[chosen]
    inner = [name for name in _INNER if isinstance(state.get(name), dict)]
    if inner:
        state = state[inner[0]]
        notes.append(f"of {chosen!r} the weights are {inner[0]!r}")
    return state, notes


def _arguments(tree):
    """The arguments that a training checkpoint's tree has, not checked."""
    found = tree.get("args")
    return found if isinstance(found, dict) else {}


def _stored(file, name):
    """What our exports say of their model, architecture or class_names: a .pt in PATH.json."""
    path = file.path
    if name in file.metadata:
        return _parse_json(file.metadata[name], f"{path}: its {name} is")
    sidecar = path.with_name(path.name + ".json")
    if path.suffix == ".safetensors" or not sidecar.is_file():
        return {}
    sidecar = _inside(path.parent, sidecar.name, path)
    return _read_json(sidecar).get(name, {})


# ---- A folder ------------------------------------------------------------------------------------


def _open_folder(path, names):
    """A model folder with a config.json, or the `transformer` of a pipeline folder."""
    path = component(path, "transformer")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: neither an Orbax checkpoint nor a diffusers folder (no config.json)"
        )
    config = _read_json(_inside(path, "config.json", path))

    for name in names:
        index = path / f"{name}.index.json"
        whole = path / name
        if index.is_file():
            tensors, files = _open_shards(path, index)
            return TorchCheckpoint(path, tensors, {}, config, [], files)
        if whole.exists():
            file = torch_file.read_tensors(_inside(path, whole.name, path))
            tensors, _ = _state_dict(file, "model")
            stored = _stored(file, "architecture")
            return TorchCheckpoint(path, tensors, stored, config, [], [file])

    # The Hub's files in half precision have a longer name, and are not taken
    # unless they are renamed.
    patterns = [name.replace(".", "*.") for name in names]
    found = [file.name for pattern in patterns for file in path.glob(pattern)]
    text = f"{path}: no {' or '.join(names)}, single or with an index"
    if found:
        names = abridged(sorted(found))
        text += f"; {names} is a variant or a shard, rename it to take it"
    raise FileNotFoundError(text)


def _open_shards(folder, index):
    """The tensors of all files that an index names, and the files."""
    content = _read_json(_inside(folder, index.name, folder))
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PortingError(f"{index}: no weight_map")
    keys_of: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        # All names first: a bad one is told before gigabytes are opened.
        if not isinstance(name, str) or name not in keys_of:
            _inside(folder, name, index)
        keys_of.setdefault(name, set()).add(key)

    tensors: dict[str, np.ndarray] = {}
    files = []
    for name in sorted(keys_of):
        files.append(torch_file.read_tensors(_inside(folder, name, index)))
        shard, _ = _state_dict(files[-1], "model")
        # A key in two shards, or in another than the index says, would be a
        # weight of unknown origin.
        if keys_of[name] != set(shard):
            keys = abridged(sorted(keys_of[name] ^ set(shard)))
            raise PortingError(f"{index} and {name} disagree on {keys}")
        tensors |= shard
    return tensors, files


def _inside(folder, name, index):
    """The file `name` of a folder; neither name nor link may lead out of it."""
    # Another file of the user's would be read, and perhaps published as
    # weights.
    is_plain = isinstance(name, str) and name not in ("", ".", "..") and len(name) < 256
    if not is_plain or any(character in name for character in "/\\\0"):
        what = f"{name!r:.80}, which is not a plain file name"
        raise PortingError(f"{index}: names the file {what}")
    path = folder / name
    # pathlib, for epath takes a pipe for a file, and does not follow links.
    local = pathlib.Path(folder)
    is_file = path.is_file() if is_remote(path) else (local / name).is_file()
    if not is_file:
        what = f"{describe(name)}, which is not in the folder"
        raise FileNotFoundError(f"{index}: names {what}")
    _check_link(folder, path)
    return path


def _check_link(folder, path):
    """Raises PortingError for a link that leads out of its folder."""
    if is_remote(path):
        return  # an object store has no links
    local = pathlib.Path(folder)
    target = pathlib.Path(path).resolve()
    roots = [local.resolve()]
    # The Hub's cache links from snapshots/REVISION to blobs.
    above = local.absolute().parents
    snapshots = [each for each in above if each.name == "snapshots"]
    roots += [each.parent.resolve() / "blobs" for each in snapshots]
    if not any(target.is_relative_to(root) for root in roots):
        raise PortingError(
            f"{path}: a link to {target}, outside the folder; name that itself to take it"
        )


def _read_json(path):
    limit = torch_file.MAX_HEADER_BYTES
    if path.stat().length > limit:
        raise PortingError(f"{path}: not valid JSON: larger than {limit} bytes")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PortingError(f"{path}: not valid JSON: {error}") from error
    value = _parse_json(text, f"{path}:")
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise PortingError(f"{path}: not valid JSON: a {kind}, not an object")
    return value


def _parse_json(text, what):
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise PortingError(f"{what} not valid JSON: {error}") from error


def check_diffusers_class(
    config: dict[str, Any], classes: Sequence[str], path: epath.PathLike
) -> None:
    """Raises PortingError where config.json names a class that is not expected."""
    name = config.get("_class_name")
    if name is not None and name not in classes:
        expected = " or ".join(classes)
        raise PortingError(f"{path}: config.json describes a {str(name)[:60]}, expected {expected}")


def check_diffusers_config(
    config: dict[str, Any], expected: dict[str, Any], path: epath.PathLike
) -> None:
    """Raises PortingError where config.json says another value than `expected`.

    A name that it leaves out is not compared: older writers know fewer.
    """
    for name, value in expected.items():
        says = config.get(name, value)
        if says != value:
            text = f"{name} = {str(says)[:60]}, expected {value}"
            raise PortingError(f"{path}: config.json says {text}")


def is_count(value: Any, low: int = 1, high: int = 10**6) -> bool:
    """Whether a value of a file is a whole number in a range."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number and low <= value <= high


def abridged(names: Iterable[str], limit: int = 6, width: int = 80) -> str:
    """The first names of a list, cut to a width, and how many more there are."""

    def shorten(name):
        return name if len(name) <= width else f"{name[: width - 3]}..."

    short = list(map(shorten, names))
    more = f" and {len(short) - limit} more" if len(short) > limit else ""
    return ", ".join(short[:limit]) + more

"""Checkpoints of the PyTorch world opened: a file or a diffusers folder becomes one flat dict.

Nothing here knows a model; everything here distrusts what it reads, as `torch_file` does below it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from lit_jax.porting import torch_file
from lit_jax.porting.untrusted import is_remote, one_line, unique_keys

WEIGHTS = ("ema", "model")  # of a training checkpoint
_STEM = "diffusion_pytorch_model"  # of the weights in a diffusers folder
# In a training checkpoint, what its arguments may say of it for the report.
_ARGUMENTS = ("model", "image_size", "resolution", "num_classes", "vae")


class PortingError(ValueError):
    """A checkpoint that cannot be taken as it is; `report` says what was found, key by key."""

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
        config: a diffusers config.json, not yet checked; None where there is none.
        notes: for the report.
        files: those that the tensors are views of.
    """

    path: epath.Path
    tensors: dict[str, np.ndarray]
    stored: Any
    config: dict[str, Any] | None
    notes: list[str]
    files: list[torch_file.TensorFile]

    def release(self) -> None:
        """Gives the pages read so far back to the system."""
        for file in self.files:
            file.release()

    def verify(self) -> None:
        """Compares the checksums that the files carry of the tensors; says so in the notes.

        Raises: TensorFileError for a record that is not what was written.
        """
        checked = [file.verify(self.tensors.values()) for file in self.files if file.records]
        if sum(checked):
            self.notes.append(f"the CRC-32 of {sum(checked)} records is that of the archive")


def open_torch_checkpoint(path: epath.PathLike, weights: str) -> TorchCheckpoint:
    """The tensors of a file, of a diffusers model folder, or of the pipeline folder above it.

    Args: weights: "ema" or "model", where a training checkpoint has both.
    Raises: PortingError for what is no checkpoint, or whose parts contradict each other;
      TensorFileError for a damaged or hostile file; FileNotFoundError.
    """
    path = epath.Path(path)
    if path.is_dir():
        return _open_folder(path)
    file = _open_file(path)
    tensors, notes = _state_dict(file, weights)
    return TorchCheckpoint(path, tensors, _stored_architecture(file), None, notes, [file])


def largest_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint whichever weights it has, for a look at its keys.

    Raises: as `open_torch_checkpoint`.
    """
    path = epath.Path(path)
    if path.is_dir():
        return _open_folder(path).tensors
    file = _open_file(path)
    weights = "ema" if isinstance(file.tensors.get("ema"), dict) else "model"
    return _state_dict(file, weights)[0]


def component(path: epath.PathLike, *names: str) -> epath.Path:
    """The first of the models `names` in a diffusers pipeline folder; any other path as it is."""
    path = epath.Path(path)
    if (path / "config.json").is_file():
        return path
    inside = (path / name for name in names if (path / name / "config.json").is_file())
    return next(inside, path)


# ---- One file ------------------------------------------------------------------------------------


def _open_file(path):
    if path.suffix == ".safetensors":
        return torch_file.read_safetensors(path)
    return torch_file.read_torch(path)


def _state_dict(file, weights):
    """The flat dict of tensors in a file, and notes of how it was found."""
    tree = file.tensors
    notes = []
    if not tree:
        raise PortingError(f"{file.path}: no tensors")
    if not all(isinstance(value, np.ndarray) for value in tree.values()):
        tree, notes = _chosen_weights(file, weights)
    for key, value in tree.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise PortingError(
                f"{file.path}: {str(key)[:80]!r} is a {type(value).__name__}, not a tensor"
            )
    if not tree:
        raise PortingError(f"{file.path}: no tensors")

    # Both wrappers of torch rename all parameters, and either may be around the other.
    for prefix in ("module.", "_orig_mod.", "module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in tree):
            tree = {key.removeprefix(prefix): value for key, value in tree.items()}
            notes.append(f"removed the prefix {prefix!r} of every key")
    return tree, notes


def _chosen_weights(file, weights):
    """The state dict in a training checkpoint, and notes of what was left."""
    tree = file.tensors
    inner = [name for name in (weights, "state_dict") if isinstance(tree.get(name), dict)]
    if not inner:
        offered = [name for name in WEIGHTS if isinstance(tree.get(name), dict)]
        advice = f"; choose weights={offered[0]}" if offered else ""
        raise PortingError(
            f"weights = {weights}, but {file.path} has no such weights, only "
            f"{abridged(map(repr, tree))}{advice}"
        )
    left = [repr(name) for name in tree if name != inner[0]]
    notes = [f"took {inner[0]!r} from a training checkpoint and left {abridged(left, 8)}"]

    arguments = tree.get("args")
    if isinstance(arguments, dict):
        known = [
            f"{name}={arguments[name]}"
            for name in _ARGUMENTS
            if isinstance(arguments.get(name), str | int)
        ]
        if known:
            notes.append(f"its training arguments: {', '.join(known)}")
    return tree[inner[0]], notes


def _stored_architecture(file):
    """What our own exports say of their model: a .safetensors in its header, a .pt in PATH.json."""
    path = file.path
    if "architecture" in file.metadata:
        try:
            return json.loads(file.metadata["architecture"], object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise PortingError(f"{path}: its architecture is not valid JSON: {error}") from error
    sidecar = path.with_name(path.name + ".json")
    if path.suffix != ".safetensors" and sidecar.is_file():
        return _read_json(_inside(path.parent, sidecar.name, path)).get("architecture", {})
    return {}


# ---- A folder ------------------------------------------------------------------------------------


def _open_folder(path):
    """A diffusers model folder, or the `transformer` of a pipeline folder."""
    path = component(path, "transformer")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: neither an Orbax checkpoint nor a diffusers folder (no config.json)"
        )
    config = _read_json(_inside(path, "config.json", path))

    for suffix in (".safetensors", ".bin"):
        index = path / f"{_STEM}{suffix}.index.json"
        whole = path / f"{_STEM}{suffix}"
        if index.is_file():
            tensors, files = _open_shards(path, index)
            return TorchCheckpoint(path, tensors, {}, config, [], files)
        if whole.exists():
            file = _open_file(_inside(path, whole.name, path))
            tensors, _ = _state_dict(file, "model")
            return TorchCheckpoint(path, tensors, {}, config, [], [file])

    patterns = (f"{_STEM}.*.safetensors", f"{_STEM}.*.bin")
    variants = sorted(found.name for pattern in patterns for found in path.glob(pattern))
    advice = f"; {abridged(variants)} is a variant or a shard, rename it to take it"
    raise FileNotFoundError(
        f"{path}: no {_STEM}.safetensors or .bin, single or with an index"
        + (advice if variants else "")
    )


def _open_shards(folder, index):
    """The tensors of all files that an index names, and the files."""
    weight_map = _read_json(_inside(folder, index.name, folder)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PortingError(f"{index}: no weight_map")
    # All names first: a bad one is told before gigabytes are opened.
    for name in weight_map.values():
        _inside(folder, name, index)

    tensors: dict[str, np.ndarray] = {}
    files = []
    for name in sorted(set(weight_map.values())):
        files.append(_open_file(_inside(folder, name, index)))
        shard, _ = _state_dict(files[-1], "model")
        listed = {key for key, value in weight_map.items() if value == name}
        if listed != set(shard):
            keys = abridged(sorted(listed ^ set(shard)))
            raise PortingError(f"{index} and {name} disagree on {keys}")
        tensors |= shard
    return tensors, files


def _inside(folder, name, index):
    """The file `name` of a folder, which neither its name nor a link may lead out of."""
    is_plain = isinstance(name, str) and name not in ("", ".", "..")
    if not is_plain or any(character in name for character in "/\\\0"):
        raise PortingError(f"{index}: names the file {name!r:.80}, which is not a plain file name")
    path = folder / name
    # epath takes a pipe for a file, and does not follow links: here this is pathlib's work.
    local = pathlib.Path(folder)
    is_file = path.is_file() if is_remote(path) else (local / name).is_file()
    if not is_file:
        raise FileNotFoundError(f"{index}: names {name}, which is not in the folder")
    if is_remote(path):
        return path  # an object store has no links

    target = (local / name).resolve()
    roots = [local.resolve()]
    # The Hub's cache links from snapshots/REVISION to blobs.
    for parent in local.absolute().parents:
        if parent.name == "snapshots":
            roots.append(parent.parent.resolve() / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise PortingError(f"{path}: a link to {target}, outside the folder")
    return path


def _read_json(path):
    try:
        if path.stat().length > torch_file.MAX_HEADER_BYTES:
            raise ValueError(f"larger than {torch_file.MAX_HEADER_BYTES} bytes")
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=unique_keys)
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not an object")
        return value
    except (ValueError, RecursionError) as error:
        raise PortingError(f"{path}: not valid JSON: {error}") from error


# ---- config.json ---------------------------------------------------------------------------------


def check_diffusers_class(config: dict[str, Any], classes: Sequence[str], path: Any) -> None:
    """Raises PortingError where config.json names another class of diffusers than `classes`."""
    name = config.get("_class_name")
    if name is not None and name not in classes:
        raise PortingError(
            f"{path}: config.json describes a {str(name)[:60]}, expected {' or '.join(classes)}"
        )


def check_diffusers_config(config: dict[str, Any], expected: dict[str, Any], path: Any) -> None:
    """Raises PortingError where config.json says another value than `expected`.

    A name that it leaves out has diffusers' default, which is the expected one.
    """
    for name, value in expected.items():
        if name in config and config[name] != value:
            raise PortingError(
                f"{path}: config.json says {name} = {str(config[name])[:60]}, expected {value}"
            )


# ---- Values and texts ----------------------------------------------------------------------------


def is_count(value: Any, low: int = 1, high: int = 10**6) -> bool:
    """Whether a value of a file is a whole number in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def abridged(names: Iterable[str], limit: int = 6, width: int = 80) -> str:
    """The first names of a list, each cut to a width, and how many more there are."""
    short = [name if len(name) <= width else f"{name[: width - 3]}..." for name in names]
    more = f" and {len(short) - limit} more" if len(short) > limit else ""
    return ", ".join(short[:limit]) + more

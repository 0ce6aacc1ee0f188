"""Checkpoints of the PyTorch world opened: a file or a diffusers folder becomes one flat dict of tensors.

Nothing here knows a model; everything here distrusts what it reads, as `torch_file` does below it.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from lit_jax.porting import torch_file


class PortingError(ValueError):
    """A checkpoint that cannot be taken as it is; `report` says what was found, key by key."""

    def __init__(self, message: str, report: Any = None):
        super().__init__(torch_file.one_line(message))
        self.report = report


@dataclasses.dataclass
class TorchCheckpoint:
    """Tensors by key, with what was stored beside them."""

    path: pathlib.Path
    tensors: dict[str, np.ndarray]
    stored: dict  # architecture that the file itself names, as it stands there
    config: dict | None  # a diffusers config.json
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
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or "/" in name
        or "\\" in name
        or "\0" in name
    ):
        raise PortingError(f"{index}: names the file {name!r:.80}, which is not a plain file name")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{index}: names {name}, which is not in the folder")
    roots = [folder.resolve()]
    roots += [
        parent.parent.resolve() / "blobs"
        for parent in folder.absolute().parents
        if parent.name == "snapshots"
    ]
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise PortingError(f"{path}: a link to {path.resolve()}, outside the folder")
    return path


def open_file(path):
    return (
        torch_file.read_safetensors(path)
        if path.suffix == ".safetensors"
        else torch_file.read_torch(path)
    )


def _state_dict(file, weights):
    """The flat dict of tensors in a file, and notes; `weights` picks "ema" or "model" where both are there."""
    tree, notes = file.tensors, []
    if not tree:
        raise PortingError(f"{file.path}: no tensors")
    if not all(isinstance(value, np.ndarray) for value in tree.values()):
        inner = [name for name in (weights, "state_dict") if isinstance(tree.get(name), dict)]
        if not inner:
            offer = [name for name in ("ema", "model") if isinstance(tree.get(name), dict)]
            raise PortingError(
                f"{file.path}: no {weights!r} weights in it, only {abridged(map(repr, tree))}"
                + (
                    f"; choose weights={offer[0]} (port.weights, teacher.weights or student.weights)"
                    if offer
                    else ""
                )
            )
        beside = [name for name in tree if name != inner[0]]
        notes.append(
            f"took {inner[0]!r} from a training checkpoint and left {abridged(map(repr, beside), 8)}"
        )
        notes += _notes_of_arguments(tree.get("args"))
        tree = tree[inner[0]]
    for key, value in tree.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise PortingError(
                f"{file.path}: {str(key)[:80]!r} is a {type(value).__name__}, not a tensor"
            )
    if not tree:
        raise PortingError(f"{file.path}: no tensors")
    for prefix in (
        "module.",
        "_orig_mod.",
        "module.",
        "_orig_mod.",
    ):  # wrappers may be nested either way
        if all(key.startswith(prefix) for key in tree):
            tree = {key.removeprefix(prefix): value for key, value in tree.items()}
            notes.append(f"removed the prefix {prefix!r} of every key")
    return tree, notes


def _notes_of_arguments(arguments):
    if not isinstance(arguments, dict):
        return []
    known = [
        f"{name}={arguments[name]}"
        for name in ("model", "image_size", "resolution", "num_classes", "vae")
        if isinstance(arguments.get(name), str | int)
    ]
    return [f"its training arguments: {', '.join(known)}"] if known else []


def open_torch_checkpoint(path, weights):
    """The tensors of a file or folder; `weights`, "ema" or "model", picks where a training checkpoint has both."""
    path = pathlib.Path(path)
    if path.is_dir():
        return _open_folder(path)
    file = open_file(path)
    tensors, notes = _state_dict(file, weights)
    stored = {}
    sidecar = path.with_name(path.name + ".json")
    if "architecture" in file.metadata:
        try:
            stored = json.loads(
                file.metadata["architecture"], object_pairs_hook=torch_file.unique_keys
            )
        except (ValueError, RecursionError) as error:
            raise PortingError(f"{path}: its architecture is not valid JSON: {error}") from error
    elif path.suffix != ".safetensors" and sidecar.is_file():
        stored = _read_json(_inside(path.parent, sidecar.name, path)).get("architecture", {})
    return TorchCheckpoint(path, tensors, stored, None, notes, [file])


def component(path, *names):
    """The first of the models `names` in a diffusers pipeline folder; any other path as it is."""
    if (path / "config.json").is_file():
        return path
    return next((path / name for name in names if (path / name / "config.json").is_file()), path)


def _open_folder(path):
    """A diffusers model folder, or the `transformer` of a pipeline folder."""
    path = component(path, "transformer")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: neither an Orbax checkpoint nor a diffusers folder (no config.json)"
        )
    config = _read_json(_inside(path, "config.json", path))
    stem = "diffusion_pytorch_model"
    files, tensors = [], {}
    for suffix in (".safetensors", ".bin"):
        index = path / f"{stem}{suffix}.index.json"
        if index.is_file():
            weight_map = _read_json(_inside(path, index.name, path)).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise PortingError(f"{index}: no weight_map")
            for name in weight_map.values():
                _inside(path, name, index)
            for name in sorted(set(weight_map.values())):
                files.append(open_file(_inside(path, name, index)))
                shard, _ = _state_dict(files[-1], "model")
                listed = {key for key, value in weight_map.items() if value == name}
                if listed != set(shard):
                    raise PortingError(
                        f"{index} and {name} disagree on {abridged(sorted(listed ^ set(shard)))}"
                    )
                tensors |= shard
            break
        if (path / f"{stem}{suffix}").exists():
            files.append(open_file(_inside(path, f"{stem}{suffix}", path)))
            tensors, _ = _state_dict(files[-1], "model")
            break
    else:
        variants = sorted(
            each.name
            for suffix in ("safetensors", "bin")
            for each in path.glob(f"{stem}.*.{suffix}")
        )
        raise FileNotFoundError(
            f"{path}: no {stem}.safetensors or .bin, single or with an index"
            + (
                f"; {abridged(variants)} is a variant or a shard, rename it to take it"
                if variants
                else ""
            )
        )
    return TorchCheckpoint(path, tensors, {}, config, [], files)


def is_count(value, low=1, high=10**6):
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def abridged(names, limit=6, width=80):
    names = [name if len(name) <= width else f"{name[: width - 3]}..." for name in names]
    return ", ".join(names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )

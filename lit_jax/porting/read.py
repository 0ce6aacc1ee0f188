"""Checkpoints of the PyTorch world, and our own, into our parameter trees.

A checkpoint of the PyTorch world is read as views of mapped files (`torch_checkpoint`).
Its family renames the keys to one spelling (`dit`, `autoencoder`), and `matching` leads
from there to the tree, every key accounted for. `write` goes the other way.
"""

import contextlib
import dataclasses
import functools
import json
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax import conditions
from lit_jax.checkpoint import is_checkpoint, open_params
from lit_jax.models import FAMILIES
from lit_jax.models.dit import DiTConfig
from lit_jax.models.pixart import PixArtConfig
from lit_jax.models.pixart_t5 import PixArtT5Config
from lit_jax.porting import autoencoder, dit, pixart, pixart_t5
from lit_jax.porting.matching import Report, checksum
from lit_jax.porting.torch_checkpoint import (
    WEIGHTS,
    PortingError,
    abridged,
    any_state_dict,
    component,
    open_torch_checkpoint,
)
from lit_jax.porting.untrusted import describe

MAX_INDEX_BYTES = 1 << 20  # of a pipeline's model_index.json

# For the architecture of each model family the module with its key tables and the
# overrides that it knows. A further family is one more line.
KEY_TABLES: dict[type, ModuleType] = {
    DiTConfig: dit,
    PixArtConfig: pixart,
    PixArtT5Config: pixart_t5,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A diffusion model that was read.

    Attributes:
        params: nested dict of leaves, which are read when they are indexed.
        config: what shapes, metadata and caller say of the model.
        report: what became of every key.
        class_names: of the labels, in their order; (): it does not tell them.
    """

    params: dict[str, Any]
    config: Any  # an Architecture
    report: Report
    class_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class AutoencoderCheckpoint:
    """An autoencoder that was read, as `Checkpoint`.

    `architecture` has the fields of `AutoencoderKL`, scaling_factor and shift_factor.
    """

    params: dict[str, Any]
    architecture: dict[str, Any]
    report: Report


def read_checkpoint(
    path: epath.PathLike, *, weights: str = "ema", overrides: Any = None, family: str = ""
) -> Checkpoint:
    """Opens a checkpoint of a diffusion model of any layout.

    Reads official DiT files (.pt, .safetensors), training checkpoints (DiT, fast-DiT,
    REPA), diffusers folders, our own exports, and Orbax checkpoints or workdirs.

    Args:
        path: file or folder.
        weights: "ema" or "model", where a training checkpoint has both.
        overrides: what the caller knows better than the checkpoint, the `Overrides` of the
            family's key tables; None: nothing.
        family: the name in `FAMILIES` of what the checkpoint must be, and the overrides
            are of; empty: any.
    Returns: with leaves that are still in their file, if that is one of torch.
    Raises:
        PortingError: a key is missing, unexpected, of the wrong shape or dtype, not
            finite, or unexplained; or an override cannot be: then the text starts with
            its name.
        TensorFileError: the file is damaged or hostile.
        FileNotFoundError: it is not there.
    """
    path = _existing(path, weights)
    params: dict[str, Any]
    if is_checkpoint(path):
        # Of older workdirs the metadata may say nothing of the model: shapes
        # tell the most, and are checked before a value is read.
        saved, params, report = _open_orbax(path, weights)
        table = _table_of(params, path, family)
        config = table.read_tree(params, saved.metadata.get("model") or {}, report)
        params = _read_orbax(saved, report)
        names = saved.metadata.get("class_names")
    else:
        source = open_torch_checkpoint(path, weights)
        report = Report(str(path), "dit", notes=source.notes)
        names = source.class_names or _names_of_pipeline(path)
        table = _table_of(source.tensors, path, family, source.config)
        params, config = table.read_torch(source, report, overrides or table.Overrides())
        report.checksum = _checked_values(params, report)
    # Every value is read for the checksum, so that is not done twice in vain.
    of_source = dict(params)
    config = table.override(params, config, overrides or table.Overrides(), report)
    if any(params[name] is not of_source.get(name) for name in params):
        report.checksum = _checked_values(params, report)
    tree = _account(params, config.to_json(), report)
    return Checkpoint(tree, config, report, _checked_names(names, config))


def read_autoencoder(
    path: epath.PathLike, *, weights: str = "ema", scaling_factor: float = 0.0
) -> AutoencoderCheckpoint:
    """Opens an AutoencoderKL: a diffusers folder, a file in any spelling, or our Orbax folder.

    Args:
        path: file or folder.
        weights: "ema" or "model", where a training checkpoint has both.
        scaling_factor: at least 0, overrides what the source says, and is needed where
            that says nothing (no config.json). 0: as the source says.
    Raises: as `read_checkpoint`.
    """
    path = _existing(path, weights)
    params: dict[str, Any]
    if is_checkpoint(path):
        saved, params, report = _open_orbax(path, weights)
        if "autoencoder" not in saved.metadata:
            raise PortingError(f"{path}: not the checkpoint of an autoencoder")
        architecture = autoencoder.read_tree(params, saved.metadata["autoencoder"], report)
        params = _read_orbax(saved, report)
    else:
        source = open_torch_checkpoint(component(path, "vae"), weights)
        report = Report(str(path), "diffusers", notes=source.notes)
        params, architecture = autoencoder.read_torch(source, report)
        report.checksum = _checked_values(params, report)
    if scaling_factor:
        architecture["scaling_factor"] = scaling_factor
    # The files of Stable Diffusion and SDXL have the same names and shapes, and
    # a wrong scale gives pictures without contrast.
    if architecture["scaling_factor"] is None:
        raise PortingError(
            f"scaling_factor must be named: nothing in {path} tells the scale of the latents "
            "(Stable Diffusion 0.18215, SDXL 0.13025)"
        )
    tree = _account(params, architecture, report)
    return AutoencoderCheckpoint(tree, architecture, report)


def is_autoencoder(path: epath.PathLike) -> bool:
    """Whether a checkpoint is an AutoencoderKL. Its keys tell; no value is read.

    Raises: as `read_checkpoint`, for what cannot be opened.
    """
    path = epath.Path(path)
    if is_checkpoint(path):
        _, shapes, _ = _open_orbax(path, "ema")
        return autoencoder.recognises(shapes)
    # A pipeline with a transformer is a DiT's, though it has an autoencoder
    # too. Those of Stable Diffusion have none.
    if path.is_dir() and component(path, "transformer", "vae") == path / "vae":
        return True
    return autoencoder.recognises(any_state_dict(path))


def load_params(params: Any, shardings: Any = None, *, consume: bool = False) -> Any:
    """Reads a tree of leaves into device arrays, one leaf at a time.

    Args:
        params: nested dict of `Leaf` or arrays.
        shardings: the same tree of shardings; each device then reads only its part.
            None: the default device.
        consume: takes each leaf out of `params` once it is loaded, so that those in
            memory are not there twice.
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
            read = functools.partial(_read_part, leaf)
            loaded[name] = jax.make_array_from_callback(leaf.shape, sharding, read)
    return loaded


def _read_part(leaf, index):
    return np.asarray(leaf[index])


def _existing(path, weights):
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be {' or '.join(WEIGHTS)}; got {weights!r}")
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path = {path}: no such file or folder")
    return path


def _open_orbax(path, weights):
    """A checkpoint of ours, the shapes of its parameters by path, and a report."""
    with _as_porting_error():
        saved = open_params(path, ema=weights == "ema")
    note = f"read {saved.item} of {saved.folder}"
    return saved, flatten_dict(saved.shapes, sep="/"), Report(str(path), "orbax", notes=[note])


def _read_orbax(saved, report):
    """The parameters by path, compared with what the checkpoint says of them."""
    # Into host memory: the caller chooses devices and shardings.
    with _as_porting_error():
        params = flatten_dict(saved.read(), sep="/")
    report.checksum = _checked_values(params, report)
    # A training checkpoint has fingerprints in place of it, compared by `read`.
    says = saved.metadata.get("checksum")
    if says is not None and says != report.checksum:
        raise PortingError(
            f"{saved.folder} is damaged: its weights have the checksum {report.checksum[:16]}..., "
            f"{str(says)[:16]}... was saved; port the source again, or take another copy"
        )
    if says is None and "fingerprints" not in saved.metadata:
        report.notes.append("the checkpoint has no checksum: its weights are taken unchecked")
    return params


@contextlib.contextmanager
def _as_porting_error():
    """The names in a folder are a stranger's: the error escapes and shortens them."""
    try:
        yield
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise PortingError(str(error)[:400]) from error


def _table_of(keys, path, wanted, says=None):
    """The key tables of a checkpoint's family, which must be the wanted one; empty: any.

    Args: says: its config.json, where it has one.
    """
    tables = {name: KEY_TABLES[family.config] for name, family in FAMILIES.items()}
    found = next((name for name, table in tables.items() if table.recognises(keys)), "")
    if wanted and found and found != wanted:
        kind = FAMILIES[found].config.__name__.removesuffix("Config")
        raise PortingError(
            f"path = {path} holds a {kind}, but family = {wanted}; take a config of the family "
            f"{found}, or another checkpoint"
        )
    if wanted and not found:
        name = (says or {}).get("_class_name")
        what = f"a {describe(name)}" if name else f"{len(keys)} keys, {abridged(sorted(keys), 4)}"
        raise PortingError(
            f"path = {path} holds {what}, but family = {wanted}; name {tables[wanted].WHAT}: a "
            f"file, a folder or a pipeline's folder"
        )
    # A DiT's error then lists what is missing.
    return tables[found or "dit"]


def _names_of_pipeline(path):
    """The classes that the model_index.json of a DiT's pipeline names; None: it has none."""
    index = path / "model_index.json"
    if not index.is_file() or index.stat().length > MAX_INDEX_BYTES:
        return None
    try:
        labels = json.loads(index.read_text())["id2label"]
        # "tench, Tinca tinca": the first of several is the one that people say.
        return [labels[str(number)].split(",")[0].strip() for number in range(len(labels))]
    # Names are a comfort: a model can be used without them.
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _checked_names(names, config):
    """The names that a checkpoint tells, if they are texts, one a class; () otherwise."""
    is_list = isinstance(names, list) and len(names) == conditions.count_classes(config)
    return tuple(names) if is_list and all(isinstance(name, str) for name in names) else ()


def _checked_values(params, report):
    """The checksum of the leaves. Every value is read here, before one is used.

    Raises: PortingError for a value that is not finite.
    """
    try:
        return checksum(unflatten_dict(params, sep="/"))
    except PortingError as error:
        raise PortingError(f"{report.source}: {error}", report) from None


def _account(params, architecture, report):
    """The tree of the leaves; the report gets what is told of it as a whole."""
    tree = unflatten_dict(params, sep="/")
    report.architecture = architecture
    report.parameters = sum(leaf.size for leaf in jax.tree.leaves(tree))
    return tree

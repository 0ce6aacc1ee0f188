"""Orbax checkpoints: the train state of a run, and parameters alone.

A training checkpoint is `checkpoints/STEP/` with the items params,
ema_params, opt_state, train (step and counters), data (the iterator's
state, JSON) and metadata (JSON). A parameter checkpoint is a folder of
the same form with params and metadata only. Everything that reads
parameters reads both.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from lit_jax.runtime import storage
from lit_jax.runtime.exit_status import TryAgainError

ARRAY_ITEMS = ("params", "ema_params", "opt_state", "train")
JSON_ITEMS = ("data", "metadata")

# TensorStore raises ValueError for everything and quotes what the system, a
# store or XLA said.
QUOTED_FAILURES = (
    "os_error_code",
    "http_response_code",
    "curl_code",
    "RESOURCE_EXHAUSTED",
)
# Below gs://, files are opened by these; a missing file is Python's own error.
STORE_LIBRARIES = ("aiohttp", "gcsfs", "google", "requests", "urllib3")

# Of a file of JSON in a checkpoint. It holds names and shapes.
MAX_JSON_BYTES = 4 << 20
# Arrays of constants pack well, and a stranger's folder may unpack to any size.
MAX_UNPACKED_BYTES = 256 << 20
MAX_COMPRESSION = 100
# Of a leaf, these are in memory once more while it is fingerprinted on the host.
ELEMENTS_AT_ONCE = 1 << 22
# What Orbax adds to the name of a folder until it is whole.
TEMPORARY = ".orbax-checkpoint-tmp"

Items = dict[str, Any]  # {item: tree of arrays}


class MismatchError(ValueError):
    """A readable checkpoint, but of another run or another model."""


class DamagedError(Exception):
    """A checkpoint that is not, or not all of, what was saved."""


# The checkpoints of a run. ----------------------------------------------------


class Checkpointer:
    """Saves and restores the train state of one run; it saves in the background.

    Args:
      directory: a local folder or gs://; it is made if it is not there.
      keep: the number of the newest checkpoints that stay.
      keep_every: each checkpoint of a multiple of this step stays too;
        0: none.
    Raises: ValueError for a place where Orbax cannot write.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int,
        keep_every: int,
    ):
        self.directory = orbax_path(directory)
        self._saving: int | None = None
        self._failure: Exception | None = None
        self._wait_for_others = ocp.multihost.get_barrier_sync_fn()
        # Folders are made before `save` returns: a failure to make one
        # in the background would leave Orbax waiting for 300 s.
        in_background = ocp.AsyncOptions(
            barrier_sync_fn=self._barrier,
            create_directories_asynchronously=False,
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            async_options=in_background,
            step_name_format=ocp.path.step.standard_name_format(),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_names=ARRAY_ITEMS + JSON_ITEMS,
        )
        # JAX's preemption service agrees on a number, and
        # preemption.Preemption gives it numbers of its own. A step
        # among them, which Orbax would give it in `save`, could delay
        # the stop by as many steps as the run has made.
        self._manager.reached_preemption = lambda step: False

    def save(
        self,
        step: int,
        items: Items,
        *,
        data: dict,
        metadata: dict,
    ) -> None:
        """Starts saving; returns when the arrays are copied to the host.

        It first waits for an earlier save to end.

        Args:
          items: the trees of ARRAY_ITEMS.
          data: the state of the data iterator, JSON values.
          metadata: JSON values.
        Raises: OSError naming the folder when files cannot be written.
        """
        # A second save would need the host memory of two states.
        self.wait()
        self._saving = step
        jax.block_until_ready(items)
        started = time.monotonic()

        metadata = metadata | {"fingerprints": fingerprints(items)}
        metadata = metadata | {"checksum": checksum([data, metadata])}
        args: dict[str, Any] = {}
        for name in ARRAY_ITEMS:
            args[name] = ocp.args.StandardSave(items[name])
        args["data"] = ocp.args.JsonSave(data)
        args["metadata"] = ocp.args.JsonSave(metadata)
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        # TensorStore raises ValueError for files too.
        except (OSError, ValueError) as error:
            self._failure = self._name_folder(error)
            raise self._failure from error

        logging.info(
            "checkpoint of step %d: the loop stood still for %.2f s, "
            "its files are written meanwhile",
            step,
            time.monotonic() - started,
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def restore(
        self,
        items_shape: Items,
        fields: dict[str, Any] | None = None,
        *,
        force: bool = False,
    ) -> tuple[int, Items, dict, dict] | None:
        """Restores the newest readable checkpoint.

        A damaged checkpoint (unreadable, or not what was saved) is
        named in the log, renamed to `STEP.damaged` and skipped. Where
        there are several processes, perhaps only one has seen the
        damage; the run then stops after the renaming. An error of the
        file system says nothing about the checkpoint: it stops the run
        and leaves everything where it is.

        Args:
          items_shape: the trees of ARRAY_ITEMS as ShapeDtypeStruct with
            the shardings onto which the arrays go.
          fields: config fields that must be as they were, compared with
            metadata["fields"].
          force: only warn when they are not.
        Returns: step, the items, the data iterator's state, the
          metadata; None if there is no checkpoint.
        Raises:
          ValueError: checkpoints are or were there, but none can be
            read; or the newest is of another run, with other fields or
            other parameters.
          TryAgainError: one of several processes meets a damaged
            checkpoint.
          OSError: the newest cannot be read for another reason than
            damage.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self.directory / str(step)
            try:
                data, metadata = self._read_json(step, path)
                saved_fields = metadata.get("fields", {})
                check_fields(path, saved_fields, fields or {}, force)
                check_shapes(path, items_shape)
                expected = metadata.get("fingerprints", {})
                items = self._read_arrays(step, path, items_shape, expected)
                return step, items, data, metadata
            except DamagedError as error:
                logging.warning(
                    "checkpoint %s is damaged and skipped: %s",
                    path,
                    error,
                )
                set_aside(path)
                if jax.process_count() > 1:
                    raise TryAgainError(
                        f"checkpoint {path} is damaged and set aside; "
                        f"run the same command again to go on from the one before"
                    ) from error
                # Orbax keeps a list of the steps that it saw at the start.
                self._manager.reload()

        # Those that an earlier start has renamed count too: a run that
        # has made steps never begins again by itself.
        aside = sorted(path.name for path in self.directory.glob("*.damaged*"))
        if aside:
            raise ValueError(
                f"no checkpoint in {self.directory} can be read; "
                f"set aside: {', '.join(aside)}. Mend and rename one of them, "
                f"or begin again in another directory"
            )
        return None

    def _read_json(self, step: int, path: epath.Path) -> tuple[dict, dict]:
        """The data iterator's state and the metadata, as they were saved."""
        args = {name: ocp.args.JsonRestore() for name in JSON_ITEMS}
        with reading(path):
            saved = self._manager.restore(step, args=ocp.args.Composite(**args))
            data = saved["data"]
            metadata = saved["metadata"]
            expected = metadata.pop("checksum", None)

        if expected is None and "fingerprints" in metadata:
            logging.warning(
                "checkpoint %s has no checksum of its data state, because an "
                "older lit_jax wrote it: taken unchecked",
                path,
            )
        elif expected != checksum([data, metadata]):
            raise DamagedError("data or metadata is not what was saved")
        return data, metadata

    def _read_arrays(
        self,
        step: int,
        path: epath.Path,
        items_shape: Items,
        expected: dict[str, int],
    ) -> Items:
        args = {}
        for name in ARRAY_ITEMS:
            args[name] = ocp.args.StandardRestore(items_shape[name])
        with reading(path):
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        items = {name: restored[name] for name in ARRAY_ITEMS}

        for name, fingerprint in fingerprints(items).items():
            if fingerprint != expected[name]:
                raise DamagedError(f"{name} is not what was saved")
        return items

    def check(self) -> None:
        """Raises the error of the save in the background, if it has failed."""
        if self._failure:
            raise self._failure

    def wait(self) -> None:
        """Returns when the last save is written.

        Raises: OSError as soon as it has failed, as `save` does.
        """
        # Orbax's own wait reports a failure only after all other
        # processes have come to its barrier, which they may never do.
        while self._manager.is_saving_in_progress():
            self.check()
            time.sleep(0.01)
        self.check()
        self._manager.wait_until_finished()

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's wait for the other processes, in its thread or in ours."""
        # A thread of Orbax that comes here while it handles an
        # exception has failed to save.
        ours = threading.current_thread() is threading.main_thread()
        error = sys.exception()
        if error and not ours and not self._failure:
            self._failure = self._name_folder(error)

        try:
            self._wait_for_others(key=key, timeout_ms=timeout_ms)
        # Another process is gone.
        except jax.errors.JaxRuntimeError as lost:
            self._failure = self._failure or lost
            raise

    def _name_folder(self, error: BaseException) -> OSError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return OSError(
            f"the checkpoint of step {self._saving} in {self.directory} cannot be written: {reason}"
        )

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


def check_fields(
    path: epath.Path,
    saved: dict[str, Any],
    wanted: dict[str, Any],
    force: bool,
) -> None:
    """Compares the config fields that a checkpoint and a run have in common.

    Raises: MismatchError with both values where they differ; `force`
      makes it a warning.
    """
    # Tuples come out of a file as lists.
    wanted = json.loads(json.dumps(wanted))
    changed = [
        f"{name} was {saved[name]} and is now {wanted[name]}"
        for name in sorted(saved.keys() & wanted.keys())
        if saved[name] != wanted[name]
    ]
    if not changed:
        return
    text = "; ".join(changed)
    if not force:
        raise MismatchError(
            f"force = False, but checkpoint {path} is of another run: {text}. "
            f"Use another directory, or go on all the same with force = True"
        )
    logging.warning(
        "going on from step %s with another config: %s",
        path.name,
        text,
    )


def find_newest(
    directory: epath.PathLike, items_shape: Items, fields: dict[str, Any], *, force: bool = False
) -> int | None:
    """The step that `Checkpointer.restore` would go on from, before anything is compiled for it.

    It reads names, shapes and metadata, no array, and leaves everything as it is.

    Args: as `Checkpointer.restore`.
    Returns: None: there is no checkpoint, or the newest is damaged.
    Raises: MismatchError and OSError as `Checkpointer.restore`.
    """
    folder = _find(orbax_path(directory))
    if folder is None:
        return None
    try:
        with reading(folder):
            metadata = _read_metadata(folder)
        if not force:
            check_fields(folder, metadata.get("fields", {}), fields, force)
        check_shapes(folder, items_shape)
    except DamagedError:
        return None
    return int(folder.name)


def check_shapes(path: epath.Path, items_shape: Items) -> None:
    """Compares the arrays of a checkpoint with those of a run.

    Raises: MismatchError naming the first array whose shapes differ, or
      that one of them does not have.
    """
    # Orbax compares too, but its message names neither the array nor what to do.
    for item in ARRAY_ITEMS:
        with reading(path):
            saved = shapes_of(path / item)
        leaves = flatten(items_shape[item])
        wanted = {name: tuple(leaf.shape) for name, leaf in leaves.items()}

        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) == wanted.get(name):
                continue
            owner = "optimizer" if item == "opt_state" else "model"
            raise MismatchError(
                f"checkpoint {path} does not fit the {owner}: "
                f"{name} is {saved.get(name, 'not there')} in the checkpoint, "
                f"{wanted.get(name, 'not there')} in the {owner}; "
                f"use another directory or the {owner} of that run"
            )


# Parameters alone. ------------------------------------------------------------


def save_params(path: epath.PathLike, params: Any, metadata: dict) -> None:
    """Writes a parameter checkpoint.

    Args:
      path: a new or empty folder.
      metadata: JSON values (model fields, origin).
    Raises: ValueError when the folder has files; OSError naming it when it
      cannot be written.
    """
    path = orbax_path(path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} already holds files; a checkpoint needs a new or empty folder")
    metadata = metadata | {"metadata_checksum": checksum(metadata)}
    # Orbax copies what it writes. With more than 1 GB of it at once, a
    # port would need the memory of two trees.
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.StandardCheckpointHandler(save_concurrent_gb=1),
        metadata=ocp.JsonCheckpointHandler(),
    )
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        metadata=ocp.args.JsonSave(metadata),
    )
    try:
        with (
            storage.naming_file(path),
            _quiet(),
            ocp.Checkpointer(handler) as checkpointer,
        ):
            checkpointer.save(path, args, force=True)
    except OSError:
        if jax.process_index() == 0:
            # The half that was written, on a disk that may be full.
            path.with_name(f"{path.name}{TEMPORARY}").rmtree(missing_ok=True)
        raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's threads from logging the tracebacks of an error that it raises anyway."""
    logger = logging.get_absl_logger()
    before = logger.level
    logger.setLevel("CRITICAL")
    try:
        yield
    finally:
        logger.setLevel(before)


def is_checkpoint(path: epath.PathLike) -> bool:
    """Whether `path` is a checkpoint of either kind, or a workdir with some."""
    return _find(epath.Path(path)) is not None


def _find(path: epath.Path) -> epath.Path | None:
    """The folder with `params`: the newest step of a run, or `path` itself."""
    for folder in (path / "checkpoints", path):
        steps = [entry for entry in _entries(folder) if _is_whole_step(entry)]
        if steps:
            return max(steps, key=lambda step: int(step.name))
    return path if (path / "params").is_dir() else None


def _entries(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_whole_step(path: epath.Path) -> bool:
    if not re.fullmatch("[0-9]+", path.name) or not (path / "params").is_dir():
        return False
    # On an object store, an unfinished checkpoint already has its name.
    return ocp.utils.is_checkpoint_finalized(path)


@dataclasses.dataclass(frozen=True)
class SavedParams:
    """The parameters of a checkpoint, which are not read yet.

    Attributes:
      folder: the checkpoint.
      item: the saved item, "ema_params" or "params".
      shapes: the tree, of ShapeDtypeStruct.
      metadata: of the checkpoint; {}: there is none.
    """

    folder: epath.Path
    item: str
    shapes: Any
    metadata: dict[str, Any]

    def read(self, shardings: Any = None) -> Any:
        """The arrays, compared with the fingerprint that was saved with them.

        Args: shardings: a tree of shardings like the parameters, or None for
          host memory (NumPy).
        Raises: ValueError when they cannot be read or are not what was saved.
        """

        def target_of(leaf: Any, sharding: Any = None) -> Any:
            if sharding is None:
                return np.empty(leaf.shape, leaf.dtype)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        trees = (self.shapes,) if shardings is None else (self.shapes, shardings)
        args = {self.item: ocp.args.StandardRestore(jax.tree.map(target_of, *trees))}
        with refusing(self.folder):
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                params = checkpointer.restore(self.folder, ocp.args.Composite(**args))[self.item]

            expected = self.metadata.get("fingerprints", {}).get(self.item)
            if expected is None:
                return params
            if shardings is None:
                found = host_fingerprint(params)
            else:
                found = fingerprints({self.item: params})[self.item]
            if found != expected:
                raise DamagedError(f"{self.item} is not what was saved")
            return params


def open_params(path: epath.PathLike, *, ema: bool = True) -> SavedParams:
    """Finds the parameters of a checkpoint; reads their shapes and the metadata.

    Args:
      path: a parameter checkpoint, a training checkpoint, or a workdir,
        which stands for its newest checkpoint.
      ema: the EMA parameters where a training checkpoint has both.
    Raises: FileNotFoundError when there is no checkpoint at `path`,
      ValueError when it cannot be read.
    """
    folder = _find(orbax_path(path))
    if folder is None:
        raise FileNotFoundError(f"{path} holds no Orbax checkpoint (a folder with `params`)")
    of_training = ("opt_state", "ema_params")
    trained = any((folder / name).is_dir() for name in of_training)
    item = "ema_params" if ema and trained else "params"
    with refusing(folder):
        metadata = _read_metadata(folder)
        tree = _saved_tree(folder / item)
        # A folder may come from a stranger, and Orbax believes what it says.
        _check_claims(folder / item, tree)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
        return SavedParams(folder, item, shapes, metadata)


def _read_metadata(folder: epath.Path) -> dict[str, Any]:
    """The metadata of a checkpoint, compared with the checksum in them."""
    # Checkpoints that other programs wrote have none.
    if not (folder / "metadata").is_dir():
        return {}
    metadata = _read_json_item(folder / "metadata")
    if not isinstance(metadata, dict):
        kind = type(metadata).__name__
        raise DamagedError(f"its metadata is a {kind}, not an object")

    # A flipped bit makes another model of a checkpoint as well in here.
    wanted = found = None
    if "metadata_checksum" in metadata:
        wanted = metadata.pop("metadata_checksum")
        found = checksum(metadata)
    elif "fingerprints" in metadata and "checksum" in metadata:
        wanted = metadata.pop("checksum")
        found = checksum([_read_json_item(folder / "data"), metadata])
    if wanted != found:
        raise DamagedError("data or metadata is not what was saved")

    expected = metadata.get("fingerprints", {})
    if not isinstance(expected, dict):
        raise DamagedError("its fingerprints are not an object")
    return metadata


def _read_json_item(item: epath.Path) -> Any:
    path = item / "metadata"
    _check_size(path)
    return json.loads(path.read_text("utf-8"))


def orbax_path(path: epath.PathLike) -> epath.Path:
    """The path as Orbax needs it. Raises: ValueError where it has no driver."""
    absolute = storage.absolute(path)
    local = not storage.is_object_store(absolute)
    if not local and not str(absolute).startswith("gs://"):
        raise ValueError(f"{path}: Orbax keeps checkpoints in local folders and in gs:// only")
    return absolute


def shapes_of(item: epath.PathLike) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays of one saved item, without reading them."""
    leaves = flatten(_saved_tree(item))
    return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def _saved_tree(item: epath.PathLike) -> Any:
    """The tree of one saved item; leaves have shape, dtype and chunks."""
    item = epath.Path(item)
    for path in (item / "_METADATA", item / "_sharding"):
        _check_size(path)
    for path in _entries(item / "array_metadatas"):
        _check_size(path)
    # Not ocp.Checkpointer, which looks for a commit mark that an item
    # does not have.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.metadata(item).tree


def _check_claims(item: epath.Path, tree: Any) -> None:
    """Raises: DamagedError for sizes that no weights have."""
    num_bytes = 0
    for name, leaf in flatten(tree).items():
        shape = tuple(leaf.shape)
        num_bytes += math.prod(shape) * np.dtype(leaf.dtype).itemsize
        # A chunk is unpacked as a whole, whatever the shape of its array.
        chunk = leaf.storage.chunk_shape if leaf.storage else None
        if chunk and any(c > max(n, 1) for c, n in zip(chunk, shape)):
            raise DamagedError(f"{name[:80]} has shape {shape}, but chunks of {tuple(chunk)}")
    if num_bytes > MAX_UNPACKED_BYTES:
        stored = _stored_bytes(item)
        if num_bytes > MAX_COMPRESSION * stored:
            raise DamagedError(
                f"{item.name} would unpack {stored} bytes to {num_bytes}, as no weights do"
            )


def _stored_bytes(path: epath.Path) -> int:
    if path.is_dir():
        return sum(map(_stored_bytes, path.iterdir()))
    return path.stat().length


def _check_size(path: epath.Path) -> None:
    if path.exists() and path.stat().length > MAX_JSON_BYTES:
        raise DamagedError(f"{path.name} has more than {MAX_JSON_BYTES} bytes")


# What is damage, and how it is found. -----------------------------------------


@contextlib.contextmanager
def reading(path: epath.PathLike) -> Iterator[None]:
    """Sorts the many kinds of errors that reading a checkpoint can raise.

    The block must do nothing but read the checkpoint at `path`.
    Raises: OSError where the machine or its file system failed,
      DamagedError for all others.
    """
    _drop_echoes()
    try:
        yield
    except Exception as error:
        failure = machine_failure(error)
        found = failure or error
        lines = str(found).splitlines() or [repr(found)]
        if failure:
            raise OSError(
                f"checkpoint {path} cannot be read and is left as it is: {lines[0]}"
            ) from error
        raise DamagedError(lines[0]) from error


def _drop_echoes() -> None:
    """Keeps tracebacks out of the log that only repeat an error.

    Orbax reads arrays side by side. Where one fails, it closes its event loop,
    and each of the others, which end later, prints that the loop is closed.
    """
    hook = sys.unraisablehook
    if not (isinstance(hook, functools.partial) and hook.func is _unless_echo):
        sys.unraisablehook = functools.partial(_unless_echo, hook)


def _unless_echo(hook: Callable[[Any], Any], unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


@contextlib.contextmanager
def refusing(path: epath.PathLike) -> Iterator[None]:
    """As `reading`, but damage is a ValueError that names the checkpoint."""
    try:
        with reading(path):
            yield
    except DamagedError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error


def machine_failure(error: BaseException | None) -> BaseException | None:
    """The error in the chain of causes that is about the machine.

    About the machine are memory, disk, network and permissions.
    Returns: None if there is none; then the checkpoint is at fault.
    """
    missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    while error:
        if any(text in str(error) for text in QUOTED_FAILURES):
            return error
        library = type(error).__module__.partition(".")[0]
        of_system = isinstance(error, MemoryError | OSError)
        of_system = of_system or library in STORE_LIBRARIES
        if of_system and not isinstance(error, missing):
            return error
        error = error.__cause__ or error.__context__
    return None


def set_aside(path: epath.Path) -> None:
    """Renames a damaged checkpoint, so that its step can be saved again."""
    names = itertools.chain(
        [f"{path.name}.damaged"],
        (f"{path.name}.damaged.{i}" for i in itertools.count(1)),
    )
    paths = (path.with_name(name) for name in names)
    free = next(other for other in paths if not other.exists())
    try:
        path.rename(free)
    except (FileNotFoundError, FileExistsError):
        # Another process may have been faster.
        if path.exists():
            raise


def checksum(value: Any) -> str:
    """Of a JSON value: the same before it is written and after it is read."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprints(items: Items) -> dict[str, int]:
    """A number for each tree, which every changed bit changes.

    It is the same on any mesh, and takes as long as reading the arrays
    once. Compressed chunks on a disk carry no checksum of their own: a
    flipped bit can read as another weight.
    """
    values = jax.device_get(_fingerprints(items))
    return {name: int(value) for name, value in values.items()}


def host_fingerprint(tree: Any) -> int:
    """The fingerprint of one tree of NumPy arrays, without a device."""
    total = 0
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        flat = np.ascontiguousarray(leaf).reshape(-1)
        flat = flat.view(f"uint{8 * flat.dtype.itemsize}")
        for start in range(0, flat.size, ELEMENTS_AT_ONCE):
            bits = flat[start : start + ELEMENTS_AT_ONCE].astype(np.uint32)
            places = np.arange(start, start + bits.size).astype(np.uint32)
            total += (2 * index + 1) * int(np.sum(bits * (2 * places + 1), dtype=np.uint32))
    return total % 2**32


@jax.jit
def _fingerprint_of_leaf(leaf: jax.Array) -> jax.Array:
    """Traced once for all leaves of a shape: parameters, their EMA and the optimizer's moments."""
    as_bits = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, as_bits).astype(jnp.uint32)
    # Every element has another odd weight, so that swapped blocks
    # show. Its place is a sum over the axes, for a reshape would
    # gather the shards.
    strides = np.cumprod([1, *leaf.shape[:0:-1]])[::-1]
    place = jnp.uint32(0)
    for axis in range(leaf.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        place += along * np.uint32(strides[axis] % 2**32)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


@jax.jit
def _fingerprints(items: Items) -> dict[str, jax.Array]:
    def of_tree(tree: Any) -> jax.Array:
        sums = jnp.stack([_fingerprint_of_leaf(leaf) for leaf in jax.tree.leaves(tree)])
        weights = 2 * jnp.arange(len(sums), dtype=jnp.uint32) + 1
        return jnp.sum(sums * weights, dtype=jnp.uint32)

    return {name: of_tree(tree) for name, tree in items.items()}


# Trees. -----------------------------------------------------------------------


def flatten(tree: Any) -> dict[str, Any]:
    """{"blocks/attn/q/kernel": leaf, ...}, with Orbax's names.

    Args: tree: nested dicts, sequences and named tuples.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(map(_name_of, path)): leaf for path, leaf in leaves}


def _name_of(entry: Any) -> str:
    """An entry of a tree path: a key, an index, or an attribute's name."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def parameter_count(tree: Any) -> int:
    """The number of elements of all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

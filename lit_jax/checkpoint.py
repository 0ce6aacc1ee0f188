"""Orbax checkpoints: the train state of a run, and parameters alone.

A training checkpoint is `checkpoints/STEP/` with the items params,
ema_params, opt_state, train (step and counters), data (the iterator's state,
JSON) and metadata (JSON). A parameter checkpoint is a folder of the same form
with params and metadata only. Everything that reads parameters reads both.
"""

import contextlib
import hashlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Iterator
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


class MismatchError(ValueError):
    """A checkpoint that can be read, but is of another run or another model."""


class DamagedError(Exception):
    """A checkpoint that is not, or not all of, what was saved."""


# The checkpoints of a run. ------------------------------------------------------------------------


class Checkpointer:
    """Saves and restores the train state of one run.

    It saves in the background. Args: keep: the number of the newest
    checkpoints that stay.
    keep_every: each checkpoint of a multiple of this step stays too; 0: none.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, keep_every: int):
        self.directory = orbax_path(directory)
        self._saving: int | None = None
        self._failure: Exception | None = None
        self._wait_for_others = ocp.multihost.get_barrier_sync_fn()
        # Folders are made before `save` returns: a failure to make one in the
        # background would leave Orbax waiting for 300 s.
        in_background = ocp.AsyncOptions(
            barrier_sync_fn=self._barrier, create_directories_asynchronously=False
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            async_options=in_background,
            step_name_format=ocp.path.step.standard_name_format(),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=ARRAY_ITEMS + JSON_ITEMS
        )
        # JAX's preemption service agrees on a number, and
        # preemption.Preemption gives it numbers of its own. A step among
        # them, which Orbax would give it in `save`, could delay the stop by
        # as many steps as the run has made.
        self._manager.reached_preemption = lambda step: False

    def save(self, step: int, items: dict[str, Any], *, data: dict, metadata: dict) -> None:
        """Starts saving; returns when the arrays are copied to the host.

        It first waits for an earlier save to end.
        Args:
          items: the trees of ARRAY_ITEMS.
          data: the state of the data iterator, JSON values. metadata: JSON
            values.
        Raises: OSError naming the folder when files cannot be written.
        """
        self.wait()
        self._saving = step
        jax.block_until_ready(items)
        started = time.monotonic()
        args = {name: ocp.args.StandardSave(items[name]) for name in ARRAY_ITEMS}
        metadata = metadata | {"fingerprints": fingerprints(items)}
        metadata = metadata | {"checksum": checksum([data, metadata])}
        args |= {"data": ocp.args.JsonSave(data), "metadata": ocp.args.JsonSave(metadata)}

        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except (OSError, ValueError) as error:  # TensorStore raises ValueError for files too
            self._failure = self._name_folder(error)
            raise self._failure from error
        logging.info(
            "checkpoint of step %d: the loop stood still for %.2f s, its files are written "
            "meanwhile",
            step,
            time.monotonic() - started,
        )

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def restore(
        self,
        items_shape: dict[str, Any],
        fields: dict[str, Any] | None = None,
        *,
        force: bool = False,
    ) -> tuple[int, dict[str, Any], dict, dict] | None:
        """Restores the newest readable checkpoint onto the shardings of `items_shape`.

        A damaged checkpoint (unreadable, or not what was saved) is named in
        the log, renamed to `STEP.damaged` and skipped. Where there are
        several processes, perhaps only one has seen the damage; the run then
        stops after the renaming. An error of the file system says nothing
        about the checkpoint: it stops the run and leaves everything where it
        is.

        Args:
          items_shape: {item: a tree of ShapeDtypeStruct with shardings}.
          fields: config fields that must be as they were, compared with
            metadata["fields"].
          force: only warn when they are not.
        Returns: step, the item trees, the data iterator's state, the
          metadata; None if there is no checkpoint.
        Raises:
          ValueError: checkpoints are or were there, but none can be read; or
            the newest is of another run, with other fields or other
            parameters.
          TryAgainError: one of several processes meets a damaged checkpoint.
          OSError: the newest cannot be read for another reason than damage.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._restore_step(step, items_shape, fields or {}, force)
            except DamagedError as error:
                path = self.directory / str(step)
                logging.warning("checkpoint %s is damaged and skipped: %s", path, error)
                self._set_aside(step)
                if jax.process_count() > 1:
                    raise TryAgainError(
                        f"checkpoint {path} is damaged and set aside; run the same command again "
                        f"to go on from the one before"
                    ) from error
                self._manager.reload()

        # Those that an earlier start has renamed count too: a run that has
        # made steps never begins again by itself.
        aside = sorted(path.name for path in self.directory.glob("*.damaged*"))
        if aside:
            raise ValueError(
                f"no checkpoint in {self.directory} can be read; set aside: {', '.join(aside)}. "
                f"Mend and rename one of them, or begin again with another --workdir"
            )
        return None

    def _restore_step(
        self, step: int, items_shape: dict[str, Any], fields: dict[str, Any], force: bool
    ) -> tuple[int, dict[str, Any], dict, dict]:
        data, metadata = self._read_json(step)
        self._check_fields(step, metadata.get("fields", {}), fields, force)
        self._check_shapes(step, items_shape)

        args = {name: ocp.args.StandardRestore(items_shape[name]) for name in ARRAY_ITEMS}
        with reading(self.directory / str(step)):
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        items = {name: restored[name] for name in ARRAY_ITEMS}
        for name, fingerprint in fingerprints(items).items():
            if fingerprint != metadata["fingerprints"][name]:
                raise DamagedError(f"{name} is not what was saved")
        return step, items, data, metadata

    def _read_json(self, step: int) -> tuple[dict, dict]:
        """The data iterator's state and the metadata, as they were saved."""
        path = self.directory / str(step)
        with reading(path):
            args = {name: ocp.args.JsonRestore() for name in JSON_ITEMS}
            saved = self._manager.restore(step, args=ocp.args.Composite(**args))
            data, metadata = (saved[name] for name in JSON_ITEMS)
            expected = metadata.pop("checksum", None)

        if expected is None and "fingerprints" in metadata:
            logging.warning(
                "checkpoint %s has no checksum of its data state, because an older lit_jax wrote "
                "it: taken unchecked",
                path,
            )
        elif expected != checksum([data, metadata]):
            raise DamagedError("data or metadata is not what was saved")
        return data, metadata

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that the step can be saved again."""
        names = itertools.chain(
            [f"{step}.damaged"], (f"{step}.damaged.{i}" for i in itertools.count(1))
        )
        free = next(name for name in names if not (self.directory / name).exists())
        damaged = self.directory / str(step)
        try:
            damaged.rename(self.directory / free)
        except (FileNotFoundError, FileExistsError):
            if damaged.exists():  # otherwise another process was faster
                raise

    def _check_fields(
        self, step: int, saved: dict[str, Any], wanted: dict[str, Any], force: bool
    ) -> None:
        # Tuples come out of a file as lists.
        wanted = json.loads(json.dumps(wanted))
        changed = [
            f"{name} was {saved[name]} and is now {wanted[name]}"
            for name in sorted(saved.keys() & wanted.keys())
            if saved[name] != wanted[name]
        ]
        if not changed:
            return
        if not force:
            raise MismatchError(
                f"checkpoint {self.directory / str(step)} is of another run: "
                f"{'; '.join(changed)}. Use another --workdir, or go on all the same with "
                f"--config.checkpoint.force_config=True"
            )
        logging.warning("going on from step %d with another config: %s", step, "; ".join(changed))

    def _check_shapes(self, step: int, items_shape: dict[str, Any]) -> None:
        path = self.directory / str(step)
        for item in ARRAY_ITEMS:
            with reading(path):
                saved = shapes_of(path / item)
            wanted = {name: tuple(leaf.shape) for name, leaf in flatten(items_shape[item]).items()}
            for name in sorted(saved.keys() | wanted.keys()):
                if saved.get(name) == wanted.get(name):
                    continue
                owner = "optimizer" if item == "opt_state" else "model"
                raise MismatchError(
                    f"checkpoint {path} does not fit the {owner}: "
                    f"{name} is {saved.get(name, 'not there')} in the checkpoint, "
                    f"{wanted.get(name, 'not there')} in the {owner}; "
                    f"use another --workdir or the config of that run"
                )

    def check(self) -> None:
        """Raises the error of the save in the background, if there is one; returns at once."""
        if self._failure:
            raise self._failure

    def wait(self) -> None:
        """Returns when the last save is written.

        Raises: OSError as soon as it has failed, as `save` does.
        """
        # Orbax's own wait reports a failure only after all other processes
        # have come to its barrier, which they may never do.
        while self._manager.is_saving_in_progress():
            self.check()
            time.sleep(0.01)
        self.check()
        self._manager.wait_until_finished()

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's wait for the other processes, in its thread or in ours."""
        # A thread of Orbax that comes here while it handles an exception has
        # failed to save.
        in_background = threading.current_thread() is not threading.main_thread()
        error = sys.exception()
        if in_background and error and not self._failure:
            self._failure = self._name_folder(error)

        try:
            self._wait_for_others(key=key, timeout_ms=timeout_ms)
        except jax.errors.JaxRuntimeError as lost:  # another process is gone
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


# Parameters alone. --------------------------------------------------------------------------------


def save_params(path: epath.PathLike, params: Any, metadata: dict) -> None:
    """Writes a parameter checkpoint.

    Args: path: a new or empty folder. metadata: JSON values (model fields,
      origin).
    Raises: ValueError when the folder has files.
    """
    path = orbax_path(path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} already holds files; a checkpoint needs a new or empty folder")
    # Orbax copies what it writes. With more than 1 GB of it at once, a port
    # would need the memory of two trees.
    handlers = {
        "params": ocp.StandardCheckpointHandler(save_concurrent_gb=1),
        "metadata": ocp.JsonCheckpointHandler(),
    }
    args = ocp.args.Composite(
        params=ocp.args.StandardSave(params), metadata=ocp.args.JsonSave(metadata)
    )
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(path, args, force=True)


def is_checkpoint(path: epath.PathLike) -> bool:
    """Whether `path` is a parameter checkpoint, a training checkpoint, or a workdir with some."""
    return _find(epath.Path(path)) is not None


def _find(path: epath.Path) -> epath.Path | None:
    """The folder that holds `params`: the newest step of a run, or `path` itself."""
    for folder in (path / "checkpoints", path):
        steps = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
        # On an object store, an unfinished checkpoint already has its name.
        steps = [
            p for p in steps if (p / "params").is_dir() and ocp.utils.is_checkpoint_finalized(p)
        ]
        if steps:
            return max(steps, key=lambda p: int(p.name))
    return path if (path / "params").is_dir() else None


def restore_params(
    path: epath.PathLike, shardings: Any = None, *, ema: bool = True
) -> tuple[Any, dict]:
    """Reads the parameters of a parameter checkpoint, or of the newest one of a run, no more.

    Args:
      path: a parameter checkpoint, a training checkpoint or a workdir.
      shardings: tree of shardings like the parameters, or None for host
        memory (NumPy).
      ema: the EMA parameters where a training checkpoint has both.
    Returns: params and the metadata dict; in it "weights" says what was read,
      "ema_params" or "params".
    Raises: FileNotFoundError when there is no checkpoint at `path`,
      ValueError when it cannot be read.
    """
    folder = _find(orbax_path(path))
    if folder is None:
        raise FileNotFoundError(f"{path} holds no Orbax checkpoint (a folder with `params`)")
    trained = (folder / "opt_state").is_dir() or (folder / "ema_params").is_dir()
    item = "ema_params" if ema and trained else "params"

    def target_of(leaf: Any, sharding: Any = None) -> Any:
        if sharding is None:
            return np.empty(leaf.shape, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    try:
        tree = _saved_tree(folder / item)
        trees = (tree,) if shardings is None else (tree, shardings)
        args = {item: ocp.args.StandardRestore(jax.tree.map(target_of, *trees))}
        if (folder / "metadata").is_dir():
            args["metadata"] = ocp.args.JsonRestore()
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder, ocp.args.Composite(**args))
        metadata = restored.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise TypeError(f"its metadata is a {type(metadata).__name__}, not an object")
    except Exception as error:  # Orbax and TensorStore raise many kinds
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"checkpoint {folder} cannot be read: {reason}") from error
    return restored[item], metadata | {"weights": item, "path": str(folder)}


def orbax_path(path: epath.PathLike) -> epath.Path:
    """The path as Orbax needs it. Raises: ValueError where Orbax has no driver."""
    absolute = storage.absolute(path)
    if storage.is_object_store(absolute) and not str(absolute).startswith("gs://"):
        raise ValueError(f"{path}: Orbax keeps checkpoints in local folders and in gs:// only")
    return absolute


def shapes_of(item: epath.PathLike) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays of one saved item, without reading them."""
    return {name: tuple(leaf.shape) for name, leaf in flatten(_saved_tree(item)).items()}


def _saved_tree(item: epath.PathLike) -> Any:
    """The tree of one saved item; leaves have shape and dtype."""
    # Not ocp.Checkpointer, which looks for a commit mark that an item does
    # not have.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.metadata(epath.Path(item)).tree


# What is damage, and how it is found. -------------------------------------------------------------


@contextlib.contextmanager
def reading(path: epath.PathLike) -> Iterator[None]:
    """Sorts the many kinds of errors that reading the checkpoint at `path` can raise.

    The block must do nothing else.
    Raises: OSError where the machine or its file system failed, DamagedError
      for all others.
    """
    try:
        yield
    except Exception as error:
        failure = machine_failure(error)
        reason = (str(failure or error).splitlines() or [repr(failure or error)])[0]
        if failure:
            raise OSError(
                f"checkpoint {path} cannot be read and is left as it is: {reason}"
            ) from error
        raise DamagedError(reason) from error


def machine_failure(error: BaseException | None) -> BaseException | None:
    """The error in the chain of causes that is about the machine; None: the checkpoint is at fault.

    About the machine are memory, disk, network and permissions.
    """
    while error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        of_system = isinstance(error, MemoryError | OSError) and not missing
        # TensorStore raises ValueError for everything and quotes what the
        # system or XLA said.
        quoted = any(sign in str(error) for sign in ("os_error_code", "RESOURCE_EXHAUSTED"))
        if of_system or quoted:
            return error
        error = error.__cause__ or error.__context__
    return None


def checksum(value: Any) -> str:
    """The checksum of a JSON value: the same before it is written and after it is read."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprints(items: dict[str, Any]) -> dict[str, int]:
    """A number for each tree, which every changed bit changes.

    It is the same on any mesh, and takes as long as reading the arrays once.
    Compressed chunks on a disk carry no checksum of their own: a flipped bit
    can read as another weight.
    """
    return {name: int(value) for name, value in jax.device_get(_fingerprints(items)).items()}


@jax.jit
def _fingerprints(items: dict[str, Any]) -> dict[str, jax.Array]:
    def of_leaf(leaf: jax.Array) -> jax.Array:
        bits_dtype = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, bits_dtype).astype(jnp.uint32)
        # Every element has another odd weight, so that swapped blocks show.
        # The place is a sum over the axes, for a reshape would gather the
        # shards.
        strides = np.cumprod([1, *leaf.shape[:0:-1]])[::-1][: leaf.ndim].tolist()
        place = [
            jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride % 2**32)
            for axis, stride in enumerate(strides)
        ]
        weights = 2 * sum(place, jnp.uint32(0)) + 1
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    def of_tree(tree: Any) -> jax.Array:
        sums = jnp.stack([of_leaf(leaf) for leaf in jax.tree.leaves(tree)])
        weights = 2 * jnp.arange(len(sums), dtype=jnp.uint32) + 1
        return jnp.sum(sums * weights, dtype=jnp.uint32)

    return {name: of_tree(tree) for name, tree in items.items()}


# Trees. -------------------------------------------------------------------------------------------


def flatten(tree: Any) -> dict[str, Any]:
    """{"blocks/attn/q/kernel": leaf, ...} of nested dicts, sequences and named tuples.

    The names are Orbax's.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_name_of(key) for key in path): leaf for path, leaf in leaves}


def _name_of(key: Any) -> str:
    """One entry of a tree path: a dict's key, a sequence's index, an attribute's name."""
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def parameter_count(tree: Any) -> int:
    """The number of elements of all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

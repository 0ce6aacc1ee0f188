"""Orbax checkpoints: the train state of a run, and parameters alone.

A training checkpoint is `checkpoints/STEP/` with the items params, ema_params, opt_state, train (step and counters), data
(the iterator's state, JSON) and metadata (JSON). A parameter checkpoint is a folder of the same form with params and
metadata only, so everything that reads parameters reads both.
"""

import contextlib
import hashlib
import itertools
import json
import pathlib
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

from lit_jax.runtime.exit_status import TryAgainError

ARRAY_ITEMS = ("params", "ema_params", "opt_state", "train")
JSON_ITEMS = ("data", "metadata")


class Checkpointer:
    """Saves and restores the train state of one run, asynchronously, keeping the newest and every so many steps."""

    def __init__(self, directory: pathlib.Path, *, keep: int, keep_every: int):
        self.directory = pathlib.Path(directory).absolute()
        self._saving, self._failure = None, None
        self._wait_for_others = ocp.multihost.get_barrier_sync_fn()
        # Folders are made before `save` returns: in the background a failure to make one leaves Orbax waiting for 300 s.
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
        # Only distributed.Preemption asks JAX's service whether to stop, with a count of its own: a step among its answers,
        # as Orbax would ask in `save`, could put the stop off by as many steps as the run has gone.
        self._manager.reached_preemption = lambda step: False

    def save(self, step: int, items: dict[str, Any], *, data: dict, metadata: dict) -> None:
        """Starts saving {"params", "ema_params", "opt_state", "train"} trees; returns once they are copied to the host.

        Before it begins it waits for an earlier save to end. Raises: OSError naming the folder when files cannot be written.
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
        except (OSError, ValueError) as error:  # TensorStore's errors of files are ValueErrors
            self._failure = self._named(error)
            raise self._failure from error
        logging.info(
            "checkpoint of step %d: the loop stood still for %.2f s, its files are written meanwhile",
            step,
            time.monotonic() - started,
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(
        self,
        items_shape: dict[str, Any],
        fields: dict[str, Any] | None = None,
        *,
        force: bool = False,
    ) -> tuple[int, dict[str, Any], dict, dict] | None:
        """Restores the newest readable checkpoint onto the shardings of `items_shape`; None if there is none.

        A damaged checkpoint (unreadable, or not what was saved) is named in the log, set aside as `STEP.damaged` and
        skipped. Of several processes only one may have seen the damage, so then the run stops after setting it aside.
        A file system that fails tells nothing of the checkpoint: that stops the run and leaves everything where it is.

        Args:
          fields: config fields that must be as they were, compared with metadata["fields"]; force: only warn of them.
        Returns: step, the item trees, the data iterator's state, the metadata.
        Raises: ValueError when checkpoints are or were there but none can be read, or the newest is of another run: other
        fields or other parameters than asked for. TryAgainError when one of several processes meets a damaged checkpoint.
        OSError when the newest cannot be read for another reason than damage.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                data, metadata = self._read_json(step)
                self._check_fields(step, metadata.get("fields", {}), fields or {}, force)
                self._check_shapes(step, items_shape)
                args = {name: ocp.args.StandardRestore(items_shape[name]) for name in ARRAY_ITEMS}
                with reading(self.directory / str(step)):
                    restored = self._manager.restore(step, args=ocp.args.Composite(**args))
                items = {name: restored[name] for name in ARRAY_ITEMS}
                for name, fingerprint in fingerprints(items).items():
                    if fingerprint != metadata["fingerprints"][name]:
                        raise DamagedError(f"{name} is not what was saved")
                return step, items, data, metadata
            except DamagedError as error:
                logging.warning(
                    "checkpoint %s is damaged and skipped: %s", self.directory / str(step), error
                )
                self._set_aside(step)
                if jax.process_count() > 1:
                    raise TryAgainError(
                        f"checkpoint {self.directory / str(step)} is damaged and set aside; run the same "
                        f"command again to go on from the one before"
                    ) from error
                self._manager.reload()
        # Those that an earlier start has set aside count too: a run that has been is never begun again by itself.
        aside = sorted(path.name for path in self.directory.glob("*.damaged*"))
        if aside:
            raise ValueError(
                f"no checkpoint in {self.directory} can be read; set aside: {', '.join(aside)}. Mend and rename "
                f"one of them, or begin again with another --workdir"
            )
        return None

    def _read_json(self, step: int) -> tuple[dict, dict]:
        """The data iterator's state and the metadata, as they were saved."""
        with reading(self.directory / str(step)):
            args = {name: ocp.args.JsonRestore() for name in JSON_ITEMS}
            saved = self._manager.restore(step, args=ocp.args.Composite(**args))
            data, metadata = (saved[name] for name in JSON_ITEMS)
            expected = metadata.pop("checksum", None)
        if expected is None and "fingerprints" in metadata:
            logging.warning(
                "checkpoint %s has no checksum of its data state, as those of an older lit_jax: taken unchecked",
                self.directory / str(step),
            )
        elif expected != checksum([data, metadata]):
            raise DamagedError("data or metadata is not what was saved")
        return data, metadata

    def _set_aside(self, step: int) -> None:
        names = itertools.chain(
            [f"{step}.damaged"], (f"{step}.damaged.{i}" for i in itertools.count(1))
        )
        free = next(name for name in names if not (self.directory / name).exists())
        try:
            (self.directory / str(step)).rename(self.directory / free)
        except FileNotFoundError:
            pass  # another process was faster

    def _check_fields(
        self, step: int, saved: dict[str, Any], wanted: dict[str, Any], force: bool
    ) -> None:
        wanted = json.loads(json.dumps(wanted))  # as they come out of a file
        changed = [
            f"{name} was {saved[name]} and is now {wanted[name]}"
            for name in sorted(saved.keys() & wanted.keys())
            if saved[name] != wanted[name]
        ]
        if not changed:
            return
        if not force:
            raise MismatchError(
                f"checkpoint {self.directory / str(step)} is of another run: {'; '.join(changed)}. Use "
                f"another --workdir, or go on all the same with --config.checkpoint.force_config=True"
            )
        logging.warning("going on from step %d with another config: %s", step, "; ".join(changed))

    def _check_shapes(self, step: int, items_shape: dict[str, Any]) -> None:
        for item in ARRAY_ITEMS:
            with reading(self.directory / str(step)):
                saved = shapes_of(self.directory / str(step) / item)
            wanted = {name: tuple(leaf.shape) for name, leaf in flatten(items_shape[item]).items()}
            for name in sorted(saved.keys() | wanted.keys()):
                if saved.get(name) != wanted.get(name):
                    owner = "optimizer" if item == "opt_state" else "model"
                    raise MismatchError(
                        f"checkpoint {self.directory / str(step)} does not fit the {owner}: {name} is "
                        f"{saved.get(name, 'not there')} in the checkpoint, "
                        f"{wanted.get(name, 'not there')} in the {owner}; use another --workdir or the "
                        f"config of that run"
                    )

    def check(self) -> None:
        """Raises what the save in the background has failed with, if it has; returns at once."""
        if self._failure:
            raise self._failure

    def wait(self) -> None:
        """Returns when the last save is written. Raises: OSError as soon as it has failed, as `save`."""
        # Not left to Orbax: where a save has failed, it tells only after all other processes have come to its barrier.
        while self._manager.is_saving_in_progress():
            self.check()
            time.sleep(0.01)
        self.check()
        self._manager.wait_until_finished()

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's wait for the other processes; where its own thread comes here with an exception, a save has failed."""
        if threading.current_thread() is not threading.main_thread() and (error := sys.exception()):
            self._failure = self._failure or self._named(error)
        try:
            self._wait_for_others(key=key, timeout_ms=timeout_ms)
        except jax.errors.JaxRuntimeError as error:  # one of them is gone
            self._failure = self._failure or error
            raise

    def _named(self, error: BaseException) -> OSError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return OSError(
            f"the checkpoint of step {self._saving} in {self.directory} cannot be written: {reason}"
        )

    def close(self) -> None:
        self._manager.close()


class MismatchError(ValueError):
    """A readable checkpoint of another model."""


class DamagedError(Exception):
    """A checkpoint that is not, or not all, what was saved."""


@contextlib.contextmanager
def reading(path: pathlib.Path) -> Iterator[None]:
    """Around nothing but the reading of the checkpoint at `path`: sorts the many kinds of errors that this can raise.

    Raises: OSError where the machine or its file system failed, DamagedError for everything else.
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
    """What in the chain of causes speaks of the machine (memory, disk, network, permission); None: of the checkpoint."""
    while error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        # TensorStore raises ValueError for everything and quotes what the system or XLA said.
        if (
            isinstance(error, MemoryError | OSError)
            and not missing
            or any(sign in str(error) for sign in ("os_error_code", "RESOURCE_EXHAUSTED"))
        ):
            return error
        error = error.__cause__ or error.__context__
    return None


def checksum(value: Any) -> str:
    """Of a JSON value: the same before it is written and after it is read."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@jax.jit
def _fingerprints(items: dict[str, Any]) -> dict[str, jax.Array]:
    def of_leaf(leaf):
        bits = jax.lax.bitcast_convert_type(
            leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        ).astype(jnp.uint32)
        # Every element weighs another odd number, so that swapped blocks show; no reshape, which would gather shards.
        stride = np.cumprod([1, *leaf.shape[:0:-1]])[::-1] if leaf.ndim else []
        place = [
            jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(s % 2**32)
            for axis, s in enumerate(stride)
        ]
        return jnp.sum(bits * (2 * sum(place, jnp.uint32(0)) + 1), dtype=jnp.uint32)

    def of_tree(tree):
        sums = jnp.stack([of_leaf(leaf) for leaf in jax.tree.leaves(tree)])
        return jnp.sum(sums * (2 * jnp.arange(len(sums), dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return {name: of_tree(tree) for name, tree in items.items()}


def fingerprints(items: dict[str, Any]) -> dict[str, int]:
    """A number for each tree that another bit anywhere changes; the same on any mesh, and as quick as one read of it.

    Compressed chunks on a disk carry no checksum of their own: a flipped byte can read as another weight.
    """
    return {name: int(value) for name, value in jax.device_get(_fingerprints(items)).items()}


def flatten(tree: Any) -> dict[str, Any]:
    """{"blocks/attn/q/kernel": leaf, ...} of nested dicts, sequences and named tuples, as Orbax names them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join(
            str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
        ): leaf
        for path, leaf in leaves
    }


def shapes_of(item: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the arrays of one saved item, without reading them."""
    return {name: tuple(leaf.shape) for name, leaf in flatten(_saved_tree(item)).items()}


def _saved_tree(item: pathlib.Path) -> Any:
    """The tree of one saved item; leaves have shape and dtype."""
    with contextlib.closing(
        ocp.StandardCheckpointHandler()
    ) as handler:  # a Checkpointer would miss the item's own commit mark
        return handler.metadata(item).tree


def save_params(path: str | pathlib.Path, params: Any, metadata: dict) -> None:
    """Writes a parameter checkpoint: params and a JSON-able metadata dict (model fields, origin). `path` must be new."""
    path = pathlib.Path(path).absolute()
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} already holds files; a checkpoint needs a new or empty folder")
    # Orbax copies what it writes; no more than 1 GB of it at once, or a port would hold two trees.
    handlers = {
        "params": ocp.StandardCheckpointHandler(save_concurrent_gb=1),
        "metadata": ocp.JsonCheckpointHandler(),
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(
            path,
            ocp.args.Composite(
                params=ocp.args.StandardSave(params), metadata=ocp.args.JsonSave(metadata)
            ),
            force=True,
        )


def is_checkpoint(path: str | pathlib.Path) -> bool:
    """Whether `path` is a parameter checkpoint, a training checkpoint, or a workdir that holds some."""
    return _find(pathlib.Path(path)) is not None


def _find(path: pathlib.Path) -> pathlib.Path | None:
    for folder in (path / "checkpoints", path):
        steps = (
            [p for p in folder.glob("*") if p.name.isdigit() and (p / "params").is_dir()]
            if folder.is_dir()
            else []
        )
        if steps:
            return max(steps, key=lambda p: int(p.name))
    return path if (path / "params").is_dir() else None


def restore_params(
    path: str | pathlib.Path, shardings: Any = None, *, ema: bool = True
) -> tuple[Any, dict]:
    """Reads the parameters of a parameter checkpoint, a training checkpoint or a workdir (its newest), nothing else.

    Args:
      shardings: tree of shardings like the parameters, or None for host memory (NumPy).
      ema: the EMA parameters where a training checkpoint has both.
    Returns: params and the metadata dict (with "weights": "ema_params" or "params", what was read).
    Raises: FileNotFoundError when there is no checkpoint at `path`, ValueError when it cannot be read.
    """
    folder = _find(pathlib.Path(path).absolute())
    if folder is None:
        raise FileNotFoundError(f"{path} holds no Orbax checkpoint (a folder with `params`)")
    trained = (folder / "opt_state").is_dir() or (folder / "ema_params").is_dir()
    item = "ema_params" if ema and trained else "params"
    try:
        tree = _saved_tree(folder / item)
        if shardings is None:
            target = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)
        else:
            target = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                tree,
                shardings,
            )
        args = {item: ocp.args.StandardRestore(target)}
        if (folder / "metadata").is_dir():
            args["metadata"] = ocp.args.JsonRestore()
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder, ocp.args.Composite(**args))
        metadata = restored.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise TypeError(f"its metadata is a {type(metadata).__name__}, not an object")
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"checkpoint {folder} cannot be read: {reason}") from error
    return restored[item], metadata | {"weights": item, "path": str(folder)}


def parameter_count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

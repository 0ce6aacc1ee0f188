"""Several processes as one run: joining them, checking that they agree, noticing that one is gone, and preemption.

A run ends with one of these exit statuses, which is all that a launcher has to know:

    0    done
    1    it cannot be run like this (bad input, or processes that do not agree): do not try again
    75   stopped from outside, by SIGTERM or because another process is gone: run the same command again to go on
"""
import contextlib
import faulthandler
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
SHUTDOWN_SECONDS = 86_400  # processes with nothing left to do wait this long at the end for one that writes a report


class TryAgainError(Exception):
    """The run stopped in good order, and the same command continues it."""


def find_cluster(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize that the environment implies; None: this process is alone.

    In this order: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (any cluster; a Kubernetes Job's
    JOB_COMPLETION_INDEX stands in for the latter), a Slurm step of several tasks, a TPU.
    Raises: ValueError when only a part of the first group is set.
    """
    if environ.get("JAX_COORDINATOR_ADDRESS"):
        count, index = environ.get("JAX_NUM_PROCESSES"), environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
        if not count or not index:
            missing = "JAX_PROCESS_ID" if count else "JAX_NUM_PROCESSES"
            raise ValueError(f"JAX_COORDINATOR_ADDRESS = {environ['JAX_COORDINATOR_ADDRESS']} is set, but not {missing}")
        return dict(coordinator_address=environ["JAX_COORDINATOR_ADDRESS"], num_processes=int(count), process_id=int(index),
                    cluster_detection_method="deactivate")
    if int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ:
        return dict(cluster_detection_method="slurm")
    if environ.get("JAX_PLATFORMS", "tpu").startswith("tpu") and tpu_attached():
        return {}  # from the TPU VM's metadata, or from what GKE sets: JAX reads both
    return None


def tpu_attached() -> bool:
    return any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))


def initialize(*, timeout: int, heartbeat: int) -> None:
    """Joins the processes of the run, if there are several; call it before anything asks for devices.

    Args:
      timeout: seconds to wait for all of them. heartbeat: seconds of silence after which one counts as gone.
    Raises: TimeoutError naming the processes that did not come.
    """
    cluster = find_cluster(os.environ)
    if cluster is None:
        return
    try:
        jax.distributed.initialize(**cluster, initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat,
                                   shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except ValueError as error:
        if cluster or "coordinator_address" not in str(error):
            raise
        # A TPU of one host that no metadata describes.
    except jax.errors.JaxRuntimeError as error:
        missing = sorted({int(task) for task in re.findall(r"/task:(\d+)", str(error).split("timed out task names")[-1])})
        who = f"process {', '.join(map(str, missing))}" if missing else f"process 0 at {cluster.get('coordinator_address')}"
        raise TimeoutError(f"{who} did not join within {timeout} s (mesh.join_timeout): "
                           f"{str(error).splitlines()[0][:200]}") from error


def _runtime() -> Any:
    """JAX's distributed runtime: num_processes, and a client whose key-value store has timeouts, unlike a collective."""
    from jax._src import distributed  # no public module offers it

    return distributed.global_state


def check_agreement(fields: dict[str, Any], *, timeout: float) -> None:
    """Compares `fields` (JSON values, nested) over all processes; a collective would hang instead of telling who differs.

    Raises: ValueError, on every process, naming the processes that differ from process 0 or did not answer in `timeout` s.
    """
    if jax.process_count() == 1:
        return
    fields = flatten_dict(fields | {"host": socket.gethostname()}, sep=".")
    index, store = jax.process_index(), _runtime().client
    if index:
        store.key_value_set(f"lit_jax/fields/{index}", json.dumps(fields))
        try:
            verdict = json.loads(store.blocking_key_value_get("lit_jax/verdict", int(1000 * (timeout + 10))))
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process 0 did not answer within {timeout + 10:.0f} s (mesh.join_timeout)") from error
    else:
        ours, verdict, deadline = json.loads(json.dumps(fields)), [], time.monotonic() + timeout
        for other in range(1, jax.process_count()):
            left = max(0.0, deadline - time.monotonic())
            try:
                theirs = json.loads(store.blocking_key_value_get(f"lit_jax/fields/{other}", int(1000 * left) + 1))
            except jax.errors.JaxRuntimeError:
                verdict.append(f"process {other} did not answer within {timeout:.0f} s (mesh.join_timeout)")
                continue
            differing = [name for name in sorted(ours.keys() | theirs.keys())
                         if name != "host" and ours.get(name) != theirs.get(name)]
            verdict += [f"process {other} ({theirs['host']}) has {name} = {theirs.get(name)}, "
                        f"process 0 ({ours['host']}) has {ours.get(name)}" for name in differing]
        store.key_value_set("lit_jax/verdict", json.dumps(verdict))
    if verdict:
        kind = TimeoutError if any("did not answer" in line for line in verdict) else ValueError
        raise kind("; ".join(verdict[:4] + [f"and {len(verdict) - 4} more"] * (len(verdict) > 4)))


def lost_processes() -> list[int]:
    """The processes of the run that no longer answer."""
    everyone = list(range(_runtime().num_processes))
    try:
        return sorted(set(everyone) - set(_runtime().client.get_live_nodes(everyone)))
    except jax.errors.JaxRuntimeError:
        return [0]  # the one that holds the register of the others


@contextlib.contextmanager
def shared_fate() -> Iterator[None]:
    """Turns the end of a job into the exit statuses above.

    One of several processes leaves at once: a normal exit would first wait for the others, a lost one among them.
    """
    try:
        yield
    except Exception as error:
        several = _runtime().num_processes > 1
        if isinstance(error, (TryAgainError, TimeoutError)):
            status, message = EXIT_TRY_AGAIN, str(error)
        elif not several:
            raise
        elif isinstance(error, (ValueError, OSError)):
            status, message = 1, f"error: {error}"
        else:
            traceback.print_exc()
            lost = lost_processes()
            status = EXIT_TRY_AGAIN if lost else 1
            message = (f"process {', '.join(map(str, lost))} is gone, so this one stops; run the same command again to go "
                       f"on from the last checkpoint" if lost else "this process has failed; the others will stop too")
        sys.stderr.write(message + "\n")
        sys.stderr.flush()
        if several:
            os._exit(status)
        sys.exit(status)


class Preemption:
    """Tells the training loop to save and stop: on SIGTERM, and at the same step on every process.

    One process listens to the signal itself. Several use JAX's preemption service, which hears the SIGTERM (or the
    platform's maintenance notice) of any of them and agrees on a step that none has reached yet.
    """

    def __init__(self):
        self._told = False
        self._alone = jax.process_count() == 1
        if self._alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, *_) -> None:
        self._told = True

    def close(self) -> None:
        if hasattr(self, "_previous"):
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to save after `step` and stop; every process asks at every step."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)


class Watchdog:
    """A thread that prints the stacks of all threads when no step has ended for `seconds`, again after as many; 0: never."""

    def __init__(self, seconds: float):
        self._seconds, self._closed = seconds, threading.Event()
        self._last, self._step = time.monotonic(), 0
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step_ended(self, step: int) -> None:
        self._last, self._step = time.monotonic(), step

    def _watch(self) -> None:
        reported = self._last
        while not self._closed.wait(max(0.01, max(self._last, reported) + self._seconds - time.monotonic())):
            now = time.monotonic()
            if now - max(self._last, reported) >= self._seconds:
                reported = now
                logging.error("process %d: no step has ended for %.0f s (train.watchdog), the last was step %d; the stacks:",
                              jax.process_index(), now - self._last, self._step)
                faulthandler.dump_traceback(sys.__stderr__)

    def close(self) -> None:
        self._closed.set()

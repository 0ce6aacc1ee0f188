"""Several processes as one run.

Joining them, comparing their configs, and finding who is gone.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import pathlib
import queue
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from lit_jax.runtime import roll_call

# The others wait so long for process 0 to prepare something.
ZERO_FIRST_SECONDS = 600
# At the end of a job, processes with nothing left to do wait for the one that
# writes a report.
SHUTDOWN_SECONDS = 86_400


# Who belongs to the run. --------------------------------------------------------------------------


def find_cluster(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize that the environment implies.

    In this order: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
    JAX_PROCESS_ID (on any cluster; JOB_COMPLETION_INDEX of a Kubernetes Job
    can replace the latter), a Slurm step of several tasks, a TPU. JAX itself
    finds out the rest.

    Returns: the arguments; None when this process is alone.
    Raises: ValueError when the first group is incomplete or makes no sense.
    """
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        count = environ.get("JAX_NUM_PROCESSES")
        index = environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX"))
        if not count or not index:
            missing = "JAX_PROCESS_ID" if count else "JAX_NUM_PROCESSES"
            raise ValueError(f"JAX_COORDINATOR_ADDRESS = {address} is set, but not {missing}")
        place = re.fullmatch(r".+:\d+", address)
        numbers = (count + index).isdecimal() and int(index) < int(count)
        if not place or not numbers:
            raise ValueError(
                f"JAX_COORDINATOR_ADDRESS = {address} must be HOST:PORT, "
                f"and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX) = {index} "
                f"one of 0 to JAX_NUM_PROCESSES = {count} less 1"
            )
        return dict(
            coordinator_address=address,
            num_processes=int(count),
            process_id=int(index),
            cluster_detection_method="deactivate",
        )

    # In a shell of an allocation, outside a step, only the first is set.
    if int(environ.get("SLURM_NTASKS", 1)) > 1:
        if {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environ.keys():
            return dict(cluster_detection_method="slurm")

    # A job that is told to use the CPU of a TPU's host is alone.
    platforms = environ.get("JAX_PLATFORMS") or "tpu"
    if platforms.startswith("tpu") and tpu_attached():
        return {}
    return None


def tpu_attached() -> bool:
    """Whether this machine has a TPU."""
    # By the device files, for asking JAX would start it.
    devices = pathlib.Path("/dev")
    patterns = ("accel[0-9]*", "vfio/[0-9]*")
    return any(any(devices.glob(pattern)) for pattern in patterns)


def check_backend() -> None:
    """Starts JAX's devices. Raises: ValueError in one line where that fails."""
    try:
        jax.devices()
    # A backend that is not installed or finds no device: RuntimeError, or an
    # AssertionError without a word.
    except Exception as error:
        wanted = jax.config.values["jax_platforms"]
        asked = f"JAX_PLATFORMS={wanted}" if wanted else "JAX"
        reason = " ".join(str(error).split()) or "this installation of JAX has no such backend"
        raise ValueError(
            f"{asked} gives no device: {reason}. Install JAX for that device (README.md), let no "
            f"other program hold it, or set JAX_PLATFORMS=cpu"
        ) from error


# Joining them. ------------------------------------------------------------


def initialize(fields: dict[str, Any], *, timeout: float, heartbeat: int) -> None:
    """Joins the processes of the run, if there are several.

    Then it compares `fields` among them. Call it before anything asks for
    devices.

    Args:
      fields: nested JSON values, on which the processes must agree.
      timeout: seconds to wait for all processes.
      heartbeat: seconds of silence after which a process counts as gone.
    Raises: TimeoutError naming the processes that did not come, ValueError
      naming those that differ from process 0.
    """
    arguments = find_cluster(os.environ)
    if arguments is None:
        return
    roll = roll_call.find_roll(os.environ)
    if roll and roll.count == 1:
        return

    deadline = time.monotonic() + timeout
    if roll and roll.index == 0:
        wait_for_port(roll.port, deadline)
    # In a thread, for this call cannot be stopped: where a process does not
    # come, JAX aborts the others, without a name and with a status that no
    # launcher understands. So its own time limit is longer than ours.
    joining = futures.ThreadPoolExecutor(1).submit(
        jax.distributed.initialize,
        **arguments,
        initialization_timeout=2 * int(timeout) + 60,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    problem = "not all processes of the run came"
    if roll:
        present = roll_call.call_roll(roll, joining, deadline)
        problem = roll_call.describe_missing(roll, present)
    futures.wait([joining], deadline - time.monotonic())
    if not joining.done():
        limit = f"within {timeout:.0f} s (mesh.join_timeout)"
        raise TimeoutError(f"{problem} {limit}")

    try:
        joining.result()
    except ValueError as error:
        if arguments or roll:
            raise
        # This machine has a TPU, but JAX finds none of its clusters: in a
        # container of a TPU VM, for one.
        logging.info("this process is alone: %s", error)
        return
    with _stacks_after(timeout):
        check_agreement(fields)


def wait_for_port(port: int, deadline: float) -> None:
    """Returns when no other program listens at the TCP port.

    JAX would not wait, and would even share the port with the service of an
    earlier run that is about to end.
    Args: deadline: of time.monotonic().
    Raises: TimeoutError when the port is still in use at the deadline.
    """
    while True:
        try:
            socket.create_server(("", port)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"port {port} of {socket.gethostname()}, where the "
                    f"processes should meet, cannot be used "
                    f"(mesh.join_timeout): {error.strerror}"
                ) from error
        time.sleep(0.2)


@contextlib.contextmanager
def _stacks_after(seconds: float) -> Iterator[None]:
    """Prints the stacks of all threads when the block does not end."""
    # It asks for the devices, and the watchdog of training is not there yet.
    faulthandler.dump_traceback_later(seconds, repeat=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def check_agreement(fields: dict[str, Any]) -> None:
    """Compares nested JSON values among the processes.

    Raises: ValueError on every process, naming the host, the field and both
      values, when one differs from process 0. The processes are disconnected
      then.
    """
    check_backend()
    problems = _compare_devices() or _compare_fields(fields)
    if problems:
        leave_together()
        if len(problems) > 4:
            problems[4:] = [f"and {len(problems) - 4} more"]
        raise ValueError("; ".join(problems))


def _compare_devices() -> list[str]:
    """JAX's collectives among processes need as many devices in each."""
    counts = Counter(device.process_index for device in jax.devices())
    return [
        f"process {i} has {counts[i]} devices, process 0 has {counts[0]} "
        f"(mesh.cpu_devices, or the chips of the host)"
        for i in sorted(counts)
        if counts[i] != counts[0]
    ]


def _compare_fields(fields: dict[str, Any]) -> list[str]:
    flat = json.dumps(flatten_dict(fields, sep="."), sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(flat.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)  # (processes, 32)
    if (digests == digests[0]).all():
        return []

    # Only now the values themselves, as JSON of one length.
    ours = {"host": socket.gethostname(), "fields": json.loads(flat)}
    text = json.dumps(ours).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.frombuffer(text.ljust(lengths.max()), np.uint8)
    texts = multihost_utils.process_allgather(padded)  # (processes, length)
    hosts_and_fields = [json.loads(row.tobytes()) for row in texts]

    problems = []
    host = hosts_and_fields[0]["host"]
    expected = hosts_and_fields[0]["fields"]
    for i, other in enumerate(hosts_and_fields):
        fields = other["fields"]
        for name in sorted(expected.keys() | fields.keys()):
            if fields.get(name) != expected.get(name):
                problems.append(
                    f"process {i} ({other['host']}) has "
                    f"{name} = {fields.get(name)}, "
                    f"process 0 ({host}) has {expected.get(name)}"
                )
    return problems


# While they run. ------------------------------------------------------------


@contextlib.contextmanager
def process_zero_first(name: str) -> Iterator[None]:
    """Process 0 runs the block before the others, which find its files.

    Args: name: of the barrier at which the others wait, for
      ZERO_FIRST_SECONDS at most.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    # Orbax's barrier waits in JAX's service: a collective would time out on
    # some devices.
    wait = ocp.multihost.get_barrier_sync_fn()
    first = jax.process_index() == 0
    if not first:
        wait(key=name, timeout_ms=1000 * ZERO_FIRST_SECONDS)
    yield
    if first:
        wait(key=name, timeout_ms=1000 * ZERO_FIRST_SECONDS)


def leave_together() -> None:
    """Disconnects this process once all others call this too.

    A process that is still connected when process 0 ends is aborted by JAX.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def lost_processes(seconds: float) -> list[int]:
    """The processes of the run that no longer answer.

    Args: seconds: how long to ask; processes that are silent longer are
      taken to be at work.
    """
    answer: queue.SimpleQueue[list[int]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            # This waits until each of the others asks too, or is found dead.
            with multihost_utils.live_devices(jax.devices()) as live:
                there = {device.process_index for device in live}
                answer.put(sorted(set(range(jax.process_count())) - there))
        except jax.errors.JaxRuntimeError:
            # Its service knows who is alive.
            answer.put([0])
        except Exception:
            # There were no devices yet, or others have gone after the answer.
            answer.put([])

    threading.Thread(target=ask, daemon=True).start()
    with contextlib.suppress(queue.Empty):
        return answer.get(timeout=seconds)
    return []

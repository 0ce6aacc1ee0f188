"""Several processes as one run: joining them, checking that they agree, noticing that one is gone, and preemption.

A run ends with one of these exit statuses, which is all that a launcher has to know:

    0    done
    1    it cannot be run like this (bad input, processes that do not agree, a loss that is not finite): do not try again
    70   training had begun and something broke, a disk or a chip: run the same command again to go on (the third such end
         in a row without a checkpoint between them is 1)
    75   stopped from outside, by SIGTERM or because another process is gone: run the same command again to go on
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

ANSWER_SECONDS = 10  # how long one process waits for another's next word once they talk
ZERO_FIRST_SECONDS = 600  # how long the others wait for process 0 to prepare something
SHUTDOWN_SECONDS = 86_400  # processes with nothing left to do wait this long at the end for one that writes a report


def find_cluster(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize that the environment implies; None: this process is alone.

    In this order: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (any cluster; a Kubernetes Job's
    JOB_COMPLETION_INDEX stands in for the latter), a Slurm step of several tasks, a TPU.
    Raises: ValueError when only a part of the first group is set, or it makes no sense.
    """
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        count, index = (
            environ.get("JAX_NUM_PROCESSES"),
            environ.get("JAX_PROCESS_ID", environ.get("JOB_COMPLETION_INDEX")),
        )
        if not count or not index:
            missing = "JAX_PROCESS_ID" if count else "JAX_NUM_PROCESSES"
            raise ValueError(f"JAX_COORDINATOR_ADDRESS = {address} is set, but not {missing}")
        if (
            not re.fullmatch(r".+:\d+", address)
            or not (count + index).isdecimal()
            or int(index) >= int(count)
        ):
            raise ValueError(
                f"JAX_COORDINATOR_ADDRESS = {address} must be HOST:PORT, and JAX_PROCESS_ID (or "
                f"JOB_COMPLETION_INDEX) = {index} one of 0 to JAX_NUM_PROCESSES = {count} less 1"
            )
        return dict(
            coordinator_address=address,
            num_processes=int(count),
            process_id=int(index),
            cluster_detection_method="deactivate",
        )
    if (
        int(environ.get("SLURM_NTASKS", 1)) > 1
        and "SLURM_PROCID" in environ
        and "SLURM_STEP_NODELIST" in environ
    ):
        return dict(cluster_detection_method="slurm")
    if (environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu") and tpu_attached():
        return {}  # from the TPU VM's metadata, or from what GKE sets: JAX reads both
    return None


def tpu_attached() -> bool:
    return any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(
        pathlib.Path("/dev/vfio").glob("[0-9]*")
    )


def initialize(fields: dict[str, Any], *, timeout: float, heartbeat: int) -> None:
    """Joins the processes of the run, if there are several; call it before anything asks for devices.

    Args:
      fields: what they must agree on, JSON values, nested.
      timeout: seconds to wait for all of them. heartbeat: seconds of silence after which one counts as gone.
    Raises: TimeoutError naming the processes that did not come, ValueError naming those that differ from process 0.
    """
    cluster = find_cluster(os.environ)
    if cluster is None:
        return
    if "coordinator_address" not in cluster:
        cluster = ask_cluster(cluster.get("cluster_detection_method"), timeout)
    if (cluster["num_processes"] or 1) == 1:
        return
    # Not left to JAX: its runtime aborts the process when another does not come, without a name.
    rendezvous(
        cluster["coordinator_address"],
        cluster["num_processes"],
        cluster["process_id"],
        fields,
        timeout=timeout,
    )
    jax.distributed.initialize(
        **cluster | {"cluster_detection_method": "deactivate"},
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def ask_cluster(method: str | None, timeout: float) -> dict[str, Any]:
    """What Slurm or the TPU platform tell of the run's processes, as arguments for jax.distributed.initialize.

    Raises: TimeoutError when the name of process 0's host is not known yet after `timeout` seconds.
    """
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize itself asks

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, method, timeout
        )
    except RuntimeError as error:
        raise TimeoutError(
            f"process 0 is not to be found within {timeout:.0f} s (mesh.join_timeout): {error}"
        ) from error
    return dict(
        zip(("coordinator_address", "num_processes", "process_id", "local_device_ids"), found)
    )


def rendezvous(
    address: str, count: int, index: int, fields: dict[str, Any], *, timeout: float
) -> None:
    """Waits until all processes have come to the coordinator's address and compares `fields`; all get the same verdict.

    Process 0 listens there, before JAX's own service does. Raises: as `initialize`.
    """
    host, port = address.rsplit(":", 1)
    deadline = time.monotonic() + timeout
    message = {
        "index": index,
        "host": socket.gethostname(),
        "fields": flatten_dict(fields, sep="."),
    }
    message = json.loads(json.dumps(message))
    if index == 0:
        kind, text = _judge(int(port), count, message, timeout)
    else:
        kind, text = _ask(host, int(port), message, deadline + ANSWER_SECONDS) or (
            "missing",
            f"process 0 at {address} did not answer within {timeout + ANSWER_SECONDS:.0f} s (mesh.join_timeout)",
        )
    if text:
        raise {"missing": TimeoutError, "differs": ValueError}[kind](text)


def _judge(port: int, count: int, ours: dict[str, Any], timeout: float) -> tuple[str, str]:
    """Process 0's part: collects the messages of the others, and answers each with the verdict."""
    deadline, there = time.monotonic() + timeout, {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port, deadline))
        while len(there) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            # One that gives up, or talks about something else, does not count.
            with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(ANSWER_SECONDS)
                stream = stack.enter_context(connection.makefile("rw"))
                theirs = json.loads(stream.readline())
                there[theirs["index"]] = theirs, stream
        missing = [i for i in range(1, count) if i not in there]
        kind, lines = "missing", []
        if missing:
            lines = [
                f"process {', '.join(map(str, missing))} of {count} did not come within {timeout:.0f} s "
                f"(mesh.join_timeout)"
            ]
        else:
            kind = "differs"
            for i, (theirs, _) in sorted(there.items()):
                lines += [
                    f"process {i} ({theirs['host']}) has {name} = {theirs['fields'].get(name)}, process 0 "
                    f"({ours['host']}) has {ours['fields'].get(name)}"
                    for name in sorted(ours["fields"].keys() | theirs["fields"].keys())
                    if ours["fields"].get(name) != theirs["fields"].get(name)
                ]
        verdict = kind, "; ".join(lines[:4] + [f"and {len(lines) - 4} more"] * (len(lines) > 4))
        for _, stream in there.values():
            with contextlib.suppress(OSError):
                stream.write(json.dumps(verdict) + "\n")
                stream.flush()
        # Whoever closes first keeps the port waiting, and JAX's service wants it next.
        for _, stream in there.values():
            with contextlib.suppress(OSError):
                stream.read()
    return verdict


def _listen(port: int, deadline: float) -> socket.socket:
    """A server at the port; where another process, perhaps of the run before, still has it, as soon as it is free."""
    both = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
    while True:
        try:
            return socket.create_server(("", port), **both)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"port {port} of {socket.gethostname()}, where the processes should meet, is in use by "
                    f"another program (mesh.join_timeout)"
                ) from error
        time.sleep(0.2)


def _ask(host: str, port: int, message: dict[str, Any], deadline: float) -> tuple[str, str] | None:
    """Another process's part: tells process 0 its fields and returns the verdict; None when there is none in time."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError, ValueError):
            with (
                socket.create_connection((host, port), left) as connection,
                connection.makefile("rw") as stream,
            ):
                stream.write(json.dumps(message) + "\n")
                stream.flush()
                return tuple(json.loads(stream.readline()))
        time.sleep(0.2)
    return None


def _runtime() -> Any:
    """JAX's distributed runtime: num_processes and the client that knows who is alive."""
    from jax._src import distributed  # no public module offers it

    return distributed.global_state


@contextlib.contextmanager
def process_zero_first(name: str) -> Iterator[None]:
    """Process 0 does what is inside before the others do: for what leaves files that they shall find."""
    several = _runtime().num_processes > 1
    if several and _runtime().process_id:
        _runtime().client.wait_at_barrier(name, 1000 * ZERO_FIRST_SECONDS)
    yield
    if several and not _runtime().process_id:
        _runtime().client.wait_at_barrier(name, 1000 * ZERO_FIRST_SECONDS)


def lost_processes(seconds: float) -> list[int]:
    """The processes of the run that no longer answer; asks for `seconds`, after which all that are silent are at work."""
    everyone, lost = list(range(_runtime().num_processes)), []

    def ask():  # this waits until each of the others asks too, or is found dead
        try:
            lost.extend(sorted(set(everyone) - set(_runtime().client.get_live_nodes(everyone))))
        except jax.errors.JaxRuntimeError:
            lost.append(0)  # the one that holds the register of the others

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return lost

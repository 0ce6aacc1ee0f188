"""Several processes as one run: joining them, comparing their configs, and finding who is gone."""

import concurrent.futures
import contextlib
import dataclasses
import faulthandler
import hashlib
import json
import os
import pathlib
import re
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

ROLL_CALL_SECONDS = 0.2  # between two datagrams of the roll call
ZERO_FIRST_SECONDS = 600  # the others wait so long for process 0 to prepare something
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

        numbers = (count + index).isdecimal()
        if not re.fullmatch(r".+:\d+", address) or not numbers or int(index) >= int(count):
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

    several_tasks = int(environ.get("SLURM_NTASKS", 1)) > 1
    if several_tasks and "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ:
        return dict(cluster_detection_method="slurm")

    if (environ.get("JAX_PLATFORMS") or "tpu").startswith("tpu") and tpu_attached():
        return {}
    return None


def tpu_attached() -> bool:
    """Whether this machine has a TPU, by its device files: asking JAX would start it."""
    devices = pathlib.Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


@dataclasses.dataclass(frozen=True)
class Roll:
    """The processes that a run waits for.

    host, port: process 0 listens there. count: the number of processes.
      index: of this process.
    """

    host: str
    port: int
    count: int
    index: int


def find_roll(environ: Mapping[str, str]) -> Roll | None:
    """Who belongs to the run that `find_cluster` finds, for the message that names the missing.

    jax.distributed learns the same from the same variables, but offers no way
    to ask it.
    Returns: None where the environment does not tell.
    """
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        found = find_cluster(environ)
        assert found is not None
        host, port = address.rsplit(":", 1)
        return Roll(host.strip("[]"), int(port), found["num_processes"], found["process_id"])

    if nodes := environ.get("SLURM_STEP_NODELIST"):
        # The first of a list such as "node[03-04,07],other1".
        first = re.match(r"([^,\[]*)(?:\[(\d+))?", nodes)
        assert first is not None
        # The port that JAX chooses for a job.
        default_port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096
        return Roll(
            host=first[1] + (first[2] or ""),
            port=int(environ.get("JAX_COORDINATOR_PORT") or default_port),
            count=int(environ["SLURM_NTASKS"]),
            index=int(environ["SLURM_PROCID"]),
        )

    return _find_tpu_roll(environ)


def _find_tpu_roll(environ: Mapping[str, str]) -> Roll | None:
    """GKE tells a TPU's hosts in the environment, a Cloud TPU VM in its metadata."""
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    hosts = next((environ[name] for name in names if environ.get(name)), "")
    worker = environ.get("TPU_WORKER_ID", "")
    slices = dict(environ)
    if not hosts:
        hosts = _metadata(environ, "worker-network-endpoints")
        worker = _metadata(environ, "agent-worker-number")
        text = _metadata(environ, "tpu-env")
        slices |= dict(re.findall(r"^(MEGASCALE_\w+): '(.*)'", text, re.MULTILINE))
    if not hosts or not worker:
        return None

    # An entry is HOST or HOST:PORT, or NAME:ID:HOST in the metadata of older
    # TPU VMs.
    entries = [entry.split(":") for entry in hosts.split(",")]
    first = slices.get("MEGASCALE_COORDINATOR_ADDRESS")
    host = first.split(":")[0] if first else entries[0][2 if len(entries[0]) == 3 else 0]
    return Roll(
        host=host,
        port=int(environ.get("JAX_COORDINATOR_PORT") or 8482),
        count=len(entries) * int(slices.get("MEGASCALE_NUM_SLICES") or 1),
        index=len(entries) * int(slices.get("MEGASCALE_SLICE_ID") or 0) + int(worker),
    )


def _metadata(environ: Mapping[str, str], name: str) -> str:
    """An attribute of a Cloud TPU VM; "" where no metadata server tells it."""
    if "TPU_SKIP_MDS_QUERY" in environ:
        return ""
    server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


# Joining them. ------------------------------------------------------------------------------------


def initialize(fields: dict[str, Any], *, timeout: float, heartbeat: int) -> None:
    """Joins the processes of the run, if there are several, and compares their configs.

    Call it before anything asks for devices.
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
    roll = find_roll(os.environ)
    if roll and roll.count == 1:
        return

    deadline = time.monotonic() + timeout
    if roll and roll.index == 0:
        wait_for_port(roll.port, deadline)

    # In a thread, for this call cannot be interrupted: when a process does
    # not come, JAX aborts the others, without a name and with a status that
    # no launcher understands. Its own time limit is therefore longer than
    # ours.
    joining = concurrent.futures.ThreadPoolExecutor(1).submit(
        jax.distributed.initialize,
        **arguments,
        initialization_timeout=2 * int(timeout) + 60,
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    present = call_roll(roll, joining, deadline) if roll else set()
    concurrent.futures.wait([joining], deadline - time.monotonic())
    if not joining.done():
        raise TimeoutError(_describe_missing(roll, present, timeout))
    try:
        joining.result()
    except ValueError as error:
        if arguments or roll:
            raise
        # A machine with a TPU, but none of JAX's clusters: a TPU VM in a
        # container, for one.
        logging.info("this process is alone: jax.distributed finds no cluster (%s)", error)
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
                    f"port {port} of {socket.gethostname()}, where the processes should meet, "
                    f"cannot be used (mesh.join_timeout): {error.strerror}"
                ) from error
        time.sleep(0.2)


def call_roll(roll: Roll, joining: concurrent.futures.Future, deadline: float) -> set[int]:
    """Finds out which processes have come, until `joining` is done or the time is over.

    Each process tells its number to process 0 by a datagram, and process 0
    answers with all that it has heard of. The run does not depend on it: the
    answer is for the message that names the missing processes. The port is
    that of JAX's service, which listens with TCP, not UDP.

    Args: deadline: of time.monotonic().
    Returns: the indices of the processes that have come, this one among them.
    """
    present = {roll.index}
    while not joining.done() and time.monotonic() < deadline:
        # Lost datagrams, those of other programs, and a host without a name
        # yet are no error.
        with contextlib.suppress(OSError, ValueError, TypeError):
            if roll.index == 0:
                _hear_others(roll, joining, deadline, present)
            else:
                present |= _tell_process_zero(roll)
        concurrent.futures.wait([joining], ROLL_CALL_SECONDS)
    return present


def _hear_others(
    roll: Roll, joining: concurrent.futures.Future, deadline: float, present: set[int]
) -> None:
    """Process 0's end of the roll call; adds to `present`."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        if both:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("", roll.port))
        server.settimeout(ROLL_CALL_SECONDS)
        while not joining.done() and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                message, sender = server.recvfrom(64)
                present.add(int(message))
                server.sendto(json.dumps(sorted(present)).encode(), sender)


def _tell_process_zero(roll: Roll) -> set[int]:
    """Tells process 0 that this process has come; returns who else has."""
    addresses = socket.getaddrinfo(roll.host, roll.port, type=socket.SOCK_DGRAM)
    family, kind, _, _, address = addresses[0]
    with socket.socket(family, kind) as client:
        client.settimeout(ROLL_CALL_SECONDS)
        client.sendto(str(roll.index).encode(), address)
        return set(json.loads(client.recv(65536)))


def _describe_missing(roll: Roll | None, present: set[int], timeout: float) -> str:
    limit = f"within {timeout:.0f} s (mesh.join_timeout)"
    if roll is None:
        return f"not all processes of the run came {limit}"

    missing = sorted(set(range(roll.count)) - present)
    if not missing:
        return (
            f"all {roll.count} processes came, but jax.distributed did not connect them at "
            f"{roll.host}:{roll.port} {limit}"
        )
    if 0 in missing:
        return f"process 0 of {roll.count} did not answer at {roll.host}:{roll.port} {limit}"
    names = ", ".join(map(str, missing[:16])) + (" and others" if len(missing) > 16 else "")
    return (
        f"process {names} of {roll.count} did not come {limit}; "
        f"{len(present)} of {roll.count} processes came"
    )


@contextlib.contextmanager
def _stacks_after(seconds: float) -> Iterator[None]:
    """Prints the stacks of all threads when the block does not end: devices are found in it."""
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
    problems = _compare_devices() or _compare_fields(fields)
    if problems:
        # Together: a process that is still connected when process 0 ends
        # would be aborted.
        jax.distributed.shutdown()
        more = [f"and {len(problems) - 4} more"] if len(problems) > 4 else []
        raise ValueError("; ".join(problems[:4] + more))


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
    message = json.dumps({"host": socket.gethostname(), "fields": json.loads(flat)}).encode()
    length = int(multihost_utils.process_allgather(np.int32(len(message))).max())
    padded = np.frombuffer(message.ljust(length), np.uint8)
    messages = [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]

    first = messages[0]
    return [
        f"process {i} ({other['host']}) has {name} = {other['fields'].get(name)}, "
        f"process 0 ({first['host']}) has {first['fields'].get(name)}"
        for i, other in enumerate(messages)
        for name in sorted(first["fields"].keys() | other["fields"].keys())
        if first["fields"].get(name) != other["fields"].get(name)
    ]


# While they run. ----------------------------------------------------------------------------------


@contextlib.contextmanager
def process_zero_first(name: str) -> Iterator[None]:
    """Process 0 runs the block before the others do, which then find the files that it leaves.

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


def lost_processes(seconds: float) -> list[int]:
    """The processes of the run that no longer answer.

    Args: seconds: how long to ask; processes that are silent longer are taken
      to be at work.
    """
    lost: list[int] = []

    def ask() -> None:
        # This waits until each of the others asks too, or is found dead.
        try:
            with multihost_utils.live_devices(jax.devices()) as live:
                there = {device.process_index for device in live}
                lost.extend(sorted(set(range(jax.process_count())) - there))
        except jax.errors.JaxRuntimeError:
            lost.append(0)  # its service knows who is alive

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return lost

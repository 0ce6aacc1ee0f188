"""Which processes of a run have come, for the message that names the others.

jax.distributed joins the processes. When one does not come it says neither
which, nor how many did. So each process tells its number to process 0 by a
datagram, and process 0 answers with all that it has heard of. The run does
not depend on it.
"""

import contextlib
import dataclasses
import json
import re
import socket
import time
import urllib.request
from collections.abc import Mapping
from concurrent import futures

SECONDS = 0.2  # between two datagrams
MOST_NAMES = 16  # in a message


@dataclasses.dataclass(frozen=True)
class Roll:
    """The processes that belong to a run.

    host, port: where process 0 hears the others. The port is that of JAX's
      service, which listens with TCP; datagrams do not disturb it.
    count: how many processes there are.
    index: which of them this one is.
    """

    host: str
    port: int
    count: int
    index: int


def call_roll(roll: Roll, joining: futures.Future, deadline: float) -> set[int]:
    """Finds out who has come, until `joining` is done or the time is over.

    Args: deadline: of time.monotonic().
    Returns: the processes that have come, this one among them.
    """
    present = {roll.index}
    while not joining.done() and time.monotonic() < deadline:
        # Lost datagrams, those of other programs, and a host that has no
        # name yet are no errors.
        with contextlib.suppress(OSError, ValueError, TypeError):
            if roll.index == 0:
                _hear_others(roll.port, joining, deadline, present)
            else:
                present |= _tell_process_zero(roll)
        futures.wait([joining], SECONDS)
    return present


def _hear_others(
    port: int,
    joining: futures.Future,
    deadline: float,
    present: set[int],
) -> None:
    """Process 0's part; adds to `present`."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        if both:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("", port))
        server.settimeout(SECONDS)
        while not joining.done() and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):
                message, sender = server.recvfrom(64)
                present.add(int(message))
                answer = json.dumps(sorted(present))
                server.sendto(answer.encode(), sender)


def _tell_process_zero(roll: Roll) -> set[int]:
    """The part of the others; returns who else has come."""
    found = socket.getaddrinfo(roll.host, roll.port, type=socket.SOCK_DGRAM)
    family, kind, _, _, address = found[0]
    with socket.socket(family, kind) as client:
        client.settimeout(SECONDS)
        client.sendto(str(roll.index).encode(), address)
        return set(json.loads(client.recv(65536)))


def describe_missing(roll: Roll, present: set[int]) -> str:
    """The beginning of a sentence that ends with the time limit."""
    missing = sorted(set(range(roll.count)) - present)
    place = f"{roll.host}:{roll.port}"
    came = f"{len(present)} of {roll.count} processes came"
    if not missing:
        return f"{came}, but jax.distributed did not connect them at {place}"
    # Without its answer, this process knows of no other.
    if 0 in missing:
        return f"process 0 of {roll.count} did not answer at {place}"
    names = ", ".join(map(str, missing[:MOST_NAMES]))
    more = " and others" if len(missing) > MOST_NAMES else ""
    return f"{came}: process {names}{more} of {roll.count} did not come"


# Who belongs to a run. --------------------------------------------------------


def find_roll(environ: Mapping[str, str]) -> Roll | None:
    """Who belongs to the run, by what a launcher or a platform sets.

    jax.distributed reads the same, but there is no way to ask it.
    Args: environ: of a process for which cluster.find_cluster found a
      cluster.
    Returns: None where it does not tell.
    """
    if address := environ.get("JAX_COORDINATOR_ADDRESS"):
        host, port = address.rsplit(":", 1)
        index = environ.get("JAX_PROCESS_ID") or environ["JOB_COMPLETION_INDEX"]
        return Roll(
            # An IPv6 address stands in brackets.
            host=host.strip("[]"),
            port=int(port),
            count=int(environ["JAX_NUM_PROCESSES"]),
            index=int(index),
        )
    if "SLURM_STEP_NODELIST" in environ:
        return _find_slurm_roll(environ)
    return _find_tpu_roll(environ)


def _find_slurm_roll(environ: Mapping[str, str]) -> Roll:
    # The first of a list such as "node[03-04,07],other1".
    nodes = environ["SLURM_STEP_NODELIST"]
    first = re.sub(r"^([^,\[]*)(\[(\d+))?.*", r"\1\3", nodes)
    # JAX chooses one of the last 4096 ports by the job's number.
    by_job = 61440 + int(environ["SLURM_JOB_ID"]) % 4096
    return Roll(
        host=first,
        port=int(environ.get("JAX_COORDINATOR_PORT") or by_job),
        count=int(environ["SLURM_NTASKS"]),
        index=int(environ["SLURM_PROCID"]),
    )


def _find_tpu_roll(environ: Mapping[str, str]) -> Roll | None:
    """GKE sets variables; a Cloud TPU VM has a metadata server."""
    settings = dict(environ)
    hosts = (
        environ.get("TPU_PROCESS_ADDRESSES")
        or environ.get("TPU_WORKER_HOSTNAMES")
        or _metadata(environ, "worker-network-endpoints")
    )
    worker = environ.get("TPU_WORKER_ID")
    if not worker:
        worker = _metadata(environ, "agent-worker-number")
        # Lines such as MEGASCALE_NUM_SLICES: '2'.
        lines = _metadata(environ, "tpu-env")
        settings |= re.findall(r"^(MEGASCALE_\w+): '(.*)'$", lines, re.M)
    if not hosts or not worker:
        return None

    # An entry is HOST, HOST:PORT, or NAME:ID:HOST on older TPU VMs.
    entries = [entry.split(":") for entry in hosts.split(",")]
    host = entries[0][2 if len(entries[0]) == 3 else 0]
    # Of several slices, the first host of the first one.
    host = settings.get("MEGASCALE_COORDINATOR_ADDRESS") or host
    slices = int(settings.get("MEGASCALE_NUM_SLICES") or 1)
    this_slice = int(settings.get("MEGASCALE_SLICE_ID") or 0)
    return Roll(
        host=host.split(":")[0],
        port=int(environ.get("JAX_COORDINATOR_PORT") or 8482),
        count=slices * len(entries),
        index=this_slice * len(entries) + int(worker),
    )


def _metadata(environ: Mapping[str, str], name: str) -> str:
    """An attribute of a Cloud TPU VM; "" where no server tells it."""
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

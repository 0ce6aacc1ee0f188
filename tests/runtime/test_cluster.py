"""Several processes as one run, on this machine; their collectives go over TCP."""

import concurrent.futures
import contextlib
import http.server
import json
import os
import signal
import socket
import threading
import time

import jax
import lives
import pytest
from jax.experimental import multihost_utils

from lit_jax.runtime import cluster, exit_status, preemption, roll_call, workdir_lock

WIDE = (
    *lives.WIDE,
    "--config.train.log_every=1",
    "--config.mesh.join_timeout=120",
    "--config.mesh.heartbeat=20",  # a busy machine can keep a process silent for long
    "--config.checkpoint.every=3",
)


@pytest.fixture(scope="module")
def server(forker, tmp_path_factory):
    return lives.Server(forker, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def one_process(server):
    life = server.run(server.folder / "one", *WIDE, "--config.train.steps=9")
    return lives.losses(server.folder / "one"), life.ids()


@pytest.fixture(scope="module")
def two_processes(server):
    """The workdir of a run of two processes, and what they saw.

    Each has a half of the parameters.
    """
    workdir = server.folder / "two"
    processes = server.run_together(
        workdir, 2, *WIDE, "--config.train.steps=6", "--config.mesh.fsdp=2"
    )
    assert [life.wait() for life in processes] == [0, 0], "".join(life.text() for life in processes)
    return workdir, processes


def assert_same_losses(actual, expected):
    for now, metrics in actual.items():
        for name, value in metrics.items():
            assert value == pytest.approx(expected[now][name], rel=1e-4), (now, name)


def test_two_processes_have_the_losses_and_the_data_of_one(one_process, two_processes):
    expected, ids = one_process
    workdir, processes = two_processes
    actual = lives.losses(workdir)
    assert list(actual) == list(range(1, 7))
    assert_same_losses(actual, expected)
    assert [a + b for a, b in zip(*(life.ids() for life in processes))] == ids[:6]


def test_four_processes_go_on_from_the_checkpoint_of_two(server, one_process, two_processes):
    workdir, _ = two_processes
    processes = server.run_together(
        workdir, 4, *WIDE, "--config.train.steps=9", "--config.mesh.fsdp=2"
    )
    assert [life.wait() for life in processes] == [0] * 4, "".join(
        life.text() for life in processes
    )
    assert {life.first_step() for life in processes} == {6}
    actual = lives.losses(workdir)
    assert list(actual) == list(range(1, 10))
    assert_same_losses(actual, one_process[0])


def test_when_one_is_killed_the_others_stop_and_say_so_and_a_restart_resumes_exactly(
    server, two_processes
):
    """And SIGTERM to one of the restarted stops all at the same step."""
    workdir = server.folder / "killed"
    run = (*WIDE, "--config.mesh.fsdp=2", "--config.checkpoint.keep=1000")
    first, second = server.run_together(workdir, 2, *run, "--config.train.steps=6")
    second.wait_for_batches(5)
    second.kill(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    assert first.wait() not in (0, 1)
    assert "process 1 is gone" in first.text() or "another task died" in first.text()
    # Process 0, without which JAX aborts the others, is the first to be ready.
    more = (*run, "--config.train.steps=1000")
    processes = server.run_together(workdir, 2, *more, late={1: 2.0})
    processes[0].wait_until(lambda: processes[0].first_step() + len(processes[0].ids()) > 6)
    processes[1].kill(signal.SIGTERM)
    assert [life.wait() for life in processes] == [exit_status.EXIT_TRY_AGAIN] * 2, "".join(
        life.text() for life in processes
    )
    steps = {life.first_step() + len(life.ids()) for life in processes}
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert steps == {saved} and 6 < saved < 1000
    expected, _ = two_processes
    until_six = [
        {now: metrics for now, metrics in lives.losses(folder).items() if now <= 6}
        for folder in (expected, workdir)
    ]
    assert until_six[0] == until_six[1] and len(until_six[0]) == 6
    assert lives.fingerprints(workdir, 6) == lives.fingerprints(expected, 6)


def test_ctrl_c_to_one_inside_a_preview_stops_all_in_it(server):
    workdir = server.folder / "drawing"
    processes = server.run_together(
        workdir,
        2,
        *WIDE,
        "--config.train.steps=1000",
        "--config.mesh.fsdp=2",
        "--config.checkpoint.every=1000000",
        "--config.train.preview_every=4",
        "--config.train.preview_images=800000",
        "--config.sample.batch_size=8",
    )
    for life in processes:
        life.wait_for_preview(4)
    told = time.monotonic()
    processes[1].kill(signal.SIGINT)
    assert [life.wait() for life in processes] == [exit_status.EXIT_TRY_AGAIN] * 2, "".join(
        p.text() for p in processes
    )
    assert time.monotonic() - told < 30  # the preview would take hours
    assert [len(life.ids()) for life in processes] == [4, 4]
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]


def test_a_checkpoint_that_cannot_be_written_stops_both_at_once(server):
    workdir = server.folder / "no_folder"
    processes = server.run_together(
        workdir, 2, *WIDE, "--config.train.steps=1000000", "--config.mesh.fsdp=2"
    )
    processes[0].wait_until(lambda: (workdir / "checkpoints" / "3").exists())
    (workdir / "checkpoints").rename(workdir / "elsewhere")
    (workdir / "checkpoints").write_text("in the way")
    broken = time.monotonic()
    assert processes[0].wait() == exit_status.EXIT_CRASHED, processes[0].text()
    assert processes[1].wait() not in (0, 1), processes[1].text()
    assert time.monotonic() - broken < 60  # Orbax alone: 302
    assert f"in {workdir}/checkpoints cannot be written: " in processes[0].text().splitlines()[-1]


@pytest.mark.parametrize(
    "each, field, values",
    [
        (("--config.seed=1", "--config.seed=2"), "has seed = 2, process 0 (", "has 1"),
        # As many devices in each process are what JAX needs to compare the rest.
        (
            ("--config.mesh.cpu_devices=1", "--config.mesh.cpu_devices=2"),
            "process 1 has 2 devices, process 0 has 1 ",
            "(mesh.cpu_devices",
        ),
    ],
)
def test_processes_with_different_configs_are_named_on_both_sides(server, each, field, values):
    processes = server.run_together(server.folder / "differing", 2, *WIDE, each=each)
    for life in processes:
        assert life.wait() == 1, life.text()
        message = life.text().splitlines()[-1]
        assert message.startswith("error: process 1 "), message
        assert field in message and values in message


def test_a_workdir_in_use_is_refused_by_all_processes(server):
    workdir = server.folder / "in_use"
    workdir.mkdir()
    with workdir_lock.lock_workdir(workdir):
        processes = server.run_together(
            workdir, 2, *WIDE, "--config.train.steps=6", "--config.mesh.fsdp=2"
        )
        assert [life.wait() for life in processes] == [1, 1], "".join(
            life.text() for life in processes
        )
    for life, owner in zip(processes, (f"process {os.getpid()} on ", "another run")):
        assert f"error: --workdir={workdir} is in use by {owner}" in life.text()
    assert [path.name for path in workdir.iterdir()] == ["lock"]


def test_a_process_that_does_not_come_is_named_by_all_others(server):
    started = time.monotonic()
    processes = server.run_together(
        server.folder / "missing", 3, *WIDE, "--config.mesh.join_timeout=5", present=2
    )
    for life in processes:
        assert life.wait() == exit_status.EXIT_TRY_AGAIN, life.text()
        message = life.text().splitlines()[-1]
        assert message == (
            "2 of 3 processes came: process 2 of 3 did not come within 5 s (mesh.join_timeout)"
        )
    assert time.monotonic() - started < 60
    assert not list((server.folder / "missing").iterdir())


def test_when_process_zero_does_not_come_the_others_say_where_they_looked(server):
    with socket.socket(type=socket.SOCK_DGRAM) as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environ = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    life = server.start(
        server.folder / "no_zero", *WIDE, "--config.mesh.join_timeout=3", environ=environ
    )
    assert life.wait() == exit_status.EXIT_TRY_AGAIN, life.text()
    message = life.text().splitlines()[-1]
    assert f"process 0 of 2 did not answer at {address} within 3 s (mesh.join_timeout)" in message


# Below: in this process.


def leaver(left):
    """Stands in for os._exit: remembers the status, and ends the test's block with it."""

    def leave(status):
        left.append(status)
        raise SystemExit(status)

    return leave


def test_the_environment_says_how_to_join(monkeypatch):
    alone = {}
    assert cluster.find_cluster(alone | {"JAX_PLATFORMS": "cpu"}) is None
    explicit = {
        "JAX_COORDINATOR_ADDRESS": "host:1234",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "2",
    }
    wanted = dict(
        coordinator_address="host:1234",
        num_processes=4,
        process_id=2,
        cluster_detection_method="deactivate",
    )
    assert cluster.find_cluster(explicit) == wanted
    kubernetes = {
        "JOB_COMPLETION_INDEX" if name == "JAX_PROCESS_ID" else name: value
        for name, value in explicit.items()
    }
    assert cluster.find_cluster(kubernetes) == wanted
    with pytest.raises(ValueError, match="but not JAX_PROCESS_ID"):
        cluster.find_cluster(
            {name: value for name, value in explicit.items() if name != "JAX_PROCESS_ID"}
        )
    for change in (
        {"JAX_COORDINATOR_ADDRESS": "host"},
        {"JAX_NUM_PROCESSES": "four"},
        {"JAX_PROCESS_ID": "4"},
    ):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=f"{name}.* = {value}"):
            cluster.find_cluster(explicit | change)
    slurm = {"SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "node[1-2]"}
    assert cluster.find_cluster(slurm) == {"cluster_detection_method": "slurm"}
    assert cluster.find_cluster(slurm | {"SLURM_NTASKS": "1", "JAX_PLATFORMS": "cpu"}) is None
    monkeypatch.setattr(cluster, "tpu_attached", lambda: True)
    assert (
        cluster.find_cluster(alone) == {} and cluster.find_cluster({"JAX_PLATFORMS": "cpu"}) is None
    )


def test_the_environment_says_who_belongs_to_the_run():
    explicit = {
        "JAX_COORDINATOR_ADDRESS": "[::1]:1234",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "2",
    }
    assert roll_call.find_roll(explicit) == roll_call.Roll("::1", 1234, count=4, index=2)
    slurm = {
        "SLURM_JOB_ID": "4100",
        "SLURM_STEP_NODELIST": "node[03-04],other7",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
    }
    expected = roll_call.Roll("node03", 61444, count=16, index=9)
    assert roll_call.find_roll(slurm) == expected
    for nodes in ("node03", "node03,other7", "node[03,05-07]"):
        assert roll_call.find_roll(slurm | {"SLURM_STEP_NODELIST": nodes}) == expected
    # As on a GKE node with TPUs, four hosts in each of two slices.
    gke = {
        "TPU_WORKER_HOSTNAMES": "a,b,c,d",
        "TPU_WORKER_ID": "2",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "first:1234",
    }
    assert roll_call.find_roll(gke) == roll_call.Roll("first", 8482, count=8, index=6)
    one_slice = {name: gke[name] for name in ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID")}
    assert roll_call.find_roll(one_slice) == roll_call.Roll("a", 8482, count=4, index=2)
    assert roll_call.find_roll({"TPU_SKIP_MDS_QUERY": "1"}) is None


def test_the_metadata_of_a_tpu_vm_say_who_belongs_to_the_run():
    attributes = {
        "worker-network-endpoints": "vm0:0:10.0.0.7,vm1:1:10.0.0.8",
        "agent-worker-number": "1",
        "tpu-env": "ZONE: 'us'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            assert folder == "/computeMetadata/v1/instance/attributes"
            self.send_response(200 if name in attributes else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"GCE_METADATA_IP": f"localhost:{server.server_port}"}
        assert roll_call.find_roll(environ) == roll_call.Roll("10.0.0.7", 8482, count=4, index=3)
        del attributes["agent-worker-number"]
        assert roll_call.find_roll(environ) is None
        server.shutdown()


def test_the_roll_call_takes_no_notice_of_other_programs_and_missing_names():
    joining = concurrent.futures.Future()
    with socket.socket(type=socket.SOCK_DGRAM) as free:
        free.bind(("", 0))
        port = free.getsockname()[1]

    def disturb_and_come():
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(1.0)
            for message in (b"GET / HTTP/1.1", b"", b"3", b"1"):
                while True:
                    client.sendto(message, ("127.0.0.1", port))
                    try:
                        answers.append(json.loads(client.recv(1000)))
                        break
                    except (TimeoutError, ConnectionRefusedError):
                        if message not in (b"3", b"1"):
                            break
        joining.set_result(None)

    answers = []
    other = threading.Thread(target=disturb_and_come)
    other.start()
    zero = roll_call.Roll("localhost", port, count=4, index=0)
    assert roll_call.call_roll(zero, joining, time.monotonic() + 60) == {0, 1, 3}
    other.join()
    assert answers == [[0, 3], [0, 1, 3]]
    nowhere = roll_call.Roll("lit-jax-slice-0-0.invalid", port, count=4, index=2)
    unjoined = concurrent.futures.Future()
    assert roll_call.call_roll(nowhere, unjoined, time.monotonic() + 0.5) == {2}


def test_the_watchdog_prints_stacks_when_no_step_ends_and_only_then(monkeypatch):
    reports = []
    monkeypatch.setattr(preemption.faulthandler, "dump_traceback", reports.append)
    watchdog = preemption.Watchdog(1.0)
    for now in range(30):
        watchdog.step_ended(now)
        time.sleep(0.05)
    assert not reports
    time.sleep(2.5)
    watchdog.close()
    assert 1 <= len(reports) <= 3


@pytest.mark.parametrize(
    "error, before, after",
    [
        (OSError(13, "Permission denied"), "raised", exit_status.EXIT_CRASHED),
        (OSError(28, "No space left"), exit_status.EXIT_CRASHED, exit_status.EXIT_CRASHED),
        (ValueError("record 7 cannot be read"), "raised", exit_status.EXIT_CRASHED),
        (jax.errors.JaxRuntimeError("INTERNAL: the chip"), "raised", exit_status.EXIT_CRASHED),
        (exit_status.GiveUpError("not finite"), "raised", "raised"),  # main turns it into status 1
        (
            exit_status.TryAgainError("stopped"),
            exit_status.EXIT_TRY_AGAIN,
            exit_status.EXIT_TRY_AGAIN,
        ),
        (
            TimeoutError("process 1 did not come"),
            exit_status.EXIT_TRY_AGAIN,
            exit_status.EXIT_CRASHED,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_the_exit_status_tells_bad_input_from_what_broke_once_training_had_begun(
    monkeypatch, capsys, tmp_path, error, before, after
):
    left = []
    monkeypatch.setattr(os, "_exit", leaver(left))
    for begun, expected in ((False, before), (True, after)):
        left.clear()
        with pytest.raises(type(error) if expected == "raised" else SystemExit) as end:
            with (
                exit_status.shared_fate(heartbeat=1.0),
                exit_status.Crashes(tmp_path / "crashes", 5) as crashes,
            ):
                crashes.begun = begun
                raise error
        if expected != "raised":
            assert end.value.code == expected
            assert str(error) in capsys.readouterr().err.splitlines()[-1]
        # Without a wait for threads that may never end: those of a crash, and of the joining.
        at_once = expected == exit_status.EXIT_CRASHED or isinstance(error, TimeoutError)
        assert left == ([expected] if at_once else [])


def test_the_third_crash_without_a_new_checkpoint_is_not_tried_again(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(os, "_exit", leaver([]))
    statuses = []
    for step in (5, 5, 8, 8, 8):
        with pytest.raises(SystemExit) as end, exit_status.shared_fate(heartbeat=1.0):
            with exit_status.Crashes(tmp_path / "crashes", step) as crashes:
                crashes.begun = True
                raise OSError("a disk")
        statuses.append(end.value.code)
        # A disk that is full later has no room for more than was there before training began.
        assert (tmp_path / "crashes").stat().st_size == 80
    assert statuses == [exit_status.EXIT_CRASHED] * 4 + [1]
    assert "crash 3 in a row" in capsys.readouterr().err.splitlines()[-1]


def test_a_port_that_is_busy_is_waited_for_and_then_named():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(TimeoutError, match=f"port {port} of .*mesh.join_timeout.* in use"):
            cluster.wait_for_port(port, time.monotonic() + 0.5)
        threading.Timer(0.5, other.close).start()
        cluster.wait_for_port(port, time.monotonic() + 60.0)


def test_a_process_that_fails_alone_leaves_although_the_others_are_silent(monkeypatch, capsys):
    left, over = [], threading.Event()

    @contextlib.contextmanager
    def silent(devices):
        over.wait()
        yield devices

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(multihost_utils, "live_devices", silent)
    monkeypatch.setattr(exit_status, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(os, "_exit", leaver(left))
    with pytest.raises(SystemExit), exit_status.shared_fate(heartbeat=0.1):
        raise RuntimeError("out of memory, here alone")
    over.set()
    assert left == [1] and "out of memory, here alone" in capsys.readouterr().err

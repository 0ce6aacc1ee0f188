"""The launcher scripts: what they start again, and with which arguments.

Stand-ins take the place of the programs that the scripts start.
"""

import os
import pathlib
import signal
import subprocess
import time

import pytest
import yaml

from configs import default
from lit_jax.runtime.exit_status import EXIT_CRASHED, EXIT_TRY_AGAIN

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
ARGUMENTS = (
    "--config=configs/default.py",
    "--config.plan.programs=('plain', 'sample')",
    "--workdir=/runs/a b",
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a program of the given name and bash body on the PATH.

    `calls` reads the arguments of each of its runs.
    """
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("TPU_NAME", "ZONE"):
        monkeypatch.delenv(name, raising=False)

    def install(name, body):
        path = tmp_path / name
        path.write_text(
            f"#!/bin/bash\n(printf '%s\\0' \"$@\"; echo) >> {tmp_path}/{name}.calls\n{body}\n"
        )
        path.chmod(0o755)

    def calls(name):
        path = tmp_path / f"{name}.calls"
        return (
            [line.split("\0")[:-1] for line in path.read_text().splitlines()]
            if path.exists()
            else []
        )

    install.calls, install.folder = calls, tmp_path
    return install


def statuses(folder, *values):
    """A body that exits with one value after the other."""
    (folder / "left").write_text("".join(f"{value}\n" for value in values))
    return f"status=$(head -1 {folder}/left); sed -i 1d {folder}/left; exit $status"


@pytest.mark.parametrize(
    "values",
    [(0,), (1,), (EXIT_TRY_AGAIN, 139, 0), (137, 1), (EXIT_CRASHED,) * 19 + (EXIT_TRY_AGAIN,)],
)
def test_a_tpu_vm_goes_on_until_it_is_done_or_cannot(stand_in, values):
    stand_in("python", statuses(stand_in.folder, *values))
    stand_in("sleep", "")
    assert subprocess.run([LAUNCH / "tpu_vm.sh", *ARGUMENTS]).returncode == values[-1]
    assert stand_in.calls("python") == [["-m", "lit_jax.main", *ARGUMENTS]] * len(values)


def test_a_tpu_vm_forgets_short_tries_after_a_long_one(stand_in):
    """A copy of the script has a clock that runs a thousand times faster.

    The third try lasts longer than the limit.
    """
    script = stand_in.folder / "fast.sh"
    text = (LAUNCH / "tpu_vm.sh").read_text()
    assert text.count("SECONDS < 600") == 1
    script.write_text(text.replace("SECONDS < 600", "SECONDS < 2"))
    script.chmod(0o755)
    stand_in("sleep", "")
    body = statuses(stand_in.folder, *[EXIT_TRY_AGAIN] * 23)
    stand_in(
        "python", f"[[ $(wc -l < {stand_in.folder}/python.calls) -ne 3 ]] || /bin/sleep 2.1; {body}"
    )
    assert subprocess.run([script]).returncode == EXIT_TRY_AGAIN
    assert len(stand_in.calls("python")) == 23


def test_a_tpu_vm_passes_sigterm_on_and_waits_for_the_job_to_save(stand_in):
    ready, saved = stand_in.folder / "ready", stand_in.folder / "saved"
    stand_in(
        "python",
        f"trap 'sleep 0.3; touch {saved}; exit {EXIT_TRY_AGAIN}' TERM; touch {ready}; "
        "while true; do sleep 0.05; done",
    )
    script = subprocess.Popen([LAUNCH / "tpu_vm.sh"])
    while not ready.exists():
        time.sleep(0.01)
    for _ in range(2):  # the second while the job is saving
        script.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert script.wait() == EXIT_TRY_AGAIN and saved.exists()
    assert len(stand_in.calls("python")) == 1


@pytest.mark.parametrize("status", [0, 1, EXIT_CRASHED, EXIT_TRY_AGAIN, 143])
@pytest.mark.parametrize("restarts", [None, 1, 2])
def test_slurm_requeues_what_can_go_on_unless_it_always_ends_at_once(
    stand_in, monkeypatch, status, restarts
):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    stand_in("srun", f"exit {status}")
    stand_in("scontrol", "")
    assert subprocess.run([LAUNCH / "gpu_slurm.sh", *ARGUMENTS]).returncode == status
    assert stand_in.calls("srun")[0][-5:] == ["python", "-m", "lit_jax.main", *ARGUMENTS][-5:]
    assert stand_in.calls("scontrol") == (
        [["requeue", "17"]] if status > 1 and restarts != 2 else []
    )


@pytest.mark.parametrize("script, name", [("tpu_vm.sh", "TPU_NAME"), ("multislice.sh", "NAME")])
def test_arguments_reach_all_hosts_as_they_are(stand_in, monkeypatch, script, name):
    monkeypatch.setenv(name, "a-slice")
    monkeypatch.setenv("ZONE", "us-west4-a")
    stand_in("gcloud", "")
    assert subprocess.run([LAUNCH / script, *ARGUMENTS]).returncode == 0
    (call,) = stand_in.calls("gcloud")
    assert {"a-slice", "--zone=us-west4-a", "--worker=all"} <= set(call)
    (command,) = [
        argument.removeprefix("--command=")
        for argument in call
        if argument.startswith("--command=")
    ]
    # What the hosts' shell makes of it: the same script, there without a name to call.
    (stand_in.folder / "lit_jax" / "launch").mkdir(parents=True)
    (stand_in.folder / "lit_jax" / "launch" / "tpu_vm.sh").symlink_to(LAUNCH / "tpu_vm.sh")
    stand_in("python", "")
    monkeypatch.delenv(name)
    subprocess.run(command, shell=True, check=True, cwd=stand_in.folder, executable="/bin/bash")
    assert stand_in.calls("python") == [["-m", "lit_jax.main", *ARGUMENTS]]


def test_the_kubernetes_job_starts_again_on_all_but_bad_input_with_fields_that_exist():
    spec = yaml.safe_load((LAUNCH / "gke.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1]
    assert spec["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "lit_jax.main"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    config = default.get_config()
    fields = [
        argument.removeprefix("--config.").split("=")
        for argument in container["args"]
        if "--config." in argument
    ]
    assert fields
    config.update_from_flattened_dict({name: int(value) for name, value in fields})

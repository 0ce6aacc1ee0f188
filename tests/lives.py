"""Short lives of a tiny training run, each in a process of its own that a test may kill.

Loading JAX and the data libraries takes far longer than the run. So a server loads them once and
forks each life.
"""

import contextlib
import gc
import io
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import compiler
from tiny_dataset import put_digits

from configs import debug
from lit_jax import checkpoint, main, models
from lit_jax.data import pipeline
from lit_jax.experiment import Experiment

REPOSITORY = pathlib.Path(__file__).parent.parent
# One layer of softmax attention, nothing computed twice: these tests are about what surrounds the
# step.
TINY = (
    "--config=configs/debug.py",
    "--config.student.init=random",
    "--config.report.num_images=0",
    "--config.model.attention=softmax",
    "--config.model.depth=1",
    "--config.train.preview_every=0",
    "--config.train.remat=none",
    "--config.train.batch_size=8",
    "--config.data.prefetch=2",
    "--config.checkpoint.keep=2",
)


# Of a model whose arrays are large enough for lit_jax/sharding.py to split.
WIDTH = 128
# What the files of tests have in common, so that a program is compiled once for all of them. The
# number of steps decides nothing here. The rate grows at first, so that a restart which
# forgets how many there were is seen.
WIDE = (
    f"--config.model.width={WIDTH}",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup=2",
)


class Forker:
    """The process that forks lives: one for all files of tests that a worker runs."""

    def __init__(self):
        environ = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            XLA_FLAGS=compiler.XLA_FLAGS,  # without the suite's eight devices
            OMP_NUM_THREADS="1",
            # Of lives alone: the suite's other programs have keys of another kind, see `serve`.
            JAX_COMPILATION_CACHE_DIR=str(pathlib.Path(os.environ["SESSION_FILES"]) / "compiled"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_SHARE_BINARY_BETWEEN_HOSTS="1",  # process 0 compiles for all processes of its run
        )
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environ | {"PYTHONPATH": str(REPOSITORY)},
        )

    def ask(self, **request):
        """`argv` and more start a life: its process id. `wait` for an id: its exit status."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()


class Server:
    """Starts lives, whose data and workdirs are in a folder.

    `start` gives a life and `wait` its exit status, where a negative one is the signal that killed
    it.
    """

    def __init__(self, forker: Forker, folder: pathlib.Path):
        self._forker = forker
        self.folder = folder
        put_digits(folder / "data")
        self._count = 0

    def start(
        self,
        workdir: pathlib.Path,
        *overrides: str,
        batches: int = -1,
        pause: float = 0.0,
        late: float = 0.0,
        environ: dict[str, str] | None = None,
    ) -> "Life":
        """Starts a life, which stops and waits once it has taken `batches`.

        So a kill hits it there or earlier. `pause`: seconds that it waits before each batch, and
        `late` before it asks whether a checkpoint is written.
        """
        self._count += 1
        workdir.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"life_{self._count}.log"
        # Another recipe takes the place of TINY's. The fields come behind it.
        named = [text for text in overrides if text.startswith("--config=")]
        argv = [
            "main",
            *(named or TINY[:1]),
            *TINY[1:],
            f"--workdir={workdir}",
            f"--config.data.dir={self.folder / 'data'}",
            *(text for text in overrides if text not in named),
        ]
        pid = self._forker.ask(
            argv=argv,
            log=str(log),
            ids=str(log.with_suffix(".ids")),
            batches=batches,
            pause=pause,
            late=late,
            environ=environ or {},
        )
        return Life(self, pid, log)

    def wait(self, pid: int) -> int:
        return self._forker.ask(wait=pid)

    def run(self, workdir: pathlib.Path, *overrides: str) -> "Life":
        """A life that ends by itself, and well."""
        life = self.start(workdir, *overrides)
        assert life.wait() == 0, life.text()
        return life

    def run_together(
        self,
        workdir: pathlib.Path,
        count: int,
        *overrides: str,
        each: tuple[str, ...] = (),
        present: int = 0,
        late: dict[int, float] | None = None,
    ) -> list["Life"]:
        """Starts the `count` processes of one run, or only the first `present`.

        `each` has an override for each process, `late` the seconds of those that lag behind.
        """
        with contextlib.closing(socket.socket()) as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environ = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        return [
            self.start(
                workdir,
                *overrides,
                *each[i : i + 1],
                late=(late or {}).get(i, 0.0),
                environ=environ | {"JAX_PROCESS_ID": str(i)},
            )
            for i in range(present or count)
        ]


class Life:
    def __init__(self, server: Server, pid: int, log: pathlib.Path):
        self._server, self.pid, self._log = server, pid, log

    def wait(self) -> int:
        return self._server.wait(self.pid)

    def kill(self, signal: int) -> None:
        os.kill(self.pid, signal)

    def wait_until(self, condition, seconds: float = 600.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.01)

    def wait_for_batches(self, count: int) -> None:
        self.wait_until(lambda: len(self.ids()) >= count)

    def wait_for_preview(self, step: int) -> None:
        """Returns when it draws, or compiles what draws."""
        line = f"drawing the preview of step {step}"
        self.wait_until(lambda: self._log.exists() and line in self.text())
        time.sleep(0.5)

    def text(self) -> str:
        return self._log.read_text()

    def ids(self) -> list[list[int]]:
        """Record ids of the batches that this process took, one list a step."""
        path = self._log.with_suffix(".ids")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def first_step(self) -> int:
        """The step that it went on from."""
        found = re.search(r"resumed from step (\d+)", self.text())
        return int(found.group(1)) if found else 0


def losses(workdir: pathlib.Path) -> dict[int, dict[str, float]]:
    """The training metrics of each logged step, without those that tell the time."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("train/images_per_second", "train/data_wait", "train/seconds_left", "train/mfu")
    assert len({line["step"] for line in lines}) == len(lines)
    return {
        line.pop("step"): {name: value for name, value in line.items() if name not in timed}
        for line in lines
    }


def fingerprints(workdir: pathlib.Path, step: int) -> dict[str, int]:
    return json.loads((workdir / "checkpoints" / str(step) / "metadata" / "metadata").read_text())[
        "fingerprints"
    ]


def record_ids(path: str, batches: int, pause: float) -> None:
    """Makes the data iterator write the ids of each batch to a file, and give `batches` at most."""

    hand_out = pipeline.DeviceIterator.__next__
    left = [batches]

    def hand_out_and_write(self):
        while not left[0]:
            time.sleep(0.05)
        time.sleep(pause)
        left[0] -= 1
        batch = hand_out(self)
        rows = {
            shard.index[0].start or 0: shard.data.tolist()
            for shard in batch["index"].addressable_shards
        }
        with open(path, "a") as file:
            file.write(json.dumps(sum((rows[start] for start in sorted(rows)), [])) + "\n")
        return batch

    pipeline.DeviceIterator.__next__ = hand_out_and_write


def lag(seconds: float) -> None:
    """Makes the process ask late whether its checkpoint is written."""
    wait = checkpoint.Checkpointer.wait

    def wait_late(self):
        time.sleep(seconds)
        wait(self)

    checkpoint.Checkpointer.wait = wait_late


def serve() -> None:
    # Everything that a life would load, before it is forked.
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    from jax._src import cache_key, xla_bridge

    import lit_jax.jobs.train  # noqa: F401

    assert "torch" not in sys.modules  # a start would take seconds more
    # What a process draws first finds the fonts, and what it traces first fills JAX's caches of
    # small functions. Nothing of it starts the CPU's client, whose threads no fork would have.
    figure = matplotlib.figure.Figure()
    figure.subplots().set(title="loss", xlabel="step", yscale="log")
    figure.savefig(io.BytesIO(), dpi=110)
    config = debug.get_config()
    for width in (WIDTH, config.model.width):
        config.model.update(attention="softmax", depth=1, width=width, implementation="xla")
        models.param_shapes(Experiment(config).model_config)
    assert not xla_bridge.backends_are_initialized()

    # On a CPU the key of a compiled program says by which process it is used. So every process but
    # the first, which alone writes to the cache, would compile everything in each of its lives.
    cache_key._hash_accelerator_config = cache_key._hash_devices

    # A third of a life would go into searching the libraries' objects for garbage, whose pages
    # would all be copied for it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)

    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            reply = os.fork()
            if reply == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ.update(request["environ"])
                record_ids(request["ids"], request["batches"], request["pause"])
                lag(request["late"])
                sys.argv = request["argv"]
                main.run()
                os._exit(0)
        sys.__stdout__.write(json.dumps(reply) + "\n")
        sys.__stdout__.flush()


if __name__ == "__main__":
    serve()

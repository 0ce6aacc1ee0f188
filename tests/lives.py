"""Short lives of a tiny training run, each in a process of its own that a test may kill.

Loading JAX and the data libraries takes far longer than the run, so a server loads them once and forks each life.
"""
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parent.parent
TINY = ("--config=configs/debug.py", "--config.student.init=random", "--config.report.num_images=0",
        "--config.train.preview_every=0", "--config.train.batch_size=8", "--config.data.prefetch=2",
        "--config.checkpoint.keep=2")


class Server:
    """Forks lives; `start` gives the process id, `wait` its exit status (negative: the signal that killed it)."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        environ = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", OMP_NUM_THREADS="1",
                       JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, cwd=REPOSITORY, env=environ | {"PYTHONPATH": str(REPOSITORY)})
        self._count = 0

    def _ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, workdir: pathlib.Path, *overrides: str, environ: dict[str, str] | None = None) -> "Life":
        self._count += 1
        workdir.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"life_{self._count}.log"
        argv = ["main", *TINY, f"--workdir={workdir}", f"--config.data.dir={self.folder / 'data'}", *overrides]
        pid = self._ask(argv=argv, log=str(log), ids=str(self.folder / f"life_{self._count}.ids"), environ=environ or {})
        return Life(self, pid, log)

    def wait(self, pid: int) -> int:
        return self._ask(wait=pid)

    def run(self, workdir: pathlib.Path, *overrides: str) -> "Life":
        """A life that ends by itself, and well."""
        life = self.start(workdir, *overrides)
        assert life.wait() == 0, life.text()
        return life

    def run_together(self, workdir: pathlib.Path, count: int, *overrides: str) -> list["Life"]:
        """Starts `count` processes of one run."""
        with contextlib.closing(socket.socket()) as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        return [self.start(workdir, *overrides, environ={"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
                                                         "JAX_PROCESS_ID": str(i)}) for i in range(count)]

    def close(self):
        self._process.stdin.close()
        self._process.wait()


class Life:
    def __init__(self, server: Server, pid: int, log: pathlib.Path):
        self._server, self.pid, self._log = server, pid, log

    def wait(self) -> int:
        return self._server.wait(self.pid)

    def kill(self, signal: int) -> None:
        os.kill(self.pid, signal)

    def text(self) -> str:
        return self._log.read_text()

    def ids(self) -> list[list[int]]:
        """Record ids of the batches that this process took, one list a step."""
        path = self._log.with_suffix(".ids")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record_ids(path: str) -> None:
    """Makes the data iterator write down the ids of each batch it hands out."""
    from lit_jax import data

    hand_out = data.DeviceIterator.__next__

    def hand_out_and_write(self):
        batch = hand_out(self)
        rows = {shard.index[0].start or 0: shard.data.tolist() for shard in batch["index"].addressable_shards}
        with open(path, "a") as file:
            file.write(json.dumps(sum((rows[start] for start in sorted(rows)), [])) + "\n")
        return batch

    data.DeviceIterator.__next__ = hand_out_and_write


def serve() -> None:
    import lit_jax.train  # noqa: F401
    from lit_jax import main

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
                record_ids(request["ids"])
                sys.argv = request["argv"]
                main.run()
                os._exit(0)
        sys.__stdout__.write(json.dumps(reply) + "\n")
        sys.__stdout__.flush()


if __name__ == "__main__":
    serve()

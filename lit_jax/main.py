"""Command line: flags, start-up, pick the job.

python -m lit_jax.main --config=configs/NAME.py [--mode=train] [--workdir=DIR]
[--config.field=value ...]

Where the package is installed, `lit_jax` is the same command. NAME alone, or a path that is not
there, is one of the shipped configs.
"""

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import signal
import sys
from logging import INFO, LogRecord

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration, a Python file with get_config().",
    lock_config=True,
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    [
        "train",
        "sample",
        "evaluate",
        "layers",
        "port",
        "export",
        "prepare",
        "plan",
        "benchmark",
        "demo",
    ],
    "The job.",
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run keeps its files; workdir/CONFIG_NAME if not given.",
)

# Jobs that several processes run together; the others need no device.
RUN_BY_SEVERAL = (
    "train",
    "sample",
    "evaluate",
    "layers",
    "port",
    "prepare",
    "benchmark",
)

# What takes less memory, where a job has run out of it.
MEMORY_ADVICE = {
    "train": "a smaller train.batch_size, or sample.batch_size for pictures, train.accumulation, "
    "mesh.fsdp over more devices and train.remat=full need less; --mode=plan says what a TPU "
    "slice would need; a workdir that holds no checkpoint yet can be used again",
    "sample": "a smaller sample.batch_size, mesh.fsdp over more devices and, with an autoencoder, "
    "autoencoder.slice_size and autoencoder.tile_size need less",
    "evaluate": "a smaller evaluate.batch_size and evaluate.num_neighbour_images need less",
    "layers": "a smaller train.batch_size and mesh.fsdp over more devices need less",
    "prepare": "a smaller prepare.batch_size, autoencoder.slice_size and autoencoder.tile_size "
    "need less",
    "benchmark": "a smaller benchmark.model_tokens and benchmark.attention_tokens need less",
}


def main(argv: list[str]) -> None:
    """Checks what all jobs need, joins the other processes, runs the job."""
    if len(argv) > 1:
        raise ValueError(
            f"unexpected argument {argv[1]!r}; a field is set with --config.field=value"
        )
    if CONFIG.value is None:
        raise ValueError("--config=configs/NAME.py is missing")

    # Libraries comment on every step of a start; a person wants our lines.
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(is_ours)
    config = CONFIG.value
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    logging.info("--mode=%s of %s: loading the libraries", MODE.value, config_file)

    # Here: JAX and the data libraries take seconds to load, and a wrong flag has failed by now.
    import jax

    from lit_jax import fields
    from lit_jax.experiment import Experiment
    from lit_jax.runtime import cluster, exit_status, preemption, storage

    fields.resolve_paths(config)
    Experiment(config)  # checks all settings, whatever the job needs of them

    default = f"workdir/{pathlib.Path(config_file).stem}"
    workdir = storage.user_path(WORKDIR.value or default, "--workdir")
    # A job would find it out as well, but after minutes of loading.
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file, not a folder")

    configure_jax(config)
    with (
        exit_status.shared_fate(config.mesh.heartbeat, MEMORY_ADVICE.get(MODE.value, "")),
        preemption.signals_stop() as listener,
    ):
        if MODE.value in RUN_BY_SEVERAL:
            in_common = json.loads(config.to_json_best_effort())
            in_common["--mode"] = MODE.value
            in_common["--workdir"] = WORKDIR.value
            # Two versions may compile one step to different collectives.
            in_common["jax"] = jax.__version__
            cluster.initialize(
                in_common,
                timeout=config.mesh.join_timeout,
                heartbeat=config.mesh.heartbeat,
            )
            if jax.distributed.is_initialized():
                listener.take_over()
            cluster.check_backend()

        # No job is imported for another: each brings libraries of its own.
        job = importlib.import_module(f"lit_jax.jobs.{MODE.value}")
        job.run(config, workdir)


def configure_jax(config: ConfigDict) -> None:
    """Passes on what JAX must know before it looks for devices."""
    import jax

    from lit_jax.runtime import cluster, pages

    configured = jax.config.values["jax_platforms"]
    if configured is None and only_libtpu() and not cluster.tpu_attached():
        jax.config.update("jax_platforms", "cpu")
    if folder := programs_folder(config.compilation_cache):
        jax.config.update("jax_compilation_cache_dir", folder)
    else:
        jax.config.update("jax_enable_compilation_cache", False)
    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    # Before there are devices: each of their threads would have a heap of its own.
    if jax.config.values["jax_platforms"] == "cpu":
        pages.keep()


def programs_folder(asked: str) -> str:
    """The folder of compiled programs; "": none.

    Args: asked: a folder; "auto": JAX_COMPILATION_CACHE_DIR, or one in the user's cache; "".
    """
    if asked != "auto":
        return asked
    if folder := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return folder
    # A program for one CPU may hold instructions that another one lacks, and homes are shared.
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        about = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        about = platform.processor()
    kind = hashlib.sha256(f"{platform.machine()} {about}".encode()).hexdigest()[:8]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "lit_jax", f"programs_{kind}")


def only_libtpu() -> bool:
    """Whether no plugin is installed but that for TPUs.

    JAX sets jax_platforms itself where it sees a TPU. Where it does not see
    one, it would start libtpu all the same, which planning wants installed on
    any machine, and libtpu would complain of the TPU that is not there.
    """
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not (importlib.util.find_spec("jax_plugins") or plugins)


def is_ours(record: LogRecord) -> bool:
    """A log filter: keeps all warnings, and of other lines only our own.

    TFDS warns of every folder that is no data set yet, though it is about to become one; where it
    matters an error of ours says so.
    """
    path = pathlib.Path(record.pathname)
    if "tensorflow_datasets" in path.parts and path.name == "file_utils.py":
        return False
    return "lit_jax" in path.parts or record.levelno > INFO


def find_config(name: str) -> str:
    """The file of a config: a path, or the name of a shipped one, whatever the folder is.

    Args: name: may end with :ARGUMENT, for a get_config that takes one.
    Raises: FileNotFoundError naming the shipped ones that are like it.
    """
    file, colon, argument = name.partition(".py:")
    if colon:
        name, argument = f"{file}.py", f":{argument}"
    if os.path.isfile(name):
        return name + argument
    shipped: dict[str, str] = {}
    spec = importlib.util.find_spec("configs")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(pathlib.Path(folder).rglob("*.py")):
            shipped.setdefault(path.relative_to(folder).with_suffix("").as_posix(), str(path))
    asked = name.removeprefix("configs/").removesuffix(".py")
    if asked in shipped:
        return shipped[asked] + argument
    close = difflib.get_close_matches(asked, shipped)
    # Of a folder its name: the ablations alone would fill the screen.
    tops = dict.fromkeys(name.partition("/")[0] + "/..." * ("/" in name) for name in shipped)
    which = f"did you mean {' or '.join(close)}?" if close else f"shipped: {', '.join(tops)}"
    what = "a directory, no file" if os.path.isdir(name) else "no such file"
    raise FileNotFoundError(f"--config={name}: {what}, nor a shipped config; {which}")


def parse_flags(argv: list[str]) -> list[str]:
    """Absl's parser, but a wrong config or override ends in one line."""
    # These errors are about the command line, and say it all themselves.
    plain = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)
    try:
        for place, text in enumerate(argv):
            if text.startswith("--config="):
                argv[place] = f"--config={find_config(text.removeprefix('--config='))}"
            elif text == "--config" and place + 1 < len(argv):
                argv[place + 1] = find_config(argv[place + 1])
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    try:
        return flags.FLAGS(argv)
    # The config is a program, which can raise anything.
    except Exception as error:
        kind = "" if isinstance(error, plain) else f"{type(error).__name__}: "
        text = _one_line(error)
        sys.exit(f"error: {_override_of(argv, text)}{kind}{text}{_config_of(argv)}")


def _one_line(error: BaseException) -> str:
    # Absl wraps the error that says what is wrong.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    # The text of a KeyError is the repr of what it was raised with.
    quoted = isinstance(error, KeyError) and error.args
    text = error.args[0] if quoted else error
    return " ".join(str(text).split())


def _override_of(argv: list[str], error: str) -> str:
    """The override that an error is about, which itself names the last part of the field alone."""
    for text in argv:
        field = text.partition("=")[0]
        names = field.removeprefix("--config.").split(".")
        if field.startswith("--config.") and any(f"'{name}'" in error for name in names):
            return f"{field}: "
    return ""


def _config_of(argv: list[str]) -> str:
    """The config file on the command line, in brackets."""
    named = [text for text in argv if text.startswith("--config=")]
    return "".join(f" ({text})" for text in named)


def run() -> None:
    """The program: bad input ends in one line on stderr and status 1."""
    try:
        _run()
    finally:
        # The status is decided. Python takes seconds to end, in which a signal
        # would turn a run that is done into one that was killed.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def _run() -> None:
    try:
        app.run(main, flags_parser=parse_flags)
    # Before the handlers of signals are set, while the libraries are loaded.
    except KeyboardInterrupt:
        sys.stderr.write("stopped by SIGINT before anything was done\n")
        sys.exit(os.EX_TEMPFAIL)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {_one_line(error)}")


if __name__ == "__main__":
    run()

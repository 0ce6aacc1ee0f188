"""Command line: flags, start-up, pick the job.

python -m lit_jax.main --config=configs/NAME.py [--mode=train] [--workdir=DIR]
[--config.field=value ...]
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from logging import LogRecord

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration, a Python file with get_config().", lock_config=True
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "sample", "evaluate", "port", "prepare", "plan", "benchmark"],
    "The job.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run keeps its files; workdir/CONFIG_NAME if not given."
)

# Jobs that several processes run together; the others need no device.
RUN_BY_SEVERAL = ("train", "sample", "evaluate", "port", "prepare", "benchmark")


def main(argv: list[str]) -> None:
    """Checks what all jobs have in common, joins the other processes, and runs the job."""
    if len(argv) > 1:
        raise ValueError(
            f"unexpected argument {argv[1]!r}; a field is set with --config.field=value"
        )
    if CONFIG.value is None:
        raise ValueError("--config=configs/NAME.py is missing")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(is_ours)
    config = CONFIG.value

    # Here: JAX and the data libraries take seconds to load, and a wrong flag has failed by now.
    import jax

    from lit_jax.experiment import Experiment
    from lit_jax.runtime import cluster, exit_status, preemption, storage

    Experiment(config)  # checks all settings, whatever the job needs of them

    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = storage.user_path(WORKDIR.value or f"workdir/{name}", "--workdir")
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file, not a folder")

    configured = jax.config.values["jax_platforms"]
    if configured is None and only_libtpu() and not cluster.tpu_attached():
        jax.config.update("jax_platforms", "cpu")
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)

    with exit_status.shared_fate(config.mesh.heartbeat):
        if MODE.value in RUN_BY_SEVERAL:
            flags_in_common = {"--mode": MODE.value, "--workdir": WORKDIR.value}
            cluster.initialize(
                flags_in_common
                | {"jax": jax.__version__}
                | json.loads(config.to_json_best_effort()),
                timeout=config.mesh.join_timeout,
                heartbeat=config.mesh.heartbeat,
            )
        job = importlib.import_module(f"lit_jax.jobs.{MODE.value}")
        # Training saves before it stops, and listens to the signal itself.
        listens = MODE.value == "train"
        with contextlib.nullcontext() if listens else preemption.sigterm_stops():
            job.run(config, workdir)


def only_libtpu() -> bool:
    """Whether JAX could find no device but a TPU or the CPU: no plugin for others is installed.

    JAX sets jax_platforms itself where it sees a TPU. Where it does not see
    one, it would start libtpu all the same, which planning wants installed on
    any machine, and libtpu would complain of the TPU that is not there.
    """
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not (importlib.util.find_spec("jax_plugins") or plugins)


def is_ours(record: LogRecord) -> bool:
    """A log filter: keeps all warnings, but of the informative lines only our own."""
    return record.levelno > 20 or "lit_jax" in pathlib.Path(record.pathname).parts


def parse_flags(argv: list[str]) -> list[str]:
    """Absl's parser, but every way in which a config or an override can be wrong is one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {_one_line(error)}{_config_of(argv)}")
    except Exception as error:  # the config is a program, which can raise anything
        sys.exit(f"error: {type(error).__name__}: {_one_line(error)}{_config_of(argv)}")


def _one_line(error: BaseException) -> str:
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    # The text of a KeyError is the repr of what it was raised with.
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def _config_of(argv: list[str]) -> str:
    """The config file on the command line, in brackets; nothing if there is none."""
    return "".join(f" ({argument})" for argument in argv if argument.startswith("--config="))


def run() -> None:
    """The program: bad input ends in one line on stderr and status 1, never in a traceback."""
    try:
        app.run(main, flags_parser=parse_flags)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {_one_line(error)}")


if __name__ == "__main__":
    run()

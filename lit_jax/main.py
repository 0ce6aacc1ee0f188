"""Command line: flags, start-up, pick the job.

python -m lit_jax.main --config=configs/NAME.py [--mode=train] [--workdir=DIR] [--config.field=value ...]
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from lit_jax import fields
from lit_jax.runtime import cluster, exit_status, preemption

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration, a Python file with get_config().", lock_config=True
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "sample", "evaluate", "port", "prepare", "plan", "benchmark"],
    "The job.",
)
RUN_BY_SEVERAL = (
    "train",
    "sample",
    "evaluate",
    "port",
    "prepare",
    "benchmark",
)  # jobs that several processes run together
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run keeps its files; workdir/CONFIG_NAME if not given."
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise ValueError(
            f"unexpected argument {argv[1]!r}; a field is set with --config.field=value"
        )
    if CONFIG.value is None:
        raise ValueError("--config=configs/NAME.py is missing")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(is_ours)
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    from etils import epath

    workdir = epath.Path(WORKDIR.value or pathlib.Path("workdir") / name)
    config = CONFIG.value
    import jax  # here: it takes seconds to load, a wrong flag has failed by now

    fields.check(config)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file, not a folder")
    if jax.config.jax_platforms is None and only_libtpu() and not cluster.tpu_attached():
        jax.config.update("jax_platforms", "cpu")
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    with exit_status.shared_fate(config.mesh.heartbeat):
        if MODE.value in RUN_BY_SEVERAL:
            shared = {"--mode": MODE.value, "--workdir": WORKDIR.value, "jax": jax.__version__}
            cluster.initialize(
                shared | json.loads(config.to_json_best_effort()),
                timeout=config.mesh.join_timeout,
                heartbeat=config.mesh.heartbeat,
            )
        job = importlib.import_module(f"lit_jax.jobs.{MODE.value}")
        with contextlib.nullcontext() if MODE.value == "train" else preemption.sigterm_stops():
            job.run(config, workdir)


def only_libtpu() -> bool:
    """Whether JAX could find no device but a TPU's or the CPU: no plugin for another is installed.

    JAX, where it sees the chips of a TPU, sets jax_platforms itself. Where it does not, libtpu, which planning wants
    installed on any machine, would be started all the same and complain of the TPU that is not there.
    """
    return not (
        importlib.util.find_spec("jax_plugins")
        or importlib.metadata.entry_points(group="jax_plugins")
    )


def is_ours(record) -> bool:
    """Keeps warnings of everybody, but of the libraries' running commentary only our own lines."""
    return record.levelno > 20 or "lit_jax" in pathlib.Path(record.pathname).parts


def parse_flags(argv: list[str]) -> list[str]:
    """Absl's parser, but every way in which a config or an override can be wrong becomes one line."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        sys.exit(f"error: {_one_line(error)}{_config_of(argv)}")
    except Exception as error:  # the config is a program, and anything can happen in one
        sys.exit(f"error: {type(error).__name__}: {_one_line(error)}{_config_of(argv)}")


def _one_line(error: Exception) -> str:
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    # The text of a KeyError is the repr of what it was raised with.
    return " ".join(
        str(error.args[0] if isinstance(error, KeyError) and error.args else error).split()
    )


def _config_of(argv: list[str]) -> str:
    """The config file on the command line, in brackets; nothing if there is none."""
    return "".join(f" ({argument})" for argument in argv if argument.startswith("--config="))


def run() -> None:
    """The program: bad input ends in one line on stderr and exit status 1, never in a traceback."""
    try:
        app.run(main, flags_parser=parse_flags)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {_one_line(error)}")


if __name__ == "__main__":
    run()

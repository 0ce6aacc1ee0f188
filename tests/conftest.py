"""What all tests share: eight pretend devices, a cache of compiled programs, marks.

The suite runs on a CPU that pretends to be eight devices, with implicit rank promotion forbidden.
"""

import ast
import atexit
import functools
import gc
import importlib.util
import os
import pathlib
import shutil
import signal
import tempfile

import compiler
import pytest

TESTS = pathlib.Path(__file__).parent

# ---- The environment, before the first import of JAX.

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Most of the suite's time is compilation, and most programs are small and run once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# With two workers on two cores a second thread of BLAS and torch mostly waits, and burns its time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# libtpu only compiles here: it must not look for a TPU's metadata server.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Test processes that run at the same time each load the compiler.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

# Many tests compile the same program. The cache lasts for one session. Workers of xdist and
# processes that a test starts inherit its place. Whoever sets JAX_COMPILATION_CACHE_DIR keeps the
# programs for the next session too. SESSION_FILES is for what else is made once.
for name in ("JAX_COMPILATION_CACHE_DIR", "SESSION_FILES"):
    if name not in os.environ:
        os.environ[name] = tempfile.mkdtemp(prefix="lit_jax_tests_")
        atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)
# To pack and write a program that compiles faster costs more than it saves.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402

from lit_jax.kernels.linear_attention_gpu_plan import JAX_NEEDED  # noqa: E402
from lit_jax.runtime import pages  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# The CPU takes 32 programs at once. With that many waiting for an interpreted kernel, whose
# callbacks run programs of their own, neither side would go on (jax-ml/jax#25861).
jax.config.update("jax_cpu_enable_async_dispatch", False)

# The CPU's compiler reads its flags here, once. libtpu reads them when a test first asks it for a
# program, and refuses some of them: they are not there any more.
flags = os.environ["XLA_FLAGS"]
os.environ["XLA_FLAGS"] = f"{flags} {compiler.XLA_FLAGS}"
pages.keep()  # as the program does
jax.devices()
os.environ["XLA_FLAGS"] = flags
# libtpu ignores the signal where nobody listens, and processes that a test starts would inherit it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# A shell ignores Ctrl-C for what it runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def forker():
    """The process of tests/lives.py, whose start takes as long as two lives."""
    import lives

    forker = lives.Forker()
    yield forker
    forker.close()


# ---- Marks. `python -m pytest -m fast -n 2` is for every change; all tests are for a commit.

# The files that carry the mark: a change that breaks the main job should break one of them.
FAST = {
    "test_architecture.py",
    "test_checkpoint.py",
    "test_configs.py",
    "test_diffusion.py",
    "test_inherit.py",
    "test_launch.py",
    "test_losses.py",
    "test_main.py",
    "test_packaging.py",
    "test_sampling.py",
    "test_sharding.py",
    "test_train_step.py",
    "costs/test_chips.py",
    "costs/test_flops.py",
    "data/test_pipeline.py",
    "evaluation/test_evaluator.py",
    "evaluation/test_in_training.py",
    "evaluation/test_metrics.py",
    "evaluation/test_npz.py",
    "evaluation/test_protocol.py",
    "evaluation/test_reports.py",
    "evaluation/test_run_report.py",
    "kernels/test_linear_attention.py",
    "models/test_attention.py",
    "models/test_dit.py",
    "runtime/test_metric_writer.py",
    "runtime/test_workdir_lock.py",
}


def top_level_imports(path: pathlib.Path) -> set[str]:
    """The first names of the modules that a file imports outside of its functions."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@functools.cache
def needs_torch(path: pathlib.Path) -> bool:
    """Whether a file of tests imports what needs torch, itself or by a helper in this folder."""
    names = top_level_imports(path)
    if names & {"torch", "diffusers", "transformers", "came_pytorch"}:
        return True
    helpers = [TESTS / f"{name}.py" for name in names]
    return any(needs_torch(helper) for helper in helpers if helper.exists())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without-torch",
        action="store_true",
        help="leave out the tests marked torch, and do not import their files",
    )


def pytest_configure() -> None:
    if missing := [name for name in sorted(FAST) if not (TESTS / name).exists()]:
        raise pytest.UsageError(f"FAST in tests/conftest.py names {missing}, which do not exist")


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """Without torch, a file that imports torch cannot even be read for its marks."""
    if config.getoption("--without-torch") and collection_path.suffix == ".py":
        return needs_torch(collection_path) or None
    return None


# Pallas Mosaic GPU is another module in an older JAX: the second Python of .ci/run has it.
HAS_MOSAIC_GPU = jax.__version_info__[:2] >= JAX_NEEDED
CUDA_WHEELS = ("jax_cuda13_plugin", "nvidia.cu13")


def has_cuda_compiler() -> bool:
    try:
        return all(importlib.util.find_spec(name) for name in CUDA_WHEELS)
    except ModuleNotFoundError:
        return False


def is_left_out(item: pytest.Item, without_torch: bool) -> bool:
    """Whether this environment lacks what a test is of: it is no test here, and none is skipped."""
    if item.path.name == "test_linear_attention_gpu.py" and not HAS_MOSAIC_GPU:
        return True
    if item.get_closest_marker("cuda") and not has_cuda_compiler():
        return True
    # A file that imports torch is not even read; a test that does so in its body has its own mark.
    return without_torch and item.get_closest_marker("torch") is not None


def pytest_collection_finish() -> None:
    """A tenth of the suite would go into searching the libraries' objects for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    write_small_arrays_whole()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """pytest collects garbage twice at its end: seconds for each of its processes."""
    gc.freeze()


def write_small_arrays_whole() -> None:
    """Of an array that all eight devices hold, one writes everything.

    Orbax would compile eight programs for each shape, which cut out an eighth each. The processes
    of tests/lives.py write as it does by itself.
    """
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    handler._min_slice_bytes_for_replica_parallel = 2**30


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.relative_to(TESTS).as_posix() in FAST:
        item.add_marker("fast")
    if needs_torch(item.path):
        item.add_marker("torch")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without_torch = config.getoption("--without-torch")
    left_out = {item for item in items if is_left_out(item, without_torch)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.getoption("--without-torch"):
        files = sorted(TESTS.rglob("test_*.py"))
        names = [str(path.relative_to(TESTS)) for path in files if needs_torch(path)]
        terminalreporter.write_line("left out without torch: " + ", ".join(names))
    if not HAS_MOSAIC_GPU:
        terminalreporter.write_line("left out without JAX 0.12: the kernels for GPUs")
    elif not has_cuda_compiler():
        terminalreporter.write_line("left out without jax[cuda13]: compiling for an H100")

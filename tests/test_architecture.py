"""The house's rules that a reader relies on, read off the source: who imports whom, and when."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "lit_jax"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" and "assets" not in path.parts  # assets are shipped, not imported
}

# The floors of the house, the top one first. A module imports from its own floor and from below.
FLOORS = (
    ("main",),
    ("jobs",),
    ("experiment", "settings", "fields"),
    (
        "data",
        "porting",
        "evaluation",
        "sampling",
        "train_step",
        "checkpoint",
        "inherit",
        "pictures",
        "text",
        "prompts",
    ),
    ("quantization",),
    ("models", "samplers", "losses", "came"),
    (
        "kernels",
        "diffusion",
        "conditions",
        "partitioning",
        "sharding",
        "ranges",
        "runtime",
        "costs",
    ),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
JOBS = {module for module in MODULES if module.startswith("jobs.")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_interval_is_measured_by_a_clock_that_jumps(module):
    """A machine's clock is set now and then; a day forward, and every timeout is over."""
    clocks = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(parse(module))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    } & {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}
    # TensorBoard shows when an event was.
    assert clocks <= ({"time.time"} if module == "runtime.metric_writer" else set())


def room(module: str) -> str:
    """The top-level module or folder that a module belongs to."""
    return module.split(".")[0]


def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def imports(module: str, *, anywhere: bool = True) -> set[str]:
    """Dotted names that a module imports; not `anywhere`: only while it is being imported."""
    tree = parse(module)
    names = set()
    for node in ast.walk(tree) if anywhere else top_level(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes outside functions: what runs at import time."""
    queue: list[ast.AST] = list(tree.body)
    while queue:
        node = queue.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            queue += ast.iter_child_nodes(node)


def ours(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in imports(module):
        if name.startswith("lit_jax."):
            inner = name.removeprefix("lit_jax.")
            found |= {other for other in MODULES if inner == other or inner.startswith(other + ".")}
    return found


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} <= FLOOR.keys()


def test_a_folder_holds_three_files_or_more():
    for folder in {path.parent for path in MODULES.values()}:
        assert len(list(folder.glob("[!_]*.py"))) >= 3, f"{folder.name} is no folder yet"


def test_the_jobs_are_those_of_the_command_line():
    modes = [
        node
        for node in ast.walk(parse("main"))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "DEFINE_enum"
    ]
    assert len(modes) == 1
    offered = {f"jobs.{element.value}" for element in modes[0].args[2].elts}
    assert JOBS == offered
    for job in JOBS:
        functions = [node for node in parse(job).body if isinstance(node, ast.FunctionDef)]
        run = next(function for function in functions if function.name == "run")
        assert [argument.arg for argument in run.args.args] == ["config", "workdir"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_down(module):
    for other in ours(module):
        assert FLOOR[room(module)] <= FLOOR[room(other)], f"{module} imports {other}, upstairs"
    if module in JOBS:
        assert not ours(module) & JOBS, "a job imports a job"
    if room(module) == "models":
        assert "sharding" not in ours(module), "model code knows no mesh"


def test_there_are_no_circles():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in sorted(ours(module)):
                visit(other, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_needs_torch_tensorflow_or_a_config(module):
    def roots(names):
        return {name.split(".")[0] for name in names}

    assert not roots(imports(module)) & {"configs", "tensorflow", "tests"}
    assert not roots(imports(module, anywhere=False)) & {"torch", "diffusers"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_jax_is_used_through_its_public_names(module):
    assert not {name for name in imports(module) if name.startswith("jax._src")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_of_ours_takes_the_name_of_a_library(module):
    """`from lit_jax import checkpoint as orbax` would read as the library."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_jax"):
            assert not [alias.asname for alias in node.names if alias.asname]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"main"}))
def test_only_main_knows_flags_and_nobody_prints(module):
    flags = ("absl.flags", "absl.app", "ml_collections.config_flags")
    assert not any(name.startswith(flags) for name in imports(module))
    calls = [
        node.func.id
        for node in ast.walk(parse(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert "print" not in calls


def test_who_knows_of_the_number_of_classes():
    """The condition is a dict to everybody else, so that one of captions can follow."""
    allowed = ("conditions", "models.dit", "porting.dit", "data.")
    for module, path in MODULES.items():
        if not module.startswith(allowed):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = {
                getattr(node, "attr", getattr(node, "arg", getattr(node, "id", "")))
                for node in nodes
            }
            # getattr(config, "num_classes") asks the same.
            for node in nodes:
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                    names.add(getattr(node.args[1], "value", ""))
            assert "num_classes" not in names, module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_library_code_takes_values_not_the_config(module):
    if module not in JOBS | {"main", "experiment", "settings", "fields"}:
        assert not {name for name in imports(module) if name.startswith("ml_collections")}

"""The house's rules that a reader relies on, read off the source: who imports whom, and what is imported when."""
import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "lit_jax"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
           if path.name != "__init__.py" and "assets" not in path.parts}     # assets are shipped, not imported
# train may evaluate; nothing else reaches across.
ALLOWED_BETWEEN_JOBS = {("train", "evaluate")}


def is_job(module):
    """A module of the package's top level with `def run(config, workdir)`."""
    return any(isinstance(node, ast.FunctionDef) and node.name == "run"
               and [a.arg for a in node.args.args] == ["config", "workdir"]
               for node in parse(module).body)


def parse(module):
    return ast.parse(MODULES[module].read_text())


def imports(module, *, anywhere=True):
    """Dotted names that a module imports; not `anywhere`: only when it is itself imported."""
    tree, names = parse(module), set()
    nodes = ast.walk(tree) if anywhere else top_level(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def top_level(tree):
    """Nodes outside functions: what runs at import time."""
    queue = list(tree.body)
    while queue:
        node = queue.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            queue += ast.iter_child_nodes(node)


def ours(module):
    """The modules of the package that a module imports."""
    found = set()
    for name in imports(module):
        if name.startswith("lit_jax."):
            inner = name.removeprefix("lit_jax.")
            found |= {other for other in MODULES if inner == other or inner.startswith(other + ".")}
    return found


JOBS = {module for module in MODULES if is_job(module)}


def test_the_jobs_are_those_of_the_command_line():
    assert {"train", "sample"} <= JOBS
    assert "main" not in JOBS
    modes = [node for node in ast.walk(parse("main")) if isinstance(node, ast.Call)
             and getattr(node.func, "attr", "") == "DEFINE_enum"]
    assert len(modes) == 1
    offered = {element.value for element in modes[0].args[2].elts}
    assert JOBS <= offered


@pytest.mark.parametrize("job", sorted(JOBS))
def test_jobs_do_not_import_jobs(job):
    assert {(job, other) for other in ours(job) & JOBS} <= ALLOWED_BETWEEN_JOBS


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_down(module):
    below = ours(module)
    assert "main" not in below
    if module not in JOBS and module != "main":
        assert not below & JOBS, "library code imports a job"
    if module.startswith("models."):
        assert not below & {"sharding", "checkpoint", "data", "step"}, "model code knows no mesh, no files and no training"
    if module.startswith("kernels."):
        assert all(other.startswith("kernels.") for other in below)


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


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"main"}))
def test_only_main_knows_flags_and_nobody_prints(module):
    assert not any(name.startswith(("absl.flags", "absl.app", "ml_collections.config_flags")) for name in imports(module))
    calls = [node.func.id for node in ast.walk(parse(module)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "print" not in calls


@pytest.mark.parametrize("module", sorted(MODULES))
def test_library_code_takes_values_not_the_config(module):
    if module not in JOBS | {"main", "from_config", "fields"}:  # the last two check a config and build what it describes
        assert not {name for name in imports(module) if name.startswith("ml_collections")}

"""What a TPU kernel costs by its compiler's own schedule, on a machine without a TPU.

libtpu compiles for a named topology anywhere, and dumps the final schedule of each
Pallas kernel: VLIW bundles, of which a core issues one a cycle. Bundles x grid steps
of a core / clock is then the kernel's compute time. The larger of that and the time
that HBM needs for what the kernels move is an estimate. It is a model, not a timing,
good for comparing versions.

The body of a loop inside a kernel counts as often as the loop turns. Not counted: what
a launch takes, and what XLA does around the kernels (copies that pad a ragged grid).

    python -m lit_jax.costs.tpu_schedule --width=1152 --heads=4 --pixels=256 \
        --topology=v5e:2x2

prints the rows of docs/kernels_tpu.md for one size and resolution.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.costs import chips
from lit_jax.kernels import linear_attention_tpu, linear_attention_tpu_plan
from lit_jax.kernels.linear_attention_case import Case

PIXELS_PER_TOKEN = 16  # an autoencoder of 8x, patches of 2
PASSES = ("forward", "backward")
KERNEL = "tpu_custom_call"  # what a Pallas kernel is called in a compiled program
MAX_CHIPS = 16_384  # more than any pod has


# ---- TPUs that are not there -------------------------------------------------


def topology_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a TPU slice, or of several, to compile for.

    Raises: ValueError, whose text starts with "topology", for a name that libtpu does
      not know or chips that the table of chips does not; FileNotFoundError without
      libtpu.
    """
    # Imported here: it asks for libtpu.
    from jax.experimental import topologies

    if not topology:  # libtpu would take it for its oldest chip
        raise ValueError(
            "topology must name a TPU slice, for example v5e:2x4 or v5p:2x2x2; it is empty"
        )
    # libtpu divides by each side, and ends the process where one is 0.
    layout = re.search(r"[=_:](\d[\dx]*)", topology)
    sides = layout[1].split("x") if layout else []
    chips_asked = math.prod(int(side) for side in sides if side)
    if not 1 <= chips_asked * slices <= MAX_CHIPS:
        raise ValueError(
            f"topology = {topology!r} in {slices} slices names {chips_asked * slices} chips; it "
            f"must be 1 to {MAX_CHIPS}"
        )
    # Nothing is loaded onto a chip. So libtpu may be loaded twice, and need not ask
    # who and where it is: any answer will do.
    answers = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    }
    for name, value in answers.items():
        os.environ.setdefault(name, value)

    options: dict[str, Any] = {}
    if slices > 1:
        options["num_slices"] = slices
    if topology.startswith("v4:"):
        # Both cores of a chip are one device, as where JAX runs on one.
        options["chip_config_name"] = "megacore"
    try:
        described = topologies.get_topology_desc(topology, platform="tpu", **options)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise FileNotFoundError(
                "compiling for a TPU needs libtpu, its compiler: pip install libtpu"
            ) from error
        raise ValueError(
            f"topology = {topology!r} (for example v5e:2x4, v5p:2x2x2): "
            f"{str(error).splitlines()[0]}"
        ) from error

    devices: list[Any] = list(described.devices)
    kind = devices[0].device_kind
    if kind not in chips.TPUS:
        raise ValueError(
            f"topology = {topology} is of {kind} chips; known are {', '.join(chips.TPUS)}"
        )
    return devices


@contextlib.contextmanager
def on_chip(topology: str) -> Iterator[jax.sharding.Mesh]:
    """One chip of the topology as the mesh in context, which a kernel asks for its VMEM.

    Raises: as `topology_devices`.
    """
    device = topology_devices(topology)[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("chip",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield mesh


def compile_for(
    fn: Callable,
    args: tuple[Any, ...],
    topology: str,
) -> jax.stages.Compiled:
    """fn(*args) compiled for one chip of the topology, in this process.

    Args: args: trees of ShapeDtypeStructs.
    Raises: what the compiler raises, and as `topology_devices`.
    """
    with on_chip(topology) as mesh:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

        def place(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        traced = jax.jit(fn).trace(*jax.tree.map(place, args))
        return traced.lower(lowering_platforms=("tpu",)).compile()


# ---- Estimates ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """The schedule of one kernel, for one grid step; loops count by their turns."""

    name: str
    bundles: int
    # By unit: the bundles that it would need if no other unit and no dependency
    # made it wait.
    least_bundles: dict[str, float]


@dataclasses.dataclass(frozen=True)
class StaticCost:
    """The estimate for one program. Times are seconds."""

    device_kind: str
    floor: float  # arguments read and outputs written once, at the chip's HBM bandwidth
    memory: float  # what the kernels move by their own account: bands pass some arrays twice
    kernels: tuple[KernelCost, ...]
    compute: float  # all kernels' bundles x grid steps of a core / clock
    temporaries: int  # bytes of HBM for neither arguments nor outputs
    bands: int  # grid steps of an image

    @property
    def bundles(self) -> int:
        """Of one image, in all kernels."""
        return sum(kernel.bundles for kernel in self.kernels) * self.bands

    def least_bundles(self, unit: str) -> float:
        """What the unit alone would need for one image."""
        needed = sum(kernel.least_bundles.get(unit, 0) for kernel in self.kernels)
        return needed * self.bands

    @property
    def ratio(self) -> float:
        """The estimate in units of the floor."""
        return max(self.compute, self.memory, self.floor) / self.floor


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled, and how often its kernels run."""

    fn: Callable  # picklable: a module's function, or a functools.partial of one
    args: tuple[Any, ...]  # trees of ShapeDtypeStructs
    # Each Pallas kernel inside takes images x bands grid steps. The images are halved where
    # a chip has two cores: the kernels' first grid axis is parallel, and of two where two
    # divides the batch.
    images: int
    bands: int = 1


def estimate(programs: dict[str, Program], topology: str) -> dict[str, StaticCost]:
    """Compiles programs for one chip of the topology, and reads their schedules.

    Args: topology: "v5e:2x2", "v4:2x2x1", ...
    Returns: the estimates by the programs' names.
    Raises: RuntimeError with the compiler's words if a program does not compile; and as
      `topology_devices`.
    """
    jobs = [(program.fn, program.args) for program in programs.values()]
    measured = _compile_in_child(jobs, topology)
    pairs = zip(programs.items(), measured)
    return {name: _cost(program, found) for (name, program), found in pairs}


def _cost(program: Program, measured: "_Measured") -> StaticCost:
    chip = chips.TPUS[measured.device_kind]
    kernels = tuple(KernelCost(*kernel) for kernel in measured.kernels)
    images = program.images
    if images % measured.cores == 0:
        images //= measured.cores
    bundles = sum(kernel.bundles for kernel in kernels) * program.bands
    return StaticCost(
        device_kind=measured.device_kind,
        floor=measured.arguments_and_outputs / chip.bandwidth,
        memory=measured.moved / chip.bandwidth,
        kernels=kernels,
        compute=bundles * images / chip.clock,
        temporaries=measured.temporaries,
        bands=program.bands,
    )


class _Measured(NamedTuple):
    """What the child tells of a compiled program; sizes are bytes."""

    device_kind: str
    cores: int
    arguments_and_outputs: int
    moved: int  # through HBM, as each kernel's pl.CostEstimate says
    temporaries: int
    kernels: list[tuple[str, int, dict[str, float]]]  # the fields of KernelCost


def _compile_in_child(jobs, topology) -> list[_Measured]:
    """Compiles in a process of its own: libtpu reads its flags once."""
    with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as folder:
        dumps = os.path.join(folder, "dumps")
        result = os.path.join(folder, "result.pickle")
        flags = (
            f"--xla_jf_dump_to={dumps}",
            "--xla_jf_dump_llo_text=true",
            # Of some hundred passes: all of them are 100 MB, and half of the time.
            "--xla_jf_dump_llo_pass_label_regex=.*(final_bundles|final_hlo).*",
        )
        child = subprocess.run(
            [sys.executable, "-m", "lit_jax.costs.tpu_schedule", "--compile-to", result],
            input=pickle.dumps((jobs, topology, dumps)),
            env=dict(os.environ, JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=" ".join(flags)),
            capture_output=True,
        )
        if child.returncode:
            _raise(child.stderr.decode(errors="replace").strip().splitlines())
        with open(result, "rb") as file:
            return [_Measured(*values) for values in pickle.load(file)]


def _raise(lines):
    """Raises what a process that wrote these lines raised, as far as we name it."""
    for kind in (ValueError, FileNotFoundError):
        prefix = f"{kind.__name__}: "
        for line in reversed(lines):  # JAX has words of its own after the error
            if line.startswith(prefix):
                raise kind(line.removeprefix(prefix))
    raise RuntimeError("\n".join(lines[-10:]))


def _compile_to(path: str) -> None:
    """Runs in the child: compiles what stdin holds, and writes what the parent wants of it."""
    jobs, topology, dumps = pickle.load(sys.stdin.buffer)
    measured = []
    for fn, args in jobs:
        os.makedirs(dumps)
        compiled = compile_for(fn, args, topology)
        kernels = [dataclasses.astuple(kernel) for kernel in _read_kernels(dumps)]
        shutil.rmtree(dumps)  # the next program's kernels may have the same names

        memory: Any = compiled.memory_analysis()
        shardings: Any = compiled.input_shardings
        chip = jax.tree.leaves(shardings)[0].mesh.devices.flat[0]
        text = compiled.as_text() or ""
        lines = [line for line in text.splitlines() if KERNEL in line]
        moved = re.findall(r'"bytes_accessed":"(\d+)"', "\n".join(lines))
        found = _Measured(
            device_kind=chip.device_kind,
            cores=chip.num_cores,
            arguments_and_outputs=memory.argument_size_in_bytes + memory.output_size_in_bytes,
            moved=sum(map(int, moved)),
            temporaries=memory.temp_size_in_bytes,
            kernels=kernels,
        )
        # A plain tuple: the class would be pickled as one of __main__.
        measured.append(tuple(found))
    with open(path, "wb") as file:
        pickle.dump(measured, file)


def _read_kernels(folder: str) -> Iterator[KernelCost]:
    """The Pallas kernels among the compiler's dumps."""
    pattern = "*final_hlo-static-per-bundle-utilization.txt"
    for path in sorted(glob.glob(os.path.join(folder, pattern))):
        found = re.match(r"\d+-(.+?)-\d+-final_hlo-static", os.path.basename(path))
        assert found, path
        name = found.group(1)
        pattern = f"*-{glob.escape(name)}-*-schedule-analysis_final_bundles.txt"
        schedules = glob.glob(os.path.join(folder, pattern))
        if name == "TLP" or not any(KERNEL in _read(schedule) for schedule in schedules):
            continue  # the program's own code and XLA's fusions
        pattern = f"*-{glob.escape(name)}-*[0-9]-final_bundles.txt"
        (schedule,) = glob.glob(os.path.join(folder, pattern))
        turns = np.array(bundle_turns(_read(schedule)))

        # A line of units, one of the slots that a bundle has for each, a rule, and then
        # a line a bundle of the slots that it uses.
        lines = _read(path).splitlines()
        head = next(i for i, line in enumerate(lines) if line.startswith("MATMUL"))
        units = lines[head].split(", ")
        slots = [int(x) for x in lines[head + 1].split()]
        bundles = [line for line in lines[head + 3 :] if line.strip()]
        used = turns @ np.array([[int(x) for x in line.split()] for line in bundles])
        needed = {unit: float(n) / slot for unit, n, slot in zip(units, used, slots) if n}
        yield KernelCost(name=name, bundles=int(turns.sum()), least_bundles=needed)


def bundle_turns(schedule: str) -> list[int]:
    """How often each bundle of a schedule issues in one grid step.

    A loop compares its counter with a constant and branches back to its first bundle. It
    counts once where it is not known how often it turns, and where a branch leads past it:
    the kernels have such loops for their first step.
    """
    # A bundle begins with its address, a mark
    # where branches lead, and a > for each loop.
    address = r"^ *(?:0x[0-9a-f]+|0) +(?=[A-Z:])"
    bundles = re.split(address, schedule, flags=re.MULTILINE)[1:]
    starts = {}  # where regions begin
    for i, bundle in enumerate(bundles):
        begin = r"(?:Start|Start/End empty) region (\d+)"
        for region in re.findall(begin, bundle):
            starts[region] = i

    loops = {}  # bundles first..last, and their text
    skipped = []
    for i, bundle in enumerate(bundles):
        branch = r"sbr\.rel .*?target = \$region(\d+)"
        for region in re.findall(branch, bundle):
            target = starts.get(region, i)
            low, high = sorted((i, target))
            text = "".join(bundles[low:high])
            # Where DMAs start it is the loop over the grid, or a step of it.
            if "dma." in text:
                continue
            if target < i:
                # A branch takes effect four bundles later.
                loops[target, i + 4] = text + bundle
            else:
                skipped.append((i, target))

    turns = [1] * len(bundles)
    test = r"scmp\.ge\.s32\.totalorder \S+, (\d+) /\* loop exit test"
    for (first, last), text in loops.items():
        limits = re.findall(test, text)
        once = any(start < first and last < end for start, end in skipped)
        if limits and not once:
            for i in range(first, last + 1):
                turns[i] *= int(limits[-1])  # the last: loops inside have their own
    return turns


def _read(path):
    with open(path) as file:
        return file.read()


# ---- The linear attention ----------------------------------------------------


def attention_program(
    case: Case,
    batch: int,
    name: str,
) -> tuple[Callable, tuple[Any, ...]]:
    """The linear attention's TPU kernels as (fn, args); `name` is forward or backward."""
    B = batch
    T = case.tokens
    D = case.width
    K = case.conv_size
    array = functools.partial(jax.ShapeDtypeStruct, dtype=case.dtype)
    filters = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    inputs: tuple[Any, ...] = (array((B, T, D)), array((B, T, 2 * D)), None, None)
    if K:
        inputs = (*inputs[:2], filters((K, K, case.head_width)), filters((case.head_width,)))

    if name == "forward":
        return functools.partial(linear_attention_tpu.forward, case=case), (inputs,)
    # Nothing saved by the forward, and the cotangent.
    args = (inputs, None, array((B, T, D)))
    return functools.partial(linear_attention_tpu.backward, case=case), args


def attention_costs(case: Case, batch: int, topology: str) -> dict[str, StaticCost]:
    """The estimates of the linear attention's TPU kernels, by pass.

    Returns: {"forward": ..., "backward": ...}, each of the pass by itself.
    Raises: as `estimate`.
    """
    programs = {}
    with on_chip(topology):  # whose VMEM decides on bands
        for name in PASSES:
            plan = linear_attention_tpu_plan.make_plan(case, backward=name == "backward")
            programs[name] = Program(*attention_program(case, batch, name), batch, plan.bands)
    return estimate(programs, topology)


# ---- The command -------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=256, help="a token is 16 pixels wide")
    parser.add_argument("--tokens", type=int, default=8192, help="B * T; at least two images")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--compile-to", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.compile_to:
        _compile_to(flags.compile_to)
        return

    if flags.width < 1 or flags.heads < 1 or flags.width % flags.heads:
        parser.error(f"--heads={flags.heads} does not divide --width={flags.width}")
    if flags.pixels < 1 or flags.pixels % PIXELS_PER_TOKEN:
        parser.error(f"--pixels={flags.pixels} is not a multiple of a token's {PIXELS_PER_TOKEN}")
    if flags.tokens < 1:
        parser.error(f"--tokens={flags.tokens} is not at least 1")
    side = flags.pixels // PIXELS_PER_TOKEN
    case = Case(width=flags.width, num_heads=flags.heads, grid=(side, side))
    batch = max(2, flags.tokens // case.tokens)
    try:
        costs = attention_costs(case, batch, flags.topology)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))

    _write_row(
        "width",
        "pixels",
        "chip",
        "pass",
        "bundles",
        "vector unit",
        "matrix unit",
        "us",
        "x floor",
    )
    for name, cost in costs.items():
        _write_row(
            flags.width,
            flags.pixels,
            cost.device_kind,
            name,
            cost.bundles,
            f"{cost.least_bundles('VALU'):.0f}",
            f"{cost.least_bundles('MATMUL'):.0f}",
            f"{cost.compute * 1e6:.1f}",
            f"{cost.ratio:.2f}",
        )


def _write_row(*cells):
    sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")


if __name__ == "__main__":
    main()

"""What a TPU kernel costs by its compiler's own schedule, on a machine without a TPU.

libtpu compiles for a named topology anywhere and dumps the final schedule of each Pallas kernel: VLIW bundles, of which a
core issues one a cycle. Bundles x grid steps of a core / clock is then the kernel's compute time, and the larger of that and
the time HBM needs for what the kernels move is an estimate. It is a model, not a timing, good for comparing versions. The
body of a loop inside a kernel is counted once: `loop_turns` multiplies it by hand. Not counted: what a launch takes, and what
XLA does around the kernels (copies that pad a ragged grid).

    python -m lit_jax.costs.tpu_schedule --width=1152 --heads=4 --pixels=256 --topology=v5e:2x2

prints the rows of docs/kernels_tpu.md for one size and resolution, and

    python -m lit_jax.costs.tpu_schedule --product

compiles the kernels for every chip, model size, resolution and pass, and prints what came of each.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lit_jax.kernels import linear_attention_tpu

# device kind -> (clock in GHz, HBM in GB/s), the vendor's figures of a chip, which is one device with all of its cores
CHIPS = {
    "TPU v4": (1.05, 1228),
    "TPU v5 lite": (1.5, 819),
    "TPU v5": (1.75, 2765),
    "TPU v6 lite": (1.75, 1640),
}

# What the kernels have to compile for: LiT's S, B, L and XL by (width, heads), on a slice of each chip.
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
SIZES = {"S": (384, 2), "B": (768, 3), "L": (1024, 4), "XL": (1152, 4)}
PIXELS = (256, 512, 1024, 2048)
PIXELS_PER_TOKEN = 16  # an autoencoder of 8x, patches of 2
PASSES = ("forward", "backward")
KERNEL = "tpu_custom_call"  # what a Pallas kernel is called in a compiled program


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """The schedule of one kernel: bundles of one grid step, and slots issued and needed at least by each unit."""

    name: str
    bundles: int
    least_bundles: dict[
        str, float
    ]  # unit -> bundles it would need if no other unit and no dependency held it up


@dataclasses.dataclass(frozen=True)
class StaticCost:
    """The estimate for one program. Times are seconds."""

    device_kind: str
    floor: float  # arguments read and outputs written once, at the chip's HBM bandwidth
    memory: float  # what the kernels move by their own account: in bands some arrays pass more than once
    kernels: tuple[KernelCost, ...]
    compute: float  # all kernels' bundles x grid steps of a core / clock
    temporaries: int  # bytes of HBM beside arguments and outputs

    @property
    def ratio(self) -> float:
        """The estimate in units of the floor."""
        return max(self.compute, self.memory, self.floor) / self.floor


def estimate(
    fn: Callable,
    args: tuple[jax.ShapeDtypeStruct, ...],
    grid_steps: int,
    topology: str,
    loop_turns: int = 1,
) -> StaticCost:
    """Compiles fn(*args) for one chip of the topology in a process of its own (libtpu reads its flags once).

    Args:
        fn: picklable: a module's function, or a functools.partial of one.
        grid_steps: grid steps of each Pallas kernel inside, halved where a chip has two cores: the kernels' first grid axis is
            parallel and of two where two divides the batch.
        topology: "v5e:2x2", "v4:2x2x1", ...
        loop_turns: turns of the loops inside the kernels. What stands outside the loops is then counted too often.

    Raises: RuntimeError with the compiler's words if the program does not compile; ValueError for a topology that libtpu or
    this file does not know; FileNotFoundError without libtpu.
    """
    with tempfile.TemporaryDirectory(prefix="static_cost_") as dump:
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
        )
        result = os.path.join(dump, "result.pickle")
        child = subprocess.run(
            [sys.executable, "-m", "lit_jax.costs.tpu_schedule", "--compile-to", result],
            input=pickle.dumps((fn, args, topology)),
            env=environment,
            capture_output=True,
        )
        if child.returncode:
            words = child.stderr.decode(errors="replace").strip().splitlines()
            for kind in (ValueError, FileNotFoundError):
                for line in reversed(words):  # JAX has words of its own after the error
                    if line.startswith(f"{kind.__name__}: "):
                        raise kind(line.removeprefix(f"{kind.__name__}: "))
            raise RuntimeError("\n".join(words[-10:]))
        with open(result, "rb") as file:
            device_kind, cores, least, moved, temporaries = pickle.load(file)
        kernels = tuple(_read_kernels(dump))
    clock, bandwidth = CHIPS[device_kind]
    steps = grid_steps // cores if grid_steps % cores == 0 else grid_steps
    compute = sum(kernel.bundles for kernel in kernels) * steps * loop_turns / (clock * 1e9)
    return StaticCost(
        device_kind=device_kind,
        floor=least / (bandwidth * 1e9),
        memory=moved / (bandwidth * 1e9),
        kernels=kernels,
        compute=compute,
        temporaries=temporaries,
    )


def _compile_to(path):
    """Runs in the child: compiles the program that stdin holds and writes what the parent wants of it to a file."""
    fn, args, topology = pickle.load(sys.stdin.buffer)
    compiled = compile_for(fn, args, topology)
    memory = compiled.memory_analysis()
    chip = compiled.input_shardings[0][0].mesh.devices.flat[0]
    kernels = "\n".join(line for line in compiled.as_text().splitlines() if KERNEL in line)
    moved = sum(
        map(int, re.findall(r'"bytes_accessed":"(\d+)"', kernels))
    )  # what each kernel's pl.CostEstimate says
    with open(path, "wb") as file:
        pickle.dump(
            (
                chip.device_kind,
                chip.num_cores,
                memory.argument_size_in_bytes + memory.output_size_in_bytes,
                moved,
                memory.temp_size_in_bytes,
            ),
            file,
        )


def compile_for(
    fn: Callable, args: tuple[jax.ShapeDtypeStruct, ...], topology: str
) -> jax.stages.Compiled:
    """fn(*args) compiled for one chip of the topology, in this process."""
    with on_chip(topology) as mesh:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).compile()


@contextlib.contextmanager
def on_chip(topology: str, field: str = "topology") -> Iterator[jax.sharding.Mesh]:
    """One chip of the topology as the mesh in context, which a kernel asks for its VMEM."""
    mesh = jax.sharding.Mesh(np.array(topology_devices(topology, field=field)[:1]), ("chip",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield mesh


def topology_devices(topology: str, slices: int = 1, field: str = "topology") -> list[jax.Device]:
    """The chips of a TPU slice, or of several, to compile for; `field` is what an error calls the topology.

    Raises: ValueError for a name that libtpu does not know or chips that CHIPS does not, FileNotFoundError without libtpu.
    """
    from jax.experimental import topologies  # asks for libtpu

    if not topology:  # libtpu would take it for its oldest chip
        raise ValueError(f"{field} is empty; it names a TPU slice, for example v5e:2x4, v5p:2x2x2")
    # Nothing is loaded onto a chip, so libtpu may be loaded twice and need not ask who and where it is: any answer will do.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
    ):
        os.environ.setdefault(name, value)
    kwargs = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        kwargs["chip_config_name"] = (
            "megacore"  # both cores of a chip are one device, as where JAX runs on one
        )
    try:
        devices = list(topologies.get_topology_desc(topology, platform="tpu", **kwargs).devices)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise FileNotFoundError(
                "compiling for a TPU needs libtpu, its compiler: pip install libtpu"
            ) from error
        raise ValueError(
            f"{field} = {topology!r} (for example v5e:2x4, v5p:2x2x2): {str(error).splitlines()[0]}"
        ) from error
    if devices[0].device_kind not in CHIPS:
        raise ValueError(
            f"{field} = {topology} is of {devices[0].device_kind} chips; known are {', '.join(CHIPS)}"
        )
    return devices


def _read_kernels(dump):
    """The Pallas kernels among the compiler's dumps."""
    for path in sorted(
        glob.glob(os.path.join(dump, "*final_hlo-static-per-bundle-utilization.txt"))
    ):
        name = re.match(r"\d+-(.+?)-\d+-final_hlo-static", os.path.basename(path)).group(1)
        schedules = glob.glob(
            os.path.join(dump, f"*-{glob.escape(name)}-*-schedule-analysis_final_bundles.txt")
        )
        if name == "TLP" or not any(KERNEL in _read(schedule) for schedule in schedules):
            continue  # the program's own code and XLA's fusions
        lines = _read(path).splitlines()
        head = next(i for i, line in enumerate(lines) if line.startswith("MATMUL"))
        units, slots = lines[head].split(", "), [int(x) for x in lines[head + 1].split()]
        rows = np.array(
            [[int(x) for x in line.split()] for line in lines[head + 3 :] if line.strip()]
        )
        needed = {unit: used / slot for unit, used, slot in zip(units, rows.sum(0), slots) if used}
        yield KernelCost(name=name, bundles=len(rows), least_bundles=needed)


def _read(path):
    with open(path) as file:
        return file.read()


def attention_program(
    D: int,
    num_heads: int,
    grid: tuple[int, int],
    batch: int,
    name: str,
    K: int = 5,
    dtype: str = "bfloat16",
) -> tuple[Callable, tuple[jax.ShapeDtypeStruct, ...]]:
    """The linear attention's TPU kernels as (fn, args); name is forward or backward."""

    T, H = grid[0] * grid[1], D // num_heads
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    filters = (
        [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((K, K, H), (H,))] if K else [None, None]
    )
    args = (shape((batch, T, D)), shape((batch, T, 2 * D)), *filters)
    if name == "backward":
        args += (None, shape((batch, T, D)))  # nothing saved by the forward, and the cotangent
    return functools.partial(
        getattr(linear_attention_tpu, name), num_heads=num_heads, grid=grid
    ), args


def attention_costs(
    D: int,
    num_heads: int,
    grid: tuple[int, int],
    batch: int,
    topology: str,
    K: int = 5,
    dtype: str = "bfloat16",
) -> dict[str, StaticCost]:
    """The estimates of the linear attention's TPU kernels, {"forward": ..., "backward": ...}, each by itself."""

    with on_chip(topology):
        turns = {
            name: linear_attention_tpu.loop_turns(D, num_heads, grid, K, dtype, name == "backward")
            for name in PASSES
        }
    return {
        name: estimate(
            *attention_program(D, num_heads, grid, batch, name, K, dtype),
            batch,
            topology,
            turns[name],
        )
        for name in PASSES
    }


def compile_product(tokens: int) -> int:
    """Compiles every chip, size, resolution and pass; prints a table and returns how many failed.

    A cell: kernel launches, MB of HBM beside arguments and outputs, seconds of compiling; or the compiler's first words.
    """
    failures = 0
    _row("chip", "size", *(f"{pixels} px {name}" for pixels in PIXELS for name in PASSES))
    sys.stdout.write("|---" * (2 + len(PIXELS) * len(PASSES)) + "|\n")
    for topology in TOPOLOGIES:
        for size, (D, num_heads) in SIZES.items():
            cells = []
            for pixels in PIXELS:
                side = pixels // PIXELS_PER_TOKEN
                for name in PASSES:
                    start = time.monotonic()
                    try:
                        program = attention_program(
                            D, num_heads, (side, side), max(1, tokens // side**2), name
                        )
                        compiled = compile_for(*program, topology)
                    except (
                        Exception
                    ) as error:  # whatever the compiler raises is the result of this cell
                        failures += 1
                        cells.append(f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
                        continue
                    launches = compiled.as_text().count(f'custom_call_target="{KERNEL}"')
                    temporaries = compiled.memory_analysis().temp_size_in_bytes
                    cells.append(
                        f"{launches}, {temporaries / 1e6:.1f} MB, {time.monotonic() - start:.0f} s"
                    )
            _row(topology.split(":")[0], size, *cells)
    sys.stdout.write(
        f"{len(TOPOLOGIES) * len(SIZES) * len(PIXELS) * len(PASSES)} programs, {failures} failed\n"
    )
    return failures


def _row(*cells):
    sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=256, help="a token is 16 pixels wide")
    parser.add_argument("--tokens", type=int, default=8192, help="B * T; at least two images")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument(
        "--product", action="store_true", help="compile for every chip, size, resolution and pass"
    )
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
    if flags.product:
        sys.exit(1 if compile_product(flags.tokens) else 0)
    side = flags.pixels // PIXELS_PER_TOKEN
    batch = max(2, flags.tokens // side**2)
    try:
        costs = attention_costs(flags.width, flags.heads, (side, side), batch, flags.topology)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    sys.stdout.write(
        "| width | pixels | chip | pass | bundles | vector unit | matrix unit | us | x floor |\n"
    )
    for name, cost in costs.items():
        bundles = sum(kernel.bundles for kernel in cost.kernels)
        vector, matrix = (
            sum(kernel.least_bundles.get(unit, 0) for kernel in cost.kernels)
            for unit in ("VALU", "MATMUL")
        )
        sys.stdout.write(
            f"| {flags.width} | {flags.pixels} | {cost.device_kind} | {name} | {bundles} | {vector:.0f} | "
            f"{matrix:.0f} | {cost.compute * 1e6:.1f} | {cost.ratio:.2f} |\n"
        )


if __name__ == "__main__":
    main()

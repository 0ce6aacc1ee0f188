"""What a config would need and cost on a TPU slice that is not there.

libtpu compiles the config's real programs for a named topology, on any Linux
machine. Memory is the compiler's own account, a device. FLOPs are counted by
formula; bytes and collectives are read off the compiled program. The time is a
roofline of these, not a measurement.
"""

import concurrent.futures
import copy
import dataclasses
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lit_jax import checkpoint, sharding
from lit_jax.costs import chips, hlo
from lit_jax.costs.chips import TPU, GiB
from lit_jax.costs.flops import train_step_flops
from lit_jax.costs.tpu_schedule import topology_devices
from lit_jax.data.buckets import UNITS, Buckets, name_of
from lit_jax.experiment import Experiment
from lit_jax.models import Model, param_shapes
from lit_jax.models.attention import make_attention
from lit_jax.settings import naming
from lit_jax.train_step import make_train_step, with_sharding

SHOWN_MOVERS = 12  # parts of the model that move most; plan.json has all
MAX_TRIES = 6  # compilations that may go into finding the largest batch
PROGRAMS = ("distill", "plain", "sample")
CHIP = "a chip"  # of which most figures are
CORE = "a core"  # where a chip has a device for each of its cores
AUTOENCODER = "0.31 GiB for the 83,653,863 parameters of Stable Diffusion's"


@dataclasses.dataclass
class Estimate:
    """One program on one slice.

    Bytes and FLOPs are a device's, of one run: a step, or one batch of samples.
    """

    program: str
    batch_size: int  # of all devices
    fits: bool
    needs: float  # bytes of memory at the peak
    capacity: float  # bytes that the compiler lets a program use
    of_what: str = CHIP
    arguments: float = 0.0  # bytes of state, teacher, batch
    temporaries: float = 0.0
    outputs: float = 0.0  # bytes of results that are not written over the state
    compile_seconds: float = 0.0
    flops: float = 0.0  # of the model's definition
    executed_flops: float = 0.0  # and what rematerialisation repeats
    traffic: float = 0.0  # bytes through memory
    # The same by the part of the model that moves it, see `hlo.Program.movers`.
    movers: dict[str, float] = dataclasses.field(default_factory=dict)
    # By kind: how often they run, on how many bytes, and what a device sends.
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    # By what takes them: see `roofline`.
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    images_per_second: float = 0.0  # of all devices
    mfu: float = 0.0
    # Arrays that steps of the program make: bytes, shape, instruction.
    largest: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Plans the programs in config.plan.programs, on stdout and in workdir/plan.json.

    Raises: ValueError (exit status 1) when one of them does not fit, after the
      shortfall and the largest batch that does are printed; and for a config
      that cannot be run on the slice.
    """
    # ---- What is asked -------------------------------------------------------
    # No device is used: this machine's, if any, are left to others.
    jax.config.update("jax_platforms", "cpu")
    plan = config.plan
    unknown = sorted(set(plan.programs) - set(PROGRAMS))
    if unknown or not plan.programs:
        raise ValueError(
            f"plan.programs names {', '.join(unknown) or 'nothing'}; "
            f"it may name {', '.join(PROGRAMS)}"
        )
    with naming("plan"):
        devices = topology_devices(plan.topology, plan.slices)
    # Of ("all",) as of names: the table's order.
    names: list[str] = []
    if plan.buckets:
        with naming("plan", names="plan.buckets"):
            names = [name_of(shape) for shape in Buckets(UNITS, tuple(plan.buckets)).shapes]
    planners = {name: Planner(of_bucket(config, name), devices) for name in names or ("",)}

    # ---- Compile -------------------------------------------------------------
    started = time.monotonic()
    wanted = [(name, program) for name in planners for program in plan.programs]
    # Two at a time: the compiler lets go of the interpreter.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        estimates = list(pool.map(lambda each: planners[each[0]].estimate(each[1]), wanted))
    for (bucket, program), estimate in zip(wanted, estimates):
        if program == plan.programs[0]:
            _show((f"bucket {bucket}: " if bucket else "") + planners[bucket].heading())
        _show(describe(estimate))

    # ---- The largest batch ---------------------------------------------------
    found = {f"{program} {bucket}".strip(): e for (bucket, program), e in zip(wanted, estimates)}
    largest = {}
    for (bucket, _), (name, estimate) in zip(wanted, found.items()):
        if estimate.fits and not plan.largest_batch:
            continue
        size = planners[bucket].largest_batch(estimate)
        largest[name] = size
        text = f"the largest batch found to fit is {size}"
        if not size:
            text = (
                "not even the smallest batch fits: take more chips, mesh.fsdp, or train.remat=full"
            )
        _show(f"{name}: {text}")
    _show(f"planned in {time.monotonic() - started:.0f} s")

    # ---- Report --------------------------------------------------------------
    report = {
        "topology": plan.topology,
        "slices": plan.slices,
        "chips": planners[wanted[0][0]].chips,
        "mesh": dict(planners[wanted[0][0]].mesh.shape),
        "largest_batch": largest,
        "programs": {name: dataclasses.asdict(e) for name, e in found.items()},
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "plan.json").write_text(json.dumps(report, indent=1) + "\n")
    too_large = [e for e in estimates if not e.fits]
    if too_large:
        raise ValueError("; ".join(_shortfall(e, plan.topology) for e in too_large))


def of_bucket(config: ConfigDict, name: str) -> ConfigDict:
    """The config with the images of a bucket of aspects; an empty name: as it is."""
    if not name:
        return config
    nominal = config.model.input_size
    with naming("plan", size="model.input_size", names="plan.buckets"):
        # Sides are counted in the cells of the model's input here, not in pixels.
        sides = Buckets(nominal, (name,)).sides(0)
    # Not of a resolved copy, whose sides would be one whole number.
    changed = copy.deepcopy(config)
    changed.model.input_size = sides
    return changed


def _shortfall(e: Estimate, topology: str) -> str:
    short = (e.needs - e.capacity) / GiB
    return (
        f"{e.program} at batch {e.batch_size} needs {e.needs / GiB:.2f} GiB "
        f"{e.of_what} of {topology}, {short:.2f} GiB more than it has"
    )


# ---- The programs ------------------------------------------------------------


class Planner:
    """Lowers and compiles a config's programs for the given chips.

    Raises: ValueError for a config that cannot be run on them.
    """

    def __init__(self, config: ConfigDict, devices: list[Any]):
        self._config = config
        self._chip = chips.TPUS[devices[0].device_kind]
        self._of_what = CHIP if self._chip.per_chip == 1 else CORE
        self._slices = len({getattr(device, "slice_index", 0) for device in devices})
        experiment = Experiment(config)
        with naming("mesh", fsdp="mesh.fsdp"):
            self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
        experiment.mesh = self.mesh  # of the chips that are not there
        experiment.check_batches()
        experiment.check_platform()
        self._experiment = experiment

        # A plan comes before the weights. Without the file
        # the teacher is the model that the config says it is.
        path = config.teacher.checkpoint
        self._teacher_is_there = bool(path) and epath.Path(path).exists()
        there = experiment.teacher if self._teacher_is_there else None
        teacher = there or experiment.default_teacher()
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            self.model = on_tpu(experiment.model, experiment.input_size)
            self.teacher = on_tpu(teacher, experiment.input_size)

        self.state = experiment.sharded_state_shapes
        dtype = config.teacher.dtype
        shapes = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, dtype),
            param_shapes(teacher.config),
        )
        shardings = sharding.fsdp_sharding(shapes, self.mesh)
        self.teacher_params = with_sharding(shapes, shardings)

    def heading(self) -> str:
        """What is planned, in a line or a few."""
        config = self._config
        mesh = self.mesh.shape
        slices = f"{self._slices} slices of " if self._slices > 1 else ""
        student = checkpoint.parameter_count(self.state.params)
        teacher = checkpoint.parameter_count(self.teacher_params)
        text = (
            f"{slices}{config.plan.topology}, {self._count()}, "
            f"mesh data {mesh['data']} x fsdp {mesh['fsdp']}; "
            f"student {student:,} parameters "
            f"({self.model.config.attention}, {self.model.implementation}), "
            f"teacher {teacher:,} ({self.teacher.implementation})"
        )
        if config.teacher.checkpoint and not self._teacher_is_there:
            planned = self.teacher.config
            family = type(planned).__name__.removesuffix("Config")
            text += (
                f"\nteacher.checkpoint = {config.teacher.checkpoint} "
                f"is not there (yet): the teacher planned is a {family} of "
                f"{planned.depth} layers of width {planned.width}"
            )
        if config.autoencoder.checkpoint and "sample" in config.plan.programs:
            text += (
                f"\nsample ends with latents; to decode them {self._of_what} holds, "
                f"beside what it needs, the whole of autoencoder.checkpoint = "
                f"{config.autoencoder.checkpoint} in float32 ({AUTOENCODER}) "
                f"and the activations of autoencoder.slice_size = "
                f"{config.autoencoder.slice_size} images"
            )
        return text

    @property
    def chips(self) -> int:
        """How many there are."""
        return self.mesh.size // self._chip.per_chip

    def _count(self) -> str:
        text = f"{self.chips} chips"
        if self._of_what == CORE:
            text += f" of {self._chip.per_chip} cores, each of them a device of JAX"
        return text

    def lower(self, program: str, batch_size: int) -> jax.stages.Lowered:
        """The program at a global batch size, lowered for the slice."""
        if program == "sample":
            # Without the decoder, whose parameters are read from a file.
            model = self._experiment.for_drawing(self.model)
            sampler = self._experiment.sampler(model, batch_size, decodes=False)
            index = self._rows((batch_size,), jnp.int32)
            condition = self._condition(batch_size)
            return sampler.lower(self._drawn_params(model), index, condition)

        distill = program == "distill"
        train_step: Any = make_train_step(
            self.model,
            self.teacher if distill else None,
            self._experiment.process,
            self._experiment.optimizer_settings,
            self._experiment.unscaled_step_settings,
            self.mesh,
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        everywhere = sharding.replicated(self.mesh)
        return train_step.lower(
            self.state,
            self.teacher_params if distill else None,
            self._batch(batch_size),
            jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
        )

    def _drawn_params(self, model):
        """Shapes of what --mode=sample hands to its model, in int8 where it is asked for."""
        params = self.state.params
        shapes = jax.eval_shape(lambda: self._experiment.drawn_params(model, params))
        return with_sharding(shapes, sharding.fsdp_sharding(shapes, self.mesh))

    def _batch(self, batch_size):
        """What the data hand to the step."""
        channels = self.model.config.in_channels
        shape = (batch_size, *self._experiment.input_size, channels)
        # Which of the two the data hold cannot be asked
        # here: as many channels as a picture has are pixels.
        if channels in (1, 3):
            batch = {"image": self._rows(shape, jnp.uint8)}
        else:
            names = ("mean", "log_variance")
            batch = {name: self._rows(shape, jnp.float16) for name in names}
        batch["index"] = self._rows((batch_size,), jnp.int32)
        return batch | self._condition(batch_size)

    def _condition(self, batch_size):
        shapes = self.model.config.condition_shapes(batch_size)
        return {name: self._rows(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}

    def _rows(self, shape, dtype):
        rows = sharding.batch_sharding(self.mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    # ---- What they take ------------------------------------------------------

    def estimate(self, program: str, batch_size: int = 0) -> Estimate:
        """Compiles a program and reads off what it needs; batch_size 0: the config's.

        Raises: ValueError where the compiler fails, but for want of memory.
        """
        group = self._config.sample if program == "sample" else self._config.train
        batch_size = batch_size or group.batch_size
        lowered = self.lower(program, batch_size)
        started = time.monotonic()
        try:
            compiled, contents = _compile(lowered)
        except jax.errors.JaxRuntimeError as error:
            found = memory_shortage(str(error))
            if not found:
                raise ValueError(
                    f"the TPU compiler fails on {program} at batch {batch_size}: "
                    f"{str(error).splitlines()[0]}. "
                    f"Another mesh.fsdp, train.remat or libtpu may do"
                ) from error
            needs, capacity = found
            seconds = time.monotonic() - started
            return Estimate(
                program,
                batch_size,
                fits=False,
                needs=needs,
                capacity=capacity,
                of_what=self._of_what,
                compile_seconds=seconds,
            )
        seconds = time.monotonic() - started

        memory: Any = compiled.memory_analysis()
        arguments = memory.argument_size_in_bytes
        # What is donated is written over, and takes no memory of its own.
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = memory.temp_size_in_bytes
        code = memory.generated_code_size_in_bytes
        estimate = Estimate(
            program=program,
            batch_size=batch_size,
            fits=True,
            needs=arguments + outputs + temporaries + code,
            capacity=self._chip.memory,
            of_what=self._of_what,
            arguments=arguments,
            temporaries=temporaries,
            outputs=outputs,
            compile_seconds=seconds,
        )

        collectives = contents.collectives(self._slices)
        ici, dcn = link_bytes(collectives, self._slices)
        flops, executed_flops = self.flops(program, batch_size)
        estimate.flops = flops / self.mesh.size
        estimate.executed_flops = executed_flops / self.mesh.size
        estimate.movers = contents.movers()
        estimate.traffic = sum(estimate.movers.values())
        estimate.collectives = by_kind(collectives)
        estimate.largest = contents.largest_buffers()
        estimate.seconds = roofline(
            self._chip,
            flops=estimate.executed_flops,
            traffic=estimate.traffic,
            ici=ici,
            dcn=dcn,
        )
        longest = estimate.seconds[estimate.bound]
        estimate.images_per_second = batch_size / longest
        # Of the definition's FLOPs: what rematerialisation repeats is no use.
        estimate.mfu = estimate.flops / self._chip.peak_flops / longest
        return estimate

    def flops(self, program: str, batch_size: int) -> tuple[float, float]:
        """FLOPs of one run on all chips.

        Returns: those of the model's definition, and these with what
          rematerialisation computes again.
        """
        size = self._experiment.input_size
        forward = self.model.config.forward_flops(size)
        if program == "sample":
            sample = self._config.sample
            guided = sample.cfg_scale != 1  # with and without the condition
            total = batch_size * sample.steps * (2 if guided else 1) * forward
            return total, total

        teacher = 0.0
        if program == "distill":
            teacher = self.teacher.config.forward_flops(size)
        total = train_step_flops(forward, teacher)
        again = {
            "none": 0.0,
            "full": forward,
            # The projections are saved; the attention between is not.
            "dots": self.model.config.attention_flops(size),
        }
        executed = total + again[self._config.train.remat]
        return batch_size * total, batch_size * executed

    # ---- The largest batch ---------------------------------------------------

    def largest_batch(self, estimate: Estimate) -> int:
        """The largest global batch whose program fits; 0: not even one image a device.

        It is guessed from two that were compiled, for memory is about linear in
        the batch, and then tried.
        """
        unit = self.mesh.size  # a batch is a multiple of it
        if estimate.program != "sample":
            unit *= self._config.train.accumulation
        tried = {estimate.batch_size: estimate}
        smallest = unit
        if estimate.fits and estimate.batch_size == unit:
            smallest = 2 * unit
        guess = smallest
        while True:
            if guess not in tried:
                logging.info("%s: trying batch %d", estimate.program, guess)
                tried[guess] = self.estimate(estimate.program, guess)
            fitting = max((size for size, e in tried.items() if e.fits), default=0)
            if not fitting or len(tried) == MAX_TRIES:
                return fitting
            guess = _next_batch(tried, fitting, unit, estimate.capacity)
            if guess <= fitting:
                return fitting


def _next_batch(
    tried: dict[int, Estimate],
    fitting: int,
    unit: int,
    capacity: float,
) -> int:
    """The batch to try next; `fitting`, the largest that fits, where there is none."""
    too_large = min((size for size, e in tried.items() if not e.fits), default=0)
    if too_large and too_large - fitting <= unit:
        return fitting
    low = tried[fitting]
    high = tried[too_large or min(tried)]
    slope = (high.needs - low.needs) / (high.batch_size - low.batch_size)
    guess = 2 * fitting
    if slope > 0:
        guess = int(fitting + (capacity - low.needs) / slope)
    guess = guess // unit * unit
    if too_large:
        # Memory is not linear to the last byte. A guess
        # at the bound would move it by one unit a try.
        margin = max(unit, (too_large - fitting) // 10 // unit * unit)
        guess = min(guess, too_large - margin)
    return guess


# ---- Numbers -----------------------------------------------------------------


def roofline(
    chip: TPU, *, flops: float, traffic: float, ici: float, dcn: float
) -> dict[str, float]:
    """Seconds that each of a device's resources is busy, as if it were alone.

    Args: flops: executed. traffic: bytes through memory. ici, dcn: bytes sent
      inside a slice and between slices.
    """
    return {
        "compute": flops / chip.peak_flops,
        "memory": traffic / chip.bandwidth,
        "ici": ici / chip.ici,
        "dcn": dcn / chip.dcn,
    }


def link_bytes(
    collectives: Iterable[hlo.Collective],
    slices: int,
) -> tuple[float, float]:
    """Bytes that a device sends inside a slice, and its share of what leaves it."""
    ici = 0.0
    dcn = 0.0
    for collective in collectives:
        ici += collective.wire_bytes
        if collective.crosses_slices:
            # The chips of a slice that take part share what crosses.
            dcn += collective.wire_bytes / max(1, collective.group // slices)
    return ici, dcn


def _compile(lowered: jax.stages.Lowered) -> tuple[Any, hlo.Program]:
    """The compiled program, for its account of memory, and what it consists of."""
    with tempfile.TemporaryDirectory(prefix="plan_") as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        try:
            text: str = compiled.as_text() or ""
        # libtpu 0.0.52 cannot read back what it made where SparseCores gather the weights (v6e,
        # TPU7x). What it leaves while it compiles stands in for it.
        except jax.errors.JaxRuntimeError:
            dumps = pathlib.Path(folder).glob("*.after_optimizations.txt")
            text = max(dumps, key=lambda dump: dump.stat().st_size).read_text()
    return compiled, hlo.Program(text)


def by_kind(collectives: Iterable[hlo.Collective]) -> dict[str, dict[str, float]]:
    """Runs, bytes of arrays, and bytes that a device sends, by kind of collective."""
    kinds: dict[str, dict[str, float]] = {}
    for collective in collectives:
        empty = {"runs": 0, "bytes": 0.0, "wire_bytes": 0.0}
        entry = kinds.setdefault(collective.kind, empty)
        entry["runs"] += collective.times
        entry["bytes"] += collective.times * collective.size
        entry["wire_bytes"] += collective.wire_bytes
    return kinds


def on_tpu(model: Model, input_size: tuple[int, int]) -> Model:
    """The model with the attention that the TPU of the mesh in context would pick.

    Left to itself the model would ask this machine's devices.
    """
    if model.implementation is not None:
        return model
    p = model.config.patch_size
    grid = (input_size[0] // p, input_size[1] // p)
    attention = make_attention(model.config, dtype=model.dtype, parent=None)
    reason = attention.refusal("pallas_tpu", model.config.width, grid)
    return model.clone(implementation="xla" if reason else "pallas_tpu")


def memory_shortage(message: str) -> tuple[float, float] | None:
    """Bytes that a program needs and may use, if the TPU compiler refuses it for that.

    It has two ways to say so. The second speaks of temporaries alone: at least
    these are needed.
    """
    size = r"([\d.]+)([KMGT]?)"
    refusals = (
        f"Used {size} of {size} hbm",
        rf"temporaries \({size}\) exceeds available HBM \({size}\)",
    )
    units = {"": 1, "K": 2**10, "M": 2**20, "G": GiB, "T": 2**40}
    for text in refusals:
        if found := re.search(text, message):
            needs = float(found[1]) * units[found[2]]
            return needs, float(found[3]) * units[found[4]]
    return None


# ---- Text --------------------------------------------------------------------


def describe(e: Estimate) -> str:
    """A program's estimate in a few lines."""
    head = (
        f"{e.program}: batch {e.batch_size}, needs {binary(e.needs)} of {binary(e.capacity)} "
        f"{e.of_what}"
    )
    if not e.fits:
        return f"{head}: {binary(e.needs - e.capacity)} too much"

    lines = [
        f"{head} (arguments {binary(e.arguments)}, "
        f"temporaries {binary(e.temporaries)}); "
        f"compiled in {e.compile_seconds:.0f} s",
        f"  {e.of_what}   {decimal(e.flops, 'FLOP')} "
        f"({decimal(e.executed_flops, 'FLOP')} with rematerialisation), "
        f"{decimal(e.traffic, 'B')} through memory",
    ]
    for part in list(e.movers)[:SHOWN_MOVERS]:
        share = 100 * e.movers[part] / e.traffic
        lines.append(f"  moved    {decimal(e.movers[part], 'B')}, {share:.0f} %, by {part}")
    for kind, entry in sorted(e.collectives.items()):
        lines.append(
            f"  {kind:<19}{entry['runs']:>6.0f} x, "
            f"{decimal(entry['bytes'], 'B')} in all, "
            f"{e.of_what} sends {decimal(entry['wire_bytes'], 'B')}"
        )

    parts = ", ".join(f"{name} {decimal(x, 's')}" for name, x in e.seconds.items() if x)
    what = "batch of samples" if e.program == "sample" else "step"
    largest = [f"{shape} {decimal(size, 'B')}" for size, shape, _ in e.largest[:3]]
    lines += [
        f"  {what}   at least {decimal(e.seconds[e.bound], 's')}, bound by {e.bound} ({parts}; "
        f"{decimal(sum(e.seconds.values()), 's')} if nothing overlaps)",
        f"  so at most {e.images_per_second:,.0f} images/s, MFU {100 * e.mfu:.3g} %",
        f"  largest  {', '.join(largest)}",
    ]
    return "\n".join(lines)


def binary(count: float) -> str:
    """Bytes of memory for people, in three digits: "15.8 GiB"."""
    unit, *larger = ("B", "KiB", "MiB", "GiB")
    while larger and count >= 999.5:
        count /= 1024.0
        unit = larger.pop(0)
    return f"{_three_digits(count)} {unit}"


def decimal(amount: float, unit: str) -> str:
    """An amount with a prefix of SI, in three digits: "5.3 ms"."""
    # A second has no kilos to anybody.
    prefixes = ["n", "u", "m", "", *([] if unit == "s" else ["k", "M", "G", "T"])]
    amount *= 1e9
    prefix = prefixes.pop(0)
    while prefixes and amount >= 999.5:
        amount /= 1000.0
        prefix = prefixes.pop(0)
    return f"{_three_digits(amount)} {prefix}{unit}"


def _three_digits(x: float) -> str:
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def _show(text: str) -> None:
    """The plan is what the user asked for: stdout, without the log's prefix."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

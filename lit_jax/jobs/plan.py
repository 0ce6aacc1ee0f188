"""What a config would need and cost on a TPU slice, found by compiling its real programs for one that is not there.

libtpu compiles for a named topology on any Linux machine. Memory is the compiler's own account, a chip. FLOPs are counted by
formula, bytes and collectives read off the compiled program; time is a roofline of these, not a measurement.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from lit_jax import checkpoint, sharding
from lit_jax.costs import chips, hlo
from lit_jax.costs.chips import GB, GiB
from lit_jax.costs.flops import attention_macs, train_step_flops
from lit_jax.costs.tpu_schedule import topology_devices
from lit_jax.experiment import Experiment
from lit_jax.kernels.linear_attention import refusal
from lit_jax.models.attention import softmax_refusal
from lit_jax.models.dit import DiT, param_shapes
from lit_jax.train_step import make_train_step, with_sharding

MAX_TRIES = 6  # compilations that may go into finding the largest batch
PROGRAMS = ("distill", "plain", "sample")
AUTOENCODER = "0.31 GiB for the 83,653,863 parameters of Stable Diffusion's"


@dataclasses.dataclass
class Estimate:
    """One program on one slice; bytes and FLOPs are a chip's, of one run (a step, or one batch of samples)."""

    program: str
    batch_size: int
    fits: bool
    needs: float  # bytes of memory at the peak
    capacity: float  # bytes the compiler lets a program use
    arguments: float = 0.0  # bytes of state, teacher, batch
    temporaries: float = 0.0
    outputs: float = 0.0  # bytes of results that take memory of their own, not the donated state's
    compile_seconds: float = 0.0
    flops: float = (
        0.0  # of the model's definition: three forward passes of the student, one of the teacher
    )
    executed_flops: float = 0.0  # and what rematerialisation repeats
    traffic: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # by what takes them, each alone
    images_per_second: float = 0.0
    mfu: float = 0.0
    largest: list = dataclasses.field(default_factory=list)

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints the plan of the programs in config.plan.programs and writes it to workdir/plan.json.

    Raises: ValueError (exit status 1) when one of them does not fit, after printing the shortfall and the largest batch
    that does; and for a config that cannot be run on the slice.
    """
    jax.config.update(
        "jax_platforms", "cpu"
    )  # no device is used: leave this machine's, if any, to others
    plan = config.plan
    unknown = sorted(set(plan.programs) - set(PROGRAMS))
    if unknown or not plan.programs:
        raise ValueError(
            f"plan.programs names {', '.join(unknown) or 'nothing'}; it may name {', '.join(PROGRAMS)}"
        )
    planner = Planner(config, topology_devices(plan.topology, plan.slices, "plan.topology"))
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(
        2
    ) as pool:  # the compiler lets go of the interpreter
        estimates = list(pool.map(planner.estimate, plan.programs))
    _show(planner.heading())
    for estimate in estimates:
        _show(describe(estimate))
    too_large = [e for e in estimates if not e.fits]
    largest = {
        e.program: planner.largest_batch(e)
        for e in (estimates if plan.largest_batch else too_large)
    }
    for program, size in largest.items():
        _show(
            f"{program}: "
            + (
                f"the largest batch found to fit is {size}"
                if size
                else "not even the smallest batch fits: take more chips, mesh.fsdp, or train.remat=full"
            )
        )
    _show(f"planned in {time.monotonic() - started:.0f} s")
    workdir.mkdir(parents=True, exist_ok=True)
    report = {
        "topology": plan.topology,
        "slices": plan.slices,
        "mesh": dict(planner.mesh.shape),
        "largest_batch": largest,
        "programs": {e.program: dataclasses.asdict(e) for e in estimates},
    }
    (workdir / "plan.json").write_text(json.dumps(report, indent=1) + "\n")
    if too_large:
        raise ValueError(
            "; ".join(
                f"{e.program} at batch {e.batch_size} needs {e.needs / GiB:.2f} GiB a chip of "
                f"{plan.topology}, {(e.needs - e.capacity) / GiB:.2f} GiB more than it has"
                for e in too_large
            )
        )


class Planner:
    """Lowers and compiles a config's programs for the given chips."""

    def __init__(self, config: ConfigDict, devices: list[jax.Device]):
        self._config = config
        self._chip = chips.TPUS[devices[0].device_kind]
        self._peak_flops = self._chip.peak_flops
        self._slices = len({getattr(device, "slice_index", 0) for device in devices})
        self._experiment = experiment = Experiment(config)
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
        experiment.mesh = self.mesh
        experiment.check_batches()
        experiment.check_platform()
        model = experiment.model
        stated = config.teacher
        size = config.model.input_size
        # A plan comes before the weights: without the file the teacher is the DiT that the config says it is.
        self._teacher_is_there = (
            bool(stated.checkpoint) and pathlib.Path(stated.checkpoint).exists()
        )
        teacher = experiment.teacher if self._teacher_is_there else experiment.default_teacher()
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            self.model, self.teacher = on_tpu(model, size), on_tpu(teacher, size)
        self.state = experiment.sharded_state_shapes
        params = param_shapes(teacher.config)
        self.teacher_params = self._shard(
            jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, stated.dtype), params)
        )

    def _shard(self, shapes: Any) -> Any:
        return with_sharding(shapes, sharding.fsdp_sharding(shapes, self.mesh))

    def heading(self) -> str:
        config, count = self._config, self.mesh.size
        parameters = [
            checkpoint.parameter_count(params)
            for params in (self.state.params, self.teacher_params)
        ]
        slices = f"{self._slices} slices of " if self._slices > 1 else ""
        text = (
            f"{slices}{config.plan.topology}, {count} chips, mesh data {self.mesh.shape['data']} x fsdp "
            f"{self.mesh.shape['fsdp']}; student {parameters[0]:,} parameters ({self.model.config.attention}, "
            f"{self.model.implementation}), teacher {parameters[1]:,} ({self.teacher.implementation})"
        )
        if config.teacher.checkpoint and not self._teacher_is_there:
            text += (
                f"\nteacher.checkpoint = {config.teacher.checkpoint} is not there (yet): the teacher planned is a "
                f"DiT of {self.teacher.config.depth} layers of width {self.teacher.config.width}"
            )
        if config.autoencoder.checkpoint and "sample" in config.plan.programs:
            text += (
                f"\nsample ends with latents; to decode them a chip holds, beside what it needs, the whole of "
                f"autoencoder.checkpoint = {config.autoencoder.checkpoint} in float32 ({AUTOENCODER}) and the "
                f"activations of autoencoder.slice_size = {config.autoencoder.slice_size} images"
            )
        return text

    def lower(self, program: str, batch_size: int) -> jax.stages.Lowered:
        """The program at a global batch size, lowered for the slice."""
        config, rows = self._config, sharding.batch_sharding(self.mesh)

        def array(shape, dtype, where=rows):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        if program == "sample":
            # The decoder is no part of the plan: its parameters are read from a file.
            sampler = self._experiment.sampler(self.model, batch_size, decodes=False)
            condition = {
                name: array(leaf.shape, leaf.dtype)
                for name, leaf in self.model.config.condition_shapes(batch_size).items()
            }
            index = array((batch_size,), jnp.int32)
            return sampler.draw_batch.lower(self.state.params, index, condition)
        teacher, teacher_params = (
            (self.teacher, self.teacher_params) if program == "distill" else (None, None)
        )
        size = config.model.input_size
        # Which of the two the data hold cannot be asked here: as many channels as a picture has are pixels.
        channels = self.model.config.in_channels
        pixels = channels in (1, 3)
        batch = {
            name: array(
                (batch_size, size, size, channels),
                jnp.uint8 if pixels else jnp.float16,
            )
            for name in (("image",) if pixels else ("mean", "log_variance"))
        }
        batch |= {name: array((batch_size,), jnp.int32) for name in ("label", "index")}
        key = jax.eval_shape(lambda: jax.random.key(0))
        train_step = make_train_step(
            self.model,
            teacher,
            self._experiment.process,
            self._experiment.optimizer_settings,
            self._experiment.unscaled_step_settings,
            self.mesh,
        )
        return train_step.lower(
            self.state,
            teacher_params,
            batch,
            array(key.shape, key.dtype, sharding.replicated(self.mesh)),
        )

    def estimate(self, program: str, batch_size: int = 0) -> Estimate:
        """Compiles a program and reads off what it needs; batch_size 0: the config's."""
        batch_size = (
            batch_size
            or (self._config.sample if program == "sample" else self._config.train).batch_size
        )
        lowered, started = self.lower(program, batch_size), time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not (found := memory_shortage(str(error))):
                raise ValueError(
                    f"the TPU compiler fails on {program} at batch {batch_size}: {str(error).splitlines()[0]}. "
                    f"Another mesh.fsdp, train.remat or libtpu may do"
                ) from error
            used, capacity = found
            return Estimate(
                program,
                batch_size,
                False,
                used,
                capacity,
                compile_seconds=time.monotonic() - started,
            )
        memory = compiled.memory_analysis()
        arguments = memory.argument_size_in_bytes
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        needs = (
            arguments + outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
        )
        estimate = Estimate(
            program,
            batch_size,
            True,
            needs,
            self._chip.memory,
            arguments,
            memory.temp_size_in_bytes,
            outputs,
            time.monotonic() - started,
        )
        text = hlo.Program(compiled.as_text())
        estimate.traffic = text.traffic()
        estimate.largest = text.largest_buffers()
        estimate.flops, estimate.executed_flops = (
            f / self.mesh.size for f in self.flops(program, batch_size)
        )
        ici = dcn = 0.0
        for collective in text.collectives(self._slices):
            entry = estimate.collectives.setdefault(
                collective.kind, {"runs": 0, "bytes": 0.0, "wire_bytes": 0.0}
            )
            entry["runs"] += collective.times
            entry["bytes"] += collective.times * collective.size
            entry["wire_bytes"] += collective.wire_bytes
            if (
                collective.crosses_slices
            ):  # each chip of a slice carries its share of what leaves it
                dcn += collective.wire_bytes / max(1, collective.group // self._slices)
            ici += collective.wire_bytes
        estimate.seconds = {
            "compute": estimate.executed_flops / self._peak_flops,
            "memory": estimate.traffic / self._chip.bandwidth,
            "ici": ici / self._chip.ici,
            "dcn": dcn / self._chip.dcn,
        }
        longest = estimate.seconds[estimate.bound]
        estimate.images_per_second = batch_size / longest
        estimate.mfu = estimate.flops / self._peak_flops / longest
        return estimate

    def flops(self, program: str, batch_size: int) -> tuple[float, float]:
        """FLOPs of one run on all chips: by the model's definition, and with what rematerialisation computes again."""
        size = (self._config.model.input_size,) * 2
        forward = self.model.config.forward_flops(size)
        if program == "sample":
            sample = self._config.sample
            passes = sample.steps * (2 if sample.cfg_scale != 1 else 1)
            return (batch_size * passes * forward,) * 2
        teacher = self.teacher.config.forward_flops(size) if program == "distill" else 0.0
        total = train_step_flops(forward, teacher)
        again = {"none": 0.0, "full": forward, "dots": attention_flops(self.model, size)}[
            self._config.train.remat
        ]
        return batch_size * total, batch_size * (total + again)

    def largest_batch(self, estimate: Estimate) -> int:
        """The largest global batch whose program fits: guessed from two that were compiled (memory is about linear), then
        tried; 0 if not even one image a device does."""
        unit = self.mesh.size * (
            self._config.train.accumulation if estimate.program != "sample" else 1
        )
        tried = {estimate.batch_size: estimate}

        def attempt(size):
            if size not in tried:
                logging.info("%s: trying batch %d", estimate.program, size)
                tried[size] = self.estimate(estimate.program, size)

        attempt(2 * unit if estimate.fits and estimate.batch_size == unit else unit)
        while True:
            fitting = max((size for size, e in tried.items() if e.fits), default=0)
            too_large = min((size for size, e in tried.items() if not e.fits), default=None)
            if not fitting:
                return 0
            if too_large is not None and too_large - fitting <= unit or len(tried) == MAX_TRIES:
                return fitting
            low, high = tried[fitting], tried[too_large if too_large is not None else min(tried)]
            slope = (high.needs - low.needs) / (high.batch_size - low.batch_size)
            guess = (
                int(fitting + (estimate.capacity - low.needs) / slope if slope > 0 else 2 * fitting)
                // unit
                * unit
            )
            if guess <= fitting:
                return fitting
            if (
                too_large is not None
            ):  # memory is not linear to the last byte: leave the bound behind, not by one unit
                guess = min(
                    guess, too_large - max(unit, (too_large - fitting) // 10 // unit * unit)
                )
            attempt(guess)


def memory_shortage(message: str) -> tuple[float, float] | None:
    """Bytes that a program needs and may use, out of the two ways in which the TPU compiler refuses one; None: neither.

    The second speaks of temporaries alone: at least these are needed.
    """
    size = r"([\d.]+)([KMGT]?)"
    for text in (
        f"Used {size} of {size} hbm",
        rf"temporaries \({size}\) exceeds available HBM \({size}\)",
    ):
        if found := re.search(text, message):
            units = {"": 1, "K": 2**10, "M": 2**20, "G": GiB, "T": 2**40}
            return float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]
    return None


def on_tpu(model: DiT, input_size: int) -> DiT:
    """The model with the attention that the TPU of the mesh in context would pick: left to itself it would look at this
    machine's devices."""
    if model.implementation is not None:
        return model
    config = model.config
    side = input_size // config.patch_size
    if config.attention == "linear":
        reason = refusal(
            "pallas_tpu",
            width=config.width,
            num_heads=config.num_heads,
            grid=(side, side),
            conv_size=config.conv_size,
            kernel_function=config.kernel_function,
            dtype=model.dtype,
        )
    else:
        H = config.width // config.num_heads
        reason = softmax_refusal("pallas_tpu", tokens=side * side, head_width=H, dtype=model.dtype)
    return model.clone(implementation="xla" if reason else "pallas_tpu")


def attention_flops(model: DiT, input_size: tuple[int, int]) -> float:
    """FLOPs of an image's attention without its projections: what remat=dots computes again."""
    config = model.config
    macs = attention_macs(
        config.attention,
        tokens=input_size[0] * input_size[1] // config.patch_size**2,
        width=config.width,
        num_heads=config.num_heads,
        conv_size=config.conv_size,
    )
    return 2.0 * config.depth * macs


def describe(estimate: Estimate) -> str:
    """A program's estimate in a few lines."""
    e = estimate
    head = f"{e.program}: batch {e.batch_size}, needs {e.needs / GiB:.2f} GiB of {e.capacity / GiB:.2f} GiB a chip"
    if not e.fits:
        return f"{head}: {(e.needs - e.capacity) / GiB:.2f} GiB too much"
    lines = [
        f"{head} (arguments {e.arguments / GiB:.2f}, temporaries {e.temporaries / GiB:.2f}); compiled in "
        f"{e.compile_seconds:.0f} s",
        f"  a chip   {e.flops / 1e12:.3f} TFLOP ({e.executed_flops / 1e12:.3f} with rematerialisation), "
        f"{e.traffic / GB:.2f} GB through memory",
    ]
    for kind, entry in sorted(e.collectives.items()):
        lines.append(
            f"  {kind:<19}{entry['runs']:>6.0f} x, {entry['bytes'] / GB:.3f} GB in all, a chip sends "
            f"{entry['wire_bytes'] / GB:.3f} GB"
        )
    parts = ", ".join(
        f"{name} {seconds * 1e3:.1f} ms" for name, seconds in e.seconds.items() if seconds
    )
    what = "step" if e.program != "sample" else "batch of samples"
    lines += [
        f"  {what}   at least {e.seconds[e.bound] * 1e3:.1f} ms, bound by {e.bound} ({parts}; "
        f"{sum(e.seconds.values()) * 1e3:.1f} ms if nothing overlaps)",
        f"  so at most {e.images_per_second:,.0f} images/s, MFU {e.mfu:.1%}",
        "  largest  "
        + ", ".join(f"{shape} {size / GB:.2f} GB" for size, shape, _ in e.largest[:3]),
    ]
    return "\n".join(lines)


def _show(text: str) -> None:
    """The plan is what the user asked for: it goes to stdout, without the log's prefix."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

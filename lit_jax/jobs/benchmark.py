"""Times the attention, the models and the input pipeline on the device at hand.

Next to each time of the attention stands its floor. On a machine with only a
CPU it prints the estimate of the kernels for a named TPU topology, ahead of
time.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from lit_jax import quantization, sharding
from lit_jax.costs import tpu_schedule
from lit_jax.costs.flops import train_step_flops
from lit_jax.evaluation.evaluator import make_evaluator
from lit_jax.experiment import Experiment
from lit_jax.kernels.linear_attention import linear_attention
from lit_jax.models import Model, init_params
from lit_jax.models.architecture import heads_of_size
from lit_jax.models.attention import LinearAttention, make_attention, softmax_attention
from lit_jax.pictures import save_png, to_uint8
from lit_jax.porting.read import load_params
from lit_jax.porting.torch_peer import torch_peer
from lit_jax.runtime import pages
from lit_jax.sampling import Sampler
from lit_jax.settings import evaluation_settings, naming
from lit_jax.train_step import (
    images_to_model,
    make_optimizer,
    make_train_step,
    new_state,
    state_shapes,
)

WHAT = ("attention", "model", "peers", "data", "image", "precision")
Row = dict[str, Any]


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Prints the table and writes workdir/benchmark.json; config.benchmark says what is timed.

    Images of several sizes are a picture too, benchmark.png.
    Raises: ValueError for fields that cannot be.
    """
    # ---- What is asked -------------------------------------------------------
    wanted = config.benchmark
    token = token_pixels(config)
    unknown = set(wanted.what) - set(WHAT)
    if unknown or not wanted.what:
        raise ValueError(
            f"benchmark.what names {', '.join(sorted(unknown)) or 'nothing'}; "
            f"it may name {', '.join(WHAT)}"
        )
    on_models = {"attention", "model"} & set(wanted.what)
    on_pixels = on_models | ({"image", "peers"} & set(wanted.what))
    whole = [isinstance(n, int) and n >= 1 and n % token == 0 for n in wanted.pixels]
    if on_pixels and not (whole and all(whole)):
        raise ValueError(
            f"benchmark.pixels = {tuple(wanted.pixels)} must be multiples of a token's "
            f"{token} pixels"
        )

    # ---- The jobs, each an iterator of rows ----------------------------------
    # What a config may get wrong is found here, before a row makes a folder.
    device = jax.devices()[0]
    jobs = []
    if on_models and device.platform == "cpu":
        jobs.append(static_estimates(config))
    elif on_models:
        Experiment(config).check_platform()
        make_models(config)
        if "attention" in wanted.what:
            jobs.append(time_attention(config))
        if "model" in wanted.what:
            jobs.append(time_models(config))
    if "peers" in wanted.what:
        jobs.append(time_peers(config))
    if "data" in wanted.what:
        jobs.append(time_data(config))
    if "image" in wanted.what:
        jobs.append(time_images(config))
    if "precision" in wanted.what:
        jobs.append(compare_precisions(config, workdir))

    # ---- Rows ----------------------------------------------------------------
    machine = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = []
    for row in itertools.chain.from_iterable(jobs):
        logging.info("%s", row)
        rows.append(row)
        # After each row: a program that does not fit
        # must not take the times of the others with it.
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            report = {"machine": machine, "rows": rows}
            (workdir / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    sys.stdout.write(f"{machine}\n{table(rows)}\n")
    images = [row for row in rows if row.get("what", "").startswith("image, ")]
    if len({row["pixels"] for row in images}) > 1 and jax.process_index() == 0:
        # Where cores are shared, other work spoils the seconds of the clock.
        seconds = "draw CPU s" if device.platform == "cpu" else "draw s"
        figure = draw_resolutions(images, (seconds, "peak GB"))
        save_png(workdir / "benchmark.png", figure.savefig, dpi=110)


def draw_resolutions(rows: list[Row], names: tuple[str, ...]) -> Any:
    """The rows of `time_images`: over the size, what an image takes by each model.

    Args: names: of the columns, each a panel.
    Returns: a matplotlib Figure.
    """
    # Not at the top, for it takes a second; no pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names):
        for what in dict.fromkeys(row["what"] for row in rows):
            line = [(row["pixels"], row[name]) for row in rows if row["what"] == what]
            style = "o--" if "torch" in what else "o-"
            axes.plot(*zip(*line), style, label=what.removeprefix("image, "))
        sizes = sorted({row["pixels"] for row in rows})
        axes.set(xlabel="pixels of a side", ylabel=name, xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def table(rows: list[Row]) -> str:
    """Markdown, a line a row; columns are the rows' keys, in the order they appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def show(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [names, *([show(row.get(name, "")) for name in names] for row in rows)]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + "---|" * len(names), *body])


# ---- Models and sizes --------------------------------------------------------


def token_pixels(config: ConfigDict) -> int:
    """Pixels that a token spans each way: a patch, of cells where the model has latents."""
    return config.model.patch_size * _cell_pixels(config)


def _cell_pixels(config):
    # As many channels as a picture has are pixels; a latent's cell has 8.
    return 1 if config.model.in_channels in (1, 3) else 8


def make_models(config: ConfigDict) -> tuple[Model, Model]:
    """The config's model with softmax attention and with its linear one: DiT and LiT.

    One of them is the config's own; the linear one of a softmax config is LiT's.
    The other has the heads and the implementation of config.teacher if it is
    softmax, and the heads of its size if it is linear. Where these do not divide the width, it has
    the next fewer that do.
    """

    def build(attention, num_heads, implementation):
        # A copy: the caller's config says what is trained.
        ours = ConfigDict(config.to_dict())
        model = config.model
        if attention != model.attention:
            ours.model.update(
                attention=attention,
                num_heads=num_heads or heads_of_size(model.size, attention, model.width),
                implementation=implementation,
            )
        return Experiment(ours).model

    teacher = config.teacher
    dit = build("softmax", teacher.num_heads, teacher.implementation)
    own = config.model.attention
    lit = build(own if own != "softmax" else "linear", 0, None)
    return dit, lit


def _linear(lit: Model) -> LinearAttention:
    attention = make_attention(lit.config, dtype=lit.dtype, parent=None)
    if not isinstance(attention, LinearAttention):
        raise ValueError(
            f"benchmark.what names attention, whose kernels are LiT's; model.attention = "
            f"{lit.config.attention} is timed in its model: benchmark.what=('model',)"
        )
    return attention


# ---- Without a device --------------------------------------------------------


def static_estimates(config: ConfigDict) -> Iterator[Row]:
    """The linear attention's TPU kernels by their compiler's schedule, next to the floor.

    See costs/tpu_schedule.py.
    Raises: ValueError, at the call, for a case that the kernels do not offer.
    """
    wanted = config.benchmark
    model = config.model
    _, lit = make_models(config)
    attention = _linear(lit)
    width = lit.config.width
    sides = {pixels: pixels // token_pixels(config) for pixels in wanted.pixels}
    for pixels, side in sides.items():
        grid = (side, side)
        with naming("benchmark"), tpu_schedule.on_chip(wanted.topology):
            # The chip in context is the one whose VMEM the kernel asks for.
            reason = attention.refusal("pallas_tpu", width, grid)
        if reason:
            raise ValueError(
                f"no estimate for model.kernel_function = {model.kernel_function}, "
                f"model.conv_size = {model.conv_size} at {pixels} pixels: {reason}"
            )
    return _estimates(attention, width, sides, wanted)


def _estimates(
    attention: LinearAttention,
    width: int,
    sides: dict[int, int],
    wanted: ConfigDict,
) -> Iterator[Row]:
    """Args: sides: tokens along a side of the image, by its pixels."""
    for pixels, side in sides.items():
        # Two at least: the cores of a chip that has two share the batch.
        batch = max(2, wanted.attention_tokens // side**2)
        case = attention.case(width, (side, side))
        costs = tpu_schedule.attention_costs(case, batch, wanted.topology)
        for name, cost in costs.items():
            yield {
                "what": "static estimate",
                "chip": cost.device_kind,
                "pixels": pixels,
                "pass": name,
                "batch": batch,
                "bundles": cost.bundles,
                "us": cost.compute * 1e6,
                "floor us": cost.floor * 1e6,
                "x floor": cost.ratio,
            }


# ---- Timing ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, least and most of the repeats."""

    median: float
    low: float
    high: float


def measure(function: Callable, *args: Any, repeats: int, calls: int = 10) -> Timing:
    """Times function(*args), already jitted.

    A repeat queues `calls` calls, so that dispatch hides behind the work.
    """
    jax.block_until_ready(function(*args))  # compiles
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = function(*args)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / calls)
    return Timing(float(np.median(seconds)), min(seconds), max(seconds))


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second that a large device copy reads and writes."""
    x = jnp.ones((64, 1024, 1024), jnp.float32)
    timing = measure(jax.jit(lambda x: x + 1.0), x, repeats=repeats)
    return 2 * x.nbytes / timing.median


# ---- The attention -----------------------------------------------------------


def time_attention(config: ConfigDict) -> Iterator[Row]:
    """Linear attention by each implementation that offers it, and softmax attention.

    Forward, and forward with backward. The floors are 4 B T D elements forward
    and 7 B T D more backward, at the measured bandwidth of a copy.
    """
    wanted = config.benchmark
    device = jax.devices()[0]
    bandwidth = copy_bandwidth(wanted.repeats)
    logging.info("%s: a copy moves %.0f GB/s", device.device_kind, bandwidth / 1e9)
    dit, lit = make_models(config)
    for pixels in wanted.pixels:
        side = pixels // token_pixels(config)
        B = max(1, wanted.attention_tokens // side**2)
        inputs, do = _attention_inputs(lit, B, side**2)
        q = inputs[0]
        for name, function in _attentions(dit, lit, side).items():

            def both(inputs, do, function=function):
                out, vjp = jax.vjp(function, *inputs)
                return out, vjp(do)

            passes = (
                ("forward", function, inputs, 4),
                ("forward + backward", both, (inputs, do), 11),
            )
            for kind, call, args, arrays in passes:
                timing = measure(jax.jit(call), *args, repeats=wanted.repeats)
                floor = arrays * q.nbytes / bandwidth
                yield {
                    "what": f"attention {name}",
                    "pixels": pixels,
                    "pass": kind,
                    "batch": B,
                    "us": timing.median * 1e6,
                    "least": timing.low * 1e6,
                    "most": timing.high * 1e6,
                    "floor us": floor * 1e6,
                    "x floor": timing.median / floor,
                }


def _attention_inputs(lit, B, T):
    """Random (q, kv, filters, bias) of a linear attention, and a cotangent."""
    D = lit.config.width
    K = lit.config.conv_size
    H = D // lit.config.num_heads
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (B, T, D), lit.dtype)
    kv = jax.random.normal(keys[1], (B, T, 2 * D), lit.dtype)
    filters = None
    bias = None
    if K:
        # Of variance 1 / (K * K): the convolution's output is as large as v.
        filters = jax.random.normal(keys[2], (K, K, H)) / K
        bias = jax.random.normal(keys[3], (H,))
    do = jax.random.normal(keys[4], (B, T, D), lit.dtype)
    return (q, kv, filters, bias), do


def _attentions(dit: Model, lit: Model, side: int) -> dict[str, Callable]:
    """The attentions to time, by name, all with the arguments of the linear one."""
    platform = jax.devices()[0].platform
    fused = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(platform, "xla")
    config = lit.config
    grid = (side, side)
    attentions: dict[str, Callable] = {}
    # On a CPU both are xla, which is then timed once.
    for name in dict.fromkeys(("xla", fused)):
        reason = _linear(lit).refusal(name, config.width, grid)
        if reason:
            logging.info("attention: not %s; %s", name, reason)
            continue
        attentions[f"linear, {name}"] = functools.partial(
            linear_attention,
            num_heads=_linear(lit).num_heads,
            grid=grid,
            kernel_function=config.kernel_function,
            implementation=name,
        )

    def softmax(q, kv, filters, bias):
        B, T, D = q.shape
        arrays = (q, *jnp.split(kv, 2, axis=-1))
        q, k, v = (x.reshape(B, T, dit.config.num_heads, -1) for x in arrays)
        return softmax_attention(q, k, v, dit.implementation).reshape(B, T, D)

    attentions[f"softmax, {dit.implementation or 'fastest'}"] = softmax
    return attentions


# ---- The models --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A model at one size of images, and the teacher that it is distilled from, if any."""

    name: str
    model: Model
    teacher: Model | None
    pixels: int
    size: int  # height = width in the model's space
    batch_size: int

    def row(self, what: str, timing: Timing, flops: float) -> Row:
        """Args: flops: of one image."""
        images_per_second = self.batch_size / timing.median
        return {
            "what": f"{self.name} {what}",
            "pixels": self.pixels,
            "batch": self.batch_size,
            "ms": timing.median * 1e3,
            "least": timing.low * 1e3,
            "most": timing.high * 1e3,
            "images/s": images_per_second,
            "TFLOP/s": flops * images_per_second / 1e12,
        }


def time_models(config: ConfigDict) -> Iterator[Row]:
    """Forward, training step and distillation step of DiT and LiT, over all devices.

    They are the config's model with both attentions. The teacher is that DiT
    too, in teacher.dtype.
    """
    mesh = Experiment(config).mesh
    dit, lit = make_models(config)
    # Nothing of a frozen model is computed again.
    teacher = dit.clone(remat="none", dtype=jnp.dtype(config.teacher.dtype).type)
    subjects = (
        ("DiT", dit, None),
        ("LiT", lit, None),
        ("LiT with DiT teacher", lit, teacher),
    )
    for pixels in config.benchmark.pixels:
        tokens = (pixels // token_pixels(config)) ** 2
        B = max(1, config.benchmark.model_tokens // tokens) * mesh.size
        size = pixels // _cell_pixels(config)
        for name, model, guide in subjects:
            subject = _Subject(name, model, guide, pixels, size, B)
            yield from _time_model(config, mesh, subject)


def _time_model(config, mesh, subject: _Subject):
    experiment = Experiment(config)
    repeats = config.benchmark.repeats
    model = subject.model
    teacher = subject.teacher
    B = subject.batch_size
    size = (subject.size, subject.size)
    rng = jax.random.key(0)

    optimizer = make_optimizer(experiment.optimizer_settings)
    state_sharding = sharding.fsdp_sharding(state_shapes(model, optimizer), mesh)
    init_state = jax.jit(
        lambda rng: new_state(init_params(model, rng), optimizer),
        out_shardings=state_sharding,
    )
    state = init_state(rng)
    condition = {
        name: np.zeros(leaf.shape, leaf.dtype)
        for name, leaf in model.config.condition_shapes(B).items()
    }
    # Latents are timed as pixels too: no draw from their posteriors is in it.
    images = np.zeros((B, *size, model.config.in_channels), np.uint8)
    rows = sharding.batch_sharding(mesh)
    batch = jax.device_put({"image": images} | condition, rows)
    flops = model.config.forward_flops(size)

    # ---- Forward, of the model alone -----------------------------------------
    teacher_params = None
    if teacher is None:
        # As a model is sampled from: not the float32 masters of training.
        params = jax.tree.map(lambda p: p.astype(model.dtype), state.params)
        x = images_to_model(batch, rng)
        t = jnp.zeros((B,), jnp.int32)
        told = {name: batch[name] for name in condition}

        def forward(params, x, t, condition):
            return model.apply({"params": params}, x, t, condition)

        forward = jax.jit(sharding.on_mesh(forward, mesh))
        timing = measure(forward, params, x, t, told, repeats=repeats)
        yield subject.row("forward", timing, flops)
        del params  # a copy that the step has no use for
    else:

        def init_teacher(rng):
            params = init_params(teacher, rng)
            return jax.tree.map(lambda p: p.astype(teacher.dtype), params)

        teacher_params = jax.jit(init_teacher)(rng)

    # ---- The step ------------------------------------------------------------
    train_step = make_train_step(
        model,
        teacher,
        experiment.process,
        experiment.optimizer_settings,
        experiment.unscaled_step_settings,
        mesh,
    )
    # The step donates its state: each call hands its result to the next.
    holder = [state]

    def step():
        holder[0], metrics = train_step(holder[0], teacher_params, batch, rng)
        return metrics

    timing = measure(step, repeats=repeats)
    guide = teacher.config.forward_flops(size) if teacher else 0.0
    what = "distillation step" if teacher else "training step"
    yield subject.row(what, timing, train_step_flops(flops, guide))


# ---- Side by side with PyTorch -----------------------------------------------


def time_peers(config: ConfigDict) -> Iterator[Row]:
    """One model evaluation of an image and its gradient: LiT, DiT and the torch modules of both.

    A row for each pass and size, with a column for each. They take turns, and the least of
    benchmark.repeats counts: CPU milliseconds of all threads, which other work on the machine
    spoils less, and milliseconds by the clock. The loss is the mean square of the output; the
    torch modules have the same weights. There are none where PyTorch is not installed.

    Raises: ValueError, at the call, for a model that cannot be.
    """
    dit, lit = make_models(config)
    return _time_peers(config, {"LiT": lit, "DiT": dit})


def _time_peers(config, models: dict[str, Model]) -> Iterator[Row]:
    for pixels in config.benchmark.pixels:
        side = pixels // _cell_pixels(config)
        passes: dict[str, dict[str, Callable]] = {"forward": {}, "gradient": {}}
        for name, model in models.items():
            forward, gradient, params = _jax_calls(model, side)
            passes["forward"][name] = forward
            passes["gradient"][name] = gradient
            peer = torch_peer(params, _with_grid(model, side))
            if peer is not None:
                forward, gradient = _torch_calls(peer, model, side)
                passes["forward"][f"torch {name}"] = forward
                passes["gradient"][f"torch {name}"] = gradient
        for kind, calls in passes.items():
            least = _take_turns(calls, config.benchmark.repeats)
            row: Row = {"what": kind, "pixels": pixels}
            row |= {f"{name} CPU ms": 1e3 * cpu for name, (cpu, _) in least.items()}
            row |= {f"{name} ms": 1e3 * clock for name, (_, clock) in least.items()}
            yield row


def _with_grid(model: Model, side: int) -> Any:
    tokens = side // model.config.patch_size
    return dataclasses.replace(model.config, grid=(tokens, tokens))


def _told(model: Model, B: int) -> dict[str, Any]:
    """A condition of ones for B images."""
    shapes = model.config.condition_shapes(B)
    return {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}


def _jax_calls(model: Model, side: int) -> tuple[Callable, Callable, Any]:
    """Forward and gradient of one image, which return arrays, and the parameters."""
    params = jax.jit(lambda rng: init_params(model, rng))(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, side, side, model.config.in_channels))
    t = jnp.full((1,), 500, jnp.int32)
    told = _told(model, 1)

    def output(params, x):
        return model.apply({"params": params}, x, t, told)

    forward = jax.jit(output)
    gradient = jax.jit(jax.grad(lambda params, x: jnp.mean(output(params, x) ** 2)))
    return (
        lambda: jax.block_until_ready(forward(params, x)),
        lambda: jax.block_until_ready(gradient(params, x)),
        params,
    )


def _torch_calls(peer: Any, model: Model, side: int) -> tuple[Callable, Callable]:
    import torch

    peer = peer.to(getattr(torch, jnp.dtype(model.dtype).name))
    x = torch.randn(1, model.config.in_channels, side, side).to(next(peer.parameters()).dtype)
    t = torch.full((1,), 500)
    y = torch.ones(1, dtype=torch.int64)

    def forward():
        with torch.no_grad():
            return peer(x, t, y)

    def gradient():
        peer.zero_grad(set_to_none=True)
        peer(x, t, y).square().mean().backward()
        return [p.grad for p in peer.parameters()]

    return forward, gradient


def _take_turns(calls: dict[str, Callable], repeats: int) -> dict[str, tuple[float, float]]:
    """The least CPU seconds and the least seconds by the clock of each call."""
    for call in calls.values():
        call()  # compiles
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            cpu = time.process_time()
            clock = time.perf_counter()
            call()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - clock))
    return {name: (min(c for c, _ in s), min(w for _, w in s)) for name, s in seconds.items()}


# ---- One image ---------------------------------------------------------------


def time_images(config: ConfigDict) -> Iterator[Row]:
    """One image a device from noise to pixels: LiT, DiT, and on a CPU the torch modules of both.

    The sampler is config.sample's; the torch module's is DDIM with as many steps and the same
    guidance. Weights are random, and so are the features of a caption: what the text encoder
    costs is not in it. The decoder of autoencoder.checkpoint is, where there is one, with ours.
    """
    experiment = Experiment(config)
    dit, lit = make_models(config)
    for pixels in config.benchmark.pixels:
        side = pixels // experiment.autoencoder_factor
        for name, model in (("linear", lit), ("softmax", dit)):
            params = jax.jit(lambda rng, m=model: init_params(m, rng))(jax.random.key(0))
            yield _time_image(experiment, name, model, params, pixels, (side, side))
            is_cpu = jax.devices()[0].platform == "cpu"
            peer = torch_peer(params, _with_grid(model, side)) if is_cpu else None
            del params
            if peer is not None:
                yield _time_torch_image(experiment, name, peer, pixels, side)


def _start_peak() -> None:
    """From here `_peak_bytes` counts, where Linux lets a process reset it."""
    if jax.default_backend() == "cpu":
        pages.release()
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """The most memory that this process had resident since `_start_peak`."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    # Linux counts in KiB, here and there.
    return 1024 * int(found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _time_image(experiment, name, model: Model, params, pixels, size) -> Row:
    B = experiment.mesh.size
    sampler = Sampler(
        model,
        experiment.sampler_settings,
        batch_size=B,
        mesh=experiment.mesh,
        size=size,
        autoencoder=experiment.autoencoder,
    )
    condition = _told(model, B)
    index = np.arange(B, dtype=np.int32)
    start = time.monotonic()
    program = sampler.lower(params, index, condition).compile()
    compiled = time.monotonic()
    _start_peak()
    cpu = time.process_time()
    latents = jax.block_until_ready(program(params, index, condition, *sampler.how))
    cpu = time.process_time() - cpu
    drawn = time.monotonic()
    jax.block_until_ready(sampler.decode(latents))
    return {
        "what": f"image, {name}",
        "pixels": pixels,
        "steps": experiment.sampler_settings.steps,
        "compile s": compiled - start,
        "draw s": drawn - compiled,
        "draw CPU s": cpu,
        "decode s": time.monotonic() - drawn,
        "peak GB": _peak_bytes() / 1e9,
    }


def _time_torch_image(experiment, name, peer, pixels, side) -> Row:
    import torch

    from lit_jax.assets import lit_torch

    settings = experiment.sampler_settings
    B = experiment.mesh.size
    noise = torch.randn(B, peer.in_channels, side, side)
    y = torch.ones(B, dtype=torch.int64)
    _start_peak()
    cpu = time.process_time()
    start = time.monotonic()
    lit_torch.sample(peer, noise, (y,), steps=settings.steps, cfg_scale=settings.cfg_scale)
    return {
        "what": f"image, torch {name}",
        "pixels": pixels,
        "steps": settings.steps,
        "draw s": time.monotonic() - start,
        "draw CPU s": time.process_time() - cpu,
        "peak GB": _peak_bytes() / 1e9,
    }


# ---- The input pipeline ------------------------------------------------------


def time_data(config: ConfigDict) -> Iterator[Row]:
    """The input pipeline alone: what this process reads, decodes and batches.

    In records a second, and records a core second. The latter counts the
    seconds that this process computes on any core, so other work on the machine
    spoils it less. A data set that stays in memory is timed as one there from its
    second epoch on: see `dataset.KEPT_BYTES`.

    Raises: ValueError or FileNotFoundError, at the call, for data that cannot
      be opened.
    """
    experiment = Experiment(config)
    return _time_batches(experiment, experiment.batches())


def _time_batches(experiment: Experiment, batches: Iterable[Any]) -> Iterator[Row]:
    config = experiment.config
    repeats = config.benchmark.repeats
    calls = 10
    # The readers start here, and not while the models are timed.
    batches = iter(batches)
    rows = len(next(batches)["index"])  # and by now the readers run

    start = time.process_time()
    timing = measure(lambda: next(batches), repeats=repeats, calls=calls)
    core_seconds = time.process_time() - start
    # `measure` makes one call that it does not time.
    batches_a_core_second = (repeats * calls + 1) / core_seconds
    yield {
        "what": f"data {experiment.dataset.name}",
        "batch": rows,
        "threads": config.data.num_threads,
        "ms": timing.median * 1e3,
        "least": timing.low * 1e3,
        "most": timing.high * 1e3,
        "images/s": rows / timing.median,
        "images/core second": rows * batches_a_core_second,
    }


# ---- Low precision -------------------------------------------------------------------------------


def compare_precisions(config: ConfigDict, workdir: epath.Path) -> Iterator[Row]:
    """The model of --mode=sample in full precision, in int8, and with what int8 leaves out.

    The same sample.num_images images each, with balanced labels: how far their pixels (of 255) are
    from those in full precision, bytes of the weights, CPU seconds an image without compilation
    and, with evaluate.reference, the score.
    Raises: ValueError or FileNotFoundError, at the call, for a config that cannot be sampled from.
    """
    experiment = Experiment(config)
    experiment.check_platform()
    checkpoint = experiment.read_sampled(workdir)
    params = load_params(
        checkpoint.params, sharding.fsdp_sharding(checkpoint.params, experiment.mesh)
    )
    index = np.arange(config.sample.num_images)
    condition = experiment.conditions(index, "balanced")
    score = None
    if config.evaluate.reference:
        settings = evaluation_settings(config)
        with naming("evaluate", directory="data.dir"):
            evaluator = make_evaluator(settings, len(index), config.data.dir, workdir)
        score = evaluator.score_images
    asked: list[tuple[str, tuple[str, ...]]] = [(kind, ()) for kind in quantization.KINDS]
    asked += [("int8", (name,)) for name in quantization.ALSO]
    return _precisions(experiment, params, condition, asked, score)


def _precisions(experiment, params, condition, asked, score) -> Iterator[Row]:
    index = np.arange(len(next(iter(condition.values()))))
    whole = None
    for kind, also in asked:
        model = experiment.model
        weights = params
        if kind != "none":
            with naming("sample"):
                model = quantization.QuantizedModel(model, kind, also)
            weights = model.quantize(params)
        sampler = experiment.sampler(model).compile(weights, condition)
        started = time.process_time()
        images = to_uint8(sampler(weights, index, condition))
        seconds = time.process_time() - started
        whole = images if whole is None else whole
        row: Row = {
            "precision": " and ".join([kind, *also]),
            "MB": sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) / 1e6,
            "mean pixel difference": float(np.abs(images - whole.astype(np.float32)).mean()),
            "CPU s an image": seconds / len(images),
        }
        yield row | (score(images) if score else {})

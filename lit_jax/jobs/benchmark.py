"""Times the attention, the model's forward and its training steps on the device at hand, next to the floor.

On a machine with only a CPU it prints the ahead-of-time static estimate of the kernels for a named TPU topology instead.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from lit_jax import sharding
from lit_jax.costs import tpu_schedule
from lit_jax.costs.flops import train_step_flops
from lit_jax.data import dataset, pipeline
from lit_jax.experiment import Experiment, naming
from lit_jax.kernels.linear_attention import linear_attention, refusal
from lit_jax.models.attention import softmax_attention
from lit_jax.models.dit import DiT, init_params
from lit_jax.train_step import (
    images_to_model,
    make_optimizer,
    make_train_step,
    new_state,
    state_shapes,
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, least and most of the repeats."""

    median: float
    low: float
    high: float


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints the table and writes workdir/benchmark.json, a row at a time; config.benchmark says what is timed."""
    wanted, token = config.benchmark, token_pixels(config)
    unknown = set(wanted.what) - {"attention", "model", "data"}
    if unknown or not wanted.what:
        raise ValueError(
            f"benchmark.what names {', '.join(sorted(unknown)) or 'nothing'}; it may name attention, model, data"
        )
    on_models = {"attention", "model"} & set(wanted.what)
    divisible = [
        isinstance(pixels, int) and pixels >= 1 and pixels % token == 0 for pixels in wanted.pixels
    ]
    if on_models and not (divisible and all(divisible)):
        raise ValueError(
            f"benchmark.pixels = {tuple(wanted.pixels)} must be multiples of a token's {token} pixels"
        )
    device = jax.devices()[0]
    jobs = []
    if on_models and device.platform == "cpu":
        jobs.append(static_estimates(config))
    elif on_models:
        Experiment(config).check_platform()
        jobs += [time_attention(config)] if "attention" in wanted.what else []
        jobs += [time_models(config)] if "model" in wanted.what else []
    if "data" in wanted.what:
        jobs.append(time_data(config))
    head = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    workdir.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in itertools.chain.from_iterable(jobs):
        logging.info("%s", row)
        rows.append(row)
        if (
            jax.process_index() == 0
        ):  # after each row: a program that does not fit must not take the others' times with it
            (workdir / "benchmark.json").write_text(
                json.dumps({"machine": head, "rows": rows}, indent=1) + "\n"
            )
    sys.stdout.write(f"{head}\n{table(rows)}\n")


def token_pixels(config: ConfigDict) -> int:
    """Pixels that a token spans each way: a patch, of cells of 8 pixels where the model works on latents."""
    return config.model.patch_size * _cell_pixels(config)


def _cell_pixels(config):
    return (
        1 if config.model.in_channels in (1, 3) else 8
    )  # as many channels as a picture has are pixels


def make_models(config: ConfigDict) -> tuple[DiT, DiT]:
    """The config's model with softmax and with linear attention: DiT and LiT.

    Heads and implementation of the attention that the model has not are config.teacher's for softmax, else the size's own.
    """

    def build(attention, num_heads, implementation):
        ours = ConfigDict(config.to_dict())
        if attention != config.model.attention:
            ours.model.update(
                attention=attention, num_heads=num_heads, implementation=implementation
            )
        return Experiment(ours).model

    return build("softmax", config.teacher.num_heads, config.teacher.implementation), build(
        "linear", 0, None
    )


def static_estimates(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """The linear attention's TPU kernels by their compiler's schedule, next to the HBM floor; see costs/tpu_schedule.py."""
    wanted, model = config.benchmark, config.model
    _, lit = make_models(config)
    for pixels in wanted.pixels:
        side = pixels // token_pixels(config)
        with tpu_schedule.on_chip(wanted.topology, "benchmark.topology"):  # whose VMEM it is
            reason = refusal("pallas_tpu", **_case(lit, side))
        if reason:
            raise ValueError(
                f"no estimate for model.kernel_function = {model.kernel_function}, model.conv_size = "
                f"{model.conv_size} at {pixels} pixels: {reason}"
            )
        batch = max(2, wanted.attention_tokens // side**2)
        costs = tpu_schedule.attention_costs(
            lit.config.width,
            lit.config.num_heads,
            (side, side),
            batch,
            wanted.topology,
            lit.config.conv_size,
            model.dtype,
        )
        for name, cost in costs.items():
            yield {
                "what": "static estimate",
                "chip": cost.device_kind,
                "pixels": pixels,
                "pass": name,
                "batch": batch,
                "bundles": sum(kernel.bundles for kernel in cost.kernels),
                "us": cost.compute * 1e6,
                "floor us": cost.floor * 1e6,
                "x floor": cost.ratio,
            }


def _case(lit, side):
    """What `refusal` asks of a linear attention over side x side tokens."""
    return dict(
        width=lit.config.width,
        num_heads=lit.config.num_heads,
        grid=(side, side),
        conv_size=lit.config.conv_size,
        kernel_function=lit.config.kernel_function,
        dtype=lit.dtype,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a row; columns are the union of the rows' keys, in the order they appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def show(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(
        lines
        + ["| " + " | ".join(show(row.get(name, "")) for name in names) + " |" for row in rows]
    )


def measure(function: Callable, *args: Any, repeats: int, calls: int = 10) -> Timing:
    """Times function(*args), already jitted: `calls` queued calls a repeat, so that dispatch hides behind the work."""
    jax.block_until_ready(function(*args))
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


def time_attention(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Linear attention by each implementation that offers it, and softmax attention, forward and forward + backward.

    Floors: 4 B T D elements forward, 7 B T D more backward, at the measured bandwidth of a copy.
    """
    wanted, device = config.benchmark, jax.devices()[0]
    bandwidth = copy_bandwidth(wanted.repeats)
    logging.info("%s: a copy moves %.0f GB/s", device.device_kind, bandwidth / 1e9)
    dit, lit = make_models(config)
    D = lit.config.width
    K = lit.config.conv_size
    H = D // lit.config.num_heads
    fused = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(device.platform, "xla")
    for pixels in wanted.pixels:
        side = pixels // token_pixels(config)
        T = side * side
        B = max(1, wanted.attention_tokens // T)
        keys = jax.random.split(jax.random.key(0), 5)
        q = jax.random.normal(keys[0], (B, T, D), lit.dtype)
        kv = jax.random.normal(keys[1], (B, T, 2 * D), lit.dtype)
        filters = bias = None
        if K:
            filters, bias = (
                jax.random.normal(keys[2], (K, K, H)) / K,
                jax.random.normal(keys[3], (H,)),
            )
        do = jax.random.normal(keys[4], (B, T, D), lit.dtype)

        def softmax(q, kv, filters, bias, T=T, B=B):
            q, k, v = (
                x.reshape(B, T, dit.config.num_heads, -1) for x in (q, *jnp.split(kv, 2, axis=-1))
            )
            return softmax_attention(q, k, v, dit.implementation).reshape(B, T, D)

        cases = {}
        for name in dict.fromkeys(("xla", fused)):
            if reason := refusal(name, **_case(lit, side)):
                logging.info("attention: not %s; %s", name, reason)
                continue
            cases[f"linear, {name}"] = functools.partial(
                linear_attention,
                num_heads=lit.config.num_heads,
                grid=(side, side),
                kernel_function=lit.config.kernel_function,
                implementation=name,
            )
        cases[f"softmax, {dit.implementation or 'fastest'}"] = softmax
        for name, function in cases.items():

            def both(q, kv, filters, bias, do, function=function):
                out, vjp = jax.vjp(function, q, kv, filters, bias)
                return out, vjp(do)

            for kind, call, args, floor in (
                ("forward", function, (q, kv, filters, bias), 4 * q.nbytes),
                ("forward + backward", both, (q, kv, filters, bias, do), 11 * q.nbytes),
            ):
                timing = measure(jax.jit(call), *args, repeats=wanted.repeats)
                yield {
                    "what": f"attention {name}",
                    "pixels": pixels,
                    "pass": kind,
                    "batch": B,
                    "us": timing.median * 1e6,
                    "least": timing.low * 1e6,
                    "most": timing.high * 1e6,
                    "floor us": floor / bandwidth * 1e6,
                    "x floor": timing.median / (floor / bandwidth),
                }


def time_models(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """Forward, training step and distillation step of DiT and LiT, the config's model with both attentions, in images/s over
    all devices. The teacher is that DiT too, in teacher.dtype."""
    wanted = config.benchmark
    mesh = Experiment(config).mesh
    dit, lit = make_models(config)
    teacher = dit.clone(remat="none", dtype=jnp.dtype(config.teacher.dtype).type)
    for pixels in wanted.pixels:
        B = max(1, wanted.model_tokens // (pixels // token_pixels(config)) ** 2) * mesh.size
        for name, model, guide in (
            ("DiT", dit, None),
            ("LiT", lit, None),
            ("LiT with DiT teacher", lit, teacher),
        ):
            yield from _time_model(config, mesh, name, model, guide, pixels, B)


def _time_model(config, mesh, name, model, teacher, pixels, B):
    experiment = Experiment(config)
    optimizer = make_optimizer(experiment.optimizer_settings)
    size = pixels // _cell_pixels(config)
    shapes = state_shapes(model, optimizer)
    shardings = sharding.fsdp_sharding(shapes, mesh)
    rng = jax.random.key(0)
    state = jax.jit(
        lambda rng: new_state(init_params(model, rng), optimizer), out_shardings=shardings
    )(rng)
    batch = jax.device_put(
        {
            "image": np.zeros((B, size, size, model.config.in_channels), np.uint8),
            "label": np.zeros(B, np.int32),
        },
        sharding.batch_sharding(mesh),
    )
    flops = model.config.forward_flops((size, size))

    def row(what, timing, flops):
        return {
            "what": f"{name} {what}",
            "pixels": pixels,
            "batch": B,
            "ms": timing.median * 1e3,
            "least": timing.low * 1e3,
            "most": timing.high * 1e3,
            "images/s": B / timing.median,
            "TFLOP/s": flops * B / timing.median / 1e12,
        }

    teacher_params = None
    if teacher is None:
        params = jax.tree.map(lambda p: p.astype(model.dtype), state.params)
        x, t = images_to_model(batch, rng), jnp.zeros((B,), jnp.int32)
        forward = jax.jit(
            sharding.on_mesh(lambda p, x, t, c: model.apply({"params": p}, x, t, c), mesh)
        )
        condition = {"label": batch["label"]}
        yield row(
            "forward",
            measure(forward, params, x, t, condition, repeats=config.benchmark.repeats),
            flops,
        )
        del params
    else:
        init = jax.jit(
            lambda rng: jax.tree.map(lambda p: p.astype(teacher.dtype), init_params(teacher, rng))
        )
        teacher_params = init(rng)
    train_step = make_train_step(
        model,
        teacher,
        experiment.process,
        experiment.optimizer_settings,
        experiment.unscaled_step_settings,
        mesh,
    )
    holder = [state]  # the step donates its state: each call hands its result to the next

    def one():
        holder[0], metrics = train_step(holder[0], teacher_params, batch, rng)
        return metrics

    total = train_step_flops(flops, teacher.config.forward_flops((size, size)) if teacher else 0.0)
    yield row(
        "distillation step" if teacher else "training step",
        measure(one, repeats=config.benchmark.repeats),
        total,
    )


def time_data(config: ConfigDict) -> Iterator[dict[str, Any]]:
    """The input pipeline alone: records/s that this process reads, decodes and batches, and how many a core second gives.

    The latter counts the seconds that this process computes on any core, so other work on the machine spoils it less.
    """
    with naming("data"):
        source = dataset.open_dataset(config.data.name, config.data.dir, config.data.split)
    rows = config.train.batch_size // jax.process_count()
    batches = iter(
        pipeline.make_batches(
            source,
            batch_size=config.train.batch_size,
            seed=config.seed,
            flip=config.data.flip,
            rows=np.arange(rows),
            num_threads=config.data.num_threads,
            prefetch=config.data.prefetch,
        )
    )
    next(batches)
    start, calls = time.process_time(), 10
    timing = measure(lambda: next(batches)["label"], repeats=config.benchmark.repeats, calls=calls)
    batches_a_core_second = (config.benchmark.repeats * calls + 1) / (
        time.process_time() - start
    )  # the first is not timed
    yield {
        "what": f"data {source.name}",
        "batch": rows,
        "threads": config.data.num_threads,
        "ms": timing.median * 1e3,
        "least": timing.low * 1e3,
        "most": timing.high * 1e3,
        "images/s": rows / timing.median,
        "images/core second": rows * batches_a_core_second,
    }

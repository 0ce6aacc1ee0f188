"""Times the attention, the model's forward and its training steps on the device at hand, next to the floor.

On a machine with only a CPU it prints the ahead-of-time static estimate of the kernels for a named TPU topology instead.
"""
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from lit_jax import data, from_config, sharding, step
from lit_jax.diffusion import make_diffusion
from lit_jax.kernels import static_cost
from lit_jax.kernels.linear_attention import linear_attention
from lit_jax.kernels.static_cost import PIXELS_PER_TOKEN
from lit_jax.models.attention import softmax_attention
from lit_jax.models.dit import SIZES, forward_flops, make_dit


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, least and most of the repeats."""

    median: float
    low: float
    high: float


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints the table and writes workdir/benchmark.json; config.benchmark says what is timed."""
    wanted = config.benchmark
    unknown = set(wanted.what) - {"attention", "model", "data"}
    if unknown or not wanted.what:
        raise ValueError(f"benchmark.what names {', '.join(sorted(unknown)) or 'nothing'}; it may name attention, model, data")
    if not wanted.pixels or any(pixels < 1 or pixels % PIXELS_PER_TOKEN for pixels in wanted.pixels):
        raise ValueError(f"benchmark.pixels = {tuple(wanted.pixels)} must be multiples of a token's {PIXELS_PER_TOKEN} pixels")
    if wanted.repeats < 1:
        raise ValueError(f"benchmark.repeats = {wanted.repeats} must be at least 1")
    device = jax.devices()[0]
    rows = []
    if device.platform == "cpu" and {"attention", "model"} & set(wanted.what):
        rows += static_estimates(config)
    else:
        bandwidth = copy_bandwidth(wanted.repeats)
        logging.info("%s: a copy moves %.0f GB/s", device.device_kind, bandwidth / 1e9)
        if "attention" in wanted.what:
            rows += time_attention(config, bandwidth)
        if "model" in wanted.what:
            rows += time_models(config)
    if "data" in wanted.what:
        rows += time_data(config)
    workdir.mkdir(parents=True, exist_ok=True)
    head = {"device": device.device_kind, "devices": jax.device_count(), "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d")}
    (workdir / "benchmark.json").write_text(json.dumps({"machine": head, "rows": rows}, indent=1) + "\n")
    sys.stdout.write(f"{head}\n{table(rows)}\n")


def attention_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Width, linear heads and softmax heads of the config's model; raises ValueError for a model that cannot be."""
    model = make_dit(size=config.model.size, width=config.model.width, num_heads=config.model.num_heads, attention="linear",
                     patch_size=2, in_channels=4, num_classes=1)
    return model.width, model.num_heads, SIZES[config.model.size][2]


def static_estimates(config: ConfigDict) -> list[dict[str, Any]]:
    """The linear attention's TPU kernels by their compiler's schedule, next to the HBM floor; see kernels/static_cost.py."""
    wanted = config.benchmark
    D, heads, _ = attention_shape(config)
    rows = []
    for pixels in wanted.pixels:
        side = pixels // PIXELS_PER_TOKEN
        batch = max(2, wanted.attention_tokens // side**2)
        costs = static_cost.attention_costs(D, heads, (side, side), batch, wanted.topology, config.model.conv_size)
        for name, cost in costs.items():
            rows.append({"what": "static estimate", "chip": cost.device_kind, "pixels": pixels, "pass": name, "batch": batch,
                         "bundles": sum(kernel.bundles for kernel in cost.kernels), "us": cost.compute * 1e6,
                         "floor us": cost.floor * 1e6, "x floor": cost.ratio})
            logging.info("%s", rows[-1])
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a row; columns are the union of the rows' keys, in the order they appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def show(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(show(row.get(name, "")) for name in names) + " |" for row in rows])


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


def time_attention(config: ConfigDict, bandwidth: float) -> list[dict[str, Any]]:
    """Linear attention by each implementation, and softmax attention, forward and forward + backward.

    Floors: 4 B T D elements forward, 7 B T D more backward, at the measured bandwidth of a copy.
    """
    wanted, platform = config.benchmark, jax.devices()[0].platform
    D, heads, softmax_heads = attention_shape(config)
    fused = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(platform)
    rows = []
    for pixels in wanted.pixels:
        side = pixels // PIXELS_PER_TOKEN
        T = side * side
        B = max(1, wanted.attention_tokens // T)
        keys = jax.random.split(jax.random.key(0), 5)
        q = jax.random.normal(keys[0], (B, T, D), jnp.bfloat16)
        kv = jax.random.normal(keys[1], (B, T, 2 * D), jnp.bfloat16)
        filters = bias = None
        if K := config.model.conv_size:
            filters = jax.random.normal(keys[2], (K, K, D // heads)) / K
            bias = jax.random.normal(keys[3], (D // heads,))
        do = jax.random.normal(keys[4], (B, T, D), jnp.bfloat16)
        cases = {f"linear, {name}": functools.partial(linear_attention, num_heads=heads, grid=(side, side), implementation=name)
                 for name in ("xla", fused) if name}

        def softmax(q, kv, filters, bias, T=T, B=B):
            shape = (B, T, softmax_heads, D // softmax_heads)
            k, v = jnp.split(kv, 2, axis=-1)
            return softmax_attention(q.reshape(shape), k.reshape(shape), v.reshape(shape)).reshape(B, T, D)

        for name, function in (cases | {"softmax, fastest": softmax}).items():
            def both(q, kv, filters, bias, do, function=function):
                out, vjp = jax.vjp(function, q, kv, filters, bias)
                return out, vjp(do)

            elements = B * T * D * 2  # bytes of one (B, T, D) array in bfloat16
            for kind, call, args, floor in (("forward", function, (q, kv, filters, bias), 4 * elements),
                                            ("forward + backward", both, (q, kv, filters, bias, do), 11 * elements)):
                timing = measure(jax.jit(call), *args, repeats=wanted.repeats)
                rows.append({"what": f"attention {name}", "pixels": pixels, "pass": kind, "batch": B, "us": timing.median * 1e6,
                             "least": timing.low * 1e6, "most": timing.high * 1e6, "floor us": floor / bandwidth * 1e6,
                             "x floor": timing.median / (floor / bandwidth)})
                logging.info("%s", rows[-1])
    return rows


def time_models(config: ConfigDict) -> list[dict[str, Any]]:
    """Forward, training step and distillation step of DiT and LiT in images/s over all devices."""
    wanted = config.benchmark
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    rows = []
    for pixels in wanted.pixels:
        size = pixels // 8
        T = (pixels // PIXELS_PER_TOKEN) ** 2
        B = max(1, wanted.model_tokens // T) * mesh.size
        build = functools.partial(make_dit, size=config.model.size, patch_size=2, in_channels=4, num_classes=1000,
                                  dtype=config.model.dtype)
        dit = build(attention="softmax", remat="none")
        models = {"DiT": build(attention="softmax", remat=config.train.remat),
                  "LiT": build(attention="linear", remat=config.train.remat, implementation=config.model.implementation)}
        for name, model in models.items():
            rows += _time_model(config, mesh, name, model, None, pixels, size, B)
        rows += _time_model(config, mesh, "LiT with DiT teacher", models["LiT"], dit, pixels, size, B)
    return rows


def _time_model(config, mesh, name, model, teacher, pixels, size, B) -> list[dict[str, Any]]:
    optimizer = from_config.optimizer(config)
    shapes = step.state_shapes(model, optimizer, size)
    shardings = sharding.fsdp_sharding(shapes, mesh)
    rng = jax.random.key(0)
    state = jax.jit(lambda rng: step.new_state(step.init_params(model, rng, size), optimizer), out_shardings=shardings)(rng)
    rows_sharding = sharding.batch_sharding(mesh)
    batch = jax.device_put({"image": np.zeros((B, size, size, 4), np.uint8), "label": np.zeros(B, np.int32)}, rows_sharding)
    flops = forward_flops(model, (size, size))
    rows = []

    def row(what, timing, flops):
        rows.append({"what": f"{name} {what}", "pixels": pixels, "batch": B, "ms": timing.median * 1e3,
                     "least": timing.low * 1e3, "most": timing.high * 1e3, "images/s": B / timing.median,
                     "TFLOP/s": flops * B / timing.median / 1e12})
        logging.info("%s", rows[-1])

    if teacher is None:
        params = jax.tree.map(lambda p: p.astype(model.dtype), state.params)
        x, t = step.images_to_model(batch, rng), jnp.zeros((B,), jnp.int32)
        forward = jax.jit(lambda p, x, t, y: model.apply({"params": p}, x, t, y))
        row("forward", measure(forward, params, x, t, batch["label"], repeats=config.benchmark.repeats), flops)
        del params
        teacher_params = None
    else:
        init = jax.jit(lambda rng: jax.tree.map(lambda p: p.astype(teacher.dtype), step.init_params(teacher, rng, size)))
        teacher_params = init(rng)
    train_step = from_config.train_step(config, model, teacher, optimizer, make_diffusion(), mesh)
    holder = [state]  # the step donates its state: each call hands its result to the next

    def one():
        holder[0], metrics = train_step(holder[0], teacher_params, batch, rng)
        return metrics

    total = 3 * flops + (forward_flops(teacher, (size, size)) if teacher else 0)
    row("distillation step" if teacher else "training step", measure(one, repeats=config.benchmark.repeats), total)
    return rows


def time_data(config: ConfigDict) -> list[dict[str, Any]]:
    """The input pipeline alone: records/s that this process reads, decodes and batches, and how many a core second gives.

    The latter counts the seconds that this process computes on any core, so other work on the machine spoils it less.
    """
    source = data.open_source(config.data.name, config.data.dir, config.data.split)
    rows = config.train.batch_size // jax.process_count()
    batches = iter(data.make_batches(source, batch_size=config.train.batch_size, seed=config.seed, flip=config.data.flip,
                                     rows=np.arange(rows), num_threads=config.data.num_threads,
                                     prefetch=config.data.prefetch))
    next(batches)
    start, calls = time.process_time(), 10
    timing = measure(lambda: next(batches)["label"], repeats=config.benchmark.repeats, calls=calls)
    batches_a_core_second = (config.benchmark.repeats * calls + 1) / (time.process_time() - start)  # the first is not timed
    return [{"what": f"data {source.name}", "batch": rows, "threads": config.data.num_threads, "ms": timing.median * 1e3,
             "least": timing.low * 1e3, "most": timing.high * 1e3, "images/s": rows / timing.median,
             "images/core second": rows * batches_a_core_second}]

"""What the benchmark times and estimates is the config's model; bad input is one line.

No test looks at a time.
"""

import dataclasses
import importlib.util
import json
import types

import jax
import numpy as np
import pytest
from etils import epath
from tiny_autoencoder import write_autoencoder

from configs import debug
from lit_jax import checkpoint
from lit_jax.costs import chips
from lit_jax.experiment import Experiment
from lit_jax.jobs import benchmark
from lit_jax.kernels.linear_attention import linear_attention
from lit_jax.models import param_shapes
from lit_jax.models.dit import DiT, DiTConfig
from lit_jax.porting.torch_peer import torch_peer


def tiny_config(**model):
    """Latents of 4 x 4 at 32 pixels, 16 tokens."""
    config = debug.get_config()
    config.model.update(
        {
            "in_channels": 4,
            "patch_size": 1,
            "num_classes": 3,
            "conv_size": 3,
            "num_heads": 1,
            "qkv_bias": False,
            "kernel_function": "focused",
            "dtype": "float32",
        }
        | model
    )
    config.teacher.num_heads = 4
    config.benchmark.update(
        what=("attention", "model"), pixels=(32,), attention_tokens=32, model_tokens=32, repeats=1
    )
    return config


@pytest.fixture
def measured(monkeypatch):
    """Calls what would be timed once and keeps its arguments and results.

    Each call takes a millisecond.
    """
    calls = []

    def measure(function, *args, repeats, calls_a_repeat=10):
        calls.append((args, function(*args)))
        return benchmark.Timing(1e-3, 1e-3, 1e-3)

    monkeypatch.setattr(benchmark, "measure", measure)
    return calls


def shapes(tree):
    return jax.tree.map(np.shape, tree)


def test_the_models_that_are_timed_are_the_configs(measured, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)  # eight would only compile longer
    config = tiny_config(depth=1)
    rows = list(benchmark.time_models(config))
    assert [row["what"] for row in rows] == [
        "DiT forward",
        "DiT training step",
        "LiT forward",
        "LiT training step",
        "LiT with DiT teacher distillation step",
    ]
    B = 2
    lit = Experiment(config).model
    dit = DiT(dataclasses.replace(lit.config, attention="softmax", num_heads=4))
    for model, (args, out) in zip((dit, lit), (measured[0], measured[2])):
        assert shapes(args[0]) == shapes(param_shapes(model.config))
        assert out.shape == (B, 4, 4, 8)
    # A millisecond each: TFLOP/s tells the FLOPs of a row.
    forward = [model.config.forward_flops((4, 4)) for model in (dit, lit)]
    expected = [forward[0], 3 * forward[0], forward[1], 3 * forward[1], 3 * forward[1] + forward[0]]
    np.testing.assert_allclose([row["TFLOP/s"] * 1e9 / B for row in rows], expected)
    assert all(
        row["images/s"] == B / 1e-3 and row["pixels"] == 32 and row["batch"] == B for row in rows
    )
    assert "kd_noise" in " ".join(measured[4][1]) and "kd_noise" not in " ".join(measured[3][1])


def test_a_width_that_the_sizes_heads_do_not_divide_has_the_next_fewer_that_do():
    """The 6 heads of S for a width of 32."""
    config = debug.get_config()
    config.model.size = "S"
    dit, lit = benchmark.make_models(config)
    assert (dit.config.width, dit.config.num_heads) == (32, 4)
    assert lit.config.num_heads == 2
    # A plan without a teacher's file plans such a one too.
    assert Experiment(config).default_teacher().config.num_heads == 4
    config.teacher.num_heads = 5
    with pytest.raises(ValueError, match="num_heads = 5 does not divide the width 32"):
        benchmark.make_models(config)


def test_the_attention_that_is_timed_is_the_configs(measured):
    config = tiny_config()
    rows = list(benchmark.time_attention(config))
    assert [(row["what"], row["pass"]) for row in rows] == [
        (f"attention {name}", kind)
        for name in ("linear, xla", "softmax, fastest")
        for kind in ("forward", "forward + backward")
    ]
    calls = measured[1:]  # the first is the copy that tells the bandwidth
    q, kv, filters, bias = calls[0][0]
    assert shapes((q, kv, filters, bias)) == ((2, 16, 32), (2, 16, 64), (3, 3, 32), (32,))
    linear = linear_attention(
        q, kv, filters, bias, num_heads=1, grid=(4, 4), kernel_function="focused"
    )
    np.testing.assert_allclose(calls[0][1], linear, rtol=1e-5, atol=1e-5)
    heads = [x.reshape(2, 16, 4, 8) for x in (q, *np.split(kv, 2, axis=-1))]
    softmax = jax.nn.dot_product_attention(*heads).reshape(q.shape)
    np.testing.assert_allclose(calls[2][1], softmax, rtol=1e-5, atol=1e-5)
    for out, gradients in (calls[1][1], calls[3][1]):
        assert (
            out.shape == q.shape
            and shapes(gradients) == shapes((q, kv, filters, bias))
            or gradients[2] is None
        )
    for row, arrays in zip(rows, (4, 11, 4, 11)):
        copied = 2 * 64 * 2**20 * 4  # bytes that the copy moves in its millisecond
        assert row["floor us"] == pytest.approx(arrays * q.nbytes / copied * 1e3)
        assert row["x floor"] == pytest.approx(row["us"] / row["floor us"])


@pytest.mark.parametrize(
    "fields, names",
    [
        (dict(kernel_function="relu"), ["linear, xla", "linear, pallas_tpu", "softmax, fastest"]),
        (dict(kernel_function="relu", conv_size=9), ["linear, xla", "softmax, fastest"]),
    ],
)
def test_a_kernel_is_timed_where_it_offers_the_case(monkeypatch, fields, names):
    monkeypatch.setattr(
        jax, "devices", lambda: [types.SimpleNamespace(platform="tpu", device_kind="a TPU")]
    )
    monkeypatch.setattr(
        benchmark, "measure", lambda *args, **kwargs: benchmark.Timing(1e-3, 1e-3, 1e-3)
    )
    rows = list(benchmark.time_attention(tiny_config(**fields)))
    assert [row["what"] for row in rows[::2]] == [f"attention {name}" for name in names]


def test_a_failure_leaves_the_rows_before_it(tmp_path, monkeypatch):
    def static_estimates(config):
        yield {"what": "the first"}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "static_estimates", static_estimates)
    with pytest.raises(RuntimeError):
        benchmark.run(tiny_config(), tmp_path)
    assert json.loads((tmp_path / "benchmark.json").read_text())["rows"] == [{"what": "the first"}]


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(pixels=("a",)),
            r"benchmark.pixels = \('a',\) must be multiples of a token's 8 pixels",
        ),
        (dict(pixels=()), r"benchmark.pixels = \(\)"),
        (dict(pixels=(64, 36)), r"benchmark.pixels = \(64, 36\)"),
        (dict(what=("speed",)), "benchmark.what names speed"),
        (dict(topology=""), "benchmark.topology must name a TPU slice"),
        (dict(topology="v9:2x2"), "benchmark.topology = 'v9:2x2'"),
    ],
)
def test_bad_fields_are_one_line(tmp_path, fields, message):
    config = tiny_config()
    config.benchmark.update(fields)
    with pytest.raises(ValueError, match=message):
        benchmark.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_timed_is_found_before_the_first_row(tmp_path, monkeypatch):
    """The data come after the models, and one size after the others."""
    config = tiny_config(kernel_function="relu")
    config.benchmark.what = ("attention", "data")
    config.data.update(name="no_such_set", dir=str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match="no_such_set"):
        benchmark.run(config, tmp_path / "run")

    config.benchmark.update(what=("attention",), pixels=(32, 64))
    refusals = {(4, 4): "", (8, 8): "too large"}
    monkeypatch.setattr(
        benchmark.LinearAttention, "refusal", lambda self, name, width, grid: refusals.get(grid, "")
    )
    with pytest.raises(ValueError, match="at 64 pixels: too large"):
        benchmark.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(kernel_function="relu", conv_size=9),
            "model.conv_size = 9 at 32 pixels: pallas_tpu offers convolutions of 3, 5 or",
        ),
        (
            dict(kernel_function="gelu"),
            "model.kernel_function = gelu, .* offers kernel_function 'relu'",
        ),
    ],
)
def test_no_estimate_of_what_the_kernels_do_not_offer(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        benchmark.run(tiny_config(**fields), tmp_path)


# The static estimates, by the TPU's compiler.


@pytest.mark.parametrize(
    "topology, clock, cores",
    [("v5e:2x2", 1.5e9, 1), ("v4:2x2x1", 1.05e9, 2), ("v5p:2x2x1", 1.75e9, 2)],
)
def test_a_static_estimate_is_of_the_configs_model_on_the_whole_chip(
    tmp_path, topology, clock, cores
):
    """The cores of a chip share its images and its HBM."""
    config = tiny_config(kernel_function="relu", dtype="bfloat16")
    config.benchmark.update(topology=topology, pixels=(128,), attention_tokens=4 * 256)
    benchmark.run(config, tmp_path)
    forward, backward = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert (forward["pass"], backward["pass"], forward["batch"], forward["pixels"]) == (
        "forward",
        "backward",
        4,
        128,
    )
    bandwidth = chips.TPUS[forward["chip"]].bandwidth
    for row, arrays in ((forward, 4), (backward, 7)):
        # Of B T D bfloat16 elements; 5 % for the filter and its gradient, which the compiler pads.
        assert row["floor us"] * 1e-6 * bandwidth == pytest.approx(
            arrays * 4 * 256 * 32 * 2, rel=0.05
        )
    for row in (forward, backward):
        assert row["bundles"] > 100 and row["us"] == pytest.approx(
            1e6 * row["bundles"] * 4 / cores / clock
        )
        assert row["x floor"] == pytest.approx(
            row["us"] / row["floor us"]
        )  # far above what memory takes


def test_an_image_is_drawn_by_both_models_and_decoded(tmp_path):
    config = tiny_config(input_size=4)
    config.autoencoder.checkpoint = str(write_autoencoder(tmp_path / "autoencoder"))
    config.benchmark.update(what=("image",), pixels=(16,))
    config.sample.update(sampler="ddim", steps=2, variance="")
    benchmark.run(config, epath.Path(tmp_path))
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    torch = importlib.util.find_spec("torch") is not None
    names = ["linear", "torch linear", "softmax", "torch softmax"]
    assert [row["what"] for row in rows] == [
        f"image, {name}" for name in names if torch or "torch" not in name
    ]
    for row in rows:
        assert row["steps"] == 2 and row["draw s"] > 0 and row["peak GB"] > 0.1


def test_images_of_several_sizes_are_a_picture(tmp_path, monkeypatch):
    """A line a model: its sizes, what an image took, and its memory."""

    def time_images(config):
        for pixels in config.benchmark.pixels:
            for factor, name in enumerate(("linear", "torch linear"), 1):
                took = {"draw CPU s": factor * pixels / 100, "peak GB": factor * 0.5}
                yield {"what": f"image, {name}", "pixels": pixels} | took

    monkeypatch.setattr(benchmark, "time_images", time_images)
    config = tiny_config()
    config.benchmark.update(what=("image",), pixels=(16,))
    benchmark.run(config, epath.Path(tmp_path / "one"))
    assert not (tmp_path / "one" / "benchmark.png").exists()
    config.benchmark.pixels = (16, 32)
    benchmark.run(config, epath.Path(tmp_path))
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
    figure = benchmark.draw_resolutions(list(time_images(config)), ("draw CPU s", "peak GB"))
    seconds, memory = figure.axes
    lines = [[line.get_label(), *line.get_xydata().tolist()] for line in seconds.lines]
    assert lines == [
        ["linear", [16, 0.16], [32, 0.32]],
        ["torch linear", [16, 0.32], [32, 0.64]],
    ]
    assert [line.get_ydata().tolist() for line in memory.lines] == [[0.5, 0.5], [1.0, 1.0]]


@pytest.mark.torch
@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_the_peer_of_a_model_computes_the_same(attention):
    """Otherwise the benchmark would compare the times of two functions."""
    import torch

    config = tiny_config(depth=1).model
    architecture = DiTConfig(
        1, 32, 2, attention=attention, num_classes=3, grid=(4, 4), conv_size=3,
        kernel_function=config.kernel_function if attention == "linear" else "relu",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), param_shapes(architecture)
    )
    x = rng.standard_normal((1, 8, 8, 4), np.float32)
    t = np.array([500])
    model = DiT(architecture, dtype=np.float32)
    ours = model.apply({"params": params}, x, t, {"label": np.ones(1, np.int32)})
    peer = torch_peer(params, architecture)
    with torch.no_grad():
        theirs = peer(
            torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t), torch.ones(1).long()
        )
    # As the exports: float32, two blocks deep.
    np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


def test_a_model_and_its_peer_are_a_row_with_a_column_each(tmp_path):
    config = tiny_config(depth=1, kernel_function="relu")
    config.benchmark.what = ("peers",)
    benchmark.run(config, tmp_path)
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [(row["what"], row["pixels"]) for row in rows] == [("forward", 32), ("gradient", 32)]
    names = ["LiT", "DiT"]
    if importlib.util.find_spec("torch") is not None:
        names = ["LiT", "torch LiT", "DiT", "torch DiT"]
    for row in rows:
        columns = [f"{name} {unit}" for unit in ("CPU ms", "ms") for name in names]
        assert list(row) == ["what", "pixels", *columns]
        assert all(row[column] > 0 for column in columns)


# ---- Low precision -------------------------------------------------------------------------------


def test_precisions_are_compared_on_the_same_images(tmp_path, monkeypatch):
    """Bytes by hand; every part that is rounded moves the pixels in a way of its own."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)  # eight would only compile longer
    config = tiny_config(depth=1, kernel_function="relu", patch_size=2, input_size=8)
    config.benchmark.what = ("precision",)
    config.evaluate.reference = ""
    config.sample.update(
        checkpoint=str(tmp_path / "params"), sampler="ddim", steps=2, cfg_scale=1.0,
        num_images=4, batch_size=4,
    )  # fmt: skip
    architecture = Experiment(config).model_config
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), param_shapes(architecture)
    )
    checkpoint.save_params(tmp_path / "params", params, {"model": architecture.to_json()})
    benchmark.run(config, tmp_path / "run")

    rows = json.loads((tmp_path / "run" / "benchmark.json").read_text())["rows"]
    alone = ["none", "int8_weights", "int8"]
    also = [f"int8 and {name}" for name in ("adaLN", "final_layer", "attention", "normaliser")]
    assert [row["precision"] for row in rows] == alone + also
    moved = [row["mean pixel difference"] for row in rows]
    assert moved[0] == 0 and len(set(moved)) == len(rows) and max(moved) < 20
    # 12 D D weights of a block in a byte each, with float32 scales of their 9 D columns.
    D = architecture.width
    whole = 4 * checkpoint.parameter_count(params)
    int8 = whole - 3 * 12 * D * D + 4 * 9 * D
    sizes = [1e6 * row["MB"] for row in rows]
    assert sizes[0] == pytest.approx(whole)
    for size in (sizes[1], sizes[2], sizes[5], sizes[6]):
        assert size == pytest.approx(int8)
    assert max(sizes[3:5]) < int8

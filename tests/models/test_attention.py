"""Softmax attention's kernels, and which a platform gets; costs; every design in a model."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.experimental.pallas import tpu as pltpu
from oracles import assert_close

from lit_jax import inherit, models
from lit_jax.costs import hlo, tpu_schedule
from lit_jax.kernels import dit5, mala, mhla
from lit_jax.kernels.depthwise import depthwise_conv
from lit_jax.models import attention, dit


def tokens(*shape, seed=5, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


# Whole blocks of 128 tokens, and the 12 x 14 of an aspect that leaves the last one ragged.
@pytest.mark.parametrize("T, head_width", [(256, 16), (168, 72)])
def test_the_tpu_flash_kernel_computes_softmax_attention(T, head_width):
    """Values and gradients, in interpret mode, which multiplies in float32: wrong axes show."""
    q, k, v, do = (jnp.asarray(tokens(1, T, 2, head_width, seed=seed)) for seed in range(4))

    def run(name):
        def both(q, k, v, do):
            out, vjp = jax.vjp(lambda *x: attention.softmax_attention(*x, name), q, k, v)
            return out, *vjp(do)

        return jax.jit(both)(q, k, v, do)

    with pltpu.force_tpu_interpret_mode():
        flash = run("pallas_tpu")
    for ours, theirs in zip(flash, run("xla"), strict=True):
        assert_close(ours, theirs, reduction=T)


def test_softmax_attention_by_blocks_of_queries_is_that_of_all_at_once(monkeypatch):
    """Values and gradients against JAX's own; 15 tokens in blocks of 5, or of 1."""
    q, k, v, do = (jnp.asarray(tokens(2, 15, 3, 4, seed=seed)) for seed in range(4))

    def run(attend):
        def both(q, k, v, do):
            out, pull = jax.vjp(attend, q, k, v)
            return out, *pull(do)

        return jax.jit(both)(q, k, v, do)

    expected = run(jax.nn.dot_product_attention)
    for scores, blocks in ((2**28, 1), (250, 3), (1, 15)):
        monkeypatch.setattr(attention, "SCORES", scores)
        found = run(lambda *x: attention.softmax_attention(*x, "xla"))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, reduction=15, what=f"{blocks} blocks")
        text = str(jax.make_jaxpr(lambda *x: attention.softmax_attention(*x, "xla"))(q, k, v))
        assert f"f32[6,{15 // blocks},15]" in text  # of heads, queries and keys


def test_the_tpu_compiler_takes_the_flash_kernel_of_a_ragged_aspect():
    """PixArt-Sigma's 1,008 tokens of the bucket 12x21 at 512 pixels, whose last block has 112."""
    array = jax.ShapeDtypeStruct((2, 1008, 16, 72), jnp.bfloat16)
    flash = functools.partial(attention.softmax_attention, implementation="pallas_tpu")
    compiled = tpu_schedule.compile_for(flash, (array,) * 3, "v5e:2x2")
    # The scores of all pairs would be 65 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 40e6


@pytest.mark.parametrize("bias", [True, False])
def test_projections_head_by_head_are_those_of_all_heads(bias):
    """What a TPU's kernel is given, values and gradients, against the dense layers."""
    x, do = (jnp.asarray(tokens(1, 128, 32, seed=seed)) for seed in range(2))
    module = functools.partial(attention.SoftmaxAttention, 2, bias, dtype=jnp.float32)
    init = jax.jit(module("xla").init, static_argnums=2)
    params = init(jax.random.key(0), x, (8, 16))
    params = jax.tree.map(lambda p: np.asarray(p) + tokens(*p.shape, seed=3, scale=0.1), params)

    def run(name):
        def both(params, x, do):
            out, vjp = jax.vjp(lambda p, x: module(name).apply(p, x, (8, 16)), params, x)
            return out, vjp(do)

        return jax.tree.leaves(jax.jit(both)(params, x, do))

    with pltpu.force_tpu_interpret_mode():
        tpu = run("pallas_tpu")
    for ours, theirs in zip(tpu, run("xla"), strict=True):
        assert_close(ours, theirs, reduction=128)


def test_nothing_is_copied_between_a_projection_and_the_flash_kernel():
    """Heads of 72 columns, DiT-XL/2's: no array changes its order on its way into the kernel."""
    module = attention.SoftmaxAttention(16, implementation="pallas_tpu")
    D = 16 * 72
    shapes = {"qkv": (D, 3 * D), "proj": (D, D)}
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    params = {n: {"kernel": array(s), "bias": array(s[1:])} for n, s in shapes.items()}

    def forward(params, x):
        return module.apply({"params": params}, x, (16, 32))

    # More than stays on the chip.
    x = array((64, 512, D))
    compiled = tpu_schedule.compile_for(forward, (params, x), "v5e:2x2")
    # x is read once or for each of q, k and v, which are written and read; so is the output.
    moved = hlo.Program(compiled.as_text()).traffic()
    assert moved <= (3 + 6 + 2 + 1) * 64 * 512 * D * 2


@pytest.mark.parametrize(
    "platform, capability, dtype, T, H, expected",
    [
        ("cpu", None, "float32", 256, 72, "xla"),
        ("tpu", None, "bfloat16", 256, 72, "pallas_tpu"),
        ("tpu", None, "bfloat16", 256, 256, "pallas_tpu"),
        ("tpu", None, "bfloat16", 256, 288, "xla"),  # wide heads in multiples of 128 only,
        ("tpu", None, "bfloat16", 128, 288, "pallas_tpu"),  # unless one block takes all tokens
        ("tpu", None, "bfloat16", 1008, 72, "pallas_tpu"),  # 128 does not divide the tokens
        ("tpu", None, "float32", 64, 72, "xla"),  # fewer than a block
        ("gpu", "9.0", "bfloat16", 64, 72, "cudnn"),
        ("gpu", "9.0", "float16", 64, 256, "cudnn"),
        ("gpu", "9.0", "bfloat16", 64, 264, "xla"),  # heads too wide
        ("gpu", "9.0", "bfloat16", 64, 36, "xla"),  # no multiple of 8
        ("gpu", "9.0", "float32", 64, 72, "xla"),  # 16 bit only
        ("gpu", "8.0", "bfloat16", 64, 128, "cudnn"),
        ("gpu", "8.0", "bfloat16", 64, 136, "xla"),  # too wide before Hopper
        ("gpu", "10.3", "bfloat16", 64, 136, "cudnn"),
        ("gpu", "gfx942", "bfloat16", 64, 72, "xla"),  # AMD's
    ],
)
def test_softmax_attention_takes_the_platforms_kernel_where_it_offers_the_case(
    monkeypatch, caplog, platform, capability, dtype, T, H, expected
):
    on_device(monkeypatch, platform, capability)
    caplog.set_level("INFO")
    q = jax.ShapeDtypeStruct((1, T, 2, H), dtype)
    for _ in range(2):
        # What is chosen cannot be traced for another device than is there; the log has its name.
        with contextlib.suppress(Exception):
            jax.eval_shape(lambda *x: attention.softmax_attention(*x), q, q, q)
    (line,) = [record.message for record in caplog.records if "softmax_attention" in record.message]
    assert line.startswith(f"softmax_attention: {expected} on a device")


def on_device(monkeypatch, platform, capability=None):
    """Makes the attentions believe in a device."""
    device = types.SimpleNamespace(platform=platform, device_kind="a device")
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "devices", lambda: [device])
    attention.take_or_xla.cache_clear()


def test_none_is_what_was_chosen_and_a_named_softmax_attention_runs_or_raises(monkeypatch):
    q, k, v = (jnp.asarray(tokens(1, 128, 2, 16, seed=seed)) for seed in range(3))
    np.testing.assert_array_equal(
        attention.softmax_attention(q, k, v), attention.softmax_attention(q, k, v, "xla")
    )
    with monkeypatch.context() as patch:
        on_device(patch, "tpu")
        # JAX's words for a TPU kernel on a CPU.
        with pytest.raises(ValueError, match="interpret mode"):
            attention.softmax_attention(q, k, v)
    for name, message in (
        ("cudnn", "cudnn runs on NVIDIA's GPUs"),
        ("fast", "must be one of xla, cudnn, pallas_tpu; got 'fast'"),
        ("pallas_tpu", "takes at least 128 tokens, got 64;"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.softmax_attention(q[:, :64], k[:, :64], v[:, :64], name)


# ---- Costs: sums that a reader can redo in the head ----------------------------------------------


def test_softmax_multiplies_every_token_with_every_other_twice():
    # Three tokens of width 4: 9 pairs, of which each costs 4 for its score and 4 for its value.
    assert attention.SoftmaxAttention(num_heads=2).macs(tokens=3, width=4) == 72


def test_linear_attention_passes_each_token_through_its_heads_state_twice():
    # Three tokens of two heads of 2 x 2: 8 into the states and 8 out of them, for each token.
    assert attention.LinearAttention(num_heads=2, conv_size=0).macs(tokens=3, width=4) == 48
    # And nine taps for each of the 12 values.
    with_convolution = attention.LinearAttention(num_heads=2, conv_size=3)
    assert with_convolution.macs(tokens=3, width=4) == 48 + 108


def test_other_designs_cost_what_their_products_do():
    """Three tokens (of MHLA: in one block) of two heads of 2 x 2, as above."""
    state = 48
    mhla = attention.BlockAttention(num_heads=2, conv_size=0, num_blocks=1)
    assert mhla.macs(tokens=3, width=4) == state + 8  # a state of 2 x 2 x 2, mixed once
    # Of wide heads the pairs cost less: 2 x 2 scores and as many read-outs of 8 columns.
    mhla = attention.BlockAttention(num_heads=1, conv_size=0, num_blocks=4)
    assert mhla.macs(tokens=2, width=8) == 2 * 2 * 2 * 8
    mala = attention.MagnitudeAttention(num_heads=2, conv_size=3)
    assert mala.macs(tokens=3, width=4) == state + 108 + 48  # the gate is a projection of 4 x 4
    dit5 = attention.FastWeightAttention(num_heads=2, conv_size=3)
    assert dit5.macs(tokens=3, width=4) == 7 * 24 + 2 * 108


# ---- Every design in a model ---------------------------------------------------------------------


def mhla_again(layer, q, k, v, dense, conv, heads):
    """(B, T, D) before the output projection, from a layer's leaves; so of the other two."""
    mix = jax.jit(mhla.mhla, static_argnames="grid")
    mixed = mix(heads(q), heads(k), heads(v), layer["mix"], grid=(4, 6))
    return np.asarray(mixed).reshape(v.shape) + conv("dwc", v)


def mala_again(layer, q, k, v, dense, conv, heads):
    mixed = jax.jit(mala.mala)(heads(q), heads(k), heads(v))
    return (np.asarray(mixed).reshape(v.shape) + conv("dwc", v)) * dense("gate")


def dit5_again(layer, q, k, v, dense, conv, heads):
    k = np.asarray(dit5.centre_keys(jnp.asarray(k)))
    q, k = q + conv("dwc_q", q), k + conv("dwc_k", k)
    mixed = jax.jit(dit5.dit5)(heads(q), heads(k), heads(v), layer["w1"], layer["w2"])
    return np.asarray(mixed).reshape(v.shape)


# Of each design beside LiT's: the leaves that no teacher with softmax has, and what it computes.
OWN = {
    "mhla": ({"mix", "dwc/kernel", "dwc/bias"}, mhla_again),
    "mala": ({"gate/kernel", "gate/bias", "dwc/kernel", "dwc/bias"}, mala_again),
    "dit5": (
        {"w1", "w2", "dwc_q/kernel", "dwc_q/bias", "dwc_k/kernel", "dwc_k/bias"},
        dit5_again,
    ),
}


def test_every_design_is_computed_again_here():
    assert attention.ATTENTIONS.keys() - {"softmax", "linear"} == OWN.keys()


def test_dit5s_small_networks_start_from_a_deviation_of_0_02():
    """As timm's trunc_normal_ gives it. A normal cut at two deviations has 0.0176."""
    module = attention.FastWeightAttention(num_heads=2, conv_size=0)
    leaves = module.init(jax.random.key(0), jnp.zeros((1, 4, 256)), (2, 2))["params"]
    for name in ("w1", "w2"):
        # Of 32,768 draws, whose own deviation is known to 0.4 %.
        np.testing.assert_allclose(np.std(leaves[name]), 0.02, rtol=0.02)
        assert np.abs(leaves[name]).max() > 0.06


@pytest.mark.parametrize("name", OWN)
def test_a_design_in_a_model_has_its_leaves_and_inherits_all_four_projections(name):
    """And it computes: the module against its own kernel, by the leaves that it declares."""
    own_leaves, again = OWN[name]
    config = dit.DiTConfig(
        depth=2, width=16, num_heads=2, attention=name, num_classes=3, conv_size=3, num_blocks=4
    )
    init = jax.jit(models.init_params, static_argnums=0)
    params = init(dit.DiT(config), jax.random.key(0))
    own = flatten_dict(params["blocks"]["attn"], sep="/")
    shared = {f"{m}/{leaf}" for m in ("q", "kv", "proj") for leaf in ("kernel", "bias")}
    assert set(own) == shared | own_leaves

    teacher = dit.DiT(dit.DiTConfig(2, 16, 2, num_classes=3))
    teacher = init(teacher, jax.random.key(1))
    merged, report = inherit.merge_params(teacher, params, load=("q", "k", "v", "o"))
    assert {path.removeprefix("blocks/attn/") for path in report.at_init} == own_leaves
    qkv = teacher["blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(merged["blocks"]["attn"]["kv"]["kernel"], qkv[..., 16:])

    layers = jax.device_get(merged["blocks"]["attn"])
    layer = jax.tree.map(lambda x: x[1] + 0.1 * tokens(*x[1].shape), layers)
    x = tokens(2, 24, 16)
    module = attention.make_attention(config, dtype=jnp.float32, parent=None)
    out = jax.jit(module.apply, static_argnums=2)({"params": layer}, x, (4, 6))
    convolve = jax.jit(depthwise_conv, static_argnums=3)

    def dense(name):
        return np.asarray(x @ layer[name]["kernel"] + layer[name]["bias"])

    def conv(name, x):
        kernel = layer[name]["kernel"][:, :, 0]
        return np.asarray(convolve(x, kernel, layer[name]["bias"], (4, 6)))

    def heads(x):
        return jnp.asarray(x.reshape(2, 24, 2, 8))

    q, (k, v) = dense("q"), np.split(dense("kv"), 2, axis=-1)
    expected = again(layer, q, k, v, dense, conv, heads)
    expected = expected @ layer["proj"]["kernel"] + layer["proj"]["bias"]
    assert_close(out, expected, reduction=24, factor=32)


def test_a_design_without_kernels_takes_xla_alone():
    config = dit.DiTConfig(2, 16, 2, attention="mala", num_classes=3)
    with pytest.raises(ValueError, match="^implementation must be one of xla for mala"):
        attention.make_attention(config, "pallas_tpu", parent=None)
    module = attention.make_attention(config, parent=None)
    assert module.refusal("xla", 16, (4, 4)) == ""
    assert module.refusal("pallas_tpu", 16, (4, 4)) == "pallas_tpu has no such attention; use xla"

"""DiT and LiT against an independent torch model, module by module and whole.

A fresh adaLN-Zero model outputs zero and every block is the identity, so parity says nothing there:
no parameter of the models compared here is zero.
"""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_dit
from flax.traverse_util import flatten_dict, unflatten_dict
from oracles import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lit_jax import sharding
from lit_jax.models import architecture, attention, dit

DEPTH, WIDTH, HEADS = 3, 48, {"softmax": 4, "linear": 3}
CLASSES = 7
# assert_close allows 8 * 2^-23 * sqrt(reduction) of the largest output: with this, 1e-5.
PARITY = dict(reduction=100)


def to_ours(path, value):
    """A torch parameter's name and array in the official layout, to our name and array."""
    value = value.detach().numpy().copy()
    path = (
        path.replace("mlp.0.", "mlp_0.")
        .replace("mlp.2.", "mlp_2.")
        .replace("adaLN_modulation.1.", "adaLN_modulation.")
    )
    *module, leaf = path.split(".")
    if leaf == "weight" and module[-1] == "embedding_table":
        leaf = "embedding"
    elif leaf == "weight":
        leaf = "kernel"
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return "/".join([*module, leaf]), value


def params_from(module):
    """The parameter tree of a whole torch model, blocks stacked; of a part, as it is."""
    flat = dict(to_ours(*item) for item in module.named_parameters() if item[0] != "pos_embed")
    layers = sorted({int(path.split("/")[1]) for path in flat if path.startswith("blocks/")})
    stacked = {}
    for path, value in flat.items():
        if path.startswith("blocks/0/"):
            inner = path.removeprefix("blocks/0/")
            stacked[f"blocks/{inner}"] = np.stack([flat[f"blocks/{i}/{inner}"] for i in layers])
        elif not path.startswith("blocks/"):
            stacked[path] = value
    return unflatten_dict(stacked, sep="/")


def make_pair(
    kind,
    *,
    grid=(4, 4),
    patch_size=2,
    in_channels=4,
    learn_sigma=True,
    seed=0,
    dtype=jnp.float32,
    **options,
):
    """The torch model with random weights everywhere, our model, and our parameters."""
    num_heads = HEADS[kind]
    fields = dict(
        patch_size=patch_size,
        in_channels=in_channels,
        num_classes=CLASSES,
        learn_sigma=learn_sigma,
        attention=kind,
        **options,
    )
    theirs = torch_dit.DiT(DEPTH, WIDTH, num_heads, grid=grid, **fields)
    torch_dit.randomise_(theirs, seed)
    config = dit.DiTConfig(depth=DEPTH, width=WIDTH, num_heads=num_heads, **fields)
    return theirs, dit.DiT(config, dtype=dtype), params_from(theirs)


def make_inputs(grid=(4, 4), patch_size=2, in_channels=4, seed=0):
    """x, t, condition and drop: the third of three images is told nothing."""
    rng = np.random.default_rng(seed)
    shape = (3, grid[0] * patch_size, grid[1] * patch_size, in_channels)
    x = rng.standard_normal(shape).astype(np.float32)
    condition = {"label": np.array([0, 3, 5])}
    return x, np.array([0, 17, 63]), condition, np.array([False, False, True])


def torch_inputs(x, t, condition, drop):
    """The same for the torch model, whose null class is a label."""
    y = np.where(drop, CLASSES, condition["label"])
    return torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(y)


def run_theirs(model, *inputs):
    with torch.no_grad():
        out = model(*torch_inputs(*inputs))
    return out.numpy().transpose(0, 2, 3, 1)


@functools.cache
def forward(model):
    """The model compiled: tests that need the same share it."""
    return jax.jit(model.apply)


def apply(module, params, *inputs, **static):
    """One module, compiled: op by op each of its sums would be a program of its own."""
    run = functools.partial(module.apply, **static)
    return jax.jit(run)({"params": params}, *inputs)


def tokens(*shape, seed=5, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


# ---- Module by module ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch_size, grid, in_channels", [(2, (4, 4), 4), (4, (3, 5), 3), (8, (2, 1), 1)]
)
def test_patch_embedding(patch_size, grid, in_channels):
    theirs, _, params = make_pair(
        "softmax", grid=grid, patch_size=patch_size, in_channels=in_channels
    )
    x, *_ = make_inputs(grid, patch_size, in_channels)
    ours = dit.PatchEmbedder(WIDTH, patch_size, jnp.float32)
    out = apply(ours, params["x_embedder"], x)
    expected = theirs.x_embedder(torch.tensor(x.transpose(0, 3, 1, 2))).detach().numpy()
    assert_close(out.reshape(expected.shape), expected, **PARITY)


@pytest.mark.parametrize("freq_shift", [0, 1])
def test_timestep_and_label_embedders(freq_shift):
    theirs, _, params = make_pair("softmax", timestep_freq_shift=freq_shift)
    t, y = np.array([0, 3, 99]), np.array([0, 6, CLASSES])
    out = apply(dit.TimestepEmbedder(WIDTH, freq_shift), params["t_embedder"], t)
    assert_close(out, theirs.t_embedder(torch.tensor(t)).detach(), **PARITY)
    np.testing.assert_array_equal(
        apply(dit.LabelEmbedder(CLASSES, WIDTH), params["y_embedder"], y),
        theirs.y_embedder(torch.tensor(y)).detach(),
    )


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("num_heads", [1, 4])
def test_softmax_attention(grid, num_heads):
    theirs = torch_dit.randomise_(torch_dit.SoftmaxAttention(WIDTH, num_heads), 1)
    x = tokens(2, grid[0] * grid[1], WIDTH)
    ours = attention.SoftmaxAttention(num_heads, dtype=jnp.float32)
    out = apply(ours, params_from(theirs), x, grid=grid)
    assert_close(out, theirs(torch.tensor(x), grid).detach(), **PARITY)


@pytest.mark.parametrize(
    "num_heads, qkv_bias, conv_size, grid",
    [
        (1, True, 5, (4, 4)),
        (3, True, 5, (3, 5)),
        (3, False, 5, (4, 4)),
        (3, True, 3, (5, 2)),
        (3, True, 0, (4, 4)),
    ],
)
def test_linear_attention(num_heads, qkv_bias, conv_size, grid):
    theirs = torch_dit.randomise_(
        torch_dit.LinearAttention(WIDTH, num_heads, qkv_bias, conv_size), 1
    )
    params = params_from(theirs)
    x = tokens(2, grid[0] * grid[1], WIDTH)
    ours = attention.LinearAttention(num_heads, qkv_bias, conv_size=conv_size, dtype=jnp.float32)
    fresh = jax.eval_shape(lambda: ours.init(jax.random.key(0), x, grid)["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    out = apply(ours, params, x, grid=grid)
    assert_close(out, theirs(torch.tensor(x), grid).detach(), **PARITY)


def test_mlp():
    theirs = torch_dit.randomise_(torch_dit.Mlp(WIDTH), 2)
    x = tokens(2, 5, WIDTH)
    assert_close(
        apply(dit.Mlp(jnp.float32), params_from(theirs), x),
        theirs(torch.tensor(x)).detach(),
        **PARITY,
    )


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_final_layer(scale):
    """At a scale of 1e-3 the variance equals the norm's epsilon: a wrong epsilon would show."""
    theirs = torch_dit.randomise_(torch_dit.FinalLayer(WIDTH, 2, 8), 3)
    x, c = tokens(2, 5, WIDTH, scale=scale), tokens(2, WIDTH, seed=6)
    ours = dit.FinalLayer(2 * 2 * 8, jnp.float32)
    out = apply(ours, params_from(theirs), x, nn.silu(jnp.asarray(c)))
    assert_close(out, theirs(torch.tensor(x), torch.tensor(c)).detach(), **PARITY)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_block(kind):
    theirs, _, _ = make_pair(kind)
    block, grid = theirs.blocks[1], (4, 4)
    x, c = tokens(2, 16, WIDTH, scale=1e-3), tokens(2, WIDTH, seed=6)
    assert_close(
        apply_block(kind, block, x, c, 1e-6),
        block(torch.tensor(x), torch.tensor(c), grid).detach(),
        **PARITY,
    )


def test_block_uses_the_second_norms_own_epsilon():
    block = torch_dit.Block(WIDTH, torch_dit.SoftmaxAttention(WIDTH, 4), mlp_norm_epsilon=1e-5)
    torch_dit.randomise_(block, 4)
    with (
        torch.no_grad()
    ):  # without the attention branch the tiny x reaches the second norm as it is
        block.adaLN_modulation[1].weight[2 * WIDTH : 3 * WIDTH] = 0
        block.adaLN_modulation[1].bias[2 * WIDTH : 3 * WIDTH] = 0
    x, c = tokens(2, 16, WIDTH, scale=1e-3), tokens(2, WIDTH, seed=6)
    expected = block(torch.tensor(x), torch.tensor(c), (4, 4)).detach()
    assert_close(apply_block("softmax", block, x, c, 1e-5), expected, **PARITY)
    other = apply_block("softmax", block, x, c, 1e-6)
    assert np.abs(other - expected.numpy()).max() > 0.1 * np.abs(expected.numpy()).max()


def apply_block(kind, block, x, c, mlp_norm_epsilon):
    """Our Block, float32, with the torch block's weights; c is the condition before its SiLU."""
    config = dit.DiTConfig(
        depth=1,
        width=WIDTH,
        num_heads=HEADS[kind],
        attention=kind,
        mlp_norm_epsilon=mlp_norm_epsilon,
    )
    ours = dit.Block(config, (4, 4), None, jnp.float32)
    (x, _), _ = apply(ours, params_from(block), (x, nn.silu(jnp.asarray(c))), None)
    return x


# ---- Whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options",
    [
        ("softmax", dict()),
        ("softmax", dict(patch_size=4, grid=(2, 3), in_channels=3)),
        ("softmax", dict(patch_size=8, grid=(3, 2), in_channels=1, learn_sigma=False)),
        ("softmax", dict(timestep_freq_shift=1, mlp_norm_epsilon=1e-5)),
        ("linear", dict()),
        ("linear", dict(patch_size=4, grid=(2, 3), in_channels=3)),
        ("linear", dict(patch_size=8, grid=(3, 2), in_channels=1, learn_sigma=False)),
        ("linear", dict(qkv_bias=False, conv_size=3)),
        ("linear", dict(conv_size=0)),
    ],
)
def test_whole_model(kind, options):
    theirs, ours, params = make_pair(kind, **options)
    shape = {
        name: options[name] for name in ("grid", "patch_size", "in_channels") if name in options
    }
    inputs = make_inputs(**shape)
    out = forward(ours)({"params": params}, *inputs)
    expected = run_theirs(theirs, *inputs)
    assert out.dtype == jnp.float32
    assert np.abs(expected).mean() > 0.3  # random everywhere: nothing is hidden behind a zero
    assert_close(out, expected, **PARITY)


@pytest.mark.parametrize("policy", ["none", "full", "dots"])
def test_a_layers_weights_are_gathered_whatever_is_computed_again(policy):
    """On a mesh each of a block's matrices is made whole, in the dtype that it is used in."""
    _, ours, params = make_pair("linear", dtype=jnp.bfloat16)
    ours = ours.clone(remat=policy)
    inputs = make_inputs()
    grad = jax.grad(lambda params: ours.apply({"params": params}, *inputs).sum())
    program = str(jax.make_jaxpr(sharding.on_mesh(grad, sharding.make_mesh(2, 4)))(params))
    for path, leaf in flatten_dict(params["blocks"], sep="/").items():
        if leaf.ndim == 3:
            shape = ",".join(map(str, leaf.shape[1:]))
            assert re.search(rf"bf16\[{shape}\] = sharding_constraint", program), (
                f"{path} is left split"
            )


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_gradients_of_the_whole_model(kind):
    theirs, ours, params = make_pair(kind)
    inputs = make_inputs()
    weights = tokens(3, 8, 8, 8, seed=8)
    out = theirs(*torch_inputs(*inputs))
    (out * torch.tensor(weights.transpose(0, 3, 1, 2))).sum().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad if parameter.requires_grad else 0)
    expected = flatten_dict(params_from(theirs), sep="/")
    grads = jax.jit(
        jax.grad(lambda params: (ours.apply({"params": params}, *inputs) * weights).sum())
    )(params)
    for path, grad in flatten_dict(grads, sep="/").items():
        # Sums over batch, tokens and width, through three blocks: 4e-5 of the largest.
        assert_close(grad, expected[path], reduction=1600, what=path)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_bfloat16_model_stays_near_float32_and_outputs_float32(kind):
    _, ours, params = make_pair(kind)
    inputs = make_inputs()
    exact = forward(ours)({"params": params}, *inputs)
    rounded = jax.jit(ours.clone(dtype=jnp.bfloat16).apply)({"params": params}, *inputs)
    assert rounded.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(rounded - exact)) / np.mean(np.square(exact)))
    # Of a few roundings of 2^-9 a block; below it would not be bfloat16 at all.
    assert 1e-4 < error < 0.05


def test_drop_is_the_null_class():
    """And what a dropped image's label is does not matter."""
    _, ours, params = make_pair("linear")
    x, t, condition, drop = make_inputs()
    variables = {"params": params}
    run = forward(ours)
    out = run(variables, x, t, condition, drop)
    other = run(variables, x, t, {"label": np.array([0, 3, 1])}, drop)
    np.testing.assert_array_equal(out, other)
    null = run(variables, x, t, {"label": np.array([0, 3, CLASSES])}, drop & False)
    np.testing.assert_array_equal(out, null)
    kept = run(variables, x, t, condition, drop & False)
    assert np.abs(kept[2] - out[2]).max() > 1e-3
    np.testing.assert_array_equal(run(variables, x, t, condition), kept)


@pytest.fixture(scope="module")
def grads():
    """A function from a rematerialisation policy to the gradients of one small model."""
    _, model, params = make_pair("softmax")
    inputs = make_inputs()

    def of(policy):
        output = model.clone(remat=policy).apply
        loss = jax.grad(lambda params: jnp.square(output({"params": params}, *inputs)).mean())
        return flatten_dict(jax.jit(loss)(params), sep="/")

    return functools.cache(of)


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(grads, policy):
    for path, grad in grads(policy).items():
        # XLA may fuse, and so round, the same sums another way.
        assert_close(grad, grads("none")[path], reduction=100, what=path)


def test_dots_saves_q_and_kv_once_and_with_their_bias():
    """The attention reads the sums; without the bias the backward pass would write them anew."""
    _, model, params = make_pair("linear", conv_size=0)
    model, inputs, biases = model.clone(remat="dots"), make_inputs(), {"q": 1000.0, "kv": 2000.0}
    # So that a mean tells what is saved; no other activation is near.
    for name, bias in biases.items():
        params["blocks"]["attn"][name]["bias"] += bias
    vjp = jax.jit(
        lambda params: jax.vjp(lambda params: model.apply({"params": params}, *inputs), params)[1]
    )(params)
    B = len(inputs[0])
    T = 16
    saved = [
        (x.shape[3], float(np.mean(x)))
        for x in jax.tree.leaves(vjp)
        if x.shape[:3] == (DEPTH, B, T)
    ]
    wide = [mean for width, mean in saved if width == 2 * WIDTH]
    assert wide == [pytest.approx(biases["kv"], rel=0.01)], saved
    # x, q, and the products of proj and fc2.
    narrow = [mean for width, mean in saved if width == WIDTH]
    assert len(narrow) == 4, saved
    assert sum(mean == pytest.approx(biases["q"], rel=0.01) for mean in narrow) == 1, saved


# ---- Sizes ---------------------------------------------------------------------------------------


def torch_model(size, *, kind="softmax", input_size=32):
    depth, width, softmax_heads, linear_heads = architecture.SIZES[size]
    heads = softmax_heads if kind == "softmax" else linear_heads
    return torch_dit.DiT(depth, width, heads, 2, 4, 1000, (input_size // 2,) * 2, attention=kind)


@pytest.mark.parametrize("kind", ["softmax", "linear"])
@pytest.mark.parametrize("size", ["S", "XL"])
def test_flops_are_those_counted_in_the_torch_model(size, kind):
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter:  # shapes only
        t = torch.zeros(1, dtype=torch.long)
        torch_model(size, kind=kind)(torch.zeros(1, 4, 32, 32), t, t)
    ours = dit.DiTConfig.of_size(size, attention=kind)
    # The torch model forms the denominator q . mean(k) as a product too: 2 T D a layer, which ours
    # leaves out.
    denominators = 2 * ours.depth * 256 * ours.width if kind == "linear" else 0
    assert ours.forward_flops((32, 32)) == counter.get_total_flops() - denominators

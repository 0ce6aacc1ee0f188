"""Low precision: what is int8, how far the outputs move, and that drawing goes through it."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lit_jax import quantization, sampling, sharding
from lit_jax.models import param_shapes
from lit_jax.models.dense import Dense
from lit_jax.models.dit import DiT, DiTConfig
from lit_jax.samplers import SamplerSettings

CONFIG = DiTConfig(
    depth=2,
    width=32,
    num_heads=2,
    patch_size=4,
    in_channels=1,
    num_classes=5,
    attention="linear",
    grid=(3, 3),
)
RNG = np.random.default_rng(0)
PARAMS = jax.tree.map(
    lambda leaf: (0.2 * RNG.standard_normal(leaf.shape)).astype(np.float32), param_shapes(CONFIG)
)
CONDITION = {"label": np.array([1, 4], np.int32)}
INPUTS = (
    RNG.standard_normal((2, 12, 12, 1)).astype(np.float32),
    np.array([10, 900], np.int32),
    CONDITION,
    np.array([False, True]),
)


def test_weights_of_the_blocks_are_int8_with_a_scale_a_layer_and_channel():
    model = quantization.QuantizedModel(DiT(CONFIG, dtype=jnp.float32), "int8_weights")
    found = flatten_dict(model.quantize(PARAMS), sep="/")
    whole = flatten_dict(PARAMS, sep="/")
    products = {name.removesuffix("/qvalue") for name in found if name.endswith("/qvalue")}
    names = ("attn/q", "attn/kv", "attn/proj", "mlp/fc1", "mlp/fc2")
    assert products == {f"blocks/{name}/kernel" for name in names}
    for name in products:
        assert found[f"{name}/qvalue"].dtype == np.int8
        # 256 levels, as wide as the largest weight of a channel needs; half a level is lost.
        scale = np.abs(whole[name]).max(axis=1, keepdims=True) / 127.5
        np.testing.assert_allclose(found[f"{name}/scale"], scale, rtol=1e-6)
        lost = np.abs(found[f"{name}/qvalue"] * found[f"{name}/scale"] - whole[name])
        assert (lost <= 0.5001 * scale).all() and lost.max() > 0
    for name in whole.keys() - products:
        np.testing.assert_array_equal(found[name], whole[name])


@pytest.mark.parametrize("kind, dtype", [("int8_weights", jnp.bfloat16), ("int8", jnp.float32)])
def test_the_outputs_move_by_no_more_than_the_rounding(kind, dtype):
    """bfloat16 has 8 bits, an activation in int8 7 of its token's largest."""
    model = DiT(CONFIG, dtype=dtype)
    quantized = quantization.QuantizedModel(model, kind)
    out = jax.jit(quantized.apply)({"params": quantized.quantize(PARAMS)}, *INPUTS)
    expected = jax.jit(DiT(CONFIG, dtype=jnp.float32).apply)({"params": PARAMS}, *INPUTS)
    assert out.shape == expected.shape and out.dtype == np.float32
    distance = np.abs(out - expected).mean() / np.abs(expected).mean()
    assert 1e-5 < distance < 0.05


class Blocks(nn.Module):
    """A product under the name of one that is int8."""

    @nn.compact
    def __call__(self, x):
        return Dense(5, use_bias=False, name="fc1")(x)


class Nested(nn.Module):
    names: tuple[str, ...] = ("blocks", "mlp")

    @nn.compact
    def __call__(self, x):
        name, *rest = self.names
        return (Nested(tuple(rest), name=name) if rest else Blocks(name=name))(x)


def test_an_activation_has_a_scale_for_each_token():
    """One token a thousand times as large as the others costs these none of their 256 levels."""
    import qwix

    x = RNG.standard_normal((2, 3, 16)).astype(np.float32)
    x[0, 1] *= 1000.0
    model = qwix.quantize_model(Nested(), quantization.make_provider("int8"))
    params = model.init(jax.random.key(0), x)["params"]
    kernel = params["blocks"]["mlp"]["fc1"]["kernel"].array
    weights = np.float64(kernel.qvalue) * np.asarray(kernel.scale)
    # Half a level of its token's scale may be lost of each element.
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127.5
    lost = np.abs(model.apply({"params": params}, jnp.asarray(x)) - x @ weights)
    assert (lost <= 0.501 * scale * np.abs(weights).sum(axis=0)).all() and lost.max() > 0


@pytest.mark.parametrize("name, int8", [("attention", 7), ("normaliser", 5)])
def test_what_stays_in_high_precision_can_be_rounded_too(name, int8):
    """Five products of a block and, of linear attention, the state and the read-out."""
    model = DiT(CONFIG, dtype=jnp.float32, implementation="xla")
    outputs = {}
    for also in ((), (name,)):
        quantized = quantization.QuantizedModel(model, "int8", also)
        call = jax.jit(quantized.apply).lower({"params": quantized.quantize(PARAMS)}, *INPUTS)
        products = re.findall(r"dot_general.*xi8>, .*xi8>.* -> .*xi32>", call.as_text())
        assert len(products) == (int8 if also else 5)
        outputs[also] = call.compile()({"params": quantized.quantize(PARAMS)}, *INPUTS)
    moved = np.abs(outputs[(name,)] - outputs[()]).mean() / np.abs(outputs[()]).mean()
    assert 1e-5 < moved < 0.05


def test_it_draws_as_any_model_does_on_one_device_and_on_eight():
    settings = SamplerSettings(sampler="ddim", steps=2, cfg_scale=2.0)
    images = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(devices, 1, devices=jax.devices()[:devices])
        model = quantization.QuantizedModel(DiT(CONFIG, dtype=jnp.float32), "int8_weights")
        sampler = sampling.Sampler(model, settings, batch_size=8, mesh=mesh)
        images.append(sampler(model.quantize(PARAMS), np.arange(2), CONDITION))
    # Float sums in another order; of activations in int8 one at an edge could fall to either side.
    assert np.abs(images[0] - images[1]).max() < 1e-4 * np.abs(images[0]).max()

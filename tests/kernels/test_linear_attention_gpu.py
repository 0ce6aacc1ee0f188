"""The GPU kernels in interpret mode against a float64 oracle, and their lowering to Triton."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from oracles import assert_close
from test_linear_attention import case_of, check, jit, make_inputs, oracle

from lit_jax.kernels import linear_attention_gpu

SMALL = linear_attention_gpu.BlockSizes(
    tokens=16, dq_tokens=16, state_tokens=16, state_rows=16, programs=1
)


def _inputs(B, grid, N, H, K, dtype, scale=1.0):
    rng, T, D = np.random.default_rng(0), grid[0] * grid[1], N * H
    q, kv, do = (jnp.asarray(scale * rng.normal(size=(B, T, m * D)), dtype) for m in (1, 2, 1))
    if not K:
        return q, kv, None, None, do
    return (
        q,
        kv,
        jnp.asarray(0.2 * rng.normal(size=(K, K, H)), jnp.float32),
        jnp.asarray(rng.normal(size=H), jnp.float32),
        do,
    )


@functools.cache
def _program(case, block_sizes):
    kwargs = dict(case=case, interpret=True, block_sizes=block_sizes)

    def both(inputs, do):
        out, saved = linear_attention_gpu.forward(inputs, **kwargs)
        return out, *linear_attention_gpu.backward(inputs, saved, do, **kwargs)

    return jit(both)


def _kernels(inputs, N, grid, block_sizes):
    case = case_of(inputs, num_heads=N, grid=grid)
    return _program(case, block_sizes)(inputs[:4], inputs[4])


def _check(inputs, N, grid, block_sizes=SMALL, factor=8.0):
    dtype, T, H = inputs[0].dtype.name, inputs[0].shape[1], inputs[0].shape[2] // N
    actual = _kernels(inputs, N, grid, block_sizes)
    out, gradients = oracle(*inputs, num_heads=N, grid=grid)
    # bfloat16 rounds operands once each, whose errors do not grow with the sums; float32 rounds
    # every sum.
    reduction = 1 if dtype == "bfloat16" else max(T, H)
    names = ("out", "dq", "dkv", "dconv_kernel", "dconv_bias")
    for name, x, y in zip(names, actual, (out, *gradients)):
        assert (x is None) == (y is None), name
        if x is not None:
            assert_close(x, y, reduction=reduction, dtype=dtype, factor=factor, what=name)
    assert actual[0].dtype == actual[1].dtype == actual[2].dtype == inputs[0].dtype


@pytest.mark.parametrize(
    "B, grid, N, H, K, dtype",
    [
        (2, (3, 5), 2, 72, 5, "bfloat16"),  # T below a block, a head that is no multiple of 16
        (2, (4, 7), 2, 16, 5, "float32"),
        (1, (5, 9), 1, 24, 3, "float32"),  # patches and token blocks with ragged tails
        (1, (4, 4), 1, 64, 7, "bfloat16"),  # a filter wider than the grid
        (1, (6, 6), 1, 288, 0, "float32"),  # no convolution; 288 = 256 + 32
        (1, (2, 9), 1, 288, 3, "bfloat16"),
        (1, (2, 9), 1, 192, 0, "bfloat16"),
        (1, (2, 9), 1, 256, 0, "bfloat16"),
    ],
)
def test_values_and_gradients_match_the_oracle(B, grid, N, H, K, dtype):
    _check(_inputs(B, grid, N, H, K, dtype), N, grid)


def test_default_block_sizes_match_the_oracle():
    _check(_inputs(1, (9, 8), 1, 16, 3, "float32"), 1, (9, 8), linear_attention_gpu.BlockSizes())


def test_splitting_the_tokens_of_a_state_matches_the_oracle():
    _check(
        _inputs(1, (11, 13), 1, 32, 0, "float32"),
        1,
        (11, 13),
        linear_attention_gpu.BlockSizes(dq_tokens=16, state_tokens=16, programs=8),
    )


def test_many_heads_match_the_oracle():
    _check(_inputs(2, (3, 6), 16, 16, 0, "float32"), 16, (3, 6))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_magnitudes_match_the_oracle(scale):
    _check(_inputs(1, (5, 5), 1, 32, 0, "float32", scale), 1, (5, 5), factor=16.0)


def test_rows_and_keys_of_zero_features_match_the_oracle():
    q, kv, conv_kernel, conv_bias, do = _inputs(2, (4, 4), 2, 32, 0, "float32")
    q = q.at[:, 3].set(-1.0).at[:, 7].set(0.0)  # phi(q) is epsilon in these rows
    kv = kv.at[1, :, :64].set(-jnp.abs(kv[1, :, :64]))  # phi(k) is epsilon in this image
    _check((q, kv, conv_kernel, conv_bias, do), 2, (4, 4))


def test_the_public_op_hands_the_forwards_state_to_the_backward():
    check(
        make_inputs(B=1, num_heads=2, head_width=16, grid=(3, 5), K=3),
        num_heads=2,
        grid=(3, 5),
        implementation="pallas_gpu",
        interpret=True,
    )


@pytest.mark.parametrize(
    "name, B, side, N, H, K, dtype",
    [
        ("S", 4, 16, 2, 192, 5, "bfloat16"),
        ("XL 256 px", 128, 16, 4, 288, 5, "bfloat16"),
        ("XL 2048 px", 2, 128, 4, 288, 5, "bfloat16"),
        ("XL float32", 4, 16, 4, 288, 5, "float32"),
        ("16 heads, 7 x 7", 4, 20, 16, 72, 7, "bfloat16"),
        ("no convolution", 4, 32, 4, 288, 0, "bfloat16"),
    ],
)
def test_kernels_lower_to_triton_for_cuda(name, B, side, N, H, K, dtype):
    """Interpret mode accepts shapes that Triton refuses; the lowering does not, without a GPU."""
    *inputs, do = jax.eval_shape(lambda: _inputs(B, (side, side), N, H, K, dtype))
    inputs = tuple(inputs)
    case = case_of(inputs, num_heads=N, grid=(side, side))
    forward_fn = functools.partial(linear_attention_gpu.forward, case=case)
    backward_fn = functools.partial(linear_attention_gpu.backward, case=case)
    _, saved = jax.eval_shape(forward_fn, inputs)
    target = "__gpu$xla.gpu.triton"
    unstable = [export.DisabledSafetyCheck.custom_call(target)]
    card = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    # JAX 0.11 and later ask which card it is for.
    with use_abstract_mesh(AbstractMesh((1,), ("card",), abstract_device=card)):
        forward, backward = (
            export.export(jax.jit(f), platforms=["cuda"], disabled_checks=unstable)(*args)
            for f, args in ((forward_fn, (inputs,)), (backward_fn, (inputs, saved, do)))
        )
    for exported, kernels in ((forward, 2), (backward, 3)):
        assert exported.mlir_module().count(f"@{target}") == kernels
    assert [x.shape for x in backward.out_avals[:2]] == [inputs[0].shape, inputs[1].shape]

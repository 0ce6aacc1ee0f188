"""The op's XLA form against a float64 oracle of the T x T matrix; its choices and refusals."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import assert_exact, equations, products
from oracles import assert_close

from lit_jax.kernels.linear_attention import (
    Case,
    choose_implementation,
    linear_attention,
    take_or_xla,
)
from lit_jax.kernels.linear_attention_gpu_plan import JAX_NEEDED

HAS_MOSAIC_GPU = jax.__version_info__[:2] >= JAX_NEEDED


def phi_and_slope(x, kernel_function):
    """phi(x) (T, H) and its Jacobian (T, H, H) in float64, straight from the definition."""
    T, H = x.shape
    if kernel_function in ("relu", "focused"):
        phi, slope = np.maximum(x, 0) + 1e-6, (x > 0).astype(np.float64)
    else:
        cdf = 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
        phi, slope = x * cdf + 1e-6, cdf + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    jacobian = np.eye(H) * slope[:, None, :]
    if kernel_function.startswith("focused"):
        norm, power = np.linalg.norm(phi, axis=1), phi**3
        size = np.linalg.norm(power, axis=1)
        focused = (norm / size)[:, None] * power
        # d(focused)_a / d(phi)_b
        outer = np.einsum(
            "ta,tb->tab", focused, phi / norm[:, None] ** 2 - 3 * phi**5 / size[:, None] ** 2
        )
        outer += np.einsum("ta,ab->tab", (norm / size)[:, None] * 3 * phi**2, np.eye(H))
        phi, jacobian = focused, np.einsum("tab,tbc->tac", outer, jacobian)
    return phi, jacobian


def oracle(q, kv, conv_kernel, conv_bias, do, *, num_heads, grid, kernel_function="relu"):
    """Output and gradients (dq, dkv, dconv_kernel, dconv_bias), float64, by the T x T matrix."""
    q, kv, do = (np.asarray(x, np.float64) for x in (q, kv, do))
    B, T, D = q.shape
    (h, w), H = grid, D // num_heads
    out, dq, dkv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(kv)
    if conv_kernel is not None:
        conv_kernel, conv_bias = (
            np.asarray(conv_kernel, np.float64),
            np.asarray(conv_bias, np.float64),
        )
        K = len(conv_kernel)
        pad, dconv_kernel, dconv_bias = K // 2, np.zeros_like(conv_kernel), np.zeros_like(conv_bias)
    for b in range(B):
        for n in range(num_heads):
            head, head_v = slice(n * H, (n + 1) * H), slice(D + n * H, D + (n + 1) * H)
            v, g = kv[b, :, head_v], do[b, :, head]
            phi_q, slope_q = phi_and_slope(q[b, :, head], kernel_function)
            phi_k, slope_k = phi_and_slope(kv[b, :, head], kernel_function)
            scores = phi_q @ phi_k.T / T
            total = scores.sum(1, keepdims=True) + 1e-6
            attention = scores / total
            out[b, :, head] = attention @ v
            dattention = g @ v.T
            dscores = (dattention - (dattention * attention).sum(1, keepdims=True)) / total / T
            dq[b, :, head] = np.einsum("tab,ta->tb", slope_q, dscores @ phi_k)
            dkv[b, :, head] = np.einsum("tab,ta->tb", slope_k, dscores.T @ phi_q)
            dkv[b, :, head_v] = attention.T @ g
            if conv_kernel is None:
                continue
            image, dimage = (
                np.pad(x.reshape(h, w, H), ((pad, pad), (pad, pad), (0, 0))) for x in (v, g)
            )
            out[b, :, head] += conv_bias
            dconv_bias += g.sum(0)
            for dy in range(K):
                for dx in range(K):
                    window = image[dy : dy + h, dx : dx + w].reshape(T, H)
                    out[b, :, head] += conv_kernel[dy, dx] * window
                    dconv_kernel[dy, dx] += (window * g).sum(0)
                    back = dimage[K - 1 - dy : K - 1 - dy + h, K - 1 - dx : K - 1 - dx + w].reshape(
                        T, H
                    )
                    dkv[b, :, head_v] += conv_kernel[dy, dx] * back
    if conv_kernel is None:
        return out, (dq, dkv, None, None)
    return out, (dq, dkv, dconv_kernel, dconv_bias)


def make_inputs(
    *, B=2, num_heads=2, head_width=8, grid=(5, 3), K=5, dtype="float32", seed=0, magnitude=1.0
):
    """Random q, kv, conv_kernel, conv_bias and cotangent; K = 0 leaves the convolution out.

    About 30 % of phi(q) and phi(k) are zero. Few rows have a single positive entry: the output does
    not depend on its size, so there dq is a difference of equal numbers.
    """
    rng = np.random.default_rng(seed)
    T, D = grid[0] * grid[1], num_heads * head_width
    q, kv, do = (rng.normal(size=(B, T, c)) for c in (D, 2 * D, D))
    q, kv[..., :D] = q + 0.5, kv[..., :D] + 0.5
    q, kv, do = (jnp.asarray(x, dtype) for x in (q * magnitude, kv * magnitude, do))
    if not K:
        return q, kv, None, None, do
    conv_kernel, conv_bias = (
        jnp.asarray(rng.uniform(-0.2, 0.2, s), jnp.float32)
        for s in ((K, K, head_width), (head_width,))
    )
    return q, kv, conv_kernel, conv_bias, do


def case_of(inputs, *, num_heads, grid):
    """The case that a call on `inputs` is."""
    q, _, conv_kernel, *_ = inputs
    K = 0 if conv_kernel is None else len(conv_kernel)
    return Case(q.shape[2], num_heads, grid, K, dtype=q.dtype)


# XLA's CPU backend would take minutes to optimise the unrolled code of interpret mode.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache  # so that cases which differ in values alone are compiled once
def _program(**kwargs):
    def run(do, *arrays):
        out, vjp = jax.vjp(lambda *arrays: linear_attention(*arrays, **kwargs), *arrays)
        return out, vjp(do)

    return jit(run)


def value_and_grads(q, kv, conv_kernel, conv_bias, do, **kwargs):
    return _program(**kwargs)(do, q, kv, conv_kernel, conv_bias)


def check(inputs, *, num_heads, grid, kernel_function="relu", factor=8.0, **kwargs):
    """Compares the output and all gradients with the oracle."""
    q, kv, conv_kernel = inputs[:3]
    B, T, D = q.shape
    H = D // num_heads
    shape = dict(num_heads=num_heads, grid=grid, kernel_function=kernel_function)
    out, grads = value_and_grads(*inputs, **shape, **kwargs)
    expected, expected_grads = oracle(*inputs, **shape)
    dtype = str(q.dtype)
    assert out.dtype == q.dtype
    # In bfloat16 the operands of the products are rounded once more (phi, the state), not only the
    # result.
    close = dict(dtype=dtype, factor=factor)
    assert_close(out, expected, reduction=1 if dtype == "bfloat16" else H, what="out", **close)
    names = ("dq", "dk", "dv", "dconv_kernel", "dconv_bias")
    actual = (grads[0], grads[1][..., :D], grads[1][..., D:], *grads[2:])
    wanted = (
        expected_grads[0],
        expected_grads[1][..., :D],
        expected_grads[1][..., D:],
        *expected_grads[2:],
    )
    for name, a, e in zip(names, actual, wanted):
        if e is None:
            assert a is None
        else:
            assert_close(a, e, reduction=T if dtype == "float32" else 1, what=name, **close)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("K", [0, 3, 5, 7])
@pytest.mark.parametrize(
    "num_heads,head_width,grid", [(1, 8, (4, 4)), (2, 12, (5, 3)), (3, 4, (1, 7))]
)
def test_xla_form_and_its_gradients_match_the_oracle(num_heads, head_width, grid, K, dtype):
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    check(inputs, num_heads=num_heads, grid=grid, implementation="xla")


@pytest.mark.parametrize("kernel_function", ["gelu", "focused", "focused_gelu"])
def test_other_kernel_functions_match_the_oracle(kernel_function):
    # GELU dips below zero: shift its inputs further up, so that no denominator is near zero.
    q, kv, *rest = make_inputs(seed=3)
    shift = 0.5 if "gelu" in kernel_function else 0.0
    check(
        (q + shift, kv + shift, *rest),
        num_heads=2,
        grid=(5, 3),
        kernel_function=kernel_function,
        factor=16,
        implementation="xla",
    )


@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
@pytest.mark.parametrize("zero", ["q", "k", "both"])
def test_extreme_magnitudes_and_dead_rows_stay_right(magnitude, zero):
    q, kv, *rest = make_inputs(magnitude=magnitude, grid=(4, 4))
    D = q.shape[-1]
    if zero in ("q", "both"):
        q = q.at[:, ::2].set(-jnp.abs(q[:, ::2]))
    if zero in ("k", "both"):
        kv = kv.at[0, :, :D].set(-jnp.abs(kv[0, :, :D]))
    check((q, kv, *rest), num_heads=2, grid=(4, 4), implementation="xla")


def test_the_gradient_of_v_is_summed_in_float32():
    """49 positive terms: a sum in bfloat16 would round at each, here only the result is rounded."""
    q, kv, _, _, do = make_inputs(K=0, grid=(7, 7), dtype="bfloat16")
    D, (h, w) = q.shape[-1], (7, 7)
    do, filters = (
        1 + abs(do),
        np.random.default_rng(0).uniform(0.5, 1.5, (7, 7, D // 2)).astype(np.float32),
    )

    def convolution(kv):  # the attention itself has no part in it
        filters_and_bias = [(jnp.asarray(f), jnp.zeros(D // 2)) for f in (filters, 0 * filters)]
        one, other = (
            linear_attention(
                jax.lax.stop_gradient(q), kv, *f, num_heads=2, grid=(h, w), implementation="xla"
            )
            for f in filters_and_bias
        )
        return one.astype(jnp.float32) - other.astype(jnp.float32)

    @jit
    def gradient(kv, do):
        _, vjp = jax.vjp(convolution, kv)
        return vjp(do.astype(jnp.float32))[0][..., D:].astype(jnp.float32)

    dv = np.asarray(gradient(kv, do))
    padded = np.pad(
        np.asarray(do.astype(jnp.float32), np.float64).reshape(-1, h, w, D),
        ((0, 0), (3, 3), (3, 3), (0, 0)),
    )
    expected = sum(
        padded[:, 6 - y : 6 - y + h, 6 - x : 6 - x + w] * np.tile(filters[y, x], 2)
        for y in range(7)
        for x in range(7)
    )
    # Four roundings to eight bits: of the convolution's part and of its sum with the attention's,
    # which cancels, both times.
    np.testing.assert_allclose(dv, expected.reshape(dv.shape), rtol=4 * 2**-8)


# What a bfloat16 value may come out of: a rounded float32, or a place where it was before.
MOVES = {
    *("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze", "pad"),
    *("split", "slice", "concatenate", "get", "swap", "masked_load", "masked_swap"),
    *("jit", "custom_vjp_call", "pallas_call"),  # what they hold is looked at too
}


def traced(dtype, implementation, kernel_function="relu"):
    """The op with its gradients, and arguments for it, to be traced."""

    def run(do, *arrays):
        _, vjp = jax.vjp(
            functools.partial(
                linear_attention,
                num_heads=2,
                grid=(4, 4),
                kernel_function=kernel_function,
                implementation=implementation,
                interpret=implementation != "xla",
            ),
            *arrays,
        )
        return vjp(do)

    *arrays, do = make_inputs(B=1, grid=(4, 4), K=3, dtype=dtype)
    return run, (do, *arrays)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_products_of_float32_are_exact_on_every_device(implementation):
    run, args = traced("float32", implementation)
    assert assert_exact(run, *args) >= 6


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_bfloat16_only_stores_and_multiplies_and_sums_are_float32(implementation):
    """The error it would make is within the tolerance of what rounding the operands makes."""
    # The two parts of dv, the attention's and the convolution's, meet in v's own type.
    moves = MOVES | ({"add_any"} if implementation == "xla" else set())
    others = ("gelu", "focused", "focused_gelu") if implementation == "xla" else ()
    for kernel_function in ("relu", *others):
        run, args = traced("bfloat16", implementation, kernel_function)
        found = products(run, *args)
        assert len(found) >= 6
        for equation in found:
            assert equation.params["preferred_element_type"] == jnp.float32, equation
        for equation in equations(run, *args):
            for variable in equation.outvars:
                if getattr(variable.aval, "dtype", None) == jnp.bfloat16:
                    assert equation.primitive.name in moves, equation


def test_uniform_values_pass_through_the_attention():
    q, kv, *_ = make_inputs(K=0)
    D = q.shape[-1]
    out = linear_attention(q, kv.at[..., D:].set(3.0), num_heads=2, grid=(5, 3))
    # Not exactly 3: the denominator carries 1e-6.
    assert_close(out, np.full(out.shape, 3.0), reduction=D, factor=200, what="out")


def test_none_chooses_xla_on_a_cpu_and_logs_it_once(caplog):
    take_or_xla.cache_clear()
    q, kv, conv_kernel, conv_bias, _ = make_inputs()
    with caplog.at_level("INFO", logger="absl"):
        for _ in range(2):
            chosen = linear_attention(q, kv, conv_kernel, conv_bias, num_heads=2, grid=(5, 3))
    named = linear_attention(
        q, kv, conv_kernel, conv_bias, num_heads=2, grid=(5, 3), implementation="xla"
    )
    np.testing.assert_array_equal(chosen, named)
    assert [r.message for r in caplog.records if "linear_attention" in r.message] == [
        "linear_attention: xla on cpu"
    ]


@pytest.mark.parametrize(
    "platform,capability,kernel_function,K,H,expected",
    [
        ("tpu", None, "relu", 5, 288, "pallas_tpu"),
        ("tpu", None, "focused", 5, 288, "xla"),
        ("tpu", None, "relu", 9, 288, "xla"),
        ("gpu", "9.0", "relu", 0, 288, "pallas_gpu" if HAS_MOSAIC_GPU else "xla"),
        ("gpu", "9.0", "relu", 5, 320, "xla"),
        ("gpu", "9.0", "gelu", 5, 288, "xla"),
        ("gpu", "8.0", "relu", 5, 288, "xla"),
    ],
)
def test_none_takes_the_platforms_kernel_where_it_offers_the_case(
    monkeypatch, platform, capability, kernel_function, K, H, expected
):
    device = types.SimpleNamespace(
        platform=platform, compute_capability=capability, device_kind="a device"
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    case = Case(2 * H, 2, (16, 16), K, kernel_function)
    assert choose_implementation(case) == expected


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(num_heads=3), "width 16 and num_heads 3"),
        (dict(num_heads=2.0), "width 16 and num_heads 2.0"),
        (dict(grid=(-5, -3)), r"one token or more; got grid \(-5, -3\)"),
        (dict(q=jnp.zeros((0, 15, 16)), kv=jnp.zeros((0, 15, 32))), r"q \(0, 15, 16\)"),
        (dict(conv_kernel=jnp.zeros(())), r"got \(\)"),
        (dict(conv_kernel=jnp.zeros((3, 3, 8), int)), "got int32"),
        (dict(grid=(4, 4)), r"grid \(4, 4\) and 15 tokens"),
        (dict(kernel_function="elu"), "got 'elu'"),
        (dict(implementation="cuda"), "got 'cuda'"),
        (
            dict(implementation="pallas_tpu", kernel_function="focused"),
            "pallas_tpu offers .* got 'focused'",
        ),
        (
            dict(implementation="pallas_tpu", conv_kernel=jnp.zeros((9, 9, 8))),
            "pallas_tpu offers .* 3, 5 or 7; got 9",
        ),
        (
            dict(implementation="pallas_gpu"),
            "pallas_gpu offers bfloat16; got float32"
            if HAS_MOSAIC_GPU
            else "pallas_gpu needs JAX 0.12 or later; this is JAX",
        ),
        (dict(implementation="pallas_tpu"), "interpret mode"),  # a named one does not fall back
        (dict(kv=jnp.zeros((2, 15, 16))), r"q \(2, 15, 16\) and kv \(2, 15, 16\)"),
        (dict(kv=jnp.zeros((2, 15, 32), jnp.bfloat16)), "q float32 and kv bfloat16"),
        (dict(conv_kernel=jnp.zeros((4, 4, 8))), r"got \(4, 4, 8\)"),
        (dict(conv_bias=None), "got only conv_kernel"),
    ],
)
def test_what_does_not_fit_raises_and_names_both_sides(change, message):
    q, kv, conv_kernel, conv_bias, _ = make_inputs()
    arguments = dict(
        q=q, kv=kv, conv_kernel=conv_kernel, conv_bias=conv_bias, num_heads=2, grid=(5, 3)
    )
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments | change)

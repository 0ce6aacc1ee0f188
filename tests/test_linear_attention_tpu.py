"""The TPU kernels: numbers in interpret mode against the float64 oracle, and the TPU compiler's word for real shapes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from oracles import assert_close
from test_linear_attention import check, make_inputs, value_and_grads

from lit_jax import sharding
from lit_jax.kernels import linear_attention_tpu, static_cost
from lit_jax.kernels.linear_attention import linear_attention

pallas = functools.partial(check, implementation="pallas_tpu", interpret=True)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 32 tokens, so that small grids take several."""
    monkeypatch.setattr(linear_attention_tpu, "CHUNK_TOKENS", 32)


def plan_of(inputs, num_heads, grid):
    return linear_attention_tpu._make_plan(inputs[0], inputs[2], num_heads, grid, arrays=7)


# Heads that straddle tiles of 128 lanes (144), fill them (128, 256), or leave a last tile ragged (192).
@pytest.mark.parametrize("num_heads,head_width,grid,K,dtype", [
    (2, 144, (3, 16), 5, "float32"),
    (2, 144, (3, 16), 5, "bfloat16"),
    (1, 192, (2, 8), 7, "float32"),
    (3, 128, (2, 16), 3, "bfloat16"),
    (1, 256, (2, 16), 0, "float32"),
])
def test_direct_form_and_its_gradients_match_the_oracle(num_heads, head_width, grid, K, dtype):
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    assert plan_of(inputs, num_heads, grid).direct
    pallas(inputs, num_heads=num_heads, grid=grid)


@pytest.mark.parametrize("num_heads,head_width,grid,K,dtype", [
    (1, 8, (5, 3), 5, "float32"),        # a ragged grid, fewer tokens than any tile
    (16, 8, (4, 4), 3, "bfloat16"),      # sixteen heads in one tile
    (4, 72, (3, 8), 7, "float32"),       # three heads meet one tile
    (3, 72, (2, 13), 5, "bfloat16"),
    (2, 288, (1, 7), 0, "float32"),      # wide heads on a ragged grid are not direct
])
def test_state_form_and_its_gradients_match_the_oracle(num_heads, head_width, grid, K, dtype):
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    plan = plan_of(inputs, num_heads, grid)
    assert (plan.direct, plan.chunks, plan.bands) == (False, 1, 1)
    pallas(inputs, num_heads=num_heads, grid=grid)


@pytest.mark.parametrize("num_heads,head_width,grid,K,dtype", [
    (2, 72, (6, 16), 5, "float32"),
    (1, 64, (7, 5), 3, "bfloat16"),      # rows added to fill the last chunk
])
def test_an_image_in_several_chunks_matches_the_oracle(small_chunks, num_heads, head_width, grid, K, dtype):
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    plan = plan_of(inputs, num_heads, grid)
    assert plan.chunks > 1 and plan.bands == 1
    pallas(inputs, num_heads=num_heads, grid=grid)


@pytest.mark.parametrize("num_heads,head_width,grid,K,dtype", [
    (1, 128, (8, 16), 5, "float32"),     # v is a block of its own
    (1, 72, (9, 13), 7, "float32"),      # it is not; the last band is half empty
    (2, 64, (6, 16), 3, "bfloat16"),
    (1, 24, (6, 16), 0, "float32"),
])
def test_bands_of_an_image_too_large_for_vmem_match_the_oracle(
        small_chunks, monkeypatch, num_heads, head_width, grid, K, dtype):
    monkeypatch.setattr(linear_attention_tpu, "_vmem_bytes", lambda: 0)
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    assert plan_of(inputs, num_heads, grid).bands > 1
    pallas(inputs, num_heads=num_heads, grid=grid)


@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
@pytest.mark.parametrize("num_heads,head_width", [(1, 128), (2, 16)])  # direct, by state
def test_extreme_magnitudes_and_dead_rows_stay_right(num_heads, head_width, magnitude):
    q, kv, *rest = make_inputs(num_heads=num_heads, head_width=head_width, grid=(2, 8), magnitude=magnitude, K=3)
    D = q.shape[-1]
    q = q.at[:, ::2].set(-jnp.abs(q[:, ::2]))
    kv = kv.at[0, :, :D].set(-jnp.abs(kv[0, :, :D]))  # image 0: phi(k) is all epsilon
    pallas((q, kv, *rest), num_heads=num_heads, grid=(2, 8))


def test_the_gradient_at_zero_is_that_of_relu():
    q, kv, *rest = make_inputs(num_heads=1, head_width=16, grid=(2, 8), K=0)
    q, kv = q.at[0, 0].set(0.0), kv.at[0, 0, :16].set(0.0)
    _, (dq, dkv, _, _) = value_and_grads(q, kv, *rest, num_heads=1, grid=(2, 8), implementation="pallas_tpu",
                                         interpret=True)
    assert not dq[0, 0].any() and not dkv[0, 0, :16].any()


def test_eight_devices_compute_what_one_computes():
    q, kv, conv_kernel, conv_bias, do = make_inputs(B=8, num_heads=2, head_width=16, grid=(2, 8), K=3)

    def grads(*arrays):
        def loss(*arrays):
            out = linear_attention(*arrays, num_heads=2, grid=(2, 8), implementation="pallas_tpu", interpret=True)
            return jnp.sum(out * do)
        return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    arrays = (q, kv, conv_kernel, conv_bias)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows, full = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("data", "fsdp"),), ()))
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    split = jit(sharding.on_mesh(grads, mesh), in_shardings=(rows, rows, full, full))(*arrays)
    for name, actual, expected in zip(("dq", "dkv", "dconv_kernel", "dconv_bias"), split, jit(grads)(*arrays)):
        assert_close(actual, expected, reduction=16 * 8, what=name)


def _cost_estimates(jaxpr):
    """The pl.CostEstimate of every kernel in a jaxpr."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            found.append(eqn.params["cost_estimate"])
        else:
            found += [cost for value in eqn.params.values() if hasattr(value, "jaxpr")
                      for cost in _cost_estimates(value.jaxpr)]
    return found


@pytest.mark.parametrize("name,arrays,products,convolutions", [("forward", 4, 2, 1), ("backward", 7, 5, 2)])
def test_the_cost_estimate_is_the_floor_where_an_image_fits(name, arrays, products, convolutions):
    B, T, D, H = 4, 64, 256, 128
    shape = functools.partial(jax.ShapeDtypeStruct, dtype="bfloat16")
    inputs = [shape((B, T, D)), shape((B, T, 2 * D)), shape((5, 5, H)), shape((H,)), shape((B, T, D))]
    fn = functools.partial(getattr(linear_attention_tpu, name), num_heads=2, grid=(4, 16))
    cost, = _cost_estimates(jax.make_jaxpr(fn)(*inputs[:4 if name == "forward" else 5]).jaxpr)
    constants = (25 + 1 if name == "forward" else 25 + 2 * 26 * 8) * D * 4  # taps, bias; each core's sums of dtaps
    assert cost.bytes_accessed == arrays * B * T * D * 2 + constants
    assert cost.flops == 2 * B * T * D * (products * H + convolutions * 25)


def _compile(topology, D, num_heads, side, backward, dtype="bfloat16"):
    """The program compiled for one chip of the topology, B * T = 8192."""
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    mesh = Mesh(np.array([device]), ("chip",))
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    T, H = side * side, D // num_heads
    B = max(1, 8192 // T)
    inputs = [shape((B, T, D), dtype), shape((B, T, 2 * D), dtype), shape((5, 5, H), "float32"), shape((H,), "float32")]
    kernels = linear_attention_tpu
    fn, inputs = (kernels.backward, [*inputs, inputs[0]]) if backward else (kernels.forward, inputs)
    fn = functools.partial(fn, num_heads=num_heads, grid=(side, side))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells the kernel the chip
        return jax.jit(fn).trace(*inputs).lower(lowering_platforms=("tpu",)).compile()


# A subset that covers chips, sizes, resolutions, forms and passes. The full product, minutes of one core:
#   for each line of PRODUCT in this file: _compile(*line)
PRODUCT = [(topology, *size, pixels // 16, backward)
           for topology in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
           for size in ((384, 2), (768, 3), (1024, 4), (1152, 4))
           for pixels in (256, 512, 1024, 2048) for backward in (False, True)]
SUBSET = [
    ("v4:2x2x1", 384, 2, 32, True),       # bands: v4 has 16 MiB of VMEM
    ("v5e:2x2", 384, 2, 128, False),
    ("v5p:2x2x1", 768, 3, 16, True),
    ("v6e:2x2", 1024, 4, 32, False),
]


@pytest.mark.parametrize("case", SUBSET, ids=str)
def test_the_tpu_compiler_takes_the_kernel(case):
    assert case in PRODUCT
    _compile(*case)


@pytest.mark.parametrize("name,bar", [("forward", 1.6), ("backward", 2.2)])
def test_static_schedule_at_xl_256_is_near_the_memory_floor(name, bar):
    """The bars at LiT-XL/2, 256 px, on v5e; nothing passes through HBM but arguments and outputs."""
    fn = functools.partial(getattr(linear_attention_tpu, name), num_heads=4, grid=(16, 16))
    shapes = [(8, 256, 1152), (8, 256, 2304), (5, 5, 288), (288,), (8, 256, 1152)][:4 if name == "forward" else 5]
    dtypes = ["bfloat16", "bfloat16", "float32", "float32", "bfloat16"]
    args = tuple(jax.ShapeDtypeStruct(*x) for x in zip(shapes, dtypes))
    cost = static_cost.estimate(fn, args, grid_steps=8, topology="v5e:2x2")
    assert len(cost.kernels) == 1 and cost.ratio <= bar, cost
    assert cost.temporaries < 2 * 2**20, cost  # taps repeated for each head, and their gradients

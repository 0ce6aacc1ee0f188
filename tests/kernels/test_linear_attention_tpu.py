"""The TPU kernels in interpret mode against a float64 oracle, and the TPU compiler's word.

The compiler, libtpu, takes real shapes on any machine.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxprs import equations
from oracles import assert_close
from test_linear_attention import case_of, check, make_inputs, value_and_grads

from lit_jax import sharding
from lit_jax.costs import tpu_schedule
from lit_jax.kernels import linear_attention_tpu, linear_attention_tpu_plan
from lit_jax.kernels.linear_attention import Case, linear_attention

pallas = functools.partial(check, implementation="pallas_tpu", interpret=True)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 32 tokens, so that small grids take several.

    What was traced before knows nothing of it, nor does what comes after.
    """
    jax.clear_caches()
    monkeypatch.setattr(linear_attention_tpu_plan, "CHUNK_TOKENS", 32)
    yield
    jax.clear_caches()


@pytest.fixture
def no_whole_images(monkeypatch):
    """VMEM that holds bands of an image at most."""
    monkeypatch.setattr(linear_attention_tpu_plan, "image_bytes", lambda plan: float("inf"))


def plan_of(inputs, num_heads, grid):
    case = case_of(inputs, num_heads=num_heads, grid=grid)
    return linear_attention_tpu_plan.make_plan(case, backward=True)


# Heads that straddle tiles of 128 lanes (144), fill them (256), or leave a last tile ragged (192).
@pytest.mark.parametrize(
    "num_heads,head_width,grid,K,dtype",
    [
        (2, 144, (4, 16), 3, "bfloat16"),  # windows of four rows
        (1, 192, (2, 8), 3, "float32"),
        (1, 256, (2, 16), 0, "float32"),
    ],
)
def test_direct_form_and_its_gradients_match_the_oracle(num_heads, head_width, grid, K, dtype):
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    assert plan_of(inputs, num_heads, grid).direct
    pallas(inputs, num_heads=num_heads, grid=grid)


@pytest.mark.parametrize(
    "num_heads,head_width,grid,K,dtype",
    [
        (1, 8, (5, 3), 3, "float32"),  # a ragged grid, fewer tokens than any tile
        (16, 8, (4, 4), 3, "bfloat16"),  # sixteen heads in one tile
        (4, 40, (4, 8), 3, "bfloat16"),  # four heads meet one tile
        (2, 144, (1, 7), 0, "float32"),  # wide heads on a ragged grid are not direct
        (2, 64, (4, 16), 0, "bfloat16"),  # no convolution, whose windows would be of four rows
    ],
)
def test_state_form_and_its_gradients_match_the_oracle(num_heads, head_width, grid, K, dtype):
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    plan = plan_of(inputs, num_heads, grid)
    assert (plan.direct, plan.chunks, plan.bands) == (False, 1, 1)
    pallas(inputs, num_heads=num_heads, grid=grid)


@pytest.mark.parametrize(
    "num_heads,head_width,grid,K,dtype",
    [
        (2, 72, (6, 16), 3, "float32"),
        (1, 64, (7, 5), 3, "bfloat16"),  # rows added to fill the last chunk
        (1, 64, (8, 8), 0, "bfloat16"),
    ],
)
def test_an_image_in_several_chunks_matches_the_oracle(
    small_chunks, num_heads, head_width, grid, K, dtype
):
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    plan = plan_of(inputs, num_heads, grid)
    assert plan.chunks > 1 and plan.bands == 1
    pallas(inputs, num_heads=num_heads, grid=grid)


@pytest.mark.parametrize(
    "num_heads,head_width,grid,K,dtype",
    [
        (1, 128, (8, 16), 3, "float32"),  # v is a block of its own
        (1, 72, (9, 13), 7, "float32"),  # it is not; the last band is half empty
        (2, 64, (6, 16), 3, "bfloat16"),
        (1, 24, (6, 16), 0, "float32"),
        (1, 128, (6, 16), 0, "bfloat16"),
    ],
)
def test_bands_of_an_image_too_large_for_vmem_match_the_oracle(
    small_chunks, no_whole_images, num_heads, head_width, grid, K, dtype
):
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    assert plan_of(inputs, num_heads, grid).bands > 1
    pallas(inputs, num_heads=num_heads, grid=grid)


@pytest.mark.parametrize(
    "num_heads,head_width,grid,K,dtype,kibibytes,pieces,groups",
    [
        (2, 16, (3, 20), 5, "float32", 16384, 2, 1),
        (1, 128, (6, 40), 3, "bfloat16", 350, 3, 1),  # pieces of several bands
        (4, 64, (4, 16), 3, "bfloat16", 350, 1, 2),
    ],
)
def test_wide_rows_and_wide_models_are_cut_and_match_the_oracle(
    monkeypatch, num_heads, head_width, grid, K, dtype, kibibytes, pieces, groups
):
    jax.clear_caches()
    monkeypatch.setattr(linear_attention_tpu_plan, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(linear_attention_tpu_plan, "vmem_bytes", lambda: kibibytes * 1024)
    inputs = make_inputs(num_heads=num_heads, head_width=head_width, grid=grid, K=K, dtype=dtype)
    plan = plan_of(inputs, num_heads, grid)
    assert (plan.pieces, plan.groups) == (pieces, groups)
    pallas(inputs, num_heads=num_heads, grid=grid)
    jax.clear_caches()


@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
@pytest.mark.parametrize(
    "num_heads,head_width,grid,K,dtype,direct",
    [
        (1, 128, (2, 8), 3, "float32", True),
        (2, 16, (2, 8), 3, "float32", False),
        (1, 128, (4, 16), 5, "bfloat16", True),  # windows of four rows of output
        (2, 16, (4, 16), 5, "bfloat16", False),
    ],
)
def test_extreme_magnitudes_and_dead_rows_stay_right(
    num_heads, head_width, grid, K, dtype, direct, magnitude
):
    q, kv, *rest = make_inputs(
        num_heads=num_heads, head_width=head_width, grid=grid, magnitude=magnitude, K=K, dtype=dtype
    )
    assert plan_of((q, kv, *rest), num_heads, grid).direct == direct
    D = q.shape[-1]
    q = q.at[:, ::2].set(-jnp.abs(q[:, ::2]))
    kv = kv.at[0, :, :D].set(-jnp.abs(kv[0, :, :D]))  # image 0: phi(k) is all epsilon
    pallas((q, kv, *rest), num_heads=num_heads, grid=grid)


@pytest.mark.parametrize("K,error", [(3, 1e-6), (5, 1e-6), (7, 2e-5)])
def test_a_bright_row_spoils_dark_ones_in_its_window_by_no_more_than_the_docstring_says(K, error):
    """Rows 1e4 and 1e-4 in one window of Cook and Toom's algorithm.

    The keys look away from the bright row.
    """
    q, kv, filters, bias, _ = make_inputs(
        B=1, num_heads=1, head_width=16, grid=(8, 16), K=K, dtype="bfloat16"
    )
    D, bright = 16, 1e4
    kv = kv.at[..., D:].set(1e-4 * kv[..., D:]).at[:, :16, :D].set(-1.0).at[:, :16, D:].set(bright)
    kwargs = dict(num_heads=1, grid=(8, 16))
    rows = [
        np.asarray(
            linear_attention(
                abs(q),
                kv,
                filters,
                0 * bias,
                implementation=name,
                interpret=name != "xla",
                **kwargs,
            ),
            np.float64,
        ).reshape(8, 16, D)[K // 2 + 1 :]
        for name in ("pallas_tpu", "xla")
    ]
    assert np.abs(rows[1]).max() < 1.0
    np.testing.assert_allclose(
        *rows, rtol=2**-7, atol=error * bright * float(abs(filters).sum((0, 1)).max())
    )


def test_the_gradient_at_zero_is_that_of_relu():
    q, kv, *rest = make_inputs(num_heads=1, head_width=16, grid=(2, 8), K=0)
    q, kv = q.at[0, 0].set(0.0), kv.at[0, 0, :16].set(0.0)
    _, (dq, dkv, _, _) = value_and_grads(
        q, kv, *rest, num_heads=1, grid=(2, 8), implementation="pallas_tpu", interpret=True
    )
    assert not dq[0, 0].any() and not dkv[0, 0, :16].any()


def test_eight_devices_compute_in_scanned_and_rematerialised_layers_what_one_computes():
    q, kv, conv_kernel, conv_bias, do = make_inputs(
        B=8, num_heads=2, head_width=16, grid=(1, 8), K=3
    )

    def grads(*arrays, **how):
        def loss(q, kv, conv_kernel, conv_bias):
            @jax.checkpoint
            def layer(q, scale):
                return linear_attention(
                    q, kv * scale, conv_kernel, conv_bias, num_heads=2, grid=(1, 8), **how
                ), None

            return jnp.sum(jax.lax.scan(layer, q, jnp.array([1.0, 0.5]))[0] * do)

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    arrays = (q, kv, conv_kernel, conv_bias)
    mesh = Mesh(
        np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )
    rows, full = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("data", "fsdp"),), ()))
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    fused = functools.partial(grads, implementation="pallas_tpu", interpret=True)
    split = jit(sharding.on_mesh(fused, mesh), in_shardings=(rows, rows, full, full))(*arrays)
    whole = jax.jit(functools.partial(grads, implementation="xla"))(*arrays)
    for name, actual, expected in zip(("dq", "dkv", "dconv_kernel", "dconv_bias"), split, whole):
        assert_close(actual, expected, reduction=16 * 8, what=name)


@pytest.mark.parametrize("taken", [("data", "fsdp"), ("data",)])
def test_inside_a_shard_map_the_kernel_takes_the_rows_that_are_there(taken):
    """All axes of the mesh taken by the caller's own shard_map, or one of them."""
    q, kv, *rest, do = make_inputs(B=8, num_heads=2, head_width=16, grid=(1, 8), K=3)
    mesh = Mesh(
        np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )
    rows = PartitionSpec(taken)

    def kernel(q, kv):
        return linear_attention(
            q, kv, *rest, num_heads=2, grid=(1, 8), implementation="pallas_tpu", interpret=True
        )

    def loss(q, kv):
        out = jax.shard_map(
            kernel, mesh=mesh, in_specs=rows, out_specs=rows, axis_names=set(taken), check_vma=False
        )(q, kv)
        return jnp.sum(out * do)

    where = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    split = jit(jax.grad(loss, argnums=(0, 1)), in_shardings=(where, where))(q, kv)
    whole = jax.grad(lambda q, kv: jnp.sum(kernel(q, kv) * do), argnums=(0, 1))(q, kv)
    for name, actual, expected in zip(("dq", "dkv"), split, whole):
        assert_close(actual, expected, reduction=16, what=name)


def test_a_batch_that_the_devices_do_not_divide_is_named():
    q, kv, *rest, _ = make_inputs(B=3, num_heads=2, head_width=16, grid=(1, 8), K=3)
    mesh = Mesh(
        np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )
    with (
        pytest.raises(ValueError, match="3 rows are no multiple of its 8 devices"),
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    ):
        linear_attention(
            q, kv, *rest, num_heads=2, grid=(1, 8), implementation="pallas_tpu", interpret=True
        )


def _cost_estimates(fn, args):
    """The pl.CostEstimate of every kernel in a program."""
    kernels = [e for e in equations(fn, *args) if e.primitive.name == "pallas_call"]
    return [kernel.params["cost_estimate"] for kernel in kernels]


@pytest.mark.parametrize(
    "name,arrays,products,convolutions", [("forward", 4, 2, 1), ("backward", 7, 5, 2)]
)
def test_the_cost_estimate_is_the_floor_where_an_image_fits(name, arrays, products, convolutions):
    B, T, D, heads = 4, 64, 256, 2
    fn, args = tpu_schedule.attention_program(Case(D, heads, (4, 16)), B, name)
    (cost,) = _cost_estimates(fn, args)
    # 5 columns of 8 products make 4 rows of output. Taps and bias; taps and each core's sums of
    # their gradients.
    constants = (40 + 1 if name == "forward" else 40 + 2 * 41 * 8) * D * 4
    assert cost.bytes_accessed == arrays * B * T * D * 2 + constants
    # By a head's T x T matrix.
    assert cost.flops == 2 * B * T * D * (products * T + convolutions * 40 // 4)
    assert cost.transcendentals == B * T * heads


def test_the_cost_estimate_of_bands_counts_every_pass(small_chunks, no_whole_images):
    B, T, D, H, heads = 2, 128, 128, 64, 2
    case = Case(D, heads, (8, 16))
    costs = {}
    for name in ("forward", "backward"):
        fn, args = tpu_schedule.attention_program(case, B, name)
        costs[name] = _cost_estimates(fn, args)
    plan = linear_attention_tpu_plan.make_plan(case, backward=False)
    # 5 columns of 6 products make 2 rows.
    assert (plan.bands, plan.halo_rows, plan.outputs) == (2, 2, 2)
    array, state, mean, taps = B * T * D * 2, B * 128 * 128 * 2, B * D * 4, 30 * D * 4
    halos = 2 * B * 2 * 2 * 16 * D * 2  # 2 bands of 2 halos of 2 rows
    sums = 2 * 31 * 8 * D * 4  # of two cores
    expected = [
        2 * array + state + mean,  # the state, of k and v
        3 * array + halos + state + mean + taps + D * 4,  # q, v, the output; the bias
        2 * array + state + mean,
        3 * array + 2 * (state + mean),  # q, do, dq
        5 * array + halos + state + mean + taps + sums,  # k, v, do, dk, dv
    ]
    found = costs["forward"] + costs["backward"]
    assert [cost.bytes_accessed for cost in found] == expected
    per_tap = 2 * B * T * D
    per_value = (H, H + 15, H, 2 * H, 2 * H + 2 * 15)
    assert [cost.flops for cost in found] == [per_tap * n for n in per_value]
    assert [cost.transcendentals for cost in found] == [B * T * heads * n for n in (0, 1, 0, 1, 0)]


def test_a_head_whose_state_vmem_does_not_hold_is_refused_by_name():
    q, kv, *rest, _ = make_inputs(
        B=1, num_heads=1, head_width=4096, grid=(1, 8), K=0, dtype="bfloat16"
    )
    with pytest.raises(
        ValueError, match="a head of 4096 bfloat16 takes .* of 64.0 MiB among them; it has 16.0"
    ):
        linear_attention(
            q, kv, *rest, num_heads=1, grid=(1, 8), implementation="pallas_tpu", interpret=True
        )


# With the cases below, the schedules of test_tpu_schedule.py (bands on a v4, both ways) and those
# at the end (XL on a v5e): every chip both ways. All 160 programs, ten minutes of a core:
# python -m docs.kernels_table
@pytest.mark.parametrize(
    "topology,width,num_heads,grid,K,dtype,name",
    [
        ("v5p:2x2x1", 384, 2, (64, 64), 5, "bfloat16", "forward"),  # S at 1024 px
        ("tpu7x:2x2x1", 384, 2, (64, 64), 5, "bfloat16", "forward"),
        ("tpu7x:2x2x1", 192, 1, (16, 16), 5, "bfloat16", "backward"),  # a head of S
        ("v5e:2x2", 1152, 4, (32, 32), 0, "bfloat16", "forward"),
        ("v5e:2x2", 144, 2, (17, 9), 7, "bfloat16", "forward"),  # heads of 72
        ("v6e:2x2", 256, 1, (16, 16), 5, "bfloat16", "forward"),  # L's heads, of whole tiles
        ("v6e:2x2", 128, 2, (12, 20), 7, "bfloat16", "backward"),  # heads of 64
        ("v5p:2x2x1", 192, 1, (2, 24), 3, "float32", "backward"),  # a head of several tiles
        ("v4:2x2x1", 1152, 4, (16, 16), 5, "bfloat16", "backward"),  # XL: 16 MiB are near
    ],
)
def test_the_tpu_compiler_takes_the_kernel(topology, width, num_heads, grid, K, dtype, name):
    case = Case(width, num_heads, grid, K, dtype=jnp.dtype(dtype))
    tpu_schedule.compile_for(*tpu_schedule.attention_program(case, 2, name), topology)


# A whole image's count has a MiB for what is small, which in a program as small as these would hide
# what is missing from it.
@pytest.mark.parametrize(
    "topology,width,num_heads,grid,K,dtype,kibibytes,form",
    [
        ("v4:2x2x1", 384, 2, (16, 16), 5, "bfloat16", 7450, "direct"),  # as XL's, two slots
        # Where what is spilled of the normalisers, or of float32, counts.
        ("v5p:2x2x1", 128, 16, (16, 32), 5, "bfloat16", 10500, "bands"),
        ("v5e:2x2", 256, 1, (64, 64), 3, "float32", 14000, "bands"),
        ("v5e:2x2", 192, 1, (5, 400), 7, "bfloat16", 4000, "pieces"),
        ("v4:2x2x1", 512, 2, (16, 16), 0, "bfloat16", 1600, "groups"),
    ],
)
def test_a_backward_pass_takes_no_more_vmem_than_its_plan_counts(
    monkeypatch, topology, width, num_heads, grid, K, dtype, kibibytes, form
):
    """The plan of a VMEM of so many KiB is compiled for one of just what the plan counts."""
    case = Case(width, num_heads, grid, K, dtype=jnp.dtype(dtype))
    monkeypatch.setattr(linear_attention_tpu_plan, "vmem_bytes", lambda: kibibytes * 1024)
    plan = linear_attention_tpu_plan.make_plan(case, backward=True)
    found = {
        "direct": plan.direct and plan.slots < len(plan.tiles),
        "bands": plan.bands > plan.pieces == 1,
        "pieces": plan.bands > plan.pieces > 1,
        "groups": plan.groups > 1,
    }
    assert [name for name in found if found[name]][-1] == form, plan
    if plan.whole:
        counted = linear_attention_tpu_plan.image_bytes(plan) - 2**20
    else:
        counted = linear_attention_tpu_plan.band_bytes(plan)
    monkeypatch.setattr(linear_attention_tpu, "make_plan", lambda *_, **__: plan)
    monkeypatch.setattr(linear_attention_tpu, "vmem_bytes", lambda: counted)
    fn, args = tpu_schedule.attention_program(case, 2, "backward")
    tpu_schedule.compile_for(fn, args, topology)


@pytest.fixture(scope="module")
def xl_at_256():
    """The schedules of LiT-XL/2, 256 px, on a v5e."""
    return tpu_schedule.attention_costs(Case(1152, 4, (16, 16)), 8, "v5e:2x2")


@pytest.mark.parametrize("name,bar", [("forward", 1.4), ("backward", 1.75)])
def test_static_schedule_at_xl_256_is_near_the_memory_floor(xl_at_256, name, bar):
    """With some air above what the schedules reach; HBM carries arguments and outputs alone."""
    cost = xl_at_256[name]
    assert len(cost.kernels) == 1 and cost.ratio <= bar, cost
    # Taps repeated for each head, and each core's sums of their gradients; no array (B, T, D).
    assert cost.temporaries < 8 * 256 * 1152 * 2, cost

"""The mesh, the FSDP rule and the batch's sharding, on eight pretend devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from oracles import assert_close

from lit_jax import sharding
from lit_jax.models import param_shapes
from lit_jax.models.dit import DiT, DiTConfig


@pytest.mark.parametrize(
    "data, fsdp, expected",
    [(-1, 1, (8, 1)), (1, -1, (1, 8)), (2, 4, (2, 4)), (-1, 4, (2, 4)), (8, 1, (8, 1))],
)
def test_a_size_of_minus_one_takes_what_is_left(data, fsdp, expected):
    mesh = sharding.make_mesh(data, fsdp)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == expected
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2


@pytest.mark.parametrize(
    "data, fsdp", [(3, -1), (2, 2), (16, 1), (-1, -1), (0, -1), (-1, 0), (-1, 16), (-2, 4)]
)
def test_impossible_meshes_name_both_sizes_and_the_devices(data, fsdp):
    with pytest.raises(ValueError, match=rf"^data = {data} and fsdp = {fsdp} .* 8 devices"):
        sharding.make_mesh(data, fsdp)


def test_a_mesh_of_some_devices():
    mesh = sharding.make_mesh(2, 1, devices=jax.devices()[:2])
    assert list(mesh.devices.ravel()) == jax.devices()[:2]


@pytest.mark.parametrize(
    "shape, spec",
    [
        ((256, 1024), PartitionSpec(None, "fsdp")),
        ((1024, 256), PartitionSpec("fsdp")),
        ((28, 1152, 3456), PartitionSpec(None, None, "fsdp")),  # the layer axis stays whole
        ((400, 128, 130), PartitionSpec(None, "fsdp")),  # even where it is the largest
        ((1001, 1153), PartitionSpec()),  # nothing divides by 4
        ((1001, 1152), PartitionSpec(None, "fsdp")),
        ((64, 64), PartitionSpec()),  # too small to be worth it
        ((2**17,), PartitionSpec("fsdp")),
        ((), PartitionSpec()),
    ],
)
def test_the_largest_dividable_axis_is_sharded(shape, spec):
    mesh = sharding.make_mesh(2, 4)
    found = sharding.fsdp_sharding({"a": jax.ShapeDtypeStruct(shape, jnp.float32)}, mesh)["a"].spec
    assert tuple(found) + (None,) * 3 == tuple(spec) + (None,) * (3 + len(found) - len(spec))


def test_without_fsdp_everything_is_replicated():
    mesh = sharding.make_mesh(8, 1)
    assert sharding.fsdp_sharding({"a": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}, mesh)[
        "a"
    ].is_fully_replicated


def test_the_batch_is_split_over_both_axes():
    mesh = sharding.make_mesh(2, 4)
    x = jax.device_put(np.arange(16).reshape(16, 1), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 1)}
    assert sorted(int(shard.data[0, 0]) for shard in x.addressable_shards) == list(range(0, 16, 2))


def test_a_batch_that_the_mesh_does_not_divide_is_named():
    mesh = sharding.make_mesh(2, 4)
    sharding.check_batch(16, mesh)
    with pytest.raises(ValueError, match=r"sample.batch_size = 12 .* 8 devices"):
        sharding.check_batch(12, mesh, "sample.batch_size")


def test_a_process_reads_the_rows_that_its_devices_hold():
    mesh = sharding.make_mesh(2, 4)
    np.testing.assert_array_equal(
        sharding.process_rows(sharding.batch_sharding(mesh), 16), np.arange(16)
    )
    some = sharding.make_mesh(2, 1, devices=jax.devices()[:2])
    np.testing.assert_array_equal(sharding.process_rows(sharding.replicated(some), 6), np.arange(6))


def test_a_rematerialised_model_whose_weights_are_split_has_the_same_gradients():
    config = DiTConfig(2, 16, 2, patch_size=4, in_channels=1, num_classes=3, attention="linear")
    model = DiT(config, remat="dots", dtype=jnp.float32)
    rng = np.random.default_rng(0)
    shapes = param_shapes(config)
    params = jax.tree.map(lambda s: 0.2 * rng.standard_normal(s.shape).astype(np.float32), shapes)
    x, target = rng.standard_normal((2, 16, 8, 8, 1)).astype(np.float32)
    t, y = rng.integers(0, 1000, 16), rng.integers(0, 3, 16)

    def gradient(params, x, t, y, model=model):
        def loss(params):
            out = model.apply({"params": params}, x, t, {"label": y})
            return jnp.mean((out[..., :1] - target) ** 2)

        return jax.grad(loss)(params)

    # They run once, so they need no optimising.
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    plain = functools.partial(gradient, model=model.clone(remat="none"))
    expected = jit(plain)(params, x, t, y)
    mesh = sharding.make_mesh(2, 4)
    where = sharding.fsdp_sharding(shapes, mesh, min_size=64)
    split = jax.device_put((params, x, t, y), (where, *[sharding.batch_sharding(mesh)] * 3))
    actual = jit(sharding.on_mesh(gradient, mesh), out_shardings=where)(*split)
    # A gradient sums over 16 images of 4 tokens, after sums of up to 64 in each layer.
    jax.tree.map(lambda a, b: assert_close(a, b, reduction=64 * 64), actual, expected)

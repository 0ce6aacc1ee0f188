"""What attention reads and gives in a block, and the two distances of it from a teacher's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from oracles import assert_close
from torch_checkpoints import inputs, make_torch, rel, run_torch, save

from lit_jax import models
from lit_jax.models import attention, dit
from lit_jax.models.blocks import ATTENTION, attention_error, feature_error
from lit_jax.porting.read import load_params, read_checkpoint

GRID = (4, 4)


def test_the_regression_compares_each_attention_with_the_teachers_on_its_own_input(tmp_path):
    """The teacher's side against hooks of torch, the student's layer by layer in NumPy."""
    torch_model = make_torch()
    seen_by_torch = {"read": [], "gave": []}

    def keep(_, told, out):
        seen_by_torch["read"].append(told[0].numpy())
        seen_by_torch["gave"].append(out.numpy())

    for block in torch_model.blocks:
        block.attn.register_forward_hook(keep)
    x, _, y = inputs({})
    t = np.array([3, 63])
    expected = run_torch(torch_model, x, t, y)

    path = save(torch_model, tmp_path / "a.safetensors", num_heads=3)
    checkpoint = read_checkpoint(path)
    teacher = dit.DiT(checkpoint.config, dtype=jnp.float32)
    frozen = load_params(checkpoint.params)
    drop = y == checkpoint.config.num_classes
    told = (x, t, {"label": np.where(drop, 0, y)}, drop)
    watched = jax.jit(functools.partial(teacher.apply, mutable=[ATTENTION]))
    output, seen = watched({"params": frozen}, *told)
    assert rel(np.asarray(output), expected) < 2e-5
    seen = seen[ATTENTION]
    for name, layers in seen_by_torch.items():
        assert rel(np.asarray(seen["blocks"][name][0]), np.stack(layers)) < 2e-5

    # The teacher itself has no error.
    error_of = jax.jit(attention_error, static_argnums=(0, 3))
    assert error_of(teacher, frozen, seen, GRID).max() < 1e-9

    config = dit.DiTConfig(3, 48, 3, attention="linear", num_classes=10)
    student = dit.DiT(config, dtype=jnp.float32)
    init = jax.jit(models.init_params, static_argnums=0)
    params = jax.device_get(init(student, jax.random.key(0)))
    module = attention.make_attention(config, dtype=jnp.float32, parent=None)
    compute = jax.jit(module.apply, static_argnums=2)
    by_layer = []
    for i, (read, gave) in enumerate(zip(*seen_by_torch.values())):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]["attn"])
        out = np.float64(compute({"params": layer}, read, GRID))
        square = ((out - gave) ** 2).mean(axis=(1, 2))
        by_layer.append(square / (np.float64(gave) ** 2).mean())

    def error(params):
        each = attention_error(student, params, seen, GRID)
        return each.sum(), each

    gradient, each = jax.jit(jax.grad(error, has_aux=True))(params)
    assert_close(each, np.mean(by_layer, axis=0), reduction=48, factor=64)
    moved = {path for path, leaf in flatten_dict(gradient, sep="/").items() if leaf.any()}
    assert moved == {path for path in flatten_dict(params, sep="/") if "blocks/attn/" in path}


def test_features_are_compared_layer_by_layer_and_image_by_image():
    """In float64, of a model with layers of one kind and of one with layers of two."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.standard_normal((2, 4, 3, 6, 8)) * [[[[[1.0]]]], [[[[3.0]]]]]
    expected = [
        np.mean(
            [
                np.mean((ours[layer, image] - theirs[layer, image]) ** 2)
                / np.mean(theirs[layer] ** 2)
                for layer in range(4)
            ]
        )
        for image in range(3)
    ]
    ours, theirs = np.float32(ours), np.float32(theirs)
    seen = {"blocks": {"gave": (theirs,)}}
    error = jax.jit(feature_error)
    assert_close(error({"blocks": {"gave": (ours,)}}, seen), np.array(expected), reduction=48)
    # Groups of two layers: the first of each group, and the second of each.
    pattern = {"layer_0": {"gave": (ours[::2],)}, "layer_1": {"gave": (ours[1::2],)}}
    assert_close(error({"blocks": pattern}, seen), np.array(expected), reduction=48)


def test_what_a_student_gives_is_the_same_under_remat():
    """And its own model's, not the teacher's: the second layer reads what the first made."""
    config = dit.DiTConfig(2, 48, 3, attention="linear", num_classes=10)
    params = jax.device_get(
        jax.jit(models.init_params, static_argnums=0)(dit.DiT(config), jax.random.key(0))
    )
    # Gates are zero at the start, and then no layer reads another.
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), params)
    x, t, y = inputs({})
    told = (x, t, {"label": y % 10}, y == 10)

    def gave(params, remat):
        student = dit.DiT(config, dtype=jnp.float32, remat=remat)
        return student.apply({"params": params}, *told, mutable=[ATTENTION])[1][ATTENTION]

    teacher = jax.tree.map(jnp.zeros_like, gave(params, "none"))
    teacher["blocks"]["gave"] = (teacher["blocks"]["gave"][0] + 1,)

    def error(params, remat):
        return feature_error(gave(params, remat), teacher).sum()

    gradient = jax.jit(jax.grad(error), static_argnums=1)
    kept, again = (flatten_dict(gradient(params, remat), sep="/") for remat in ("none", "full"))
    for path, leaf in kept.items():
        np.testing.assert_allclose(again[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
    # Gradients reach what comes before an attention, and nothing after the last one.
    assert kept["x_embedder/proj/kernel"].any() and kept["blocks/mlp/fc1/kernel"][0].any()
    assert not kept["blocks/mlp/fc1/kernel"][1].any()
    assert not kept["final_layer/linear/kernel"].any()

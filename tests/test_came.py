"""CAME against its authors' PyTorch code, layer by layer, and under FSDP."""

import came_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from oracles import assert_close

from lit_jax import came, sharding

L = 2
# A matrix, a vector, a table and a convolution; alone, and one a layer. Torch's shapes.
SHAPES = {"kernel": (6, 4), "bias": (6,), "table": (6, 8), "window": (5, 1, 3, 3)}


def to_ours(name, array):
    """A matrix is transposed; a convolution's window comes first."""
    axes = {"kernel": (1, 0), "window": (2, 3, 1, 0)}.get(name)
    return array.transpose(axes) if axes else array


def draw(rng, scale=1.0):
    """Torch's tensors by name: those of the stem, and of every layer."""
    names = [(place, name) for place in ("stem", 0, 1) for name in SHAPES]
    return {key: (scale * rng.standard_normal(SHAPES[key[1]])).astype(np.float32) for key in names}


def tree(tensors):
    """Our tree of them: the layers stacked."""
    blocks = {
        name: np.stack([to_ours(name, tensors[layer, name]) for layer in range(L)])
        for name in SHAPES
    }
    stem = {name: to_ours(name, tensors["stem", name]) for name in SHAPES}
    return {"blocks": blocks, "stem": stem}


@pytest.fixture(scope="module")
def gradients():
    """Of 12 steps: large, then small, and zero in one of the tensors."""
    rng = np.random.default_rng(0)
    steps = [draw(rng, scale) for scale in np.geomspace(30, 1e-4, 12)]
    for step in steps:
        step["stem", "table"] *= 0
    return steps


@pytest.fixture(scope="module")
def theirs(gradients):
    """The parameters after each step of the authors' code."""
    start = {key: torch.nn.Parameter(torch.tensor(x)) for key, x in start_tensors().items()}
    optimizer = came_pytorch.CAME(list(start.values()), lr=0.01, weight_decay=0.1)
    after = []
    for step in gradients:
        for key, parameter in start.items():
            parameter.grad = torch.tensor(step[key])
        optimizer.step()
        after.append(tree({key: p.detach().numpy().copy() for key, p in start.items()}))
    return after


def start_tensors():
    return draw(np.random.default_rng(1))


def optimizer():
    return optax.chain(
        came.scale_by_came(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.01)
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_it_is_the_authors_code_layer_by_layer(gradients, theirs, devices):
    tx = optimizer()
    params = tree(start_tensors())
    mesh = sharding.make_mesh(1, 8) if devices == 8 else None
    state = jax.jit(tx.init)(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    if mesh:
        # By shape, as the train state is: the axis of 8 of the tables is split.
        place = [sharding.fsdp_sharding(each, mesh) for each in (params, state)]
        params, state = jax.device_put((params, state), tuple(place))
        step = jax.jit(step, out_shardings=tuple(place))
    else:
        step = jax.jit(step)
    for grads, expected in zip(gradients, theirs):
        params, state = step(params, state, jax.tree.map(jnp.asarray, tree(grads)))
        flat = jax.tree_util.tree_leaves_with_path(params)
        for (path, leaf), other in zip(flat, jax.tree.leaves(expected)):
            assert_close(leaf, other, reduction=20, what=jax.tree_util.keystr(path))


def test_the_state_is_one_array_and_four_factors():
    state = came.scale_by_came().init(tree(start_tensors()))
    kernel = state["blocks"]["kernel"]
    shapes = [leaf.shape for leaf in kernel]
    assert shapes == [(L, 4, 6), (L, 4), (L, 6), (L, 4), (L, 6)]
    window = [leaf.shape for leaf in state["blocks"]["window"]]
    assert window == [(L, 3, 3, 1, 5), (L, 1, 5, 3), (L, 1, 5, 3), (L, 1, 5, 3), (L, 1, 5, 3)]
    assert [leaf.shape for leaf in state["blocks"]["bias"]] == [(L, 6), (L, 6)]


def test_a_fresh_state_is_a_shock():
    """Without bias correction the first update has an rms of 11.1 learning rates."""
    tx = came.scale_by_came()
    g = {"kernel": jnp.asarray(np.random.default_rng(2).standard_normal((64, 64), np.float32))}
    update, _ = tx.update(g, tx.init(g))
    assert 10.5 < np.sqrt(np.mean(np.square(update["kernel"]))) < 11.7

"""Which layers bear another attention: errors against whole models, and the choice of a pattern."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax import models, sharding
from lit_jax.evaluation import layers
from lit_jax.models.blocks import ATTENTION, attention_error
from lit_jax.models.dit import DiT, DiTConfig

SMALL = dict(width=16, num_heads=2, patch_size=4, in_channels=1, num_classes=10)
SOFTMAX = DiTConfig(2, **SMALL)
# The first layer is linear, the second keeps softmax.
HYBRID = DiTConfig(2, **SMALL, attention="linear", softmax_every=2, softmax_heads=2)
MESH = sharding.make_mesh(2, 2, devices=jax.devices()[:4])


def random_params(config, seed):
    """Random everywhere: the output of a fresh model would be zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32),
        models.param_shapes(config),
    )


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    x_t = rng.standard_normal((4, 8, 12, 1), np.float32)
    return x_t, np.array([3, 200, 555, 999]), {"label": np.array([0, 4, 9, 2])}


@functools.cache
def compiled(config):
    """A student's sums, compiled once."""
    model, teacher = (DiT(each, dtype=jnp.float32) for each in (config, SOFTMAX))
    return layers.make_layer_sums(model, teacher, MESH)


def with_softmax_layers(hybrid, own):
    """The teacher of a hybrid: softmax in all layers, `own` in the first, else the same leaves."""
    flat = flatten_dict(hybrid, sep="/")
    for path, leaf in flatten_dict(own, sep="/").items():
        first, _, rest = path.partition("/")
        if first == "blocks":
            second = flat[f"blocks/layer_1/{rest}"][0]
            before = leaf[0] if "attn/" in rest else flat[f"blocks/layer_0/{rest}"][0]
            flat[path] = np.stack([before, second])
    kept = {path: leaf for path, leaf in flat.items() if not path.startswith("blocks/layer_")}
    return unflatten_dict(kept, sep="/")


def test_one_replaced_layer_is_the_model_that_has_it():
    """A model whose first layer alone is linear is the teacher with that layer replaced."""
    params = random_params(HYBRID, 1)
    teacher_params = with_softmax_layers(params, random_params(SOFTMAX, 2))
    x_t, t, condition = told = inputs()
    errors = layers.errors_of([compiled(HYBRID)(params, teacher_params, *told)], "a")

    student, teacher = (DiT(config, dtype=jnp.float32) for config in (HYBRID, SOFTMAX))
    wanted, seen = jax.jit(lambda p: teacher.apply({"params": p}, *told, mutable=[ATTENTION]))(
        teacher_params
    )
    changed = jax.jit(lambda p: student.apply({"params": p}, *told))(params)
    # The noise alone: the other channel is the variance's.
    wanted, changed = (np.asarray(each, np.float64)[..., :1] for each in (wanted, changed))
    distance = ((changed - wanted) ** 2).sum() / (wanted**2).sum()
    assert errors.output[0] == pytest.approx(distance, rel=1e-3)
    grid = (2, 3)
    regression = attention_error(student, params, seen[ATTENTION], grid).mean()
    assert errors.attention[0] == pytest.approx(float(regression), rel=1e-4)
    assert errors.output[0] > 0.01

    # The second layer is the teacher's: float32 may fuse it in another order.
    assert errors.attention[1] < 1e-11 and errors.output[1] < 1e-11
    assert errors.ranking == [0, 1]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_layer_ranks_first(broken):
    teacher_params = random_params(SOFTMAX, 3)
    params = jax.tree.map(np.array, teacher_params)
    params["blocks"]["attn"]["proj"]["kernel"][broken] *= 0.5
    sums = [compiled(SOFTMAX)(params, teacher_params, *inputs(seed)) for seed in (0, 1)]
    errors = layers.errors_of(sums, "a")
    assert errors.ranking[0] == broken
    assert errors.attention[1 - broken] < 1e-11 < 1e-4 < errors.attention[broken]
    assert errors.output[1 - broken] < 1e-11 < 1e-4 < errors.output[broken]


def make_sums(distances, square):
    distances = np.float32(distances)
    squares = dict(attention_square=np.full(len(distances), square), output_square=square)
    return dict(attention_distance=distances, output_distance=2 * distances) | squares


def test_batches_count_by_their_squares():
    """The error is of all images together, not the mean of the batches' errors."""
    errors = layers.errors_of([make_sums([1, 2], 4.0), make_sums([5, 0], 1.0)], "a")
    assert errors == layers.LayerErrors((1.2, 0.4), (2.4, 0.8))
    with pytest.raises(ValueError, match="^runs/a: with the attention of layer 1 the error of the"):
        layers.errors_of([make_sums([1, np.nan], 4.0)], "runs/a")


def make_patterns(seed=0, size=(64, 64)):
    """All patterns of twelve layers, with random errors."""
    student = DiTConfig.of_size("S", attention="linear")
    found = layers.patterns(student, DiTConfig.of_size("S"), size)
    drawn = np.random.default_rng(seed).random((2, 12)).tolist()
    errors = layers.LayerErrors(tuple(drawn[0]), tuple(drawn[1]))
    return errors, [pattern.with_errors(errors) for pattern in found]


def test_patterns_are_all_that_the_depth_allows():
    errors, found = make_patterns()
    student = DiTConfig.of_size("S", attention="linear")
    teacher = DiTConfig.of_size("S")
    linear, softmax = (each.forward_flops((64, 64)) for each in (student, teacher))
    expected = {0: set()}
    for every in range(2, 13):
        kept = {layer for layer in range(12) if (layer + 1) % every == 0}
        if 11 in kept:  # the group fills the depth
            expected[every] = kept
    assert {pattern.softmax_every: set(pattern.kept) for pattern in found} == expected
    for pattern in found:
        share = (linear + len(pattern.kept) * (softmax - linear) / 12) / softmax
        assert pattern.flops_share == pytest.approx(share, rel=1e-12)
        others = set(range(12)) - set(pattern.kept)
        assert pattern.output == pytest.approx(sum(errors.output[i] for i in others))
        assert pattern.attention == pytest.approx(sum(errors.attention[i] for i in others))


# At 8 x 8 tokens softmax is the cheaper one, at 32 x 32 the dearer.
@pytest.mark.parametrize("seed, size", itertools.product(range(3), [(16, 16), (64, 64)]))
def test_the_choice_is_the_best_within_the_budget(seed, size):
    _, found = make_patterns(seed, size)
    shares = sorted(pattern.flops_share for pattern in found)
    for share in (*shares, 1.5):
        chosen = layers.choose(found, share)
        assert chosen.flops_share <= share
        for other in found:
            assert other.flops_share > share or other.output >= chosen.output
    with pytest.raises(ValueError, match=r"^flops_share = 0.5, but the cheapest pattern has "):
        layers.choose(found, 0.5)
    # Of equal errors the cheaper one.
    equal = [dataclasses.replace(pattern, output=1.0) for pattern in found]
    assert layers.choose(equal, 1.5).flops_share == shares[0]

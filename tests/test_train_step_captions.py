"""The one train step with a model that is told a caption, and PixArt-Sigma's optimizer."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from oracles import assert_close

from lit_jax import models, sharding
from lit_jax.diffusion import GaussianDiffusion
from lit_jax.models.pixart import PixArt, PixArtConfig
from lit_jax.train_step import (
    OptimizerSettings,
    StepSettings,
    make_optimizer,
    make_train_step,
    new_state,
    state_shapes,
)

FIELDS = dict(
    depth=2, width=32, cross_heads=4, caption_channels=12, caption_length=5, position_base=4
)
STUDENT = PixArt(PixArtConfig(num_heads=2, attention="linear", **FIELDS), dtype=np.float32)
TEACHER = PixArt(PixArtConfig(num_heads=4, **FIELDS), dtype=np.float32)
NULL = STUDENT.config.frozen[0]
OPTIMIZER = OptimizerSettings(
    steps=20, name="came", learning_rate=1e-3, weight_decay=0.1, clip_norm=0.01, warmup=12
)
STEP = StepSettings(dropout=0.5, ema_decay=0.9, noise_weight=1.0, scaling_factor=0.13025)


def random_params(model, seed):
    rng = np.random.default_rng(seed)
    shapes = models.param_shapes(model.config)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)


def make_batch(B=8):
    rng = np.random.default_rng(3)
    return {
        "mean": rng.standard_normal((B, 4, 8, 4), np.float32).astype(np.float16),
        "log_variance": rng.standard_normal((B, 4, 8, 4), np.float32).astype(np.float16),
        "caption": rng.standard_normal((B, 5, 12), np.float32),
        "caption_mask": np.arange(5) <= np.arange(B)[:, None] % 5,
    }


@functools.cache
def two_steps(data, fsdp):
    """The state before, the state after two steps on a mesh, and the metrics of both."""
    mesh = sharding.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    step = make_train_step(STUDENT, TEACHER, GaussianDiffusion(), OPTIMIZER, STEP, mesh)
    optimizer = make_optimizer(OPTIMIZER)
    shardings = sharding.fsdp_sharding(state_shapes(STUDENT, optimizer), mesh, min_size=64)
    make = jax.jit(lambda p: new_state(p, optimizer), out_shardings=shardings)
    state = make(random_params(STUDENT, 0))
    before = jax.device_get(state)
    teacher = jax.device_put(random_params(TEACHER, 1), sharding.replicated(mesh))
    batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh))
    history = []
    for _ in range(2):
        # A step leaves what is so small on every device: its second would be another program.
        state = jax.device_put(state, shardings)
        state, metrics = step(state, teacher, batch, jax.random.key(0))
        history.append({name: float(value) for name, value in metrics.items()})
    return before, jax.device_get(state), history


def test_the_hybrid_loss_is_that_of_class_conditional_models():
    _, _, history = two_steps(1, 1)
    for metrics in history:
        total = sum(metrics[name] for name in ("mse", "vb", "kd_noise"))
        assert metrics["loss"] == pytest.approx(total + 0.05 * metrics["kd_variance"], rel=1e-5)
    assert [metrics["learning_rate"] for metrics in history] == pytest.approx(
        [1e-3 / 12, 2e-3 / 12]
    )


def test_a_mesh_of_eight_steps_as_one_device_does():
    """CAME's factors and norms are those of whole tensors, however they are split."""
    _, one, alone = two_steps(1, 1)
    _, eight, history = two_steps(2, 4)
    for ours, theirs in zip(history, alone):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # Sums of another order, divided by roots of small numbers: the first updates are large.
    expected = flatten_dict(one.params, sep="/")
    for path, leaf in flatten_dict(eight.params, sep="/").items():
        # A bias of the keys moves no softmax: its gradient is rounding, which CAME makes large.
        start = 32 if path == "blocks/cross_attn/kv_linear/bias" else 0
        assert_close(leaf[..., start:], expected[path][..., start:], factor=2000, what=path)


def test_all_but_the_null_caption_is_trained():
    before, after, _ = two_steps(1, 1)
    for tree in ("params", "ema_params"):
        new = flatten_dict(getattr(after, tree), sep="/")
        for path, old in flatten_dict(getattr(before, tree), sep="/").items():
            assert np.array_equal(new[path], old) == (path == NULL), (tree, path)


@pytest.mark.parametrize("warmup", [0, 11])
def test_came_whose_first_update_would_be_above_the_learning_rate_is_refused(warmup):
    """It is 11.1 times as large (test_came.py): a twelfth of the rate is the first that does."""
    with pytest.raises(ValueError, match=f"^warmup = {warmup}, but the first update of came is 11"):
        OptimizerSettings(steps=20, name="came", warmup=warmup)
    assert 11.1 * OPTIMIZER.rates()(0) < OPTIMIZER.learning_rate


def test_an_epsilon_that_a_small_clip_makes_large_is_remarked():
    """PixArt-Sigma's clip of 0.01 with AdamW: an element's rms is 4e-7."""
    settings = OptimizerSettings(steps=20, clip_norm=0.01)
    assert "leaves an rms of 4e-07 an element" in settings.remark(610_856_096)
    for change in (dict(epsilon=1e-10), dict(clip_norm=1.0), dict(name="came", warmup=12)):
        assert not dataclasses.replace(settings, **change).remark(610_856_096)

"""Sampling by image number: image i is the same in every batch, on every mesh.

It does not depend on which other images are drawn.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

from lit_jax import conditions, sampling, sharding
from lit_jax.models import param_shapes
from lit_jax.models.dit import DiT, DiTConfig
from lit_jax.samplers import SamplerSettings

CONFIG = DiTConfig(
    depth=1,
    width=16,
    num_heads=2,
    patch_size=4,
    in_channels=1,
    num_classes=5,
    attention="linear",
    grid=(2, 2),
)
MODEL = DiT(CONFIG, dtype=jnp.float32)
BLIND = DiT(dataclasses.replace(CONFIG, learn_sigma=False), dtype=jnp.float32)
SIZE = 8


def make_sampler(devices=8, model=MODEL, *, batch_size=8, seed=0, **change):
    mesh = sharding.make_mesh(devices, 1, devices=jax.devices()[:devices])
    settings = SamplerSettings(**dict(steps=4, cfg_channels="all") | change)
    return sampling.Sampler(model, settings, batch_size=batch_size, seed=seed, mesh=mesh)


def random_labels(index):
    return conditions.for_images(CONFIG, np.asarray(index), seed=0, labels="random")


def random_params(model):
    shapes = param_shapes(model.config)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )


PARAMS = random_params(MODEL)


@pytest.fixture(scope="module")
def sampler():
    return make_sampler()


@pytest.fixture(scope="module")
def images(sampler):
    """Images 0 to 15."""
    index = np.arange(16)
    return sampler(PARAMS, index, random_labels(index))


def test_images_are_float32_and_differ(images):
    assert (
        images.shape == (16, SIZE, SIZE, 1)
        and images.dtype == np.float32
        and np.isfinite(images).all()
    )
    flat = images.reshape(16, -1)
    distances = np.abs(flat[:, None] - flat[None]).max(axis=-1) + np.eye(16)
    assert distances.min() > 0.1


@pytest.mark.parametrize("index", [[3], [15, 2, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 15]])
def test_an_image_does_not_depend_on_which_others_are_drawn(sampler, images, index):
    """A subset of any length, in any order: the program is the same.

    So the images are the same, bit for bit.
    """
    index = np.array(index)
    np.testing.assert_array_equal(sampler(PARAMS, index, random_labels(index)), images[index])


@pytest.mark.parametrize("devices, batch_size", [(1, 3), (8, 16)])
def test_an_image_does_not_depend_on_the_batch_or_the_mesh(images, devices, batch_size):
    other, index = make_sampler(devices, batch_size=batch_size), np.arange(7)
    # Another shape is another program. It may sum products in another order, in each of the four
    # steps.
    assert_close(other(PARAMS, index, random_labels(index)), images[:7], reduction=400)


def test_the_seed_and_the_label_change_the_image(sampler, images):
    index = np.arange(8)
    labels = random_labels(index)
    other = sampler(PARAMS, index, {"label": (labels["label"] + 1) % 5})
    assert (np.abs(other - images[:8]).max(axis=(1, 2, 3)) > 1e-3).all()
    reseeded = sampler.with_seed(1)
    assert (np.abs(reseeded(PARAMS, index, labels) - images[:8]).max(axis=(1, 2, 3)) > 0.1).all()


@contextlib.contextmanager
def programs():
    """Collects the seconds of each program that the compiler is asked for."""
    found = []
    listening = True

    def listen(event, seconds, **about):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    # There is no way to unregister a single one.
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        listening = False


def test_a_program_is_noticed():
    with programs() as compiled:
        jax.jit(lambda x: x * 3.25 - 1)(np.arange(7.0))
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "change", [{"cfg_scale": 4.0}, {"cfg_scale": 4.0, "cfg_interval": (300.0, 800.0)}, {"seed": 3}]
)
def test_guidance_and_seed_are_arguments_of_the_program(sampler, images, change):
    """Changed after the first batch they compile nothing, and give what a new sampler gives."""
    index = np.arange(8)
    labels = random_labels(index)
    np.testing.assert_array_equal(sampler(PARAMS, index, labels), images[:8])
    other = sampler.with_seed(3) if "seed" in change else sampler.with_guidance(**change)
    with programs() as compiled:
        found = other(PARAMS, index, {"label": (labels["label"] + 1) % 5})
    assert compiled == []
    expected = make_sampler(**change)(PARAMS, index, {"label": (labels["label"] + 1) % 5})
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - images[:8]).max() > 0.01
    # The sampler itself is as it was.
    np.testing.assert_array_equal(sampler(PARAMS, index, labels), images[:8])


def test_a_sampler_without_guidance_gets_none():
    with pytest.raises(ValueError, match="^cfg_scale = 2.0, but the sampler was built with 1"):
        make_sampler(cfg_scale=1.0).with_guidance(2.0)


def test_a_compiled_sampler_draws_the_same_and_compiles_no_more(sampler, images):
    condition = random_labels(np.arange(3))
    compiled = make_sampler().compile(PARAMS, condition)
    sampler(PARAMS, np.arange(3), condition)  # all that surrounds the program is compiled too
    with programs() as asked_for:
        drawn = compiled.with_seed(0)(PARAMS, np.arange(3), condition)
    assert asked_for == []
    np.testing.assert_array_equal(drawn, images[:3])


@pytest.mark.parametrize("change", [{}, dict(sampler="dpm++", steps=3), dict(cfg_scale=1.0)])
def test_a_stream_of_steps_ends_with_the_images_that_are_drawn_at_once(sampler, change):
    settings = SamplerSettings(**dict(steps=4, cfg_channels="all") | change)
    other = sampler.with_settings(settings)
    condition = random_labels(np.arange(3))
    seen = [np.asarray(x) for x in other.stream(PARAMS, np.arange(3), condition)]
    assert len(seen) == settings.steps
    assert_close(seen[-1][:3], other(PARAMS, np.arange(3), condition), reduction=64)
    # The estimates are other pictures on the way, and come nearer.
    distances = [np.abs(x - seen[-1]).mean() for x in seen[:-1]]
    assert distances[0] > distances[-1] > 0


def test_a_stream_of_a_rule_of_outputs_shows_images_too():
    """Heun's first two evaluations are where two steps of Euler's rule look."""
    model = DiT(dataclasses.replace(CONFIG, prediction="velocity"), dtype=jnp.float32)
    params = random_params(model)
    condition = random_labels(np.arange(2))
    seen = {}
    for name, steps in (("euler", 2), ("heun", 4)):
        sampler = make_sampler(1, model, batch_size=2, cfg_scale=1.0, sampler=name, steps=steps)
        seen[name] = [np.asarray(x) for x in sampler.stream(params, np.arange(2), condition)]
    for s in range(2):
        assert_close(seen["heun"][s], seen["euler"][s], reduction=64)
    assert_close(seen["heun"][-1], sampler(params, np.arange(2), condition), reduction=64)


def test_other_steps_seeds_and_guidance_compile_no_other_step():
    condition = random_labels(np.arange(2))

    def stream(sampler, **change):
        settings = SamplerSettings(**dict(steps=4, cfg_channels="all") | change)
        other = sampler.with_settings(settings).with_seed(5)
        return other.stream(PARAMS, np.arange(2), condition)

    sampler, before = make_sampler(), make_sampler()
    seen = stream(sampler)
    next(seen)
    with programs() as compiled:
        list(seen)
    assert compiled == []  # the second step is the program of the first
    for change in (dict(steps=6), dict(cfg_scale=4.0), dict(cfg_scale=1.0)):
        list(stream(before, **change))  # compiles all but the step of `sampler`
        with programs() as compiled:
            list(stream(sampler, **change))
        assert compiled == [], change


def test_random_labels_belong_to_the_number_and_are_uniform():
    labels = random_labels(np.arange(2000))["label"]
    np.testing.assert_array_equal(random_labels([1999, 5, 70])["label"], labels[[1999, 5, 70]])
    counts = np.bincount(labels, minlength=5)
    assert len(counts) == 5  # the null class is never drawn
    assert (np.abs(counts - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()
    assert labels.dtype == np.int32


@pytest.mark.parametrize("seed", [0, 9])
def test_a_label_has_a_stream_of_its_own(seed):
    """It shares no key with a sampling step: each of those folds a small number into an image's."""
    image_key = jax.random.fold_in(jax.random.key(seed), 3)
    steps = jax.vmap(lambda s: jax.random.fold_in(image_key, s))(jnp.arange(1001))
    stream = jax.random.fold_in(image_key, conditions.LABEL_STREAM)
    keys = np.asarray(jax.random.key_data(steps))
    assert not (keys == np.asarray(jax.random.key_data(stream))).all(axis=1).any()
    # Of many classes: another stream would seldom draw the same one.
    config = dataclasses.replace(CONFIG, num_classes=10**6)
    label = conditions.for_images(config, np.array([3]), seed=seed, labels="random")["label"]
    assert label == [jax.random.randint(stream, (), 0, 10**6)]


def test_balanced_labels_count_through_the_classes():
    index = np.array([0, 1, 4, 5, 13])
    labels = conditions.for_images(CONFIG, index, seed=0, labels="balanced")
    np.testing.assert_array_equal(labels["label"], [0, 1, 4, 0, 3])


def test_progress_counts_the_images_that_are_done(sampler):
    done = []
    sampler(PARAMS, np.arange(11), {"label": np.zeros(11, np.int32)}, done.append)
    assert done == [8, 11]


def test_a_model_without_a_variance_head_samples():
    labels = {"label": np.zeros(3, np.int32)}
    images = make_sampler(model=BLIND)(random_params(BLIND), np.arange(3), labels)
    assert images.shape == (3, SIZE, SIZE, 1) and np.isfinite(images).all()


def test_a_variance_can_be_fixed_though_the_model_predicts_one(images):
    """Learned is the default of a model that predicts it; the two fixed ones are other chains."""
    index = np.arange(8)
    labels = random_labels(index)
    small, large = (
        make_sampler(1, variance=name)(PARAMS, index, labels)
        for name in ("fixed_small", "fixed_large")
    )
    for one, other in ((images[:8], small), (images[:8], large), (small, large)):
        assert np.abs(one - other).max() > 0.01
    with pytest.raises(
        ValueError, match="variance = learned_range, but the model predicts no variance"
    ):
        make_sampler(model=BLIND, variance="learned_range")


def test_impossible_requests_are_named():
    with pytest.raises(ValueError, match="batch_size = 12 is not a multiple of the 8 devices"):
        make_sampler(batch_size=12)
    with pytest.raises(ValueError, match="labels must be one of random, balanced; got 'sorted'"):
        conditions.for_images(CONFIG, np.arange(3), seed=0, labels="sorted")
    unsized = DiT(dataclasses.replace(CONFIG, grid=None), dtype=jnp.float32)
    with pytest.raises(ValueError, match="does not say which grid it was trained on"):
        make_sampler(model=unsized)

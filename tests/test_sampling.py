"""Sampling by image number: image i is the same in every batch, on every mesh, whatever else is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_close

from lit_jax import sampling, sharding
from lit_jax.diffusion import make_diffusion
from lit_jax.models.dit import DiT

MODEL = DiT(
    depth=1,
    width=16,
    num_heads=2,
    patch_size=4,
    in_channels=1,
    num_classes=5,
    attention="linear",
    dtype=jnp.float32,
)
SIZE = 8


def make_generator(devices=8, model=MODEL, **change):
    mesh = sharding.make_mesh(devices, 1, devices=jax.devices()[:devices])
    fields = dict(
        size=SIZE,
        seed=0,
        sampler="ddpm",
        steps=4,
        batch_size=8,
        cfg_scale=1.5,
        cfg_channels="all",
        cfg_interval=(0.0, 1000.0),
        clip_denoised=False,
    )
    return sampling.Sampler(model, make_diffusion(), mesh, **fields | change)


def random_params(model):
    x, t = (
        jax.ShapeDtypeStruct((1, SIZE, SIZE, model.in_channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t, t)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )


PARAMS = random_params(MODEL)


@pytest.fixture(scope="module")
def generator():
    return make_generator()


@pytest.fixture(scope="module")
def images(generator):
    """Images 0 to 15."""
    index = np.arange(16)
    return generator(PARAMS, index, generator.labels(index, "random"))


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
def test_an_image_does_not_depend_on_which_others_are_drawn(generator, images, index):
    """Any subset, in any order, of any length: the program is the same, so the images are, bit for bit."""
    index = np.array(index)
    np.testing.assert_array_equal(
        generator(PARAMS, index, generator.labels(index, "random")), images[index]
    )


@pytest.mark.parametrize("devices, batch_size", [(1, 3), (8, 16)])
def test_an_image_does_not_depend_on_the_batch_or_the_mesh(images, devices, batch_size):
    other, index = make_generator(devices, batch_size=batch_size), np.arange(7)
    # Another shape is another program: products may be summed in another order, in each of the four steps.
    assert_close(other(PARAMS, index, other.labels(index, "random")), images[:7], reduction=400)


def test_the_seed_and_the_label_change_the_image(generator, images):
    index = np.arange(8)
    labels = generator.labels(index, "random")
    other = generator(PARAMS, index, (labels + 1) % 5)
    assert (np.abs(other - images[:8]).max(axis=(1, 2, 3)) > 1e-3).all()
    reseeded = make_generator(seed=1)
    assert (np.abs(reseeded(PARAMS, index, labels) - images[:8]).max(axis=(1, 2, 3)) > 0.1).all()


def test_random_labels_belong_to_the_number_and_are_uniform(generator):
    labels = generator.labels(np.arange(2000), "random")
    np.testing.assert_array_equal(
        generator.labels(np.array([1999, 5, 70]), "random"), labels[[1999, 5, 70]]
    )
    counts = np.bincount(labels, minlength=5)
    assert len(counts) == 5  # the null class is never drawn
    assert (np.abs(counts - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()
    assert labels.dtype == np.int32


def test_balanced_labels_count_through_the_classes(generator):
    np.testing.assert_array_equal(
        generator.labels(np.array([0, 1, 4, 5, 13]), "balanced"), [0, 1, 4, 0, 3]
    )


def test_progress_counts_the_images_that_are_done(generator):
    done = []
    generator(PARAMS, np.arange(11), np.zeros(11, np.int32), done.append)
    assert done == [8, 11]


def test_a_model_without_a_variance_head_samples():
    model = MODEL.clone(learn_sigma=False)
    images = make_generator(model=model)(random_params(model), np.arange(3), np.zeros(3, np.int32))
    assert images.shape == (3, SIZE, SIZE, 1) and np.isfinite(images).all()


def test_a_variance_can_be_fixed_though_the_model_predicts_one(generator, images):
    """Learned is the default of a model that predicts it; the two fixed ones are other chains."""
    index = np.arange(8)
    labels = generator.labels(index, "random")
    small, large = (
        make_generator(1, variance=name)(PARAMS, index, labels)
        for name in ("fixed_small", "fixed_large")
    )
    for one, other in ((images[:8], small), (images[:8], large), (small, large)):
        assert np.abs(one - other).max() > 0.01
    with pytest.raises(
        ValueError, match="sample.variance = learned_range, but model.learn_sigma = False"
    ):
        make_generator(model=MODEL.clone(learn_sigma=False), variance="learned_range")


def test_impossible_requests_are_named(generator):
    with pytest.raises(ValueError, match="cfg_channels is '3' or 'all', got '2'"):
        make_generator(cfg_channels="2")
    with pytest.raises(
        ValueError, match=r"cfg_interval is two timesteps, the lower one first, got \(9.0, 1.0\)"
    ):
        make_generator(cfg_interval=(9.0, 1.0))
    with pytest.raises(ValueError, match="unknown variance 'small'"):
        make_generator(variance="small")
    with pytest.raises(
        ValueError, match="sample.batch_size = 12 is not a multiple of the 8 devices"
    ):
        make_generator(batch_size=12)
    with pytest.raises(ValueError, match="sample.labels must be random or balanced, got 'sorted'"):
        generator.labels(np.arange(3), "sorted")
    with pytest.raises(ValueError, match="'euler'"):
        make_generator(sampler="euler")

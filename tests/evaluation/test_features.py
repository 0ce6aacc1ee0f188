"""From images to features: resizes, the preprocessing of each protocol, batches and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jaxprs import assert_exact
from PIL import Image
from tiny_extractor import make_extractor

from lit_jax.evaluation import efficientnet_lite0, features, inception


def resize_tf1_oracle(image, size):
    """tf.compat.v1.image.resize_bilinear, align_corners=False: one pixel after another, float64.

    As in its kernel, the scale and the positions are float32.
    """
    H, W, C = image.shape
    out = np.empty((size, size, C))
    for i in range(size):
        y = np.float32(i) * (np.float32(H) / np.float32(size))
        top = int(np.floor(y))
        bottom, dy = min(top + 1, H - 1), float(y - np.float32(top))
        for j in range(size):
            x = np.float32(j) * (np.float32(W) / np.float32(size))
            left = int(np.floor(x))
            right, dx = min(left + 1, W - 1), float(x - np.float32(left))
            above = image[top, left] + (image[top, right] - image[top, left]) * dx
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            out[i, j] = above + (below - above) * dy
    return out


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (512, 512), (299, 299), (7, 5)])
def test_resize_is_tensorflow_1s(shape, size=299):
    images = np.random.default_rng(0).integers(0, 256, (1, *shape, 3)).astype(np.float32)
    actual = jax.jit(features.resize_tf1, static_argnums=1)(images, size)
    expected = resize_tf1_oracle(images[0].astype(np.float64), size)
    oracles.assert_close(actual[0], expected, factor=3.0, what=f"{shape} -> {size}")


def test_resize_has_the_known_pixels_of_tensorflow_1():
    """Corners stay, the far edge is repeated and not reached; a ramp is read at i * in / out."""
    ramp = jnp.broadcast_to(jnp.arange(4.0)[None, None, :, None], (1, 4, 4, 1))
    np.testing.assert_array_equal(
        features.resize_tf1(ramp, 8)[0, 0, :, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    )
    np.testing.assert_array_equal(features.resize_tf1(ramp, 2)[0, 0, :, 0], [0, 2])
    # With half-pixel centres, as pytorch-fid resizes, the same rows differ:
    np.testing.assert_allclose(
        features.resize_half_pixel(ramp, 8)[0, 0, :, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    )


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(32, 32), (256, 256), (512, 384)])
def test_half_pixel_resize_is_torchs(shape):
    import torch

    images = np.random.default_rng(0).uniform(0, 1, (2, *shape, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(images).movedim(-1, 1),
        size=(299, 299),
        mode="bilinear",
        align_corners=False,
    ).movedim(1, -1)
    # A position near 512 is known to 2^-15 in float32, and a pixel can change by its full range
    # from one to the next.
    oracles.assert_close(
        features.resize_half_pixel(images, 299), expected, factor=512.0, what=str(shape)
    )


def test_clean_resize_keeps_fractions_and_overshoot():
    images = np.zeros((1, 64, 64, 3), np.uint8)
    images[:, :, 32:] = 255
    resized = features.resize_clean(images, 299)
    assert resized.dtype == np.float32 and resized.shape == (1, 299, 299, 3)
    assert resized.min() < -1 and resized.max() > 256 and (resized != np.round(resized)).any()
    np.testing.assert_array_equal(
        features.resize_clean(np.full((1, 50, 50, 3), 7, np.uint8), 299), 7.0
    )


def expected_input(name, images):
    """Preprocessing of (B, H, W, 3) uint8 in torch and NumPy."""
    if name == "inception_adm":
        resized = [resize_tf1_oracle(image.astype(np.float64), 299) for image in images]
        return (np.stack(resized) - 128) / 128
    if name == "inception_pytorch_fid":
        import torch

        x = torch.from_numpy(images).movedim(-1, 1).float() / 255
        x = torch.nn.functional.interpolate(
            x, size=(299, 299), mode="bilinear", align_corners=False
        )
        return (2 * x - 1).movedim(1, -1).numpy()
    channels = [
        [
            Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC)
            for c in range(3)
        ]
        for image in images
    ]
    resized = np.array([[np.asarray(c) for c in image] for image in channels])
    return (resized.transpose(0, 2, 3, 1) - 128) / 128


@pytest.mark.torch
def test_extractors_preprocess_as_their_protocol_says():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    seen = {}
    for name, suffix in (
        ("inception_adm", "adm"),
        ("inception_pytorch_fid", "pytorch_fid"),
        ("inception_clean", "clean"),
    ):
        extractor = features.make_inception_extractor(name, {})
        assert (extractor.name, extractor.suffix) == (name, suffix)
        seen[suffix] = np.asarray(extractor.preprocess(jnp.asarray(extractor.prepare(images))))
        oracles.assert_close(seen[suffix], expected_input(name, images), factor=64.0, what=name)
    for other in ("pytorch_fid", "clean"):
        assert np.abs(seen["adm"] - seen[other]).max() > 0.1


def test_the_hash_of_weights_is_of_names_and_values():
    x = np.arange(3, dtype=np.float32)
    trees = [{"a": x, "b": 2 * x}, {"a": x, "c": 2 * x}, {"a": 2 * x, "b": x}, {"a": x, "b": x}]
    assert len({features.hash_params(tree) for tree in trees}) == 4
    half = jax.tree.map(lambda leaf: leaf.astype(np.float16), trees[0])
    assert features.hash_params(half) == features.hash_params(trees[0])


def test_efficientnets_images_are_antialiased():
    """As PIL resizes images of floats, which takes all pixels below a bigger one."""
    images = np.random.default_rng(0).integers(0, 256, (1, 600, 500, 3), dtype=np.uint8)
    actual = features.make_efficientnet_extractor({}).preprocess(jnp.asarray(images))
    for c in range(3):
        channel = Image.fromarray(images[0, :, :, c].astype(np.float32))
        channel = channel.resize((224, 224), Image.Resampling.BILINEAR)
        expected = (np.asarray(channel, np.float64) - 127) / 128
        # A position near 600 is known to 2^-15 in float32, as above.
        oracles.assert_close(actual[0, :, :, c], expected, factor=512.0, what=f"channel {c}")


@pytest.mark.parametrize("name, count", [("inception", 95), ("efficientnet", 34)])
def test_products_of_the_networks_are_exact_on_every_device(name, count):
    networks = {
        "inception": (inception.InceptionV3(), 299),
        "efficientnet": (efficientnet_lite0.EfficientNetLite0(), 224),
    }
    network, size = networks[name]
    x = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), x)
    assert assert_exact(network.apply, params, x) == count


def test_extract_drops_padding_and_repeats_grey_images():
    """With a real network: the result for an image does not depend on what shares its batch."""
    extractor = features.make_extractor("efficientnet_lite0")
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    whole = next(features.extract(extractor, [images], 8))["pool"]
    batches = features.extract(extractor, [images[:6], images[6:]], 8)
    ragged = [outputs["pool"] for outputs in batches]
    assert [len(pool) for pool in ragged] == [6, 2] and whole.shape == (8, 1280)
    oracles.assert_close(np.concatenate(ragged), whole, reduction=1280, what="ragged batches")

    grey = images[..., :1]
    from_grey, from_rgb = (
        next(features.extract(extractor, [x], 8))["pool"] for x in (grey, grey.repeat(3, -1))
    )
    np.testing.assert_array_equal(from_grey, from_rgb)


def test_batches_keep_their_order():
    extractor = make_extractor()
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    batches = [images[:7], images[7:8], images[8:]]
    pool = [outputs["pool"] for outputs in features.extract(extractor, batches, 16)]
    assert [len(batch) for batch in pool] == [7, 1, 12]
    np.testing.assert_allclose(np.concatenate(pool)[:, 0], 0.01 * np.arange(20), rtol=1e-6)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="^features must be one of inception_adm.*; got 'fid'"):
        features.make_extractor("fid")
    with pytest.raises(FileNotFoundError, match="^weights = '' is empty: inception_adm needs"):
        features.make_extractor("inception_adm")
    with pytest.raises(ValueError, match=r"uint8, got \(2, 4, 4, 3\) float32"):
        next(features.extract(make_extractor(), [np.zeros((2, 4, 4, 3), np.float32)], 8))
    with pytest.raises(ValueError, match="between 1 and 8 images a batch, got 9"):
        next(features.extract(make_extractor(), [np.zeros((9, 4, 4, 3), np.uint8)], 8))

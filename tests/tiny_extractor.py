"""A real extractor with a network of a few products, for tests of what goes around the network."""

import jax.numpy as jnp
import numpy as np

from lit_jax.evaluation import features


def tiny_network(params, x):
    """Means of the quarters of an image, (B, 12); products of them; five of them."""
    B, H, W, C = x.shape
    quarters = x.reshape(B, 2, H // 2, 2, W // 2, C).mean((2, 4))
    quarters = quarters.reshape(B, -1) * params["scale"]
    return {
        "pool": quarters,
        "spatial": quarters[:, :3] * quarters[:, 3:6],
        "logits": quarters[:, :5],
    }


def as_it_is(images):
    return images


def to_float(images):
    return images.astype(jnp.float32)


def make_extractor(name="tiny", weights="w1"):
    return features.Extractor(
        name=name,
        suffix="tiny",
        frechet={"pool": "fd", "spatial": "sfd"},
        scores_classes=True,
        protocol={"features": name, "weights": weights},
        params={"scale": jnp.float32(0.01)},
        network=tiny_network,
        prepare=as_it_is,
        preprocess=to_float,
    )


def features_of(images, extractor):
    """What the extractor's network makes of uint8 images, float64."""
    outputs = extractor.network(extractor.params, images.astype(np.float32))
    return {key: np.asarray(value, np.float64) for key, value in outputs.items()}


def random_images(count, seed=0, size=8):
    """Smooth images with noise, (count, size, size, 3) uint8."""
    rng = np.random.default_rng(seed)
    smooth = rng.uniform(0, 255, (count, 2, 2, 3)).repeat(size // 2, 1).repeat(size // 2, 2)
    return np.clip(smooth + rng.normal(0, 20, (count, size, size, 3)), 0, 255).astype(np.uint8)


def batches_of(images, batch_size):
    return (images[i : i + batch_size] for i in range(0, len(images), batch_size))

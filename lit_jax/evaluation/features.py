"""Image features for evaluation: uint8 images in, features out, and the protocol that says how.

Which network, which weights, which resize and which scale make a number what it is, so they are one object: an
`Extractor`, made by name.

    inception_adm          FID as ADM's evaluator computes it: TensorFlow 1 bilinear resize, (x - 128) / 128
    inception_pytorch_fid  FID as pytorch-fid: half-pixel bilinear resize, 2 x / 255 - 1
    inception_clean        FID as clean-fid: PIL bicubic with antialiasing on the host, (x - 128) / 128
    efficientnet_lite0     a measure of our own that needs no download: antialiased bilinear resize, (x - 127) / 128
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from lit_jax import sharding
from lit_jax.evaluation import efficientnet_lite0, inception


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A feature network with its preprocessing.

    Attributes:
        name: one of `EXTRACTORS`.
        suffix: what the names of its scores end in.
        frechet: the names of its Frechet distances, by output of the network.
        scores_classes: whether its logits give an Inception score.
        protocol: what has to be equal for two scores to be comparable, the hash of the weights included.
        network: (params, (B, size, size, 3) float32) -> dict of (B, dim) float32.
        prepare: the host's part of preprocessing, (B, H, W, 3) uint8 -> (B, h, w, 3).
        preprocess: the device's part, from there to what the network takes.
    """

    name: str
    suffix: str
    frechet: dict[str, str]
    scores_classes: bool
    protocol: dict[str, str]
    params: dict
    network: Callable
    prepare: Callable
    preprocess: Callable


def _bilinear(images, size, positions):
    """Interpolates (B, H, W, C) at `positions(in_size, out_size)` along both axes, in the order TensorFlow does."""
    for_axis = {}
    for axis in (1, 2):
        in_size = images.shape[axis]
        position = positions(in_size, size)  # (size,) float32
        low = np.floor(position).astype(np.int32)
        high = np.minimum(low + 1, in_size - 1)
        shape = (1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1)
        for_axis[axis] = low, high, (position - low).astype(np.float32).reshape(shape)
    left, right, x_weight = for_axis[2]
    top, bottom, y_weight = for_axis[1]
    before, after = jnp.take(images, left, axis=2), jnp.take(images, right, axis=2)
    rows = before + (after - before) * x_weight  # (B, H, size, C)
    above, below = jnp.take(rows, top, axis=1), jnp.take(rows, bottom, axis=1)
    return above + (below - above) * y_weight


def resize_tf1(images: jax.Array, size: int) -> jax.Array:
    """TensorFlow 1's resize_bilinear with align_corners=False: no half-pixel centres, no antialiasing; FID's own.

    Pixel i of the result lies at i * (in / out) of the source, a position computed in float32.

    Args: images (B, H, W, C) float32. Returns: (B, size, size, C)
    """
    return _bilinear(
        images, size, lambda n, m: np.arange(m, dtype=np.float32) * (np.float32(n) / np.float32(m))
    )


def resize_half_pixel(images: jax.Array, size: int) -> jax.Array:
    """Bilinear resize with half-pixel centres and no antialiasing, as torch.nn.functional.interpolate and pytorch-fid.

    Args: images (B, H, W, C) float32. Returns: (B, size, size, C)
    """

    def positions(in_size, out_size):
        scale = np.float32(in_size) / np.float32(out_size)
        return np.maximum(
            (np.arange(out_size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5),
            np.float32(0),
        )

    return _bilinear(images, size, positions)


def resize_clean(images: np.ndarray, size: int) -> np.ndarray:
    """PIL's bicubic resize with antialiasing, channel by channel in float32 and without rounding, as clean-fid.

    Args: images (B, H, W, C) uint8, on the host. Returns: (B, size, size, C) float32, which may leave [0, 255]
    """

    def channel(x):
        return np.asarray(
            Image.fromarray(x.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        )

    return np.stack(
        [
            np.stack([channel(image[..., c]) for c in range(image.shape[-1])], axis=-1)
            for image in images
        ]
    )


def hash_params(params: dict) -> str:
    """The first 16 hex digits of a SHA-256 over names and values, whatever file they came in."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


EXTRACTORS = ("inception_adm", "inception_pytorch_fid", "inception_clean", "efficientnet_lite0")


def make_extractor(name: str, weights: str | Path = "") -> Extractor:
    """Loads the network of an extractor.

    Args:
        name: one of `EXTRACTORS`.
        weights: the weights file. Inception needs one; for EfficientNet-Lite0 it may be left to the installed package.
    Raises: ValueError for an unknown name or a file of something else, FileNotFoundError without weights.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown features {name!r}: expected one of {', '.join(EXTRACTORS)}")
    if name == "efficientnet_lite0":
        params = efficientnet_lite0.load_params(weights or efficientnet_lite0.find_weights())
        return make_efficientnet_extractor(params)
    if not weights:
        raise FileNotFoundError(
            f"evaluate.weights is empty: {name} needs the Inception weights of pytorch-fid or "
            "torch-fidelity (.pth) or of jax-fid (.pickle); see docs/evaluation.md"
        )
    return make_inception_extractor(name, inception.load_params(weights))


def make_efficientnet_extractor(params: dict) -> Extractor:
    """EfficientNet-Lite0 with given parameters."""
    protocol = {
        "features": "efficientnet_lite0",
        "network": "EfficientNet-Lite0",
        "weights": hash_params(params),
        "resize": f"antialiased bilinear to {efficientnet_lite0.INPUT_SIZE}",
        "scale": "(x - 127) / 128",
    }
    return Extractor(
        "efficientnet_lite0",
        "efficientnet_lite0",
        {"pool": "fd"},
        False,
        protocol,
        params,
        _efficientnet_network,
        _as_it_is,
        _efficientnet_preprocess,
    )


def make_inception_extractor(name: str, params: dict) -> Extractor:
    """Inception-v3 of FID with given parameters and the preprocessing of `name`."""
    # suffix of the scores, the host's part, the device's part, and what the protocol calls the last two
    suffix, prepare, preprocess, resize, scale = {
        "inception_adm": (
            "adm",
            _as_it_is,
            _adm_preprocess,
            "TensorFlow 1 bilinear",
            "(x - 128) / 128",
        ),
        "inception_pytorch_fid": (
            "pytorch_fid",
            _as_it_is,
            _pytorch_fid_preprocess,
            "half-pixel bilinear",
            "2 x / 255 - 1",
        ),
        "inception_clean": (
            "clean",
            _clean_prepare,
            _clean_preprocess,
            "PIL bicubic",
            "(x - 128) / 128",
        ),
    }[name]
    protocol = {
        "features": name,
        "network": "Inception-v3 (2015-12-05, FID)",
        "weights": hash_params(params),
        "resize": f"{resize} to {inception.INPUT_SIZE}",
        "scale": scale,
    }
    return Extractor(
        name,
        suffix,
        {"pool": "fid", "spatial": "sfid"},
        True,
        protocol,
        params,
        _inception_network,
        prepare,
        preprocess,
    )


def _as_it_is(images):
    return images


def _efficientnet_network(params, x):
    return {"pool": efficientnet_lite0.EfficientNetLite0().apply({"params": params}, x)["pool"]}


def _efficientnet_preprocess(images):
    B, _, _, C = images.shape
    size = efficientnet_lite0.INPUT_SIZE
    return (
        jax.image.resize(images.astype(jnp.float32), (B, size, size, C), "bilinear", antialias=True)
        - 127.0
    ) / 128.0


def _inception_network(params, x):
    return inception.InceptionV3().apply({"params": params}, x)


def _adm_preprocess(images):
    return (resize_tf1(images.astype(jnp.float32), inception.INPUT_SIZE) - 128.0) / 128.0


def _pytorch_fid_preprocess(images):
    # Divided before the resize, as there: the order shows in the last bits.
    return 2.0 * resize_half_pixel(images.astype(jnp.float32) / 255.0, inception.INPUT_SIZE) - 1.0


def _clean_prepare(images):
    return resize_clean(images, inception.INPUT_SIZE)


def _clean_preprocess(images):
    return (images - 128.0) / 128.0


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(network, preprocess, params, images):
    return network(params, preprocess(images))


def dims(extractor: Extractor) -> dict[str, int]:
    """How many numbers an image has in each of the network's outputs."""
    image = extractor.prepare(np.zeros((1, 64, 64, 3), np.uint8))
    shapes = jax.eval_shape(
        lambda params, x: extractor.network(params, extractor.preprocess(x)),
        extractor.params,
        image,
    )
    return {key: shape.shape[1] for key, shape in shapes.items()}


def extract(
    extractor: Extractor, batches: Iterable[np.ndarray], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Features of batches of images, on all devices of this process.

    Every batch runs at one size, padded if it is short, and the padding's features are dropped: no image is lost or
    counted twice, and nothing is compiled anew for the last batch.

    Args:
        batches: (B, H, W, 1 or 3) uint8 with 0 < B <= batch_size; grey images are repeated to three channels.
        batch_size: rounded up to a multiple of the number of devices.
    Yields: (B, dim) float32 on the host, by output of the network.
    """
    devices = jax.local_devices()
    batch_size = -(-batch_size // len(devices)) * len(devices)
    mesh = sharding.make_mesh(devices=devices)
    params = jax.device_put(extractor.params, NamedSharding(mesh, PartitionSpec()))

    def start(images):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"expected images (B, H, W, 1 or 3) uint8, got {images.shape} {images.dtype}"
            )
        if not 0 < len(images) <= batch_size:
            raise ValueError(
                f"expected between 1 and {batch_size} images a batch, got {len(images)}"
            )
        if images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        padded = np.pad(
            extractor.prepare(images), ((0, batch_size - len(images)), (0, 0), (0, 0), (0, 0))
        )
        return _apply(
            extractor.network,
            extractor.preprocess,
            params,
            jax.device_put(padded, sharding.batch_sharding(mesh)),
        ), len(images)

    pending = None  # one batch ahead: the device works while the host reads and accumulates
    for images in batches:
        ahead = start(images)
        if pending is not None:
            yield {key: np.asarray(value)[: pending[1]] for key, value in pending[0].items()}
        pending = ahead
    if pending is not None:
        yield {key: np.asarray(value)[: pending[1]] for key, value in pending[0].items()}

"""Image features for evaluation: uint8 images in, features out.

Which network, which weights, which resize and which scale decide what a number
means, so they are one object: an `Extractor`, made by name.

    inception_adm          FID of ADM's evaluator: the bilinear resize of
                           TensorFlow 1, (x - 128) / 128
    inception_pytorch_fid  FID of pytorch-fid: half-pixel bilinear resize,
                           2 x / 255 - 1
    inception_clean        FID of clean-fid: the antialiased bicubic resize of
                           PIL, (x - 128) / 128
    efficientnet_lite0     a measure of our own that needs no download:
                           antialiased bilinear resize, (x - 127) / 128
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from PIL import Image

from lit_jax import sharding
from lit_jax.evaluation import efficientnet_lite0, inception

EXTRACTORS = (
    "inception_adm",
    "inception_pytorch_fid",
    "inception_clean",
    "efficientnet_lite0",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
    """A feature network with its preprocessing."""

    name: str  # one of EXTRACTORS
    suffix: str  # what the names of its scores end in
    frechet: dict[str, str]  # names of its distances, by output of the network
    scores_classes: bool  # whether its logits give an Inception score
    # What must be equal for two scores to be comparable, among it a hash of
    # the weights.
    protocol: dict[str, str]
    params: dict
    # (params, (B, size, size, 3) float32) -> {output: (B, dim) float32}
    network: Callable
    # The host's part of the preprocessing: (B, H, W, 3) uint8 -> (B, h, w, 3),
    # and the device's part from there to what the network takes.
    prepare: Callable
    preprocess: Callable


# ---- Making an extractor ----


def check_name(name: str) -> None:
    """Raises ValueError unless there is an extractor of that name."""
    if name not in EXTRACTORS:
        raise ValueError(f"features must be one of {', '.join(EXTRACTORS)}; got {name!r}")


def make_extractor(name: str, weights: epath.PathLike = "") -> Extractor:
    """Loads the network of an extractor.

    Args:
      name: one of `EXTRACTORS`.
      weights: the weights file. Inception needs one; EfficientNet-Lite0 finds
        those of the installed package.
    Raises: ValueError for an unknown name or a file of something else;
      FileNotFoundError.
    """
    check_name(name)
    if weights and not epath.Path(weights).is_file():
        raise FileNotFoundError(f"weights = {weights}: no such file")
    if name == "efficientnet_lite0":
        path = weights or efficientnet_lite0.find_weights()
        return make_efficientnet_extractor(efficientnet_lite0.load_params(path))
    if not weights:
        raise FileNotFoundError(
            f"weights = '' is empty: {name} needs the Inception weights of "
            "pytorch-fid or torch-fidelity (.pth) or of jax-fid (.pickle); see "
            "docs/evaluation.md"
        )
    return make_inception_extractor(name, inception.load_params(weights))


def make_efficientnet_extractor(params: dict) -> Extractor:
    """EfficientNet-Lite0 with given parameters."""
    return Extractor(
        name="efficientnet_lite0",
        suffix="efficientnet_lite0",
        # Not "fid": no published number compares with it.
        frechet={"pool": "fd"},
        scores_classes=False,
        protocol={
            "features": "efficientnet_lite0",
            "network": "EfficientNet-Lite0",
            "weights": hash_params(params),
            "resize": f"antialiased bilinear to {efficientnet_lite0.INPUT_SIZE}",
            "scale": "(x - 127) / 128",
        },
        params=params,
        network=_efficientnet_network,
        prepare=_as_it_is,
        preprocess=_efficientnet_preprocess,
    )


def make_inception_extractor(name: str, params: dict) -> Extractor:
    """Inception-v3 of FID with given parameters and the preprocessing of `name`."""
    preprocessing = _INCEPTION_PREPROCESSING[name]
    return Extractor(
        name=name,
        suffix=name.removeprefix("inception_"),
        frechet={"pool": "fid", "spatial": "sfid"},
        scores_classes=True,
        protocol={
            "features": name,
            "network": "Inception-v3 (2015-12-05, FID)",
            "weights": hash_params(params),
            "resize": f"{preprocessing.resize} to {inception.INPUT_SIZE}",
            "scale": preprocessing.scale,
        },
        params=params,
        network=_inception_network,
        prepare=preprocessing.prepare,
        preprocess=preprocessing.preprocess,
    )


def hash_params(params: dict) -> str:
    """The first 16 hex digits of a SHA-256 over names and values."""
    # Over the values and not the file: the same weights are published in three
    # formats.
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


# ---- Resizing ----


def resize_tf1(images: jax.Array, size: int) -> jax.Array:
    """TensorFlow 1's resize_bilinear with align_corners=False, which FID was defined with.

    It has no half-pixel centres and no antialiasing: pixel i of the result
    lies at i * (in / out) of the source.

    Args:
      images: (B, H, W, C) float32.
    Returns: (B, size, size, C)
    """

    def positions(in_size, out_size):
        # Scale and positions are float32 in TensorFlow too; float64 would move
        # some of them.
        scale = np.float32(in_size) / np.float32(out_size)
        return np.arange(out_size, dtype=np.float32) * scale

    return _bilinear(images, size, positions)


def resize_half_pixel(images: jax.Array, size: int) -> jax.Array:
    """Bilinear resize with half-pixel centres and no antialiasing.

    It is torch.nn.functional.interpolate with align_corners=False, which
    pytorch-fid uses.

    Args:
      images: (B, H, W, C) float32.
    Returns: (B, size, size, C)
    """

    def positions(in_size, out_size):
        scale = np.float32(in_size) / np.float32(out_size)
        centres = np.arange(out_size, dtype=np.float32) + np.float32(0.5)
        return np.maximum(centres * scale - np.float32(0.5), np.float32(0))

    return _bilinear(images, size, positions)


def _bilinear(images, size, positions):
    """Interpolates (B, H, W, C) at `positions(in_size, out_size)` along both axes."""
    H, W = images.shape[1:3]
    top, bottom, y_weight = _taps(positions(H, size), H)
    left, right, x_weight = _taps(positions(W, size), W)

    # Columns first and rows then, as TensorFlow: the order shows in the last
    # bits.
    x_weight = x_weight.reshape(1, 1, -1, 1)
    before = jnp.take(images, left, axis=2)
    after = jnp.take(images, right, axis=2)
    rows = before + (after - before) * x_weight  # (B, H, size, C)

    y_weight = y_weight.reshape(1, -1, 1, 1)
    above = jnp.take(rows, top, axis=1)
    below = jnp.take(rows, bottom, axis=1)
    return above + (below - above) * y_weight  # (B, size, size, C)


def _taps(position, in_size):
    """The two source pixels of each position, (size,) int32, and the weight of the second."""
    low = np.floor(position).astype(np.int32)
    high = np.minimum(low + 1, in_size - 1)
    weight = (position - low).astype(np.float32)
    return low, high, weight


def resize_clean(images: np.ndarray, size: int) -> np.ndarray:
    """PIL's bicubic resize with antialiasing, without rounding, as in clean-fid.

    Args:
      images: (B, H, W, C) uint8, on the host.
    Returns: (B, size, size, C) float32, which may leave [0, 255].
    """
    B, _, _, C = images.shape
    resized = np.empty((B, size, size, C), np.float32)
    for i in range(B):
        for c in range(C):
            # PIL has float32 images of one channel only; in uint8 it would
            # round and clip.
            channel = Image.fromarray(images[i, :, :, c].astype(np.float32))
            channel = channel.resize((size, size), Image.Resampling.BICUBIC)
            resized[i, :, :, c] = np.asarray(channel)
    return resized


# ---- Networks and preprocessing ----
#
# They are functions of the module, not closures: jax.jit knows a program by
# its functions, and two extractors of one name share it.


def _as_it_is(images):
    return images


def _efficientnet_network(params, x):
    outputs: Any = efficientnet_lite0.EfficientNetLite0().apply({"params": params}, x)
    # Without the logits: an Inception score of another network would be no
    # Inception score.
    return {"pool": outputs["pool"]}


def _efficientnet_preprocess(images):
    B, _, _, C = images.shape
    size = efficientnet_lite0.INPUT_SIZE
    images = images.astype(jnp.float32)
    images = jax.image.resize(images, (B, size, size, C), "bilinear", antialias=True)
    return (images - 127.0) / 128.0


def _inception_network(params, x):
    return inception.InceptionV3().apply({"params": params}, x)


def _adm_preprocess(images):
    images = resize_tf1(images.astype(jnp.float32), inception.INPUT_SIZE)
    return (images - 128.0) / 128.0


def _pytorch_fid_preprocess(images):
    # Divided before the resize, as there: the order shows in the last bits.
    images = images.astype(jnp.float32) / 255.0
    return 2.0 * resize_half_pixel(images, inception.INPUT_SIZE) - 1.0


def _clean_prepare(images):
    return resize_clean(images, inception.INPUT_SIZE)


def _clean_preprocess(images):
    return (images - 128.0) / 128.0


@dataclasses.dataclass(frozen=True)
class _Preprocessing:
    """What images go through before Inception, and what the protocol calls it."""

    resize: str
    scale: str
    prepare: Callable
    preprocess: Callable


_INCEPTION_PREPROCESSING = {
    "inception_adm": _Preprocessing(
        resize="TensorFlow 1 bilinear",
        scale="(x - 128) / 128",
        prepare=_as_it_is,
        preprocess=_adm_preprocess,
    ),
    "inception_pytorch_fid": _Preprocessing(
        resize="half-pixel bilinear",
        scale="2 x / 255 - 1",
        prepare=_as_it_is,
        preprocess=_pytorch_fid_preprocess,
    ),
    "inception_clean": _Preprocessing(
        resize="PIL bicubic",
        scale="(x - 128) / 128",
        prepare=_clean_prepare,
        preprocess=_clean_preprocess,
    ),
}


# ---- Running an extractor ----


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(network, preprocess, params, images):
    return network(params, preprocess(images))


def dims(extractor: Extractor) -> dict[str, int]:
    """How many numbers an image has in each output of the network."""
    # The size of the image does not matter: the preprocessing resizes it.
    image = extractor.prepare(np.zeros((1, 64, 64, 3), np.uint8))
    shapes = jax.eval_shape(
        functools.partial(_apply, extractor.network, extractor.preprocess),
        extractor.params,
        image,
    )
    return {key: shape.shape[1] for key, shape in shapes.items()}


def extract(
    extractor: Extractor, batches: Iterable[np.ndarray], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Features of batches of images, on all devices of this process.

    Args:
      batches: (B, H, W, 1 or 3) uint8 with 0 < B <= batch_size; grey images
        are repeated to three channels.
      batch_size: is rounded up to a multiple of the number of devices.
    Yields: (B, dim) float32 on the host, by output of the network.
    Raises: ValueError for images of another type, shape or number.
    """
    # Of this process alone: in training every process scores all images by
    # itself.
    devices = jax.local_devices()
    mesh = sharding.make_mesh(devices=devices)
    batch_size = -(-batch_size // len(devices)) * len(devices)
    params = jax.device_put(extractor.params, sharding.replicated(mesh))

    # One batch ahead: the device computes while the host reads images and adds
    # up moments.
    running = None
    for images in batches:
        padded = _prepare(extractor, images, batch_size)
        outputs = _start(extractor, params, padded, mesh)
        if running is not None:
            yield _finish(*running)
        running = outputs, len(images)
    if running is not None:
        yield _finish(*running)


def _prepare(extractor: Extractor, images: np.ndarray, batch_size: int) -> np.ndarray:
    """The host's part: checks, three channels, and padding to `batch_size`."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"expected images (B, H, W, 1 or 3) uint8, got {images.shape} {images.dtype}"
        )
    B = len(images)
    if not 0 < B <= batch_size:
        raise ValueError(f"expected between 1 and {batch_size} images a batch, got {B}")
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)

    # A short last batch would be compiled anew, and the devices might not
    # divide it.
    padding = ((0, batch_size - B), (0, 0), (0, 0), (0, 0))
    return np.pad(extractor.prepare(images), padding)


def _start(extractor: Extractor, params: dict, images: np.ndarray, mesh: Mesh) -> dict:
    """Dispatches a batch; its outputs are still being computed."""
    on_devices = jax.device_put(images, sharding.batch_sharding(mesh))
    return _apply(extractor.network, extractor.preprocess, params, on_devices)


def _finish(outputs: dict[str, jax.Array], count: int) -> dict[str, np.ndarray]:
    """Waits for the outputs and drops those of the padding."""
    return {key: np.asarray(value)[:count] for key, value in outputs.items()}

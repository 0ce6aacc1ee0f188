"""From raw images to the records of a prepared data set: pixels or latents."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds

from lit_jax import sharding
from lit_jax.data.raw_images import ImageSettings
from lit_jax.models.autoencoder import Autoencoder

Record = dict[str, Any]
# From images (B, H, W, C) uint8 to the arrays of their records, (B, ...) each.
Encode = Callable[[np.ndarray], dict[str, Any]]


class LabelledImages(Protocol):
    """What the features of records follow from; `RawImages` are such."""

    @property
    def settings(self) -> ImageSettings: ...
    @property
    def channels(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def num_classes(self) -> int: ...


def make_features(
    images: LabelledImages, autoencoder: Autoencoder | None
) -> tfds.features.FeaturesDict:
    """What a record holds: the arrays of `make_encoder`, the label, the id."""
    shapes: dict[str, tuple[int, ...]] = {}
    if autoencoder:
        h, w = (side // autoencoder.module.factor for side in images.settings.sides)
        both = (2, h, w, autoencoder.module.latent_channels)
        shapes["mean"] = both
        shapes["log_variance"] = both
        dtype: type = np.float16
    else:
        shapes["image"] = (*images.settings.sides, images.channels)
        dtype = np.uint8

    # As bytes: TFDS reads them fastest so, and needs no TensorFlow to write them.
    features = {
        name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")
        for name, shape in shapes.items()
    }
    if images.class_names:
        label = tfds.features.ClassLabel(names=images.class_names)
    else:
        label = tfds.features.ClassLabel(num_classes=images.num_classes)
    features["label"] = label
    features["id"] = tfds.features.Text()
    return tfds.features.FeaturesDict(features)


def make_encoder(
    autoencoder: Autoencoder | None,
    mesh: jax.sharding.Mesh,
    *,
    mirrored: bool = True,
    batch_size: int = 0,
) -> Encode:
    """The function from a batch of images to the arrays of their records.

    Without an autoencoder they are "image", the pixels. Latents are "mean" and
    "log_variance" (B, 2, h, w, C) float16, of each image and its mirror: each device
    encodes a part of the batch. The call returns before they are computed.

    Args:
      mirrored: False: latents are (B, h, w, C), of the image alone.
      batch_size: smaller batches are filled up to it, so that images of one size share a
        program.
    """
    if autoencoder is None:
        return lambda images: {"image": images}

    def moments(params, images):
        x = images.astype(jnp.float32) / 127.5 - 1.0
        # The parameters are an argument: closed over, they would be constants of the
        # program, a copy for each.
        encoder = dataclasses.replace(autoencoder, params=params)
        # float16, as on the disk: half as much is copied to the host.
        if not mirrored:
            return [part.astype(jnp.float16) for part in encoder.encode(x)]
        both = jnp.stack([x, x[:, :, ::-1]], axis=1)  # (b, 2, H, W, C)
        B = len(x)
        encoded = encoder.encode(both.reshape(2 * B, *x.shape[1:]))
        return [part.reshape(B, 2, *part.shape[1:]).astype(jnp.float16) for part in encoded]

    run = sharding.map_rows(moments, mesh)
    rows = sharding.batch_sharding(mesh)

    def encode(images):
        B = len(images)
        # The devices must divide the batch. The rows that fill it are cut off again.
        fill = max(batch_size - B, -B % mesh.size)
        padded = np.pad(images, ((0, fill), (0, 0), (0, 0), (0, 0)), mode="edge")
        placed = jax.device_put(padded, rows)
        mean, log_variance = run(autoencoder.params, placed)
        return {"mean": mean[:B], "log_variance": log_variance[:B]}

    return encode


def encode_batches(
    records: Iterator[Record], sizes: list[int], encode: Encode
) -> Iterator[list[Record]]:
    """Lists of `sizes` finished records, in the order of the raw ones.

    Those of broken images, which have "broken" and no "image", stay as they are.
    Raises: ValueError for latents that are not finite in float16.
    """
    # The devices encode a batch while the caller writes the one before it.
    ahead = None
    for size in sizes:
        batch = [next(records) for _ in range(size)]
        images = [record.pop("image") for record in batch if "broken" not in record]
        arrays = encode(np.stack(images)) if images else {}
        if ahead:
            yield _join(*ahead)
        ahead = batch, arrays
    if ahead:
        yield _join(*ahead)


def _join(batch: list[Record], arrays: dict[str, Any]) -> list[Record]:
    """The records of a batch, each with its rows of the arrays."""
    good = [record for record in batch if "broken" not in record]
    for name, array in arrays.items():
        rows = np.asarray(array)  # waits for the devices
        for record, row in zip(good, rows, strict=True):
            if row.dtype == np.float16 and not np.isfinite(row).all():
                raise ValueError(
                    f"the {name} of the latents of {record['id']} is not finite in "
                    f"float16; is the autoencoder right?"
                )
            record[name] = row
    return batch

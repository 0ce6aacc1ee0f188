"""Labelled images of any size, of a TFDS data set or a folder, cropped to squares."""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from PIL import Image

from lit_jax.data.dataset import find_builder, first_line
from lit_jax.runtime import storage

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# What Pillow raises for damaged files, and for those that would not fit into memory.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle, `size` pixels a side, as ADM and DiT cut it.

    It is exact, for scores depend on it. It halves by box filter as long as the shorter
    side is at least twice the size, scales that side to the size by bicubic
    interpolation, and cuts the middle out. Smaller images are enlarged.
    """
    while min(image.size) >= 2 * size:
        width = image.width // 2
        height = image.height // 2
        image = _resize(image, width, height, Image.Resampling.BOX)

    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = _resize(image, width, height, Image.Resampling.BICUBIC)

    left = (width - size) // 2
    top = (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _resize(image: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    # Width first, then height, with pixels rounded between: what Pillow did in one call
    # before version 13. Since then it takes the height first where that is less work,
    # and pixels differ by a grey level or more.
    wide = image.resize((width, image.height), resample)
    return wide.resize((width, height), resample)


@dataclasses.dataclass(frozen=True)
class RawImages:
    """Labelled images of any size, cropped when they are read.

    Record i is {"image" uint8 (size, size, channels), "label" int, "id" str}.
    """

    name: str  # what prepared.json keeps
    split: str
    origin: str  # in error messages
    listing: str  # tells these images from others of the same name
    count: int
    num_classes: int
    class_names: tuple[str, ...] | None
    size: int
    channels: int
    read: Callable[[int], tuple[Image.Image, int, str]]  # image, label, id
    file_of: Callable[[int], str] = lambda index: ""  # in error messages

    def __len__(self) -> int:
        return self.count

    def about_labels(self) -> dict[str, Any]:
        """What prepared.json keeps of the labels, by its keys."""
        return {"num_classes": self.num_classes, "class_names": hash_of(self.class_names)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises: ValueError naming the image, when it or its label is no good."""
        try:
            image, label, name = self.read(int(index))
            # Pillow decodes here: it has read only the header of the image.
            image = image.convert("L" if self.channels == 1 else "RGB")
            image = center_crop(image, self.size)
        except PILLOW_ERRORS as error:
            raise ValueError(
                f"image {index} of {self.origin} cannot be read: {self.file_of(index)}{error}"
            ) from error
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"image {index} of {self.origin} has label {label}, "
                f"there are {self.num_classes} classes"
            )
        pixels = np.asarray(image).reshape(self.size, self.size, self.channels)
        return {"image": pixels, "label": label, "id": name}


def open_images(
    name: str, directory: epath.PathLike, split: str, size: int, channels: int = 0
) -> RawImages:
    """The images of a TFDS data set or, if `name` has a slash, of a folder.

    A folder, local or of an object store, has a folder of image files for each class;
    the sorted names of these are the classes.

    Args:
      name: the data set, or the path of the folder.
      directory: where the data set is; for a folder it does not matter.
      split: of the data set, slices too; of a folder all is taken.
      size: side of the squares that are cut out.
      channels: 1 or 3; 0 means those of the data set, and 3 of a folder.
    Raises: FileNotFoundError when there is no such data set or folder; ValueError for
      one without labelled images.
    """
    if "/" in name:
        return _open_folder(epath.Path(name), split, size, channels or 3)
    return _open_tfds(find_builder(name, directory), name, split, size, channels)


# ---- A TFDS data set -----------------------------------------------------------------------------


def _open_tfds(
    builder: tfds.core.DatasetBuilder, name: str, split: str, size: int, channels: int
) -> RawImages:
    features = builder.info.features
    _check_features(name, features)
    open_pixels: Callable[[Any], Image.Image]
    if isinstance(features["image"], tfds.features.Image):
        # Files are decoded here, always by Pillow: TFDS takes OpenCV where there is one,
        # and the pixels of its JPEGs differ.
        decoders = {"image": tfds.decode.SkipDecoding()}
        open_pixels = _from_bytes
    else:
        decoders = None
        open_pixels = _from_array

    try:
        records = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"name = {name!r} is stored as {builder.info.file_format}, which has no "
            f"random access; `tfds convert_format` makes ArrayRecord of it"
        ) from error
    except ValueError as error:
        text = f"split = {split!r} is not of {name}: {first_line(error)}"
        raise ValueError(text) from error

    # TFDS's ImageNet has "file_name", what --mode=prepare wrote has "id".
    identifiers = [field for field in ("file_name", "id") if field in features]

    def read(index):
        record = records[index]
        key = record[identifiers[0]] if identifiers else index
        key = key.decode() if isinstance(key, bytes) else str(key)
        return open_pixels(record["image"]), int(record["label"]), key

    label = features["label"]
    return RawImages(
        name=name,
        split=split,
        origin=f"{name}, split {split},",
        listing=builder.info.full_name,
        count=len(records),
        num_classes=label.num_classes,
        class_names=tuple(label.names) if label.names else None,
        size=size,
        channels=channels or features["image"].shape[-1],
        read=read,
    )


def _check_features(name: str, features: tfds.features.FeaturesDict) -> None:
    if {"image", "label"} <= set(features):
        image = features["image"]
        # Images of any size have the shape (None, None, 3).
        channels = (image.shape or [0])[-1]
        if image.np_dtype == np.uint8 and channels in (1, 3):
            return
    raise ValueError(
        f"name = {name!r} has {dict(features)}; it needs a uint8 image of 1 or 3 "
        f"channels and a label"
    )


def _from_bytes(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _from_array(pixels: np.ndarray) -> Image.Image:
    # Pillow has no axis for the one channel of a grey image.
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


# ---- A folder of class folders -------------------------------------------------------------------


def _open_folder(folder: epath.Path, split: str, size: int, channels: int) -> RawImages:
    if not folder.is_dir():
        raise FileNotFoundError(f"name = {str(folder)!r} is no folder")
    folders = [path for path in folder.iterdir() if path.is_dir()]
    classes = sorted(path.name for path in folders if not path.name.startswith("."))

    files = []  # (name within the folder, label)
    skipped = 0
    for label, class_name in enumerate(classes):
        paths = list((folder / class_name).iterdir())
        names = [path.name for path in paths if path.suffix.lower() in IMAGE_FILES]
        files += [(f"{class_name}/{name}", label) for name in sorted(names)]
        skipped += len(paths) - len(names)

    kinds = ", ".join(IMAGE_FILES)
    if skipped:
        text = "%s: %d files are skipped, for they do not end in %s"
        logging.warning(text, folder, skipped, kinds)
    if not files:
        raise ValueError(f"name = {str(folder)!r} holds no class folders of images ({kinds})")

    def read(index):
        name, label = files[index]
        return _from_bytes((folder / name).read_bytes()), label, name

    # With the sizes: other images under the same names are another listing.
    listing = [(name, label, _bytes(folder / name)) for name, label in files]
    return RawImages(
        name=folder.name,
        split=split,
        origin=str(folder),
        listing=hash_of(listing),
        count=len(files),
        num_classes=len(classes),
        class_names=tuple(classes),
        size=size,
        channels=channels,
        read=read,
        file_of=lambda index: f"{files[index][0]}: ",
    )


def _bytes(path: epath.Path) -> int:
    # epath's stat asks for the name of the owner too, and fails where there is none, as
    # on network disks.
    if storage.is_object_store(path):
        return path.stat().length
    return os.path.getsize(path)


def hash_of(value: Any) -> str:
    """A hash of JSON values: it tells one list of files or classes from another."""
    text = json.dumps(value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

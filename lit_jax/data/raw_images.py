"""Labelled images of any size, of a TFDS data set or a folder, cropped to one size."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from PIL import ExifTags, Image, ImageColor, ImageOps

from lit_jax import ranges
from lit_jax.data.dataset import count_classes, find_builder, first_line
from lit_jax.runtime import storage

# Those of torchvision, and GIF.
IMAGE_FILES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
)
# Folders that programs leave beside images: macOS's zip files, Synology's disks.
LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test"}

# What Pillow refuses unless told otherwise.
MAX_PIXELS = 2 * 89_478_485


NO_FILE = (errno.ENOENT, errno.EISDIR)


class BrokenImageError(ValueError):
    """The content of one image is no good; `name` says of which."""

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.name = name


@contextlib.contextmanager
def own_pixel_limit() -> Iterator[None]:
    """Lifts Pillow's limit on the size of images, which is one for the whole process."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How a file becomes the pixels of a record."""

    size: int | tuple[int, int]  # (height, width) that is cut out; a number: a square
    channels: int = 0  # 1 or 3; 0: those of a TFDS data set, and 3 of a folder
    # Colour behind transparent pixels. Empty: alpha is dropped, so the colour that a
    # program left in invisible pixels shows, as in ADM and DiT.
    background: str = "white"
    exif_orientation: bool = True  # turn the picture as its camera says; ADM does not
    max_pixels: int = MAX_PIXELS  # larger files are not decoded

    def __post_init__(self):
        ranges.check(self, size=ranges.SIDES, max_pixels=ranges.AT_LEAST_1, background=COLOUR)

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width)."""
        return ranges.sides(self.size)


def _is_colour(name: str) -> bool:
    try:
        return not name or len(ImageColor.getrgb(name)) == 3
    except ValueError:
        return False


COLOUR = ranges.Range("a colour, such as white or #ff8000, or empty", _is_colour)


# ---- Pixels --------------------------------------------------------------------------------------


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """The middle of an image in `size` pixels, as ADM and DiT cut their squares.

    It is exact, for scores depend on it. It halves by box filter as long as both sides are
    at least twice those asked for, scales by bicubic interpolation to the smallest size
    that covers them, and cuts the middle out. Smaller images are enlarged.

    Args: size: (height, width), or the side of a square.
    """
    h, w = ranges.sides(size)
    while image.width >= 2 * w and image.height >= 2 * h:
        width = image.width // 2
        height = image.height // 2
        image = resize(image, width, height, Image.Resampling.BOX)

    scale = max(w / image.width, h / image.height)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = resize(image, width, height, Image.Resampling.BICUBIC)

    left = (width - w) // 2
    top = (height - h) // 2
    return image.crop((left, top, left + w, top + h))


def resize(image: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    """The image in width x height pixels, the same ones with every Pillow."""
    # Width first, then height, with pixels rounded between: what Pillow did in one call
    # before version 13. Since then it takes the height first where that is less work,
    # and pixels differ by a grey level or more.
    wide = image.resize((width, image.height), resample)
    return wide.resize((width, height), resample)


def to_pixels(
    image: Image.Image, settings: ImageSettings, channels: int
) -> tuple[np.ndarray, list[str]]:
    """Decodes and crops an image that Pillow has opened.

    Returns: (h, w, channels) uint8, and in words what was done besides.
    Raises: as `decode`.
    """
    decoded, treated = decode(image, settings, channels)
    cropped = center_crop(decoded, settings.size)
    return np.asarray(cropped).reshape(*settings.sides, channels), treated


def decode(
    image: Image.Image, settings: ImageSettings, channels: int
) -> tuple[Image.Image, list[str]]:
    """An image that Pillow has opened, upright, opaque, in grey or RGB, of any size.

    Returns: it, and in words what was done to it.
    Raises: ValueError, or what Pillow raises, for an image that has no such pixels.
    """
    pixels = image.width * image.height
    if pixels > settings.max_pixels:
        raise ValueError(
            f"it has {image.width} x {image.height} = {pixels:,} pixels, max_pixels = "
            f"{settings.max_pixels:,}"
        )
    treated = []
    # The second picture of an MPO is a preview or depth of the first, by a phone.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        treated.append("of several frames, of which the first is taken")
        image.seek(0)
    if settings.exif_orientation and _orientation(image) > 1:
        treated.append("turned as their EXIF says")
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        treated.append("of 16 bits, of which the upper 8 are taken")
        image = _upper_bits(image)
    if settings.background and image.has_transparency_data:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            treated.append(f"transparent, put on {settings.background}")
            ground = Image.new("RGBA", image.size, settings.background)
            image = Image.alpha_composite(ground, image)
    return image.convert("L" if channels == 1 else "RGB"), treated


def upright_sides(image: Image.Image, settings: ImageSettings) -> tuple[int, int]:
    """(height, width) that `decode` gives an image, from its header alone."""
    # The values above 4 turn it by a quarter.
    if settings.exif_orientation and _orientation(image) > 4:
        return image.width, image.height
    return image.height, image.width


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # A picture whose EXIF is damaged is whole all the same.
    except Exception:
        return 1


def _upper_bits(image: Image.Image) -> Image.Image:
    """A grey image of 8 bits. Pillow alone would clip all above 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its values have no known range: {image.mode} of {values.min()} to {values.max()}"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


# ---- Images by number ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RawImages:
    """Labelled images of any size, cropped when they are read.

    Record i is {"image" uint8 (h, w, channels), "label" int, "id" str, "treated" list of
    str}, where "treated" says in words what was done to the image besides the crop.
    """

    name: str  # what prepared.json keeps
    split: str
    origin: str  # in error messages
    listing: str  # tells these images from others of the same name
    count: int
    num_classes: int
    class_names: tuple[str, ...] | None
    settings: ImageSettings
    channels: int
    read: Callable[[int], tuple[Image.Image, int, str]]  # image, label, id
    file_of: Callable[[int], str] = lambda index: ""  # in error messages

    def __len__(self) -> int:
        return self.count

    def about(self) -> dict[str, Any]:
        """What prepared.json keeps of pixels and labels, by its keys."""
        h, w = self.settings.sides
        return {
            "image_size": h if h == w else [h, w],
            "background": self.settings.background,
            "exif_orientation": self.settings.exif_orientation,
            "num_classes": self.num_classes,
            "class_names": hash_of(self.class_names),
        }

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises: BrokenImageError for an image that is no good, ValueError otherwise.

        Both name the image.
        """
        try:
            image, label, name = self.read(int(index))
            pixels, treated = to_pixels(image, self.settings, self.channels)
        # Damage shows as an error of Pillow, ArrayRecord or protobuf.
        except Exception as error:
            file = self.file_of(index)
            which = f"image {index} of {self.origin} cannot be read: "
            text = f"{which}{file and file + ': '}{first_line(error)}"
            # The disk's own errors have a number: such an image may be whole. A link to nothing
            # and a folder with an image's name are none.
            if isinstance(error, OSError) and error.errno not in (None, *NO_FILE):
                raise ValueError(text) from error
            raise BrokenImageError(text, file or str(index)) from error
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"image {index} of {self.origin} has label {label}, "
                f"there are {self.num_classes} classes"
            )
        return {"image": pixels, "label": label, "id": name, "treated": treated}


def open_images(
    name: str,
    directory: epath.PathLike,
    split: str,
    settings: ImageSettings,
    *,
    classes: int = 0,
) -> RawImages:
    """The images of a folder, or of a TFDS data set.

    A folder, local or of an object store, has a folder of image files for each class, with
    any folders in it; the sorted names of these are the classes. Where it holds images
    itself and no such folders, they are one class.

    Args:
      name: the data set, with its config (NAME/CONFIG), or the path of the folder.
      directory: where the data set is; for a folder it does not matter.
      split: of the data set, slices too; of a folder all is taken.
      classes: how many there are, for a data set whose labels are plain numbers.
    Raises: FileNotFoundError when there is no such data set or folder; ValueError for
      one without images.
    """
    folder = find_folder(name, directory)
    if folder is not None:
        return _open_folder(folder, split, settings)
    return _open_tfds(find_builder(name, directory), name, split, settings, classes)


def find_folder(name: str, directory: epath.PathLike) -> epath.Path | None:
    """The image folder that `name` means; None: it means a TFDS data set of `directory`.

    Raises: FileNotFoundError for a path that is neither.
    """
    path = epath.Path(name)
    if "/" not in name:
        # A data set goes first: its own folder may lie here.
        if path.is_dir() and not _holds_dataset(directory, name):
            logging.info("%s is no data set of %s, but a folder of images", name, directory)
            return path
        return None
    if path.is_dir():
        return path
    if re.fullmatch(r"\w+/[\w.+-]+(:[\d.]+)?", name) and _holds_dataset(directory, name):
        return None
    raise FileNotFoundError(
        f"name = {str(path)!r} is no folder, and no data set in directory = {str(directory)!r}"
    )


def _holds_dataset(directory: epath.PathLike, name: str) -> bool:
    folder = epath.Path(directory) / name.split(":")[0]
    infos = ("*/dataset_info.json", "*/*/dataset_info.json")
    return any(any(folder.glob(pattern)) for pattern in infos)


# ---- A TFDS data set -----------------------------------------------------------------------------


def _open_tfds(
    builder: tfds.core.DatasetBuilder,
    name: str,
    split: str,
    settings: ImageSettings,
    classes: int,
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

    records = source_records(builder, name, split, decoders)

    # TFDS's ImageNet has "file_name", what --mode=prepare wrote has "id".
    identifiers = [field for field in ("file_name", "id") if field in features]

    def read(index):
        record = records[index]
        key = record[identifiers[0]] if identifiers else index
        key = key.decode() if isinstance(key, bytes) else str(key)
        label = int(record["label"]) if "label" in features else 0
        return open_pixels(record["image"]), label, key

    label = features["label"] if "label" in features else None
    names = getattr(label, "names", None)
    return RawImages(
        name=name,
        split=split,
        origin=f"{name}, split {split},",
        listing=builder.info.full_name,
        count=len(records),
        num_classes=count_classes(name, features, classes),
        class_names=tuple(names) if names else None,
        settings=settings,
        channels=settings.channels or features["image"].shape[-1],
        read=read,
    )


def _check_features(name: str, features: tfds.features.FeaturesDict) -> None:
    if "image" in features:
        image = features["image"]
        # Images of any size have the shape (None, None, 3).
        channels = (image.shape or [0])[-1]
        if image.np_dtype == np.uint8 and channels in (1, 3, 4):
            return
    raise ValueError(
        f"name = {name!r} has {dict(features)}; it needs a uint8 image of 1, 3 or 4 channels"
    )


def source_records(
    builder: tfds.core.DatasetBuilder, name: str, split: str, decoders: Any = None
) -> Any:
    """The records of a split of a data set that is prepared from, by number.

    Raises: ValueError for a split that it has not, or files without random access.
    """
    try:
        return builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"name = {name!r} is stored as {builder.info.file_format}, which has no "
            f"random access; `tfds convert_format` makes ArrayRecord of it"
        ) from error
    except ValueError as error:
        raise ValueError(f"split = {split!r} is not of {name}: {first_line(error)}") from error


def _from_bytes(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _from_array(pixels: np.ndarray) -> Image.Image:
    # Pillow has no axis for the one channel of a grey image.
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


# ---- A folder of class folders -------------------------------------------------------------------


def _open_folder(folder: epath.Path, split: str, settings: ImageSettings) -> RawImages:
    skipped: Counter[str] = Counter()
    classes = []
    for path in folder.iterdir():
        # By its name first: in a bucket each look at a path is a request.
        if _is_litter(path.name):
            skipped["hidden"] += 1
        elif _is_image(path):
            skipped["beside"] += 1
        elif path.is_dir():
            classes.append(path.name)
        else:
            skipped["other"] += 1
    classes.sort()

    files = []  # (name within the folder, label)
    empty = []
    for label, class_name in enumerate(classes):
        names = sorted(image_files(folder / class_name, skipped))
        files += [(f"{class_name}/{name}", label) for name in names]
        if not names:
            empty.append(printable(class_name))
    if not files:
        # One class, without a name: those of two splits are the same.
        classes = []
        empty = []
        skipped.clear()
        files = [(name, 0) for name in sorted(image_files(folder, skipped))]
    if not files:
        kinds = ", ".join(IMAGE_FILES)
        raise ValueError(f"name = {str(folder)!r} holds no class folders of images ({kinds})")
    _log_folder(folder, files, [printable(name) for name in classes], empty, skipped)

    def read(index):
        name, label = files[index]
        return _from_bytes((folder / name).read_bytes()), label, printable(name)

    # With the sizes: other images under the same names are another listing.
    listing = [(name, label, file_bytes(folder / name)) for name, label in files]
    return RawImages(
        name=folder.name,
        split=split,
        origin=str(folder),
        listing=hash_of(listing),
        count=len(files),
        num_classes=len(classes) or 1,
        class_names=tuple(map(printable, classes)) or None,
        settings=settings,
        channels=settings.channels or 3,
        read=read,
        file_of=lambda index: printable(files[index][0]),
    )


def image_files(
    folder: epath.Path, skipped: Counter[str], above: tuple[str, ...] = ()
) -> Iterator[str]:
    """Names within a folder of the images in it and in its folders; counts what is left out."""
    here = os.path.realpath(folder)
    if here in above:
        return  # a link to a folder that it lies in
    for path in folder.iterdir():
        if _is_litter(path.name):
            skipped["hidden"] += 1
        elif _is_image(path):
            yield path.name
        elif path.is_dir():
            for name in image_files(path, skipped, (*above, here)):
                yield f"{path.name}/{name}"
        else:
            skipped["other"] += 1


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in LITTER


def _is_image(path: epath.Path) -> bool:
    return path.suffix.lower() in IMAGE_FILES


def _log_folder(
    folder: epath.Path,
    files: list[tuple[str, int]],
    classes: list[str],
    empty: list[str],
    skipped: Counter[str],
) -> None:
    if classes:
        few = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        text = "%s: %d images in %d classes: %s"
        logging.info(text, folder, len(files), len(classes), few)
    else:
        logging.info("%s: %d images and no class folders: one class", folder, len(files))
    if classes and set(map(str.lower, classes)) <= SPLIT_NAMES:
        text = "%s: the classes are called %s: are these splits? Then name one of the folders"
        logging.warning(text, folder, ", ".join(classes))
    if empty:
        text = "%s: %d class folders hold no image, and count as classes all the same: %s"
        logging.warning(text, folder, len(empty), ", ".join(empty))
    if skipped["hidden"]:
        text = "%s: %d hidden files and folders are skipped (.*, %s)"
        logging.warning(text, folder, skipped["hidden"], ", ".join(LITTER))
    if skipped["beside"]:
        text = "%s: %d images that lie beside the class folders are skipped"
        logging.warning(text, folder, skipped["beside"])
    if skipped["other"]:
        text = "%s: %d files are skipped, for they do not end in %s"
        logging.warning(text, folder, skipped["other"], ", ".join(IMAGE_FILES))


def printable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 as \\xNN, line breaks as spaces."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return " ".join(text.splitlines())


def file_bytes(path: epath.Path) -> int:
    """The size of a file; 0 for a link to nothing, which is told when the image is read."""
    # epath's stat asks for the name of the owner too, and fails where there is none, as
    # on network disks.
    if storage.is_object_store(path):
        return path.stat().length
    return os.path.getsize(path) if os.path.exists(path) else 0


def hash_of(value: Any) -> str:
    """A hash of JSON values: it tells one list of files or classes from another."""
    text = json.dumps(value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

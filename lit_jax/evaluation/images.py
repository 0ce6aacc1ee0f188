"""Images to score, or to score against: those of an npz file or of a folder.

Both are read in batches, for 50,000 images of 256 x 256 are 10 GB.
"""

import contextlib
import hashlib
import io
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from lit_jax.data import raw_images
from lit_jax.data.dataset import first_line
from lit_jax.evaluation import npz
from lit_jax.runtime import storage

READERS = 16  # threads; an object store answers each request after a while


class NpzImages:
    """The array `arr_0` of an npz file.

    Attributes:
      count: the number of images.
      shape: (H, W, C), with 1 or 3 channels.
    Raises: ValueError or FileNotFoundError that begins with the path.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self.name = path.stem
        self.count, *shape = npz.image_shape(path)
        self.shape = tuple(shape)

    def batches(self, num_images: int, batch_size: int) -> Iterator[np.ndarray]:
        """Yields the first images in file order, (B, H, W, C) uint8."""
        return npz.image_batches(self.path, num_images, batch_size)

    def about(self, name: str) -> dict[str, Any]:
        """What the sampling job wrote as `name`; {}: it did not."""
        return npz.read_json(self.path, name)

    def content_hash(self) -> str:
        """What tells this file from others, 16 hex digits."""
        return npz.file_hash(self.path)


class _Header(NamedTuple):
    """What a file says of itself."""

    size: tuple[int, int]  # width, height
    is_grey: bool
    digest: bytes  # of the file's bytes


class FolderImages:
    """The images of a folder and of the folders in it, ordered by their paths.

    Attributes:
      count: the number of images.
      shape: (H, W, C): one channel where all of them are grey, else three.
    Raises: ValueError that begins with the path, where there are no images,
      a file is none, or two are of different sizes.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self.name = storage.absolute(path).name
        skipped: Counter[str] = Counter()
        found = sorted(raw_images.image_files(path, skipped))
        self._files = list(_without_overviews(found))
        if not self._files:
            kinds = ", ".join(raw_images.IMAGE_FILES)
            raise ValueError(f"{path} holds no images ({kinds})")
        if hidden := skipped["hidden"]:
            text = "%s: %d hidden files and folders are skipped"
            logging.info(text, path, hidden)

        # One pass over all bytes: a file of another size is found before the
        # network runs, and the hash needs the bytes as well.
        with ThreadPoolExecutor(READERS) as pool:
            headers = list(pool.map(self._read_header, self._files))
        size = headers[0].size
        digest = hashlib.sha256()
        for file, header in zip(self._files, headers):
            if header.size != size:
                first = _called(self._files[0], size)
                other = _called(file, header.size)
                raise ValueError(f"{path} holds images of different sizes: {first}, {other}")
            digest.update(header.digest)
        self._digest = digest.hexdigest()[:16]

        width, height = size
        is_grey = all(header.is_grey for header in headers)
        self.count = len(self._files)
        self.shape = (height, width, 1 if is_grey else 3)
        # Upright by the file's own rows: the usual evaluators ignore EXIF.
        self._settings = raw_images.ImageSettings(
            size=(height, width),
            exif_orientation=False,
        )

    def batches(self, num_images: int, batch_size: int) -> Iterator[np.ndarray]:
        """Yields the first images in their order, (B, H, W, C) uint8.

        Raises: ValueError naming a file that is damaged.
        """
        treated: Counter[str] = Counter()
        # Pillow decodes outside Python's lock, so threads help.
        with ThreadPoolExecutor(READERS) as pool:
            for start in range(0, num_images, batch_size):
                stop = min(start + batch_size, num_images)
                files = self._files[start:stop]
                decoded = list(pool.map(self._read_pixels, files))
                for _, words in decoded:
                    treated.update(words)
                yield np.stack([pixels for pixels, _ in decoded])
        for what, count in sorted(treated.items()):
            logging.warning("%s: %d images are %s", self.path, count, what)

    def about(self, name: str) -> dict[str, Any]:
        """What the sampling job left as NAME.json; {}: it did not."""
        path = self.path / f"{name}.json"
        if not path.is_file():
            return {}
        value = storage.read_object(path)
        if value is None:
            raise ValueError(f"{path} cannot be read as a JSON object")
        return value

    def content_hash(self) -> str:
        """What tells this folder from others, 16 hex digits.

        It is of the files' bytes in their order; their names decide no score.
        """
        return self._digest

    def _read_header(self, file: str) -> _Header:
        with self._naming(file):
            content = (self.path / file).read_bytes()
            with Image.open(io.BytesIO(content)) as image:
                is_grey = Image.getmodebase(image.mode) == "L"
                digest = hashlib.sha256(content).digest()
                return _Header(image.size, is_grey, digest)

    def _read_pixels(self, file: str) -> tuple[np.ndarray, list[str]]:
        with self._naming(file):
            content = io.BytesIO((self.path / file).read_bytes())
            with Image.open(content) as image:
                channels = self.shape[-1]
                decoded, treated = raw_images.decode(image, self._settings, channels)
                return np.asarray(decoded).reshape(self.shape), treated

    @contextlib.contextmanager
    def _naming(self, file: str) -> Iterator[None]:
        try:
            yield
        # For damage Pillow raises errors of many types.
        except Exception as error:
            which = f"{self.path}: {raw_images.printable(file)}"
            raise ValueError(f"{which} cannot be read: {first_line(error)}") from error


def open_images(path: epath.Path) -> NpzImages | FolderImages:
    """The images of a folder, or of an npz file.

    Raises: ValueError or FileNotFoundError that begins with the path.
    """
    return FolderImages(path) if path.is_dir() else NpzImages(path)


@contextlib.contextmanager
def naming_path(argument: str, path: epath.PathLike) -> Iterator[None]:
    """Begins the errors of the block with `ARGUMENT = PATH`."""
    value = str(path)
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        # What reads a file begins with the path, which is the value.
        text = str(error).removeprefix(value)
        if text == str(error):
            text = f": {text}"
        # Not type(error): subclasses such as JSONDecodeError are made from
        # more than a text.
        is_missing = isinstance(error, FileNotFoundError)
        kind = FileNotFoundError if is_missing else ValueError
        raise kind(f"{argument} = {value}{text}") from error


def _without_overviews(files: list[str]) -> Iterable[str]:
    """Leaves out PROMPT/grid.png, GenEval's picture of all in PROMPT/samples."""
    # With one image a prompt it is of the same size, and would count twice.
    paths = [pathlib.PurePosixPath(file) for file in files]
    prompts = {path.parents[1] for path in paths if path.parent.name == "samples"}
    for file, path in zip(files, paths):
        if path.name != "grid.png" or path.parent not in prompts:
            yield file


def _called(file: str, size: tuple[int, int]) -> str:
    width, height = size
    return f"{raw_images.printable(file)} is {width} x {height} pixels"

"""Reads npz files: images one batch after another, arrays of floats, and texts in JSON.

The files may come from anywhere, so they are data and nothing else. Pickled
objects are refused, and damaged bytes end in a ValueError that begins with the
file's path.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from etils import epath

# What reading the bytes of a broken archive raises.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,  # a member is marked as encrypted
    NotImplementedError,  # or as compressed by an unknown method
)


def file_hash(path: epath.Path) -> str:
    """The first 16 hex digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def image_shape(path: epath.Path) -> tuple[int, ...]:
    """The shape of the images `arr_0`, from the header alone.

    Raises: ValueError unless they are uint8 (N, H, W, 1 or 3);
      FileNotFoundError.
    """
    with _open_images(path) as (shape, _):
        return shape


def image_batches(
    path: epath.Path,
    num_images: int,
    batch_size: int,
) -> Iterator[np.ndarray]:
    """Yields the first `num_images` images `arr_0` in file order.

    Yields: (B, H, W, C) uint8.
    Raises: ValueError for a file that is damaged or shorter than its header
      says.
    """
    # NumPy would read the whole array. 50,000 images of 256 x 256 are 10 GB,
    # so the bytes are streamed.
    with _open_images(path) as (shape, member):
        image = shape[1:]
        for start in range(0, num_images, batch_size):
            size = min(batch_size, num_images - start)
            num_bytes = size * math.prod(image)
            try:
                chunk = member.read(num_bytes)
            except DAMAGE as error:
                raise ValueError(
                    f"{path}: arr_0 is damaged after {start} images: {error}"
                ) from error

            if len(chunk) != num_bytes:
                raise ValueError(
                    f"{path} is truncated: its header promises {shape[0]} images, "
                    f"but the data end after about {start}"
                )
            yield np.frombuffer(chunk, np.uint8).reshape(size, *image)


@contextlib.contextmanager
def _open_images(path: epath.Path) -> Iterator[tuple[tuple[int, ...], IO[bytes]]]:
    """The shape of `arr_0`, and a file that stands at its first pixel."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        try:
            archive = stack.enter_context(zipfile.ZipFile(file))
            member = stack.enter_context(archive.open("arr_0.npy"))
        except (KeyError, *DAMAGE) as error:
            raise ValueError(f"{path} is not an npz with an array 'arr_0': {error}") from error

        # Outside the `try`: what the caller does with the file may raise
        # errors of the same types.
        yield _read_header(member, path), member


def _read_header(member: IO[bytes], path: epath.Path) -> tuple[int, ...]:
    # Bytes that are no header at all raise ValueError here.
    try:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(member)
        else:
            header = np.lib.format.read_array_header_2_0(member)
    except (ValueError, *DAMAGE) as error:
        raise ValueError(f"{path}: the header of arr_0 cannot be read: {error}") from error

    shape, fortran_order, dtype = header
    is_images = len(shape) == 4 and 0 not in shape[1:] and shape[-1] in (1, 3)
    if dtype != np.uint8 or fortran_order or not is_images:
        order = " in Fortran order" if fortran_order else ""
        raise ValueError(
            f"{path}: arr_0 is {dtype} {shape}{order}, expected uint8 (N, H, W, 1 or 3)"
        )
    return shape


@dataclasses.dataclass(frozen=True)
class Archive:
    """An open npz file, whose arrays are read by name; see `open_archive`."""

    path: epath.Path
    arrays: Any  # an np.lib.npyio.NpzFile, which reads an array when it is asked for

    @property
    def names(self) -> set[str]:
        """The names of its arrays."""
        return set(self.arrays.files)

    def read_json(self, name: str) -> dict[str, Any]:
        """The object that the text `name` holds.

        Raises: ValueError for anything else than a JSON object.
        """
        try:
            value = json.loads(str(self.arrays[name]))
        except (ValueError, *DAMAGE) as error:
            raise ValueError(f"{self.path}: {name} cannot be read as JSON text: {error}") from error
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise ValueError(f"{self.path}: {name} is a JSON {kind}, expected an object")
        return value

    def read_floats(self, name: str, ndim: int) -> np.ndarray:
        """The array `name`, float64.

        Raises: ValueError unless it has `ndim` axes of finite floats.
        """
        try:
            array = self.arrays[name]
        except (ValueError, KeyError, *DAMAGE) as error:
            raise ValueError(f"{self.path}: {name} cannot be read: {error}") from error
        is_floats = array.dtype.kind == "f" and array.ndim == ndim
        # One NaN in a covariance would make every score NaN.
        if not is_floats or not np.isfinite(array).all():
            raise ValueError(
                f"{self.path}: {name} is {array.dtype} {array.shape}, "
                f"expected {ndim} axes of finite floats"
            )
        return array.astype(np.float64)


@contextlib.contextmanager
def open_archive(path: epath.Path) -> Iterator[Archive]:
    """Opens an npz file; its arrays are read when they are asked for.

    Raises: ValueError for a file of another kind, FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")

    with path.open("rb") as file:
        # np.load opens single arrays and pickles too, which have no names.
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} is not an npz file")
        file.seek(0)
        # Pickles are programs: an array of objects would run its code.
        try:
            arrays = np.load(file, allow_pickle=False)
        except (ValueError, *DAMAGE) as error:
            raise ValueError(f"{path} is not an npz file: {error}") from error
        with arrays:
            yield Archive(path, arrays)


def read_json(path: epath.Path, name: str) -> dict[str, Any]:
    """The object that the sampling job wrote as `name`.

    Returns: {} where a file from elsewhere has no such text.
    """
    with open_archive(path) as archive:
        return archive.read_json(name) if name in archive.names else {}

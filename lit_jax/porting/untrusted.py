"""What all readers of a stranger's file share: its errors, its limits, the map.

A file may claim anything. So its errors name the file and fit on one line, and
each size that it claims is compared with the file before it is used.
"""

import contextlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NoReturn, cast

from etils import epath

# More than any weight has; it keeps products of hostile shapes short.
MAX_DIMENSIONS = 16
# That a copy from or to an object store keeps in memory.
COPY_BYTES = 16 << 20


class TensorFileError(ValueError):
    """A file that is not what it claims to be.

    The message names the file and what is wrong.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def failure(path: epath.PathLike) -> Callable[[str], NoReturn]:
    """A function that raises `TensorFileError`: the file's name, then its text."""

    def fail(what: str) -> NoReturn:
        raise TensorFileError(f"{path}: {what}")

    return fail


def one_line(text: str) -> str:
    """`text` with whatever moves a terminal's cursor escaped."""
    # The names in a file are the stranger's: one could erase the line that
    # warns of it, or add a line that praises the file.
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def describe(value: Any) -> str:
    """A short name for a value of the file."""
    if isinstance(value, str | bytes | float | bool | None) or is_size(value):
        return repr(value)[:80]
    # A container is not printed, for it may be endless.
    return f"a {type(value).__name__}"


def is_size(value: Any) -> bool:
    """Whether a value is a whole number from 0 to 2^63 - 1."""
    # To Python a bool is an int.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def fits_numpy(shape: Iterable[int], itemsize: int) -> bool:
    """Whether NumPy can make an array of this shape."""
    # NumPy multiplies the sizes that are not zero, even those of an empty
    # array.
    return math.prod(n for n in shape if n) * itemsize < 2**63


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object hook that refuses a key given twice.

    Raises: ValueError naming the key.
    """
    # Python's own takes the second, another reader of the same file the first.
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:80]!r} appears twice")
        result[key] = value
    return result


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a place on an object store, such as gs://bucket/file."""
    return "://" in os.fspath(path)


def map_file(path: epath.PathLike) -> mmap.mmap:
    """Maps a file read-only: opening it costs nothing, reading a tensor that tensor.

    A file on an object store is first copied to a temporary one, which goes with
    the map.

    Raises: TensorFileError for an empty file, and for what a download often
      leaves in place of the weights. FileNotFoundError.
    """
    path = epath.Path(path)
    fail = failure(path)
    # epath takes a pipe for a file, and opening one would wait for ever.
    is_file = path.is_file() if is_remote(path) else os.path.isfile(path)
    if not is_file:
        raise FileNotFoundError(f"{path}: no such file")

    with contextlib.ExitStack() as stack:
        file = cast(BinaryIO, stack.enter_context(path.open("rb")))
        if is_remote(path):
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, copy, COPY_BYTES)
            copy.seek(0)
            file = cast(BinaryIO, copy)

        start = file.read(64)
        if not start:
            fail("the file is empty")
        start = start.lstrip().lower()
        if start.startswith(b"version https://git-lfs"):
            fail("a Git LFS pointer, not the weights; run `git lfs pull` there")
        if start.startswith((b"<!doctype", b"<html", b"<?xml")):
            fail("a web page, not the weights: the download got a login or an error page")
        # The map keeps the file open by itself.
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

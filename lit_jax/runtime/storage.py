"""Where the files of a run lie: a folder, or an object store.

`etils.epath` reads and writes both. An object store differs from a folder in
three ways: a file appears when it is complete and replaces the old one at
once, nothing can be appended to it, and it cannot be locked.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

from etils import epath

SCHEMES = ("gs", "s3", "az", "hf")  # those that etils.epath knows


def user_path(name: str, argument: str) -> epath.Path:
    """The path that a user gives as `argument`, which the error names.

    Raises: ValueError when it is a URL that cannot be opened here, or in no home folder.
    """
    path = epath.Path(resolve(name, argument))
    try:
        path.exists()
    # Each store has errors of its own, for credentials, the network, names,
    # and for the package that opens it.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        problem = "cannot be reached"
        if isinstance(error, ImportError):
            problem = "needs a further package"
        raise ValueError(f"{argument}={name} {problem}: {reason}") from error
    return path


def resolve(name: str, argument: str) -> str:
    """The name with the home folder for a leading ~, which only a shell would replace.

    Raises: ValueError for a URL of a kind that is not known, and for a home that is not there.
    """
    scheme, separator, _ = name.partition("://")
    # Without this check, file://x and a misspelt gcs://bucket would become
    # local folders.
    if separator and scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"{argument}={name} is neither a local folder nor one of {known}")

    home = os.path.expanduser(name)
    if home.startswith("~"):
        raise ValueError(f"{argument}={name} is in no home folder; write ./{name} for that name")
    return home


def is_object_store(path: epath.PathLike) -> bool:
    """Whether the path is in a store whose files cannot be changed in place."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root of the file system; a URL stays as it is."""
    path = epath.Path(path)
    return path if is_object_store(path) else path.absolute()


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file so that a kill leaves the old text or the new one.

    Raises: OSError naming the file.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file so that a kill or a power failure leaves the old content or the new one.

    Raises: OSError naming the file; it is then as it was.
    """
    if is_object_store(path):
        with naming_file(path):
            path.write_bytes(content)
    else:
        with replacing(path) as file:
            file.write(content)


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Opens a file to write, which replaces `path` when the block ends without an error.

    Raises: OSError naming the file; it is then as it was.
    """
    path = epath.Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            if not is_object_store(path):
                # Else a machine that dies after the renaming leaves an empty file.
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        # Half a file is of no use, and the disk may be full.
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise _named(path, error) from error
        raise


@contextlib.contextmanager
def naming_file(path: epath.PathLike) -> Iterator[None]:
    """Turns an error of the block into an OSError that names the file."""
    try:
        yield
    # A disk raises OSError, an object store errors of its own.
    except Exception as error:
        raise _named(path, error) from error


def _named(path: epath.PathLike, error: Exception) -> OSError:
    reason = getattr(error, "strerror", None) or error
    return OSError(f"{path} cannot be written: {reason}")


def read_object(path: epath.Path) -> dict[str, Any] | None:
    """The JSON object in a file; None: the file is damaged."""
    try:
        value = json.loads(path.read_bytes())
    # Bytes that are no text, or no JSON, or JSON of any depth.
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def unused(path: epath.Path) -> epath.Path:
    """The path, or with a number behind it, that names no file yet."""
    candidates = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    return path if not path.exists() else next(c for c in candidates if not c.exists())


def open_to_append(path: epath.Path, limit: int | None = None) -> "BinaryIO | ObjectFile":
    """Opens a file to write bytes at its end.

    Args: limit: that of `ObjectFile`; a local file has none.
    """
    if is_object_store(path):
        return ObjectFile(path, limit)
    return open(path, "ab")


class ObjectFile:
    """A file of an object store to which bytes can be appended.

    Each flush uploads the object again, as a whole. Args: limit: an object
    that has grown to this number of bytes is left as it is, and the file goes
    on in NAME.0001, NAME.0002 and so on; None keeps it in one object, for
    files that stay small.
    """

    def __init__(self, path: epath.Path, limit: int | None = None):
        self.name = str(path)
        self._path = path
        self._limit = limit
        self._parts = 0
        self._content = bytearray(path.read_bytes() if path.exists() else b"")
        self._uploaded = len(self._content)

    def write(self, data: bytes) -> int:
        self._content += data
        return len(data)

    def flush(self) -> None:
        # Stores limit how often an object may be written, and charge for it.
        if len(self._content) == self._uploaded:
            return
        self._path.write_bytes(bytes(self._content))
        self._uploaded = len(self._content)
        if self._limit and self._uploaded >= self._limit:
            self._parts += 1
            self._path = epath.Path(f"{self.name}.{self._parts:04d}")
            self._content.clear()
            self._uploaded = 0

    def close(self) -> None:
        self.flush()

"""Tensor files of the PyTorch world, read and written without PyTorch.

Files are mapped, never loaded: every tensor is a NumPy view of the map, so opening a 2.7 GB file costs nothing and
reading one tensor costs that tensor. Every size a file claims is checked against the file before it is used.
"""
import dataclasses
import json
import math
import mmap
import os
import pathlib

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100 << 20    # the limit of the safetensors library
MAX_DIMENSIONS = 16             # more than any weight has; keeps products of hostile shapes short

_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}


class TensorFileError(ValueError):
    """A file that is not what it claims to be; the message names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open file: `tensors` are read-only views of the map, `extra` is what was stored beside them."""
    path: pathlib.Path
    tensors: dict[str, np.ndarray]
    extra: dict
    map: mmap.mmap

    def release(self):
        """Gives the pages read so far back to the system; they are read again from disk when needed."""
        self.map.madvise(mmap.MADV_DONTNEED)


def map_file(path):
    """Maps a non-empty regular file read-only; a Git LFS pointer is refused with what to do about it."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise TensorFileError(f"{path}: the file is empty")
        if file.read(40).startswith(b"version https://git-lfs"):
            raise TensorFileError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _unique(pairs):
    """JSON object hook that refuses a key given twice (the second would silently win)."""
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_safetensors(path):
    """Opens a .safetensors file: 8 bytes of header length, a JSON header, then the tensors.

    Stricter than the format: tensors may neither overlap nor leave gaps, so that nothing hides in the file.
    Raises TensorFileError naming the tensor for anything the header says that the file does not hold.
    """
    path, buffer = pathlib.Path(path), map_file(path)

    def fail(what):
        raise TensorFileError(f"{path}: {what}")

    if len(buffer) < 8:
        fail(f"{len(buffer)} bytes are too few for a safetensors file")
    header_bytes = int.from_bytes(buffer[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(buffer) - 8):
        fail(f"the header claims {header_bytes} bytes, the file has {len(buffer) - 8} (limit {MAX_HEADER_BYTES})")
    try:
        header = json.loads(buffer[8 : 8 + header_bytes].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        fail(f"the header is not valid JSON: {error}")
    if not isinstance(header, dict):
        fail(f"the header is a {type(header).__name__}, not an object")
    extra = header.pop("__metadata__", {})
    if not isinstance(extra, dict) or not all(isinstance(value, str) for value in extra.values()):
        fail("__metadata__ is not an object of strings")

    data_bytes = len(buffer) - 8 - header_bytes
    tensors, spans = {}, []
    for key, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            fail(f"{key}: the entry is not {{dtype, shape, data_offsets}}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            fail(f"{key}: dtype {entry['dtype']!r} is not one of {', '.join(_SAFETENSORS_DTYPES)}")
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
            fail(f"{key}: {str(shape)[:80]} is not a shape")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            fail(f"{key}: {str(offsets)[:80]} are not data offsets")
        begin, end = offsets
        if begin > end or end > data_bytes:
            fail(f"{key}: data offsets {begin}..{end} are outside the {data_bytes} bytes of data")
        if math.prod(shape) * dtype.itemsize != end - begin:
            fail(f"{key}: shape {tuple(shape)} of {entry['dtype']} needs {math.prod(shape) * dtype.itemsize} bytes, "
                 f"the offsets span {end - begin}")
        spans.append((begin, end, key))
        tensors[key] = np.frombuffer(buffer, dtype, math.prod(shape), 8 + header_bytes + begin).reshape(shape)
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            fail(f"{key}: starts at byte {begin} of the data, expected {position}: tensors overlap or leave a gap")
        position = end
    if position != data_bytes:
        fail(f"{data_bytes - position} bytes after the last tensor belong to none")
    return TensorFile(path, tensors, extra, buffer)


def write_safetensors(path, tensors, metadata):
    """Writes (key, shape, read) triples in order, one tensor in memory at a time, as float32.

    Args:
        tensors: sequence of (key, shape, read) where `read()` returns the array of that shape.
        metadata: str -> str, kept in the header.
    """
    header, position = {"__metadata__": metadata}, 0
    for key, shape, _ in tensors:
        size = 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)     # tensors start on 8 bytes, as the library writes them

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape, read in tensors:
            file.write(contiguous(read(), shape, key))

    write_atomically(path, write)


def contiguous(array, shape, key):
    """The bytes of `array` as little-endian float32, C order; the shape must be the announced one."""
    array = np.ascontiguousarray(array, np.dtype("<f4"))
    if array.shape != tuple(shape):
        raise ValueError(f"{key}: shape {array.shape}, announced {tuple(shape)}")
    return array.reshape(-1).view(np.uint8).data


def write_atomically(path, write):
    """Calls write(file) on a temporary file beside `path` and renames it: a failure leaves nothing behind."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

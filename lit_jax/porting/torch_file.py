"""Tensor files (.pt, .bin, .safetensors) read and written without PyTorch.

Files are mapped, never loaded: every tensor is a NumPy view of the map, so opening a
2.7 GB file costs nothing and reading one tensor costs that tensor. Every size that a
file claims is compared with the file first. Pickles are interpreted (`pickles`), never
run.
"""

import bisect
import collections
import dataclasses
import io
import json
import math
import mmap
import os
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np
from etils import epath

from lit_jax.porting.pickles import Tensor, Unpickler
from lit_jax.porting.untrusted import (
    COPY_BYTES,
    MAX_DIMENSIONS,
    TensorFileError,
    describe,
    failure,
    fits_numpy,
    is_remote,
    is_size,
    map_file,
    unique_keys,
)

# Of a safetensors header and of any file of JSON. Parsed, they take up to 30
# times as much; the header of a model of 1,000 tensors has 0.1 MB.
MAX_HEADER_BYTES = 8 << 20
# Of a torch file's pickle. It holds names and shapes: a training checkpoint
# needs 1 MB.
MAX_PICKLE_BYTES = 4 << 20
# Of a zip archive's directory, which has some 80 bytes for a record.
MAX_DIRECTORY_BYTES = 8 << 20

_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_ZIP_START = b"PK\x03\x04"
_PICKLE_START = b"\x80\x02"
# Their numbers mean nothing without scales, which each tool keeps in its own way.
_QUANTISED = "quantised weights, which are not read; take the file in float32, bfloat16 or float16"
# What the first two pickles of a file before torch 1.6 hold.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

Fail = Callable[[str], NoReturn]


# ---- An open file --------------------------------------------------------------------------------


class Record(NamedTuple):
    """A stored file of a zip archive."""

    begin: int
    num_bytes: int
    crc: int  # 0: none, as torch.serialization.set_crc32_options(False) writes
    name: str

    def check(self, buffer: mmap.mmap, fail: Fail) -> None:
        """Compares the CRC-32 of the stored bytes with that of the archive."""
        # torch.load does not: a byte that flipped on a disk or on the way, and
        # made another weight, goes unnoticed there.
        actual = zlib.crc32(memoryview(buffer)[self.begin : self.begin + self.num_bytes])
        if self.crc and actual != self.crc:
            fail(
                f"record {self.name[:80]!r} is damaged: its CRC-32 is {actual:08x}, "
                f"the archive says {self.crc:08x}"
            )


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open file of tensors, as read-only views of the map.

    Attributes:
        path: of the file.
        tensors: the flat dict of a safetensors file, or whatever tree of dicts, lists
            and values a torch file holds (an argparse.Namespace comes as a dict).
        metadata: the string dict of a safetensors file.
        map: the file.
        records: those of a zip archive, in the order of the file.
    """

    path: epath.Path
    tensors: dict[Any, Any]
    metadata: dict[str, str]
    map: mmap.mmap
    records: tuple[Record, ...] = ()

    def verify(self, arrays: Iterable[np.ndarray]) -> int:
        """Reads the records that hold `arrays`, and compares their CRC-32.

        Returns: how many records have one.
        Raises: TensorFileError naming the first record that is not what was written.
        """
        if not self.records:  # of the formats a zip archive alone has checksums
            return 0
        # An array does not know its record, but its address tells its place in
        # the map.
        base = np.frombuffer(self.map, np.uint8).ctypes.data
        places = [array.ctypes.data - base for array in arrays if array.size]
        starts = [record.begin for record in self.records]
        inside = [place for place in places if 0 <= place < len(self.map)]
        found = {bisect.bisect_right(starts, place) - 1 for place in inside}

        checked = [self.records[index] for index in sorted(found) if self.records[index].crc]
        for record in checked:
            record.check(self.map, failure(self.path))
            self.release()  # or a file of 3 GB would stay in memory
        return len(checked)

    def release(self) -> None:
        """Gives the pages read so far back; they are read again when they are needed."""
        self.map.madvise(mmap.MADV_DONTNEED)


# ---- safetensors ---------------------------------------------------------------------------------


def read_tensors(path: epath.PathLike) -> TensorFile:
    """Opens a file of either format. Its first bytes tell which, whatever its name.

    Raises: as `read_safetensors` and `read_torch`.
    """
    path = epath.Path(path)
    buffer = map_file(path)
    # After the header's length its JSON; torch's files have a signature there
    # or, the legacy ones, the end of a number.
    is_torch = buffer[:4] == _ZIP_START or buffer[:2] == _PICKLE_START
    if buffer[8:9] == b"{" or (path.suffix == ".safetensors" and not is_torch):
        return _open_safetensors(path, buffer)
    return _open_torch(path, buffer)


def read_safetensors(path: epath.PathLike) -> TensorFile:
    """Opens a .safetensors file: the header's length, the header in JSON, the tensors.

    Raises: TensorFileError naming the tensor for anything the header says that the file
      does not hold. FileNotFoundError.
    """
    path = epath.Path(path)
    return _open_safetensors(path, map_file(path))


def _open_safetensors(path, buffer):
    fail = failure(path)
    header, start = _safetensors_header(buffer, fail)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, metadata.values())):
        fail("__metadata__ is not an object of strings")

    tensors = {}
    spans = []
    for key, entry in header.items():
        dtype, shape, begin, end = _safetensors_entry(
            entry, len(buffer) - start, lambda what, key=key: fail(f"{key[:80]}: {what}")
        )
        spans.append((begin, end, key))
        flat = np.frombuffer(buffer, dtype, math.prod(shape), start + begin)
        tensors[key] = flat.reshape(shape)

    # Stricter than the format, so that nothing hides in a file.
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            fail(
                f"{key[:80]}: starts at byte {begin} of the data, expected {position}: "
                "tensors overlap or leave a gap"
            )
        position = end
    if position != len(buffer) - start:
        fail(f"{len(buffer) - start - position} bytes after the last tensor belong to none")
    return TensorFile(path, tensors, metadata, buffer)


def _is_text(value):
    return isinstance(value, str)


def _safetensors_header(buffer, fail):
    """The header of a file, and the place of the first byte after it."""
    if len(buffer) < 8:
        fail(f"{len(buffer)} bytes are too few for a safetensors file")
    num_bytes = int.from_bytes(buffer[:8], "little")
    if num_bytes > min(MAX_HEADER_BYTES, len(buffer) - 8):
        fail(
            f"the header claims {num_bytes} bytes; the file has {len(buffer) - 8}, "
            f"the limit is {MAX_HEADER_BYTES}"
        )
    start = 8 + num_bytes
    # A header of nested brackets exhausts the parser's recursion.
    try:
        header = json.loads(buffer[8:start].decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        fail(f"the header is not valid JSON: {error}")
    if not isinstance(header, dict):
        fail(f"the header is a {type(header).__name__}, not an object")
    return header, start


def _safetensors_entry(entry, data_bytes, fail):
    """The dtype, shape and first and last byte that an entry of a header names."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        fail("the entry is not {dtype, shape, data_offsets}")
    name = entry["dtype"]
    if isinstance(name, str) and re.match(r"F[468]_", name):
        fail(f"dtype {describe(name)}: {_QUANTISED}")
    if not isinstance(name, str) or name not in _SAFETENSORS_DTYPES:
        fail(f"dtype {describe(name)} is not one of {', '.join(_SAFETENSORS_DTYPES)}")
    dtype = _SAFETENSORS_DTYPES[name]

    shape = entry["shape"]
    is_list = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not is_list or not all(map(is_size, shape)):
        fail(f"{json.dumps(shape)[:80]} is not a shape")
    if not fits_numpy(shape, dtype.itemsize):
        fail(f"shape {tuple(shape)} of {name} needs 2^63 bytes or more")

    offsets = entry["data_offsets"]
    is_pair = isinstance(offsets, list) and len(offsets) == 2
    if not is_pair or not all(map(is_size, offsets)):
        fail(f"{json.dumps(offsets)[:80]} are not data offsets")
    begin, end = offsets
    if begin > end or end > data_bytes:
        fail(f"data offsets {begin}..{end} are outside the {data_bytes} bytes of data")
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes != end - begin:
        fail(
            f"shape {tuple(shape)} of {name} needs {num_bytes} bytes, "
            f"the offsets span {end - begin}"
        )
    return dtype, shape, begin, end


# ---- torch ---------------------------------------------------------------------------------------


def read_torch(path: epath.PathLike) -> TensorFile:
    """Opens a file of torch.save, zip or legacy format; nothing in it runs.

    Raises: TensorFileError if the file is damaged or asks for anything but tensors in
      plain containers. FileNotFoundError.
    """
    path = epath.Path(path)
    return _open_torch(path, map_file(path))


def _open_torch(path, buffer):
    fail = failure(path)
    start = buffer[:4]
    records: tuple[Record, ...] = ()
    if start == _ZIP_START:
        value, records = _read_zip(buffer, fail)
    elif start[:1] == b"\x80":
        value = _read_legacy(buffer, fail)
    elif start == b"GGUF":
        fail(f"a GGUF file: {_QUANTISED}")
    else:
        fail(f"not a torch file: it starts with {start!r}")
    if not isinstance(value, dict):
        fail(f"holds {describe(value)}, not a dict of tensors")
    return TensorFile(path, value, {}, buffer, records)


def _read_zip(buffer, fail):
    """The object of torch's zip format (since torch 1.6), and the file's records."""
    records, root = _zip_records(buffer, fail)
    # Records that share bytes would make more of the file than its size.
    spans = sorted(records.values())
    for one, other in zip(spans, spans[1:]):
        if one.begin + one.num_bytes > other.begin:
            fail(f"the records {one.name[:80]!r} and {other.name[:80]!r} overlap")

    # Only newer versions of torch say it.
    order = records.get(f"{root}byteorder")
    if order and buffer[order.begin : order.begin + min(order.num_bytes, 16)] != b"little":
        fail("the tensors are not little-endian")

    # The pickle names each tensor's storage, and a storage is the record of its
    # key.
    pickle = records[f"{root}data.pkl"]
    if pickle.num_bytes > MAX_PICKLE_BYTES:
        fail(f"data.pkl has {pickle.num_bytes} bytes, the limit is {MAX_PICKLE_BYTES}")
    pickle.check(buffer, fail)
    stream = io.BytesIO(buffer[pickle.begin : pickle.begin + pickle.num_bytes])
    unpickler = Unpickler(stream, fail)
    value = unpickler.load()

    prefix = f"{root}data/"
    storages = {
        name.removeprefix(prefix): (record.begin, record.num_bytes)
        for name, record in records.items()
        if name.startswith(prefix)
    }
    unpickler.place_arrays(_viewer(buffer, storages, fail))
    return value, tuple(spans)


def _zip_records(buffer, fail):
    """The records of an archive by name, all inside the file, and their folder."""
    # zipfile reads the directory at the end of the file. It opens no record.
    try:
        with zipfile.ZipFile(_Directory(buffer, fail)) as archive:
            entries = archive.infolist()
    except TensorFileError:
        raise
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        struct.error,
        OverflowError,
    ) as error:
        fail(f"a damaged or truncated zip archive: {error}")

    # Of two records with one name readers take different ones.
    names = collections.Counter(entry.filename for entry in entries)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        fail(f"the record {repeated[0][:80]!r} appears twice")
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        fail(f"a zip archive with {len(pickles)} data.pkl records, torch.save writes one")
    root = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(f"{root}code/") or name == f"{root}constants.pkl" for name in names):
        fail("a TorchScript archive (a program), not a checkpoint")

    records = {}
    total = 0
    for entry in entries:
        what = f"record {entry.filename[:80]!r}"
        if entry.flag_bits & 0x1:
            fail(f"{what} is encrypted")
        is_stored = entry.compress_type == zipfile.ZIP_STORED
        if not is_stored or entry.compress_size != entry.file_size:
            fail(
                f"{what} is compressed ({entry.compress_size} to {entry.file_size} bytes), "
                "which torch.save never does"
            )

        # The directory says where a record's header is, and the header where
        # its bytes.
        start = max(entry.header_offset, 0)
        header = buffer[start : start + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            fail(f"{what} does not start where the archive says")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        begin = start + 30 + name_bytes + extra_bytes
        total += entry.file_size
        if begin + entry.file_size > len(buffer) or total > len(buffer):
            fail(
                f"{what} of {entry.file_size} bytes does not fit in the file of {len(buffer)} "
                "bytes beside the others"
            )
        records[entry.filename] = Record(begin, entry.file_size, entry.CRC, entry.filename)
    return records, root


class _Directory(io.RawIOBase):
    """A mapped archive as zipfile reads it, up to a largest directory."""

    # zipfile reads as many bytes as the archive says, and makes an object of
    # every 46.
    def __init__(self, buffer, fail):
        super().__init__()
        self._file = memoryview(buffer)
        self._fail = fail
        self._place = 0

    def seekable(self):
        return True

    def tell(self):
        return self._place

    def seek(self, offset, whence=io.SEEK_SET):
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: len(self._file)}
        self._place = start[whence] + offset
        if self._place < 0:
            raise ValueError("a place before the file's first byte")
        return self._place

    def read(self, size=-1):
        begin = self._place
        end = len(self._file) if size < 0 else min(begin + size, len(self._file))
        if end - begin > MAX_DIRECTORY_BYTES:
            self._fail(f"a directory of {end - begin} bytes, the limit is {MAX_DIRECTORY_BYTES}")
        self._place = max(begin, end)
        return bytes(self._file[begin:end])


def _read_legacy(buffer, fail):
    """The object of the format before torch 1.6: five pickles, then the storages.

    The package of EfficientNet's weights, which evaluation reads, has this format.
    """
    stream = io.BytesIO(buffer[:MAX_PICKLE_BYTES])
    if Unpickler(stream, fail).load() != _LEGACY_MAGIC:
        fail("neither a zip archive nor a legacy torch file")
    protocol = Unpickler(stream, fail).load()
    if protocol != _LEGACY_PROTOCOL:
        fail(f"legacy torch protocol {describe(protocol)}, expected {_LEGACY_PROTOCOL}")
    system = Unpickler(stream, fail).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        fail("the tensors are not little-endian")
    # The object; then the keys of its storages, in the order in which they
    # follow.
    unpickler = Unpickler(stream, fail)
    value = unpickler.load()
    keys = Unpickler(stream, fail).load()
    if not isinstance(keys, list) or not all(map(_is_text, keys)) or len(set(keys)) != len(keys):
        fail("the list of storages is damaged")

    storages = {}
    position = stream.tell()
    for key in keys:
        if key not in unpickler.storages:
            fail(f"storage {key[:80]!r} belongs to no tensor")
        if position + 8 > len(buffer):
            fail(f"truncated before storage {key[:80]!r}")
        # The length in front counts elements, whose type the pickle has told.
        numel = int.from_bytes(buffer[position : position + 8], "little")
        num_bytes = numel * unpickler.storages[key].itemsize
        position += 8
        if position + num_bytes > len(buffer):
            fail(
                f"truncated: storage {key[:80]!r} needs {num_bytes} bytes, "
                f"{len(buffer) - position} are left"
            )
        storages[key] = (position, num_bytes)
        position += num_bytes
    if position != len(buffer):
        fail(f"{len(buffer) - position} bytes after the last storage belong to none")
    unpickler.place_arrays(_viewer(buffer, storages, fail))
    return value


def _viewer(buffer, storages, fail):
    """A function from a key and its `Tensor` to the array.

    `storages` maps a storage's key to (first byte, number of bytes).
    """

    def view_of(key: Any, tensor: Tensor) -> np.ndarray:
        name = f"{str(key)[:80]}"
        storage = tensor.storage
        shape = tensor.shape
        strides = tensor.strides
        itemsize = storage.dtype.itemsize
        what = f"storage {storage.key[:80]!r}"

        # The storage, as the file has it.
        if storage.key not in storages:
            fail(f"{what} is not in the file")
        begin, num_bytes = storages[storage.key]
        if storage.record_numel * itemsize != num_bytes:
            fail(
                f"{what} claims {storage.record_numel} x {itemsize} bytes, "
                f"the file holds {num_bytes}"
            )
        if storage.start + storage.numel > storage.record_numel:
            fail(
                f"{what} has {storage.record_numel} elements, a view takes "
                f"{storage.start}..{storage.start + storage.numel}"
            )

        # The tensor in it.
        if not fits_numpy(shape, itemsize):
            fail(f"{name}: shape {shape} of {storage.dtype} needs 2^63 bytes or more")
        size = math.prod(shape)
        steps = sum((n - 1) * stride for n, stride in zip(shape, strides))
        # With a stride of 0 a small storage would give a tensor of any size.
        if size > storage.numel or (size and tensor.offset + steps >= storage.numel):
            fail(
                f"{name}: shape {shape}, strides {strides}, offset {tensor.offset} "
                f"does not fit in its {what} of {storage.numel} elements"
            )
        if size == 0:
            return np.empty(shape, storage.dtype)
        flat = np.frombuffer(buffer, storage.dtype, storage.numel, begin + storage.start * itemsize)
        return np.lib.stride_tricks.as_strided(
            flat[tensor.offset :],
            shape,
            # A stride that nothing steps over may be anything, and overflow in
            # bytes.
            [stride * itemsize if n > 1 else 0 for n, stride in zip(shape, strides)],
            writeable=False,
        )

    return view_of


# ---- Writing -------------------------------------------------------------------------------------


class NewTensor(NamedTuple):
    """A tensor to write; `read()` gives its array when it is its turn."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    dtype: str = "F32"  # or I8, which `write_safetensors` alone takes


def write_safetensors(
    path: epath.PathLike, tensors: Sequence[NewTensor], metadata: Mapping[str, str]
) -> None:
    """Writes tensors in order, one in memory at a time.

    Args: metadata: goes into the header.
    Raises: ValueError for an array of another shape than announced: then nothing is left.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for key, shape, _, dtype in tensors:
        end = position + _SAFETENSORS_DTYPES[dtype].itemsize * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode("utf-8")
    # Tensors start on 8 bytes, as the library writes them.
    text += b" " * (-len(text) % 8)

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(_bytes_of(tensor))

    write_atomically(path, write)


def write_torch(path: epath.PathLike, tensors: Sequence[NewTensor]) -> None:
    """Writes tensors as torch.save writes a flat state dict, one in memory at a time.

    Raises: ValueError for an array of another shape than announced: then nothing is left.
    """

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _add_record(file, archive, "data.pkl", _pickled_state_dict(tensors))
            _add_record(file, archive, "byteorder", b"little")
            for index, tensor in enumerate(tensors):
                _add_record(file, archive, f"data/{index}", _bytes_of(tensor))
            _add_record(file, archive, "version", b"3\n")

    write_atomically(path, write)


def _add_record(file, archive, name, data):
    info = zipfile.ZipInfo(f"archive/{name}")
    # torch aligns each record to 64 bytes by an extra field, to map the file.
    info.extra = b"FB\0\0"
    # Where the record may be large, zipfile puts another field before it.
    zip64 = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0
    header = file.tell() + 30 + len(info.filename) + len(info.extra) + zip64
    padding = -header % 64
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, data)


def _pickled_state_dict(tensors):
    """The data.pkl of a flat float32 state dict whose storages are numbered in order."""

    # In protocol 2, which every torch reads.
    def text(value):
        data = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(data)) + data

    def number(value):
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    empty = b"ccollections\nOrderedDict\n)R"
    # An OrderedDict, then between a mark and the last opcode each key with its
    # tensor.
    out = [b"\x80\x02", empty, b"("]
    for index, (key, shape, _, _) in enumerate(tensors):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n"
        storage += text(str(index)) + text("cpu") + number(math.prod(shape)) + b"tQ"
        out += [text(key), b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, number(0)]
        out += [numbers(shape), numbers(strides), b"\x89", empty, b"tR"]
    return b"".join([*out, b"u."])


def _bytes_of(tensor):
    """The bytes of a tensor, little-endian and in C's order."""
    key, shape, read, dtype = tensor
    array = np.asarray(read(), _SAFETENSORS_DTYPES[dtype].newbyteorder("<"), order="C")
    if array.shape != tuple(shape):
        raise ValueError(f"{key}: shape {array.shape}, announced {tuple(shape)}")
    return array.reshape(-1).view(np.uint8).data


def write_atomically(path: epath.PathLike, write: Callable[[IO[bytes]], None]) -> None:
    """Calls write(file) on a temporary file and renames it: a failure leaves nothing."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if is_remote(path):
            # An archive is written back and forth, which an object store
            # cannot.
            with tempfile.TemporaryFile() as file:
                write(file)
                file.seek(0)
                with partial.open("wb") as copy:
                    shutil.copyfileobj(file, copy, COPY_BYTES)
            partial.replace(path)
        else:
            with open(partial, "wb") as file:
                write(file)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

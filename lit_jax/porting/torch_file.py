"""Tensor files of the PyTorch world (.pt, .bin, .safetensors), read and written without PyTorch.

Files are mapped, never loaded: every tensor is a NumPy view of the map, so opening a 2.7 GB file costs
nothing and reading one tensor costs that tensor. Every size a file claims is checked against the file first.

A .pt file is a pickle, that is a program. `_Unpickler` interprets the few opcodes that tensor files use by
itself: it has no way to import or call anything, whatever the file asks for.
"""

import bisect
import collections
import dataclasses
import io
import json
import math
import mmap
import os
import pathlib
import pickletools
import struct
import typing
import zipfile
import zlib

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100 << 20  # of a safetensors header, the library's own limit
MAX_PICKLE_BYTES = (
    16 << 20
)  # of a pickle; it holds names and shapes, a training checkpoint needs 1 MB
MAX_RECORDS = 1 << 20  # of a zip archive
MAX_DIMENSIONS = 16  # more than any weight has; keeps products of hostile shapes short

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


def one_line(text):
    """`text` with line breaks and what else moves a terminal's cursor escaped: names in a file are not ours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TensorFileError(ValueError):
    """A file that is not what it claims to be; the message names the file and what is wrong."""

    def __init__(self, message):
        super().__init__(one_line(message))


class Record(typing.NamedTuple):
    """A stored file of a zip archive; a CRC-32 of 0 is none (torch.serialization.set_crc32_options(False))."""

    begin: int
    num_bytes: int
    crc: int
    name: str

    def check(self, buffer, fail):
        """torch.load does not look at the CRC, so a byte that flipped on a disk or on the way goes unnoticed there."""
        actual = zlib.crc32(memoryview(buffer)[self.begin : self.begin + self.num_bytes])
        if self.crc and actual != self.crc:
            fail(
                f"record {self.name[:80]!r} is damaged: its CRC-32 is {actual:08x}, the archive says {self.crc:08x}"
            )


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open file of tensors, as read-only views of the map.

    `tensors` is the flat dict of a safetensors file, or whatever tree of dicts, lists and values a .pt file
    holds (an argparse.Namespace comes as a dict); `metadata` is the string dict of a safetensors file. `records`
    are those of a zip archive in the order of the file.
    """

    path: pathlib.Path
    tensors: dict
    metadata: dict[str, str]
    map: mmap.mmap
    records: tuple[Record, ...] = ()

    def verify(self, arrays):
        """Reads the records that hold `arrays`, and compares their CRC-32; returns how many have one.

        Raises TensorFileError naming the first record that is not what was written.
        """
        base = np.frombuffer(self.map, np.uint8).ctypes.data
        places = [array.ctypes.data - base for array in arrays if array.size]
        starts = [record.begin for record in self.records]
        found = {
            bisect.bisect_right(starts, place) - 1 for place in places if 0 <= place < len(self.map)
        }
        checked = [self.records[index] for index in sorted(found) if self.records[index].crc]
        for record in checked:
            record.check(self.map, _failure(self.path))
            self.release()
        return len(checked)

    def release(self):
        """Gives the pages read so far back to the system; they are read again from disk when needed."""
        self.map.madvise(mmap.MADV_DONTNEED)


def map_file(path):
    """Maps a non-empty regular file read-only; what a download often leaves instead of it is named."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise TensorFileError(f"{path}: the file is empty")
        start = file.read(64).lstrip().lower()
        if start.startswith(b"version https://git-lfs"):
            raise TensorFileError(
                f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` there"
            )
        if start.startswith((b"<!doctype", b"<html", b"<?xml")):
            raise TensorFileError(
                f"{path}: a web page, not the weights: the download got a login or an error page"
            )
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _failure(path):
    def fail(what):
        raise TensorFileError(f"{path}: {what}")

    return fail


def unique_keys(pairs):
    """JSON object hook that refuses a key given twice (the second would silently win)."""
    result = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key[:80]!r} appears twice")
        result[key] = value
    return result


def _fits(shape, itemsize):
    """Whether NumPy can make such an array: it multiplies the sizes that are not zero, even of an empty one."""
    return math.prod(n for n in shape if n) * itemsize < 2**63


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _describe(value):
    """A short name for an untrusted value; containers are not printed, for they may be endless."""
    return (
        repr(value)[:80]
        if isinstance(value, str | bytes | float | bool | None) or _is_size(value)
        else (f"a {type(value).__name__}")
    )


def read_safetensors(path):
    """Opens a .safetensors file: 8 bytes of header length, a JSON header, then the tensors.

    Stricter than the format: tensors may neither overlap nor leave gaps, so that nothing hides in the file.
    Raises TensorFileError naming the tensor for anything the header says that the file does not hold.
    """
    path = pathlib.Path(path)
    buffer = map_file(path)
    fail = _failure(path)
    if len(buffer) < 8:
        fail(f"{len(buffer)} bytes are too few for a safetensors file")
    header_bytes = int.from_bytes(buffer[:8], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(buffer) - 8):
        fail(
            f"the header claims {header_bytes} bytes; the file has {len(buffer) - 8}, "
            f"the limit is {MAX_HEADER_BYTES}"
        )
    try:
        header = json.loads(
            buffer[8 : 8 + header_bytes].decode("utf-8"), object_pairs_hook=unique_keys
        )
    except (ValueError, RecursionError) as error:
        fail(f"the header is not valid JSON: {error}")
    if not isinstance(header, dict):
        fail(f"the header is a {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        fail("__metadata__ is not an object of strings")

    data_bytes = len(buffer) - 8 - header_bytes
    tensors, spans = {}, []
    for key, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            fail(f"{key[:80]}: the entry is not {{dtype, shape, data_offsets}}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _SAFETENSORS_DTYPES:
            fail(
                f"{key[:80]}: dtype {_describe(entry['dtype'])} is not one of {', '.join(_SAFETENSORS_DTYPES)}"
            )
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMENSIONS
            or not all(map(_is_size, shape))
        ):
            fail(f"{key[:80]}: {json.dumps(shape)[:80]} is not a shape")
        if not _fits(shape, dtype.itemsize):
            fail(f"{key[:80]}: shape {tuple(shape)} of {entry['dtype']} needs 2^63 bytes or more")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            fail(f"{key[:80]}: {json.dumps(offsets)[:80]} are not data offsets")
        begin, end = offsets
        if begin > end or end > data_bytes:
            fail(
                f"{key[:80]}: data offsets {begin}..{end} are outside the {data_bytes} bytes of data"
            )
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes != end - begin:
            fail(
                f"{key[:80]}: shape {tuple(shape)} of {entry['dtype']} needs {num_bytes} bytes, "
                f"the offsets span {end - begin}"
            )
        spans.append((begin, end, key))
        tensors[key] = np.frombuffer(
            buffer, dtype, math.prod(shape), 8 + header_bytes + begin
        ).reshape(shape)
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            fail(
                f"{key[:80]}: starts at byte {begin} of the data, expected {position}: "
                "tensors overlap or leave a gap"
            )
        position = end
    if position != data_bytes:
        fail(f"{data_bytes - position} bytes after the last tensor belong to none")
    return TensorFile(path, tensors, metadata, buffer)


def write_safetensors(path, tensors, metadata):
    """Writes (key, shape, read) triples in order, one tensor in memory at a time, as float32.

    Args:
        tensors: sequence of (key, shape, read) where `read()` returns the array of that shape.
        metadata: str -> str, kept in the header.
    """
    header, position = {"__metadata__": metadata}, 0
    for key, shape, _ in tensors:
        size = 4 * math.prod(shape)
        header[key] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors start on 8 bytes, as the library writes them

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape, read in tensors:
            file.write(contiguous(read(), shape, key))

    write_atomically(path, write)


# The storages that a tensor file names, by dtype.
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


@dataclasses.dataclass(frozen=True)
class Global:
    """A global that the pickle names; it stays a name, whatever it is: nothing imports it."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Elements `start` to `start + numel` of the stored record `key`."""

    key: str
    dtype: np.dtype
    start: int
    numel: int
    record_numel: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()


class _Unpickler:
    """Interprets one pickle from a stream; anything beyond tensors and plain containers fails.

    No opcode imports or calls: GLOBAL makes a `Global`, and REDUCE and BUILD know what each of the few names that may
    be called means. Opcodes make no more than they read, and REDUCE and BUILD, which may be given one memoised object again
    and again, together make no more than the stream is long: time and memory are at most a fixed multiple of its length.
    """

    def __init__(self, stream, fail):
        self._stream, self._fail = stream, fail
        self._stack, self._memo, self._dicts = [], {}, []
        self._budget = (
            stream.getbuffer().nbytes
        )  # characters and entries that REDUCE and BUILD may make
        self.storages = {}  # key -> dtype of every storage that was named

    def replace_tensors(self, view_of):
        """Puts the array in place of every `_Tensor` that is a value of a dict."""
        for entries in self._dicts:
            for key, value in entries.items():
                if isinstance(value, _Tensor):
                    entries[key] = view_of(key, value)

    def _spend(self, amount):
        self._budget -= amount
        if self._budget < 0:
            self._fail(
                "the pickle makes more out of its objects than it holds, which no tensor file does"
            )

    def _new_dict(self):
        self._dicts.append({})
        return self._dicts[-1]

    def load(self):
        try:
            for opcode, argument, _ in pickletools.genops(self._stream):
                if opcode.name == "STOP":
                    if len(self._stack) != 1:
                        self._fail(
                            "the pickle is damaged: it ends with a stack of "
                            f"{len(self._stack)} objects instead of one"
                        )
                    value = self._stack.pop()
                    return self._refuse(value) if isinstance(value, Global) else value
                self._step(opcode.name, argument)
        except TensorFileError:
            raise
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
        ) as error:
            self._fail(f"the pickle is damaged: {str(error)[:200] or type(error).__name__}")

    def _step(self, opcode, argument):
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode == "NEWTRUE")
            case (
                "INT"
                | "BININT"
                | "BININT1"
                | "BININT2"
                | "LONG"
                | "LONG1"
                | "LONG4"
                | "FLOAT"
                | "BINFLOAT"
                | "UNICODE"
                | "SHORT_BINUNICODE"
                | "BINUNICODE"
                | "BINUNICODE8"
                | "STRING"
                | "BINSTRING"
                | "SHORT_BINSTRING"
                | "SHORT_BINBYTES"
                | "BINBYTES"
            ):
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append(self._new_dict())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode[-1])
                items = tuple(self._pop() for _ in range(size))[::-1]
                stack.append(items)
            case "LIST":
                stack.append(self._pop_to_mark())
            case "DICT":
                stack.append(self._fill(self._new_dict(), self._pop_to_mark()))
            case "APPEND":
                value = self._pop()
                self._top(list).append(value)
            case "APPENDS":
                values = self._pop_to_mark()
                self._top(list).extend(values)
            case "SETITEM":
                value, key = self._pop(), self._pop()
                self._fill(self._top(dict), [key, value])
            case "SETITEMS":
                items = self._pop_to_mark()
                self._fill(self._top(dict), items)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(self._name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self._pop(), self._pop()
                stack.append(self._name(module, name))
            case "BINPERSID":
                stack.append(self._storage(self._pop()))
            case "REDUCE":
                arguments, function = self._pop(), self._pop()
                stack.append(self._reduce(function, arguments))
            case "NEWOBJ":
                arguments, function = self._pop(), self._pop()
                if function != Global("argparse.Namespace") or arguments != ():
                    self._refuse(function)
                stack.append(self._new_dict())
            case "BUILD":
                state, target = self._pop(), self._top(dict)
                # A state_dict carries its module versions as an attribute; a Namespace is all attributes.
                if not isinstance(state, dict):
                    self._fail(
                        f"the pickle sets a {type(state).__name__} as the state of an object"
                    )
                if state.keys() != {"_metadata"}:
                    self._spend(len(state))
                    self._fill(target, [item for entry in state.items() for item in entry])
            case _:
                self._fail(f"the pickle uses the opcode {opcode}, which no tensor file needs")

    def _pop(self):
        value = self._stack.pop()
        if value is _MARK:
            self._fail("the pickle is damaged: a mark where an object belongs")
        return value

    def _top(self, kind):
        if not self._stack or not isinstance(self._stack[-1], kind):
            self._fail(f"the pickle is damaged: no {kind.__name__} where one belongs")
        return self._stack[-1]

    def _pop_to_mark(self):
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _fill(self, target, items):
        if len(items) % 2:
            self._fail("the pickle is damaged: a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, str | int | float | bytes | Global | None):
                self._fail(f"the pickle uses a {type(key).__name__} as a key")
            if (
                isinstance(key, int) and abs(key) >= 2**32
            ):  # larger ones can be chosen to have one hash
                self._fail("the pickle uses an integer of more than 32 bits as a key")
            if key in target:
                self._fail(f"the key {str(key)[:80]!r} appears twice")
            target[key] = value
        return target

    def _name(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            self._fail("the pickle is damaged: a global that is not named by strings")
        full = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return Global(name)
        return Global(full)

    def _refuse(self, function):
        what = function.name if isinstance(function, Global) else type(function).__name__
        self._fail(
            f"asks to run {what[:120]}, which is refused: only tensors in plain containers are read "
            "(save the state_dict alone)"
        )

    def _storage(self, identity):
        if (
            not isinstance(identity, tuple)
            or len(identity) not in (5, 6)
            or identity[0] != "storage"
        ):
            self._fail("a persistent object that is not a tensor storage")
        _, kind, key, _, numel = identity[:5]
        if not isinstance(kind, Global) or not isinstance(key, str) or not _is_size(numel):
            self._fail("a storage without type, name and size")
        if kind.name not in _STORAGE_DTYPES:
            self._refuse(kind)
        dtype = _STORAGE_DTYPES[kind.name]
        if self.storages.setdefault(key, dtype) != dtype:
            self._fail(f"storage {key[:80]!r} is named with two types")
        if len(identity) == 5 or identity[5] is None:
            return _Storage(key, dtype, 0, numel, numel)
        view = identity[5]  # old files: (name of the view, first element, number of elements)
        if not isinstance(view, tuple) or len(view) != 3 or not all(map(_is_size, view[1:])):
            self._fail(f"storage {key[:80]!r}: not a view")
        return _Storage(key, dtype, view[1], view[2], numel)

    def _reduce(self, function, arguments):
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            self._refuse(function)
        match function.name:
            case "collections.OrderedDict":
                pairs = arguments[0] if arguments else []
                if len(arguments) > 1 or not isinstance(pairs, list):
                    self._fail("an OrderedDict of something else than a list")
                self._spend(len(pairs))
                return self._fill(
                    self._new_dict(), [item for key, value in pairs for item in (key, value)]
                )
            case "collections.defaultdict" if len(arguments) <= 1:
                return self._new_dict()
            case "argparse.Namespace" if not arguments:
                return self._new_dict()
            case "torch.Size" if len(arguments) == 1 and isinstance(arguments[0], tuple):
                return arguments[0]
            case "pathlib.PosixPath" | "pathlib.PurePosixPath":
                self._spend(len(arguments))
                if all(isinstance(argument, str) for argument in arguments):
                    self._spend(sum(map(len, arguments)))
                    return str(pathlib.PurePosixPath(*arguments))
            case "torch._utils._rebuild_parameter" if arguments and isinstance(
                arguments[0], _Tensor
            ):
                return arguments[0]
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" if (
                len(arguments) >= 4
            ):
                storage, offset, shape, strides = arguments[:4]
                if not isinstance(storage, _Storage):
                    self._fail("a tensor without a storage")
                if not isinstance(shape, tuple) or not isinstance(strides, tuple):
                    self._fail("a tensor whose shape or strides are not a tuple of sizes")
                if (
                    not _is_size(offset)
                    or len(shape) != len(strides)
                    or len(shape) > MAX_DIMENSIONS
                ):
                    self._fail(
                        f"a tensor at {_describe(offset)} with {len(shape)} dimensions and "
                        f"{len(strides)} strides (limit {MAX_DIMENSIONS})"
                    )
                if not all(map(_is_size, shape + strides)):
                    self._fail("a tensor whose shape or strides are not a tuple of sizes")
                return _Tensor(storage, offset, shape, strides)
        self._refuse(function)


def _viewer(buffer, places, fail):
    """Returns a function from `_Tensor` to array; `places`: storage key -> (first byte, number of bytes)."""

    def view_of(key, tensor):
        storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
        if storage.key not in places:
            fail(f"storage {storage.key[:80]!r} is not in the file")
        begin, num_bytes = places[storage.key]
        itemsize = storage.dtype.itemsize
        if storage.record_numel * itemsize != num_bytes:
            fail(
                f"storage {storage.key[:80]!r} claims {storage.record_numel} x {itemsize} bytes, "
                f"the file holds {num_bytes}"
            )
        if storage.start + storage.numel > storage.record_numel:
            fail(
                f"storage {storage.key[:80]!r} has {storage.record_numel} elements, a view takes "
                f"{storage.start}..{storage.start + storage.numel}"
            )
        if not _fits(shape, itemsize):
            fail(f"{str(key)[:80]}: shape {shape} of {storage.dtype} needs 2^63 bytes or more")
        size = math.prod(shape)
        last = (
            tensor.offset + sum((n - 1) * stride for n, stride in zip(shape, strides))
            if size
            else 0
        )
        if size > storage.numel or (size and last >= storage.numel):
            fail(
                f"{str(key)[:80]}: shape {shape}, strides {strides}, offset {tensor.offset} does not fit in its "
                f"storage {storage.key[:80]!r} of {storage.numel} elements"
            )
        flat = np.frombuffer(buffer, storage.dtype, storage.numel, begin + storage.start * itemsize)
        if size == 0:
            return np.empty(shape, storage.dtype)
        return np.lib.stride_tricks.as_strided(
            flat[tensor.offset :],
            shape,
            [stride * itemsize if n > 1 else 0 for n, stride in zip(shape, strides)],
            writeable=False,
        )

    return view_of


def _read_zip(path, buffer, fail):
    """The pickled object of torch's zip format (torch 1.6 and later), and the records of `TensorFile`."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        struct.error,
        OverflowError,
    ) as error:
        fail(f"a damaged or truncated zip archive: {error}")
    if len(records) > MAX_RECORDS:
        fail(f"{len(records)} records, the limit is {MAX_RECORDS}")
    names = collections.Counter(record.filename for record in records)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        fail(f"the record {repeated[0][:80]!r} appears twice")
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        fail(f"a zip archive with {len(pickles)} data.pkl records, torch.save writes one")
    root = pickles[0][: -len("data.pkl")]
    if any(name.startswith(f"{root}code/") or name == f"{root}constants.pkl" for name in names):
        fail("a TorchScript archive (a program), not a checkpoint")

    places, total = {}, 0
    for record in records:
        what = f"record {record.filename[:80]!r}"
        if record.flag_bits & 0x1:
            fail(f"{what} is encrypted")
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            fail(
                f"{what} is compressed ({record.compress_size} to {record.file_size} bytes), "
                "which torch.save never does"
            )
        start = max(record.header_offset, 0)
        header = buffer[start : start + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            fail(f"{what} does not start where the archive says")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        begin = start + 30 + name_bytes + extra_bytes
        total += record.file_size
        if begin + record.file_size > len(buffer) or total > len(buffer):
            fail(
                f"{what} of {record.file_size} bytes does not fit in the file of {len(buffer)} bytes "
                "beside the others"
            )
        places[record.filename] = Record(begin, record.file_size, record.CRC, record.filename)

    spans = sorted(places.values())
    for one, other in zip(spans, spans[1:]):
        if one.begin + one.num_bytes > other.begin:
            fail(f"the records {one.name[:80]!r} and {other.name[:80]!r} overlap")

    order = places.get(f"{root}byteorder")
    if order and buffer[order.begin : order.begin + min(order.num_bytes, 16)] != b"little":
        fail("the tensors are not little-endian")
    begin, num_bytes, *_ = places[pickles[0]]
    if num_bytes > MAX_PICKLE_BYTES:
        fail(f"data.pkl has {num_bytes} bytes, the limit is {MAX_PICKLE_BYTES}")
    places[pickles[0]].check(buffer, fail)
    unpickler = _Unpickler(io.BytesIO(buffer[begin : begin + num_bytes]), fail)
    value = unpickler.load()
    prefix = f"{root}data/"
    storages = {
        name[len(prefix) :]: record[:2]
        for name, record in places.items()
        if name.startswith(prefix)
    }
    unpickler.replace_tensors(_viewer(buffer, storages, fail))
    return value, tuple(spans)


def _read_legacy(buffer, fail):
    """The same of the format before torch 1.6: five pickles, then length and bytes of each storage."""
    stream = io.BytesIO(buffer[:MAX_PICKLE_BYTES])
    if _Unpickler(stream, fail).load() != _LEGACY_MAGIC:
        fail("neither a zip archive nor a legacy torch file")
    protocol = _Unpickler(stream, fail).load()
    if protocol != _LEGACY_PROTOCOL:
        fail(f"legacy torch protocol {_describe(protocol)}, expected {_LEGACY_PROTOCOL}")
    system = _Unpickler(stream, fail).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        fail("the tensors are not little-endian")
    unpickler = _Unpickler(stream, fail)
    value = unpickler.load()
    keys = _Unpickler(stream, fail).load()
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or len(set(keys)) != len(keys)
    ):
        fail("the list of storages is damaged")
    places, position = {}, stream.tell()
    for key in keys:
        if key not in unpickler.storages:
            fail(f"storage {key[:80]!r} belongs to no tensor")
        if position + 8 > len(buffer):
            fail(f"truncated before storage {key[:80]!r}")
        numel = int.from_bytes(buffer[position : position + 8], "little")
        num_bytes = numel * unpickler.storages[key].itemsize
        if position + 8 + num_bytes > len(buffer):
            fail(
                f"truncated: storage {key[:80]!r} needs {num_bytes} bytes, "
                f"{len(buffer) - position - 8} are left"
            )
        places[key] = (position + 8, num_bytes)
        position += 8 + num_bytes
    if position != len(buffer):
        fail(f"{len(buffer) - position} bytes after the last storage belong to none")
    unpickler.replace_tensors(_viewer(buffer, places, fail))
    return value


def read_torch(path):
    """Opens a file of torch.save (zip or legacy format) without running anything in it.

    Raises TensorFileError if the file is damaged or asks for anything but tensors in plain containers.
    """
    path = pathlib.Path(path)
    buffer = map_file(path)
    fail = _failure(path)
    start = buffer[:4]
    if start == b"PK\x03\x04":
        value, records = _read_zip(path, buffer, fail)
    elif start[:1] == b"\x80":
        value, records = _read_legacy(buffer, fail), ()
    else:
        fail(f"not a torch file: it starts with {start!r}")
    if not isinstance(value, dict):
        fail(f"holds {_describe(value)}, not a dict of tensors")
    return TensorFile(path, value, {}, buffer, records)


def _pickled_state_dict(tensors):
    """The data.pkl of a flat float32 state dict whose storages are numbered in order."""

    def text(value):
        data = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(data)) + data

    def number(value):
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    empty = b"ccollections\nOrderedDict\n)R"
    out = [b"\x80\x02", empty, b"("]
    for index, (key, shape, _) in enumerate(tensors):
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        storage = (
            b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(index)) + text("cpu")
        )
        storage += number(math.prod(shape)) + b"tQ"
        out += [text(key), b"ctorch._utils\n_rebuild_tensor_v2\n(", storage, number(0)]
        out += [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides)]
        out += [b"\x89", empty, b"tR"]
    return b"".join([*out, b"u."])


def write_torch(path, tensors):
    """Writes (key, shape, read) triples as a flat float32 state dict, one tensor in memory at a time."""

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:

            def add(name, data):
                info = zipfile.ZipInfo(f"archive/{name}")
                # torch aligns each record to 64 bytes by an extra field, so that it can map the file
                info.extra = b"FB\0\0"
                zip64 = 20 if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0
                header = file.tell() + 30 + len(info.filename) + len(info.extra) + zip64
                info.extra = b"FB" + struct.pack("<H", -header % 64) + b"Z" * (-header % 64)
                archive.writestr(info, data)

            add("data.pkl", _pickled_state_dict(tensors))
            add("byteorder", b"little")
            for index, (key, shape, read) in enumerate(tensors):
                add(f"data/{index}", contiguous(read(), shape, key))
            add("version", b"3\n")

    write_atomically(path, write)


def contiguous(array, shape, key):
    """The bytes of `array` as little-endian float32, C order; the shape must be the announced one."""
    array = np.asarray(array, np.dtype("<f4"), order="C")
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

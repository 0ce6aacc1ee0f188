"""Pickles read without running them: one interpreter for all of this package.

A pickle is a program. `Unpickler` interprets the few opcodes that files of weights
use by itself: it has no way to import or call anything, whatever the file asks for.
It knows torch's tensors, NumPy's arrays and plain containers.
"""

import dataclasses
import io
import math
import pathlib
import pickletools
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
from etils import epath

from lit_jax.porting.untrusted import (
    MAX_DIMENSIONS,
    TensorFileError,
    describe,
    failure,
    fits_numpy,
    is_size,
    map_file,
)

# Of a pickle with the arrays inside. That of Inception's weights has 95 MB.
MAX_ARRAYS_BYTES = 1 << 29
# Each takes up to 100 bytes of memory and some microseconds. A training
# checkpoint needs 40 for a tensor.
MAX_OPCODES = 1 << 20
# The storages that a torch file names.
STORAGE_DTYPES = {
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
# NumPy's types by the code that a pickle gives them. Not among them are
# objects, whose bytes would be pickles again, records and strings.
ARRAY_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
# Opcodes whose argument is the object.
_LITERALS = frozenset(
    [
        *"INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT".split(),
        *"UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8".split(),
        *"STRING BINSTRING SHORT_BINSTRING SHORT_BINBYTES BINBYTES".split(),
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MARK = object()


# ---- What a pickle is made into ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Global:
    """A global that the pickle names: it stays a name, for nothing imports it."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """Elements `start` to `start + numel` of the stored record `key`."""

    key: str
    dtype: np.dtype
    start: int
    numel: int
    record_numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A torch tensor that is not yet an array: its place in a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# NumPy's pickles make an object first and give it its state later, when the
# memo has the object already. So these two change.


@dataclasses.dataclass
class _DType:
    code: str
    byte_order: str = "="


@dataclasses.dataclass(eq=False)
class _Array:
    array: np.ndarray | None = None


# ---- The interpreter -----------------------------------------------------------------------------


class Unpickler:
    """Interprets one pickle; anything beyond arrays and plain containers fails.

    No opcode imports or calls: GLOBAL makes a `Global`, and REDUCE and BUILD know what
    each of the few names that may be called means. Time and memory are at most a fixed
    multiple of the stream's length.

    Args:
        stream: starts with the pickle, and `load` leaves it after that.
        fail: raises `TensorFileError` with its text.
    """

    def __init__(self, stream: io.BytesIO, fail: Callable[[str], NoReturn]):
        self.storages: dict[str, np.dtype] = {}  # by key, every storage that was named
        self._stream = stream
        self._fail = fail
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._dicts: list[dict] = []
        # Other opcodes make no more than they read. REDUCE and BUILD can be
        # given one object of the memo again and again: together they may make
        # this many characters and entries.
        self._budget = stream.getbuffer().nbytes

    def load(self) -> Any:
        """The object of the pickle. `place_arrays` then puts the arrays into its dicts."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self._stream)):
                if opcode.name == "STOP":
                    return self._result()
                if count == MAX_OPCODES:
                    self._fail(f"the pickle has more than {MAX_OPCODES} opcodes")
                self._step(opcode.name, argument)
        except TensorFileError:
            raise
        # Whatever the bytes provoke, in pickletools or here. Anything else is
        # our mistake.
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
        ) as error:
            self._fail(f"the pickle is damaged: {str(error)[:200] or type(error).__name__}")

    def place_arrays(self, view_of: Callable[[Any, Tensor], np.ndarray]) -> None:
        """Puts the array in place of every tensor and array that is a value of a dict.

        Args: view_of: gives the array of a key and its tensor.
        """
        for entries in self._dicts:
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    entries[key] = view_of(key, value)
                elif isinstance(value, _Array):
                    if value.array is None:
                        self._fail(f"{str(key)[:80]}: an array without content")
                    entries[key] = value.array

    def _result(self):
        if len(self._stack) != 1:
            self._fail(
                "the pickle is damaged: it ends with a stack of "
                f"{len(self._stack)} objects instead of one"
            )
        value = self._pop()
        return self._refuse(value) if isinstance(value, Global) else value

    def _step(self, opcode, argument):
        stack = self._stack
        if opcode in _LITERALS:
            stack.append(argument)
            return
        if opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
            return

        match opcode:
            case "PROTO" | "FRAME":
                pass
            # Containers.
            case "EMPTY_DICT":
                stack.append(self._new_dict())
            # Sets become lists, for what is in one may be anything here.
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "MARK":
                stack.append(_MARK)
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode[-1])
                items = [self._pop() for _ in range(size)]
                stack.append(tuple(items[::-1]))
            case "LIST" | "FROZENSET":
                stack.append(self._pop_to_mark())
            case "DICT":
                stack.append(self._fill(self._new_dict(), self._pop_to_mark()))
            case "APPEND":
                value = self._pop()
                self._top(list).append(value)
            case "APPENDS" | "ADDITEMS":
                values = self._pop_to_mark()
                self._top(list).extend(values)
            case "SETITEM":
                value = self._pop()
                key = self._pop()
                self._fill(self._top(dict), [key, value])
            case "SETITEMS":
                items = self._pop_to_mark()
                self._fill(self._top(dict), items)
            # The stack and the memo.
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
            # Names, and what is made of them.
            case "GLOBAL":
                stack.append(self._name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name = self._pop()
                module = self._pop()
                stack.append(self._name(module, name))
            case "BINPERSID":
                stack.append(self._storage(self._pop()))
            case "REDUCE":
                arguments = self._pop()
                function = self._pop()
                stack.append(self._reduce(function, arguments))
            case "NEWOBJ":
                arguments = self._pop()
                function = self._pop()
                if function != Global("argparse.Namespace") or arguments != ():
                    self._refuse(function)
                stack.append(self._new_dict())
            case "BUILD":
                state = self._pop()
                self._build(self._top(dict | _Array | _DType), state)
            case _:
                self._fail(f"the pickle uses the opcode {opcode}, which no tensor file needs")

    def _pop(self):
        value = self._stack.pop()
        if value is _MARK:
            self._fail("the pickle is damaged: a mark where an object belongs")
        return value

    def _top(self, kind):
        if not self._stack or not isinstance(self._stack[-1], kind):
            name = getattr(kind, "__name__", "object with a state")
            self._fail(f"the pickle is damaged: no {name} where one belongs")
        return self._stack[-1]

    def _pop_to_mark(self):
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _new_dict(self):
        self._dicts.append({})
        return self._dicts[-1]

    def _fill(self, target, items):
        if len(items) % 2:
            self._fail("the pickle is damaged: a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, str | int | float | bytes | Global | None):
                self._fail(f"the pickle uses a {type(key).__name__} as a key")
            # Larger integers can be chosen to have one hash: a dict of n of
            # them takes n^2 steps. Strings cannot, for Python's hash of them
            # has a secret.
            if isinstance(key, int) and abs(key) >= 2**32:
                self._fail("the pickle uses an integer of more than 32 bits as a key")
            if key in target:
                self._fail(f"the key {str(key)[:80]!r} appears twice")
            target[key] = value
        return target

    def _spend(self, amount):
        self._budget -= amount
        if self._budget < 0:
            self._fail(
                "the pickle makes more out of its objects than it holds, which no tensor file does"
            )

    def _name(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            self._fail("the pickle is damaged: a global that is not named by strings")
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return Global(name)
        return Global(f"{module}.{name}")

    def _refuse(self, function) -> NoReturn:
        what = function.name if isinstance(function, Global) else type(function).__name__
        self._fail(
            f"asks to run {what[:120]}, which is refused: only tensors in plain containers are "
            "read; save the state_dict alone: torch.save(model.state_dict(), FILE)"
        )

    # ---- States ----------------------------------------------------------------------------------

    def _build(self, target, state):
        if isinstance(target, _Array):
            target.array = self._array(state)
        elif isinstance(target, _DType):
            target.byte_order = self._byte_order(state)
        elif not isinstance(state, dict):
            self._fail(f"the pickle sets a {type(state).__name__} as the state of an object")
        # A state_dict carries its module versions as an attribute, which nobody
        # needs; a Namespace is all attributes.
        elif state.keys() != {"_metadata"}:
            self._spend(len(state))
            self._fill(target, [item for entry in state.items() for item in entry])

    def _byte_order(self, state):
        """Of a type's state: (version, byte order, subarray, names, fields, ...)."""
        plain = isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", ">", "|", "=")
        if not plain or any(part is not None for part in state[2:5]):
            self._fail("an array of records, which no tensor file needs")
        return state[1]

    def _array(self, state):
        """Of an array's state: (version, shape, type, is in Fortran's order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            self._fail("an array without shape, type and bytes")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            self._fail("an array without shape, type and bytes")
        if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
            self._fail(f"an array whose shape is not a tuple of up to {MAX_DIMENSIONS} sizes")
        if not all(map(is_size, shape)):
            self._fail(f"an array whose shape is not a tuple of up to {MAX_DIMENSIONS} sizes")

        of = np.dtype(dtype.byte_order + dtype.code)
        if not fits_numpy(shape, of.itemsize):
            self._fail(f"an array of shape {shape} and type {of} needs 2^63 bytes or more")
        num_bytes = math.prod(shape) * of.itemsize
        if num_bytes != len(data):
            self._fail(
                f"an array of shape {shape} and type {of} needs {num_bytes} bytes, "
                f"the pickle has {len(data)}"
            )
        if not data:
            return np.empty(shape, of)
        return np.frombuffer(data, of).reshape(shape, order="F" if fortran else "C")

    # ---- Storages and calls ----------------------------------------------------------------------

    def _storage(self, identity):
        is_tuple = isinstance(identity, tuple) and len(identity) in (5, 6)
        if not is_tuple or identity[0] != "storage":
            self._fail("a persistent object that is not a tensor storage")
        _, kind, key, _, numel = identity[:5]
        if not isinstance(kind, Global) or not isinstance(key, str) or not is_size(numel):
            self._fail("a storage without type, name and size")
        if kind.name not in STORAGE_DTYPES:
            self._refuse(kind)
        dtype = STORAGE_DTYPES[kind.name]
        if self.storages.setdefault(key, dtype) != dtype:
            self._fail(f"storage {key[:80]!r} is named with two types")

        if len(identity) == 5 or identity[5] is None:
            return Storage(key, dtype, 0, numel, numel)
        # Files before torch 0.4: (name of the view, first element, number of
        # elements), where tensors share a storage.
        view = identity[5]
        if not isinstance(view, tuple) or len(view) != 3 or not all(map(is_size, view[1:])):
            self._fail(f"storage {key[:80]!r}: not a view")
        return Storage(key, dtype, view[1], view[2], numel)

    def _reduce(self, function, arguments):
        maker = self._MAKERS.get(function.name) if isinstance(function, Global) else None
        if maker is None or not isinstance(arguments, tuple):
            self._refuse(function)
        made = maker(self, arguments)
        return self._refuse(function) if made is None else made

    # Each maker returns what a call of its name makes; None: not with such
    # arguments.

    def _ordered_dict(self, arguments):
        pairs = arguments[0] if arguments else []
        if len(arguments) > 1 or not isinstance(pairs, list):
            self._fail("an OrderedDict of something else than a list")
        self._spend(len(pairs))
        items = [item for key, value in pairs for item in (key, value)]
        return self._fill(self._new_dict(), items)

    def _default_dict(self, arguments):
        # The argument would make missing values. It stays a name, and nothing
        # misses one.
        return self._new_dict() if len(arguments) <= 1 else None

    def _namespace(self, arguments):
        return self._new_dict() if not arguments else None

    def _size(self, arguments):
        is_tuple = len(arguments) == 1 and isinstance(arguments[0], tuple)
        return arguments[0] if is_tuple else None

    def _set(self, arguments):
        items = arguments[0] if arguments else []
        if len(arguments) > 1 or not isinstance(items, list):
            return None
        self._spend(len(items))
        return list(items)

    def _path(self, arguments):
        return self._joined(pathlib.PurePosixPath, arguments)

    def _windows_path(self, arguments):
        return self._joined(pathlib.PureWindowsPath, arguments)

    def _joined(self, kind, arguments):
        self._spend(len(arguments))
        if not all(isinstance(argument, str) for argument in arguments):
            return None
        self._spend(sum(map(len, arguments)))
        return str(kind(*arguments))

    def _device(self, arguments):
        kind, *index = arguments if arguments else (None,)
        if not isinstance(kind, str) or len(index) > 1 or not all(map(is_size, index)):
            return None
        self._spend(len(kind))
        return ":".join([kind, *map(str, index)])

    def _parameter(self, arguments):
        is_tensor = bool(arguments) and isinstance(arguments[0], Tensor)
        return arguments[0] if is_tensor else None

    def _tensor(self, arguments):
        if len(arguments) < 4:
            return None
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, Storage):
            self._fail("a tensor without a storage")
        if not isinstance(shape, tuple) or not isinstance(strides, tuple):
            self._fail("a tensor whose shape or strides are not a tuple of sizes")
        many = len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS
        if many or not is_size(offset):
            self._fail(
                f"a tensor at {describe(offset)} with {len(shape)} dimensions and "
                f"{len(strides)} strides (limit {MAX_DIMENSIONS})"
            )
        if not all(map(is_size, shape + strides)):
            self._fail("a tensor whose shape or strides are not a tuple of sizes")
        return Tensor(storage, offset, shape, strides)

    def _empty_array(self, arguments):
        is_array = bool(arguments) and arguments[0] == Global("numpy.ndarray")
        return _Array() if is_array else None

    def _dtype(self, arguments):
        code = arguments[0] if arguments else None
        if code not in ARRAY_DTYPES:
            self._fail(
                f"an array of type {describe(code)}, which is not one of {', '.join(ARRAY_DTYPES)}"
            )
        return _DType(code)

    def _scalar(self, arguments):
        """A number of NumPy's, as Python's own."""
        if len(arguments) != 2 or not isinstance(arguments[0], _DType):
            return None
        dtype = np.dtype(arguments[0].byte_order + arguments[0].code)
        data = arguments[1]
        if not isinstance(data, bytes) or len(data) != dtype.itemsize:
            self._fail(f"a scalar of type {dtype} without its {dtype.itemsize} bytes")
        return np.frombuffer(data, dtype)[0].item()

    def _encoded(self, arguments):
        # Protocol 2 has no bytes: Python 3 writes text there, and asks for its
        # Latin-1.
        is_text = len(arguments) == 2 and isinstance(arguments[0], str)
        if not is_text or arguments[1] not in ("latin1", "latin-1"):
            return None
        self._spend(len(arguments[0]))
        return arguments[0].encode("latin-1")

    def _complex(self, arguments):
        are_numbers = all(isinstance(each, int | float) for each in arguments)
        return complex(*arguments) if len(arguments) == 2 and are_numbers else None

    def _no_bytes(self, arguments):
        return b"" if not arguments else None

    # The names that a pickle may call.
    _MAKERS = {
        "collections.OrderedDict": _ordered_dict,
        "collections.defaultdict": _default_dict,
        "argparse.Namespace": _namespace,
        "torch.Size": _size,
        "torch.device": _device,
        # Of protocol 2; builtins has them in the later ones.
        "__builtin__.set": _set,
        "__builtin__.frozenset": _set,
        "__builtin__.complex": _complex,
        "builtins.complex": _complex,
        "builtins.set": _set,
        "builtins.frozenset": _set,
        "pathlib.PosixPath": _path,
        "pathlib.PurePosixPath": _path,
        "pathlib._local.PosixPath": _path,  # Python 3.13
        "pathlib._local.PurePosixPath": _path,
        "pathlib.WindowsPath": _windows_path,
        "pathlib.PureWindowsPath": _windows_path,
        "pathlib._local.WindowsPath": _windows_path,
        "pathlib._local.PureWindowsPath": _windows_path,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "numpy.core.multiarray._reconstruct": _empty_array,
        "numpy._core.multiarray._reconstruct": _empty_array,
        "numpy.core.multiarray.scalar": _scalar,
        "numpy._core.multiarray.scalar": _scalar,
        "numpy.dtype": _dtype,
        "_codecs.encode": _encoded,
        "__builtin__.bytes": _no_bytes,  # of an empty array, in protocol 2
    }


def read_pickle(path: epath.PathLike) -> Any:
    """The object of a pickle of NumPy arrays in plain containers; nothing in it runs.

    Returns: with read-only arrays as values of its dicts.
    Raises: TensorFileError if the file is damaged or asks for anything else.
      FileNotFoundError.
    """
    fail = failure(path)
    buffer = map_file(path)
    if len(buffer) > MAX_ARRAYS_BYTES:
        fail(f"{len(buffer)} bytes of pickle, the limit is {MAX_ARRAYS_BYTES}")
    unpickler = Unpickler(io.BytesIO(buffer), fail)
    value = unpickler.load()
    unpickler.place_arrays(
        lambda key, _: fail(f"{str(key)[:80]}: a torch tensor, which a torch file alone can hold")
    )
    return value

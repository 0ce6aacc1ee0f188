"""Pickles are interpreted, never run: what may be named, what may be called, and at what cost."""

import argparse
import codecs
import collections
import os
import pathlib
import pickle
import struct
import subprocess

import numpy as np
import pytest
import torch
from torch_archives import archive, legacy, refuse, tensor_pickle

from lit_jax.porting import pickles, torch_file
from lit_jax.porting.untrusted import TensorFileError


class Run:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


class Built:
    def __init__(self, state):
        self._state = state

    def __reduce__(self):
        return argparse.Namespace, (), self._state


def canary_call(path):
    return f"open({str(path)!r}, 'w').close()"


def attacks(folder):
    """Name -> (object whose unpickling would leave a canary, what the message says)."""
    canary, run = folder / "canary", canary_call(folder / "canary")
    return {
        "os_system": (Run(os.system, f"touch {canary}"), "asks to run posix.system"),
        "eval": (Run(eval, run), "asks to run (builtins|__builtin__).eval"),
        "exec": (Run(exec, run), "asks to run (builtins|__builtin__).exec"),
        "subprocess": (
            Run(subprocess.call, ["touch", str(canary)]),
            "asks to run (subprocess|commands).call",
        ),
        "open": (Run(open, str(canary), "w"), "asks to run (_?io).open"),
        "pathlib_touch": (Run(pathlib.Path.touch, canary), "asks to run"),
        "getattr": (Run(getattr, 1, "real"), "asks to run (builtins|__builtin__).getattr"),
        "import": (Run(__import__, "antigravity"), "asks to run (builtins|__builtin__).__import__"),
        "torch_load": (Run(torch.load, "x"), "asks to run torch.serialization.load"),
        "numpy_load": (Run(np.load, "x", None, True), "asks to run numpy"),
        "a_module": (torch.nn.Linear(1, 1), "asks to run torch.nn.modules.linear.Linear"),
        "a_class": (dict, "asks to run (builtins|__builtin__).dict"),
        "in_a_namespace": (
            argparse.Namespace(x=Run(os.system, f"touch {canary}")),
            "asks to run posix.system",
        ),
        "in_optimizer_state": (
            {"model": {}, "opt": [Run(os.system, f"touch {canary}")]},
            "posix.system",
        ),
        "as_a_key": ({Run(os.system, f"touch {canary}"): 1}, "posix.system"),
        "namespace_state_is_a_tuple": (
            Built((None, {"__class__": 1})),
            "sets a tuple as the state",
        ),
        "tuple_as_a_key": ({(1, 2): 3}, "uses a tuple as a key"),
        "a_number": (7, "holds 7, not a dict"),
        "a_list": ([1], "holds a list, not a dict"),
        "bytearray": ({"a": bytearray(b"x")}, "asks to run|opcode BYTEARRAY8"),
        "a_set_of_calls": ({"a": {Run(os.system, f"touch {canary}")}}, "posix.system"),
        "a_device_of_no_name": ({"a": Run(torch.device, b"cuda")}, "asks to run torch.device"),
        "a_set_of_a_dict": ({"a": Run(set, {})}, "asks to run (builtins|__builtin__).set"),
    }


@pytest.mark.parametrize("form", ["zip2", "zip5", "legacy"])
@pytest.mark.parametrize("name", attacks(pathlib.Path("/")))
def test_pickles_that_ask_for_more_than_tensors_are_refused(tmp_path, name, form):
    value, message = attacks(tmp_path)[name]
    pickled = pickle.dumps(value, 5 if form == "zip5" else 2)
    refuse(
        tmp_path / "a.pt",
        legacy(pickled, keys=(), data=b"") if form == "legacy" else archive(pickled),
        message,
    )


def test_the_attacks_are_real(tmp_path):
    """The canary would show: plain pickle runs what we refuse."""
    for name in (
        "os_system",
        "eval",
        "exec",
        "subprocess",
        "open",
        "in_a_namespace",
        "in_optimizer_state",
    ):
        value, _ = attacks(tmp_path)[name]
        try:
            pickle.loads(pickle.dumps(value))
        except TypeError:
            pass  # os.system's 0 as part of something else
        assert (tmp_path / "canary").exists(), name
        (tmp_path / "canary").unlink()


MEMO_PATHS = (
    b"\x80\x02]q\0(cpathlib\nPurePosixPath\nq\1X\xe8\3\0\0"
    + b"y" * 1000
    + b"\x85q\2R"
    + b"h\1h\2R" * 9
    + b"e."
)
MEMO_PAIRS = (
    b"\x80\x02]q\0(ccollections\nOrderedDict\nq\1]("
    + b"".join(b"K" + bytes([i]) + b"K\1\x86" for i in range(200))
    + b"e\x85q\2R"
    + b"h\1h\2R" * 9
    + b"e."
)
MEMO_STATE = (
    b"\x80\x02]q\0(}q\1("
    + b"".join(b"K" + bytes([i]) + b"K\1" for i in range(200))
    + b"u"
    + b"}h\1b" * 9
    + b"e."
)


def nested_tuples(depth):
    return b"\x80\x02)" + b"\x85" * depth + b"."


def doubling_lists(count):
    """A list of a list twice, `count` times over: 2^count leaves if anything walked it."""
    return (
        b"\x80\x02]q\0"
        + b"".join(
            b"0]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e"
            for i in range(count)
        )
        + b"."
    )


GOOD = tensor_pickle()
PICKLES = {
    "paths_of_one_string": (
        lambda: MEMO_PATHS,
        "makes more out of its objects than it holds",
    ),
    "dicts_of_one_list": (
        lambda: MEMO_PAIRS,
        "makes more out of its objects than it holds",
    ),
    "states_of_one_dict": (
        lambda: MEMO_STATE,
        "makes more out of its objects than it holds",
    ),
    "keys_of_one_hash": (
        lambda: b"\x80\x02}\x8a\x09" + (2**61 - 1).to_bytes(9, "little") + b"K\1s.",
        "more than 32 bits",
    ),
    "state_with_a_key_twice": (
        lambda: b"\x80\x02ccollections\nOrderedDict\n)RX\1\0\0\0aK\1s}X\1\0\0\0aK\2sb.",
        "the key 'a' appears twice",
    ),
    "duplicate_key": (lambda: GOOD[:-1] + GOOD[3:], "the key 'a' appears twice"),
    "pickle_without_end": (lambda: GOOD[:-1], "the pickle is damaged"),
    "pickle_of_garbage": (lambda: bytes(range(200, 256)) * 9, "the pickle is damaged"),
    "pickle_of_nothing": (lambda: b"", "the pickle is damaged"),
    "stack_underflow": (lambda: b"\x80\x02}s.", "the pickle is damaged"),
    "memo_that_was_never_put": (lambda: b"\x80\x02h\x07.", "the pickle is damaged"),
    "memo_of_4_billion": (lambda: b"\x80\x02]r\xff\xff\xff\xff.", "holds a list"),
    "mark_as_an_object": (lambda: b"\x80\x02((\x85.", "the pickle is damaged"),
    "key_without_a_value": (lambda: b"\x80\x02}(K\x01u.", "a key without a value"),
    "string_longer_than_the_pickle": (
        lambda: b"\x80\x02X\xff\xff\xff\x7fabc.",
        "the pickle is damaged",
    ),
    "bytes_of_2_to_62": (
        lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
        "the pickle is damaged",
    ),
    "nested_far_too_deep": (lambda: nested_tuples(10**5), "holds a tuple"),
    "nested_as_a_key": (
        lambda: b"\x80\x02}" + nested_tuples(10**5)[2:-1] + b"K\1s.",
        "a tuple as a key",
    ),
    "billion_laughs": (lambda: doubling_lists(100), "holds a list"),
    "billion_laughs_as_a_shape": (
        lambda: GOOD.replace(b"\x89c", doubling_lists(60)[2:-1] + b"0\x89c", 1).replace(
            b"torch._utils", b"torch._Utils"
        ),
        "asks to run",
    ),
    "inst_opcode": (lambda: b"(S'touch canary'\nios\nsystem\n.", "opcode INST"),
    "obj_opcode": (lambda: b"(cos\nsystem\nS'x'\no.", "opcode OBJ"),
    "newobj_ex_opcode": (
        lambda: b"\x80\x04cargparse\nNamespace\n)}\x92.",
        "opcode NEWOBJ_EX",
    ),
    "extension_opcode": (lambda: b"\x80\x02\x82\x01.", "opcode EXT1"),
    "stack_global_of_numbers": (
        lambda: b"\x80\x04K\x01K\x02\x93.",
        "not named by strings",
    ),
    "persistent_text_id": (lambda: b"Psomething\n.", "opcode PERSID"),
    "dotted_name": (
        lambda: b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        "asks to run collections.OrderedDict.__init__",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles_are_refused(tmp_path, monkeypatch, name):
    content, message = PICKLES[name]
    monkeypatch.chdir(tmp_path)  # where some would leave their canary
    refuse(tmp_path / "a.pt", archive(content()), message)


def test_what_is_named_and_not_called_stays_a_name(tmp_path):
    """As Lightning's callbacks do, keyed by their class; os.system is as inert as they."""
    torch.save(
        {
            "ema": {"a": torch.ones(2)},
            "callbacks": {argparse.ArgumentParser: os.system},
            "args": torch.float32,
            "opt": collections.defaultdict(dict),
        },
        tmp_path / "a.pt",
    )
    read = torch_file.read_torch(tmp_path / "a.pt").tensors
    name = pickles.Global
    assert read["callbacks"] == {name("argparse.ArgumentParser"): name("posix.system")}
    assert read["args"] == name("torch.float32") and read["opt"] == {}
    np.testing.assert_array_equal(read["ema"]["a"], np.ones(2))


# NumPy's arrays, in torch files and in pickles of their own.


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("code", [*pickles.ARRAY_DTYPES, ">f4", "<i8"])
def test_arrays_of_every_type_are_read(tmp_path, code, protocol):
    array = np.arange(6).reshape(2, 3).astype(code)
    tree = {"a": array, "b": {"c": array.T, "d": array[0, 1:], "e": array.reshape(2, 1, 3)}}
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(tree, protocol))
    read = pickles.read_pickle(tmp_path / "a.pickle")
    assert read.keys() == tree.keys() and read["b"].keys() == tree["b"].keys()
    for ours, theirs in ((read["a"], array), *zip(read["b"].values(), tree["b"].values())):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
        assert not ours.flags.writeable


def test_arrays_are_read_in_torch_files_too(tmp_path):
    torch.save({"a": torch.ones(2), "b": np.arange(3.0)}, tmp_path / "a.pt")
    read = torch_file.read_torch(tmp_path / "a.pt").tensors
    np.testing.assert_array_equal(read["a"], np.ones(2, np.float32))
    np.testing.assert_array_equal(read["b"], [0, 1, 2])


@pytest.mark.parametrize("protocol", [2, 4])
def test_empty_arrays_keep_their_shape(tmp_path, protocol):
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"a": np.zeros((2, 0, 3))}, protocol))
    assert pickles.read_pickle(tmp_path / "a.pickle")["a"].shape == (2, 0, 3)


RECONSTRUCT = np.zeros(1).__reduce__()[0]


class Type:
    """Pickles to a NumPy type of any code and state."""

    def __init__(self, code="f4", byte_order="<", fields=(None, None, None)):
        self._call = np.dtype, (code, False, True), (3, byte_order, *fields, -1, -1, 0)

    def __reduce__(self):
        return self._call


class Array:
    """Pickles to a NumPy array of any state."""

    def __init__(self, shape=(2,), dtype=None, data=bytes(8), state=None):
        dtype = Type() if dtype is None else dtype
        state = (1, shape, dtype, False, data) if state is None else state
        self._call = RECONSTRUCT, (np.ndarray, (0,), b"b"), state

    def __reduce__(self):
        return self._call


def encoded_again_and_again():
    """One text of a thousand letters, a hundred times as bytes."""
    text = b"X" + struct.pack("<I", 1000) + b"y" * 1000 + b"q\1"
    call = b"c_codecs\nencode\nq\2" + text + b"X\6\0\0\0latin1q\3\x86R"
    return b"\x80\x02](" + call + b"h\2h\1h\3\x86R" * 99 + b"e."


SCALAR = np.float32(1).__reduce__()[0]
ARRAYS = {
    "objects": (np.array([None], object), "an array of type 'O8', which is not one of f2"),
    "an_attack_in_an_array": (np.array([Run(os.system, "touch canary")], object), "type 'O8'"),
    "records": (np.zeros(2, [("a", "f4")]), "an array of type 'V4'"),
    "strings": (np.array(["a"]), "an array of type 'U1'"),
    "dates": (np.zeros(1, "M8[s]"), "an array of type 'M8'"),
    "a_type_of_containers": (Array(dtype=Type(("f4", "f4"))), "an array of type a tuple"),
    "a_subarray": (Array(dtype=Type(fields=(("f4", (2,)), None, None))), "an array of records"),
    "named_fields": (Array(dtype=Type("f4", "|", (None, ("a",), {}))), "an array of records"),
    "an_unknown_byte_order": (Array(dtype=Type("f4", "!")), "an array of records"),
    "no_type": (Array(dtype=3), "without shape, type and bytes"),
    "bytes_missing": (Array(data=bytes(7)), r"shape \(2,\) .* needs 8 bytes, the pickle has 7"),
    "bytes_too_many": (Array(data=bytes(9)), "needs 8 bytes, the pickle has 9"),
    "bytes_as_text": (Array(data="xxxxxxxx"), "without shape, type and bytes"),
    "a_list_of_objects": (Array(data=[None, None]), "without shape, type and bytes"),
    "negative_shape": (Array(shape=(-2,)), "whose shape is not a tuple of up to 16 sizes"),
    "boolean_shape": (Array(shape=(True,)), "whose shape is not a tuple"),
    "shape_a_number": (Array(shape=2), "whose shape is not a tuple"),
    "hundred_dimensions": (Array(shape=(1,) * 100), "whose shape is not a tuple of up to 16"),
    "shape_overflows": (Array(shape=(2**62, 4)), r"needs 2\^63 bytes or more"),
    "empty_shape_overflows": (Array(shape=(0, 2**62), data=b""), r"needs 2\^63 bytes or more"),
    "state_too_short": (Array(state=(1, (2,))), "without shape, type and bytes"),
    "state_a_dict": (Array(state={"__class__": 1}), "without shape, type and bytes"),
    "no_state": (Run(RECONSTRUCT, np.ndarray, (0,), b"b"), "a: an array without content"),
    "another_class": (Run(RECONSTRUCT, dict, (0,), b"b"), "asks to run numpy.*_reconstruct"),
    "as_a_key": ({Array(): 1}, "uses a _Array as a key"),
    "a_scalar_of_objects": (Run(SCALAR, np.dtype(object), b"x" * 8), "an array of type 'O8'"),
    "a_scalar_too_short": (Run(SCALAR, np.dtype("f8"), b"x" * 7), "float64 without its 8 bytes"),
    "a_scalar_of_text": (Run(SCALAR, np.dtype("f8"), "x" * 8), "float64 without its 8 bytes"),
    "a_scalar_of_no_type": (Run(SCALAR, "f8", b"x" * 8), "asks to run numpy.*multiarray.scalar"),
    "numpy_load": (Run(np.load, "x"), "asks to run numpy.*load"),
    "another_codec": (Run(codecs.encode, "x", "rot13"), "asks to run _codecs.encode"),
    "no_codec": (Run(codecs.encode, "x"), "asks to run _codecs.encode"),
    "letters_that_are_no_bytes": (Run(codecs.encode, "\u0661", "latin1"), "pickle is damaged"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_lie_are_refused(tmp_path, monkeypatch, name, protocol):
    value, message = ARRAYS[name]
    monkeypatch.chdir(tmp_path)
    refuse(tmp_path / "a.pickle", pickle.dumps({"a": value}, protocol), message)


@pytest.mark.parametrize(
    "content, message",
    [
        (encoded_again_and_again(), "makes more out of its objects than it holds"),
        (tensor_pickle(), "a: a torch tensor, which a torch file alone can hold"),
        (pickle.dumps({"a": np.ones(3)}, 4)[:-1], "the pickle is damaged"),
        (pickle.dumps({"a": np.ones(3)}, 5), "uses the opcode BYTEARRAY8|asks to run numpy"),
        (b"", "the file is empty"),
        (b"\x80\x04not a pickle", "the pickle is damaged"),
    ],
)
def test_pickles_of_arrays_that_lie_are_refused(tmp_path, content, message):
    refuse(tmp_path / "a.pickle", content, message)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_values_beside_the_weights_are_read(tmp_path, protocol):
    """As trainers leave them in their arguments and counters."""
    values = {
        "steps": np.int64(5),
        "loss": np.float32(0.5),
        "done": np.bool_(True),
        "device": torch.device("cuda", 1),
        "cpu": torch.device("cpu"),
        "tags": {"a"},
        "frozen": frozenset([7]),
        "raw": b"abc",
        "phase": 1 + 2j,
        "place": pathlib.PureWindowsPath("C:/a") / "b",
    }
    torch.save(values, tmp_path / "a.pt", pickle_protocol=protocol)
    expected = dict(
        steps=5,
        loss=0.5,
        done=True,
        device="cuda:1",
        cpu="cpu",
        tags=["a"],
        frozen=[7],
        raw=b"abc",
        phase=1 + 2j,
        place="C:\\a\\b",
    )
    read = torch_file.read_torch(tmp_path / "a.pt").tensors
    assert read == expected
    assert [type(read[name]) for name in ("steps", "loss", "done")] == [int, float, bool]


def test_paths_of_other_pythons_are_read(tmp_path):
    """Python 3.13 moved its classes of paths."""
    content = b"\x80\x02}X\1\0\0\0acpathlib._local\nPosixPath\nX\1\0\0\0bX\1\0\0\0c\x86Rs."
    (tmp_path / "a.pickle").write_bytes(content)
    assert pickles.read_pickle(tmp_path / "a.pickle") == {"a": "b/c"}


@pytest.mark.parametrize("unit", [b"}", b"\x94", b"}b", b"NNN\x87"], ids=str)
def test_a_pickle_has_a_largest_number_of_opcodes(tmp_path, monkeypatch, unit):
    """Dicts, entries of the memo, states, tuples: each byte makes up to 100 of memory."""
    monkeypatch.setattr(pickles, "MAX_OPCODES", 1000)
    content = b"\x80\x02}" + unit * 1000 + b"."
    for name, form in (("a.pt", archive), ("b.pt", legacy), ("c.pickle", bytes)):
        (tmp_path / name).mkdir()
        refuse(tmp_path / name / name, form(content), "the pickle has more than 1000 opcodes")


def test_a_pickle_of_arrays_has_a_largest_size(tmp_path):
    with (tmp_path / "a.pickle").open("wb") as file:
        file.write(b"\x80\x04}.")
        file.truncate(pickles.MAX_ARRAYS_BYTES + 1)
    with pytest.raises(TensorFileError, match="536870913 bytes of pickle, the limit is 536870912"):
        pickles.read_pickle(tmp_path / "a.pickle")


def test_no_damage_to_a_good_pickle_gives_anything_but_a_clear_error(tmp_path):
    rng = np.random.default_rng(0)
    good = pickle.dumps({"a": {"b": np.zeros((2, 2), np.float32)}, "c": np.arange(3)}, 4)
    path = tmp_path / "a.pickle"
    for trial in range(600):
        damaged = bytearray(good)
        if trial % 3 == 0:
            del damaged[rng.integers(1, len(good)) :]
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            value = pickles.read_pickle(path)
        except TensorFileError as error:
            assert "\n" not in str(error)
            continue
        arrays = list(value.values()) if isinstance(value, dict) else []
        for array in arrays:
            assert not isinstance(array, np.ndarray) or array.nbytes <= len(good)

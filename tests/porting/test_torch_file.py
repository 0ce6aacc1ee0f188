"""Torch's files read and written without torch: against real torch, and against files that lie."""

import argparse
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_archives import archive, entry, header, legacy, patched, refuse, tensor_pickle

from lit_jax.porting import torch_file
from lit_jax.porting.untrusted import TensorFileError

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def to_numpy(tensor):
    """Through integers for bfloat16, which torch does not hand to NumPy."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(array, tensor):
    expected = to_numpy(tensor)
    assert array.dtype == expected.dtype and array.shape == expected.shape
    assert np.array_equal(array, expected)
    assert not array.flags.writeable or array.size == 0


# What torch writes.


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_stride_is_read(tmp_path, dtype, legacy):
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    tensors = {
        "plain": base,
        "transposed": base.permute(2, 0, 1),
        "slice": base[:, 1:, ::2],
        "scalar": base[1, 2, 3],
        "empty": base[:0],
        "shared": base,
        "parameter": torch.nn.Parameter(base.clone(), requires_grad=False),
    }
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    read = torch_file.read_torch(tmp_path / "a.pt").tensors
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(read[name], tensor.detach())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_checkpoint_with_a_namespace_is_read(tmp_path, legacy):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(
        model="DiT-S/2",
        tmp_path=pathlib.Path("a") / "b",
        lr=1e-4,
        none=None,
        big=2**70,
        flag=True,
        names=["x", "y"],
        size=torch.Size([1, 2]),
    )
    torch.save(
        {
            "model": model.state_dict(),
            "ema": model.state_dict(),
            "opt": optimizer.state_dict(),
            "args": args,
            "steps": 7,
        },
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    read = torch_file.read_torch(tmp_path / "a.pt").tensors
    assert read["args"] == vars(args) | {"tmp_path": "a/b", "size": (1, 2)}
    assert read["steps"] == 7
    assert_same(read["ema"]["weight"], model.weight.detach())
    assert_same(read["opt"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path, protocol):
    tensor = torch.randn(3)
    torch.save(
        {"a": tensor, "n": argparse.Namespace(x=1)}, tmp_path / "a.pt", pickle_protocol=protocol
    )
    read = torch_file.read_torch(tmp_path / "a.pt").tensors
    assert_same(read["a"], tensor)
    assert read["n"] == {"x": 1}


def test_what_we_write_torch_reads_and_so_do_we(tmp_path):
    state = {
        "a.weight": torch.randn(3, 5),
        "b": torch.randn(()),
        "c": torch.randn(2, 3, 4, 5),
        "ü": torch.zeros(0, 2),
    }
    tensors = [
        torch_file.NewTensor(key, tuple(tensor.shape), tensor.numpy)
        for key, tensor in state.items()
    ]
    torch_file.write_torch(tmp_path / "a.pt", tensors)
    torch_file.write_safetensors(tmp_path / "a.safetensors", tensors, {"k": "v"})
    for loaded in (
        torch.load(tmp_path / "a.pt", weights_only=True),
        torch.load(tmp_path / "a.pt", weights_only=True, mmap=True),
        load_file(tmp_path / "a.safetensors"),
    ):
        assert set(loaded) == set(state)
        assert all(torch.equal(loaded[key], state[key]) for key in state)
    ours = torch_file.read_safetensors(tmp_path / "a.safetensors")
    assert ours.metadata == {"k": "v"}
    for tensors in (ours.tensors, torch_file.read_torch(tmp_path / "a.pt").tensors):
        for key, tensor in state.items():
            assert_same(tensors[key], tensor)
    assert list(torch.load(tmp_path / "a.pt")) == list(state)  # in our order


def test_safetensors_of_the_library_are_read(tmp_path):
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    read = torch_file.read_safetensors(tmp_path / "a.safetensors")
    for key, tensor in tensors.items():
        assert_same(read.tensors[key], tensor)


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path):
    def broken():
        raise RuntimeError("disk on fire")

    def tensor(key, read):
        return torch_file.NewTensor(key, (2,), read)

    for write, name in (
        (torch_file.write_torch, "a.pt"),
        (lambda path, t: torch_file.write_safetensors(path, t, {}), "a.safetensors"),
    ):
        (tmp_path / name).write_text("old")
        with pytest.raises(RuntimeError, match="on fire"):
            write(tmp_path / name, [tensor("a", lambda: np.zeros(2)), tensor("b", broken)])
        with pytest.raises(ValueError, match=r"a: shape \(3,\), announced \(2,\)"):
            write(tmp_path / name, [tensor("a", lambda: np.zeros(3))])
        assert (tmp_path / name).read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.safetensors"]


def flip(path, content):
    """Flips one bit in the only place of a file that holds `content`."""
    data = path.read_bytes()
    assert data.count(content) == 1
    place = data.index(content) + len(content) * 5 // 8
    path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])


@pytest.mark.parametrize(
    "view", [lambda t: t, lambda t: t.T, lambda t: t[1:, 1:]], ids=["whole", "transposed", "part"]
)
def test_a_flipped_bit_is_found(tmp_path, view):
    """torch.load takes such a file without a word."""
    path = tmp_path / "a.pt"
    tensors = {name: torch.randn(30, 20) for name in "abc"}
    torch.save({name: view(tensor) for name, tensor in tensors.items()}, path)
    file = torch_file.read_torch(path)
    assert file.verify(file.tensors.values()) == 3
    flip(path, tensors["b"].numpy().tobytes())
    assert not torch.equal(torch.load(path, weights_only=True)["b"], view(tensors["b"]))
    file = torch_file.read_torch(path)
    with pytest.raises(
        TensorFileError,
        match="record 'a/data/1' is damaged: its CRC-32 is [0-9a-f]{8}, the archive says",
    ):
        file.verify(file.tensors.values())
    assert file.verify([file.tensors["a"], file.tensors["c"]]) == 2  # what is not taken is not read
    assert file.verify([np.zeros(3)]) == 0  # of another file


def test_archives_without_checksums_are_taken(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    file = torch_file.read_torch(tmp_path / "a.pt")
    assert file.verify(file.tensors.values()) == 0


def test_reading_does_not_load_torch():
    code = "import sys, lit_jax.porting.torch_file; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Files that lie. Each case writes a file and names what the one line of its error must say.


SAFETENSORS = {
    "empty": (b"", "the file is empty"),
    "short": (b"\1\2\3", "too few"),
    "lfs_pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
        "Git LFS pointer",
    ),
    "header_past_the_end": (header({}, length=1000), "the header claims 1000 bytes"),
    "header_of_2_to_63": (header({}, length=2**63), "the header claims 9223372036854775808"),
    "header_not_json": (header(b"{nope"), "not valid JSON"),
    "header_not_utf8": (header(b"\xff\xfe{}"), "not valid JSON"),
    "header_nested_a_million_deep": (header(b"[" * 1_000_000), "not valid JSON"),
    "header_with_a_huge_number": (header(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "header_a_list": (header([]), "the header is a list"),
    "duplicate_key": (header(b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "duplicate_field": (
        header(b'{"a": {"dtype": "F32", "dtype": "F32"}}'),
        "'dtype' appears twice",
    ),
    "metadata_not_strings": (header({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry_a_number": (header({"a": 1}), "a: the entry"),
    "entry_without_shape": (
        header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
        "a: the entry",
    ),
    "unknown_dtype": (
        header({"a": entry(dtype="F8_E4M3", offsets=(0, 2))}, bytes(2)),
        "dtype 'F8_E4M3'",
    ),
    "dtype_a_list": (header({"a": entry() | {"dtype": ["F32"]}}, bytes(8)), "dtype"),
    "negative_dimension": (
        header({"a": entry(shape=(-2, -1))}, bytes(8)),
        r"a: \[-2, -1\] is not a shape",
    ),
    "float_dimension": (header({"a": entry(shape=(2.0,))}, bytes(8)), "is not a shape"),
    "boolean_dimension": (header({"a": entry(shape=(True, 2))}, bytes(8)), "is not a shape"),
    "thousand_dimensions": (header({"a": entry(shape=[1] * 1000)}, bytes(8)), "is not a shape"),
    "shape_overflows_64_bits": (
        header({"a": entry(shape=[2**32, 2**32, 2**2, 2**2])}, bytes(8)),
        r"\(4294967296, 4294967296, 4, 4\) of F32 needs 2\^63 bytes",
    ),
    "empty_shape_overflows": (
        header({"a": entry(shape=[0, 2**62], offsets=(0, 0))}),
        r"a: shape \(0, 4611686018427387904\) of "
        r"F32 needs 2\^63 bytes",
    ),
    "a_header_of_9_megabytes": (header(b" " * (9 << 20)), "the limit is 8388608"),
    "a_long_name": (header({"k" * 10**5: 1}), ": k{80}: the entry"),
    "offsets_past_the_end": (
        header({"a": entry(shape=(4,), offsets=(0, 16))}, bytes(8)),
        "outside the 8 bytes",
    ),
    "offsets_reversed": (header({"a": entry(offsets=(8, 0))}, bytes(8)), "outside"),
    "offsets_of_another_size": (
        header({"a": entry(shape=(1,))}, bytes(8)),
        r"needs 4 bytes, the offsets span 8",
    ),
    "overlapping_tensors": (
        header({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "overlap or leave a gap",
    ),
    "gap_between_tensors": (
        header({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24)),
        "leave a gap",
    ),
    "hidden_bytes_at_the_end": (
        header({"a": entry()}, bytes(99)),
        "91 bytes after the last tensor",
    ),
    "truncated": (
        header({"a": entry(shape=(2, 4), offsets=(0, 32))}, bytes(31)),
        "outside the 31 bytes",
    ),
    "a_zip_by_another_name": (b"PK\3\4" + bytes(100), "the header claims"),
    "a_web_page": (b"<!DOCTYPE html><html>not found</html>", "a web page, not the weights"),
    "an_error_of_a_bucket": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "a web page",
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_hostile_safetensors_are_refused(tmp_path, name):
    content, message = SAFETENSORS[name]
    refuse(tmp_path / "a.safetensors", content, message)


def overlapping(data):
    """The entry of data/1 in the central directory leads to the record of data/0."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        offset = file.getinfo("archive/data/0").header_offset
    return patched(data, "archive/data/1", 42, struct.pack("<I", offset))


GOOD = tensor_pickle()
ZIPS = {
    "truncated_by_one_byte": (lambda: archive(GOOD)[:-1], "damaged or truncated zip"),
    "truncated_in_the_middle": (lambda: archive(GOOD)[:200], "damaged or truncated zip"),
    "only_the_signature": (lambda: b"PK\3\4", "damaged or truncated zip"),
    "no_pickle": (lambda: archive(GOOD).replace(b"data.pkl", b"data.pkk"), "0 data.pkl records"),
    "two_pickles": (lambda: archive(GOOD, {"other/data.pkl": GOOD}), "2 data.pkl records"),
    "the_same_record_twice": (
        lambda: archive(GOOD, {"archive/data/0": bytes(16), "archive/data/1": bytes(16)}).replace(
            b"data/1", b"data/0"
        ),
        "'archive/data/0' appears twice",
    ),
    "zip_bomb": (
        lambda: archive(
            GOOD, {"archive/data/0": bytes(10_000_000)}, compression=zipfile.ZIP_DEFLATED
        ),
        "is compressed",
    ),
    "compressed_pickle": (
        lambda: archive(GOOD + bytes(10_000), compression=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "claims_more_than_the_file": (
        lambda: patched(
            patched(archive(GOOD), "archive/data/0", 20, b"\xff\xff\xff\x7f"),
            "archive/data/0",
            24,
            b"\xff\xff\xff\x7f",
        ),
        "2147483647 bytes does not fit",
    ),
    "sizes_that_differ": (
        lambda: patched(archive(GOOD), "archive/data/0", 24, b"\xff\xff\0\0"),
        "is compressed",
    ),
    "header_elsewhere": (
        lambda: patched(archive(GOOD), "archive/data/0", 42, b"\x07\0\0\0"),
        "does not start where",
    ),
    "encrypted": (lambda: patched(archive(GOOD), "archive/data/0", 8, b"\1\0"), "is encrypted"),
    "torchscript": (
        lambda: archive(GOOD, {"archive/constants.pkl": b"", "archive/code/a.py": b"x"}),
        "TorchScript",
    ),
    "big_endian": (
        lambda: archive(GOOD, {"archive/data/0": bytes(16), "archive/byteorder": b"big"}),
        "not little-endian",
    ),
    "storage_missing": (lambda: archive(tensor_pickle(key="7")), "storage '7' is not in the file"),
    "storage_named_like_a_path": (
        lambda: archive(tensor_pickle(key="../../etc/passwd")),
        "is not in the file",
    ),
    "storage_smaller_than_claimed": (
        lambda: archive(tensor_pickle(numel=400)),
        "claims 400 x 4 bytes",
    ),
    "storage_larger_than_claimed": (
        lambda: archive(tensor_pickle(numel=1, shape=(1,), strides=(1,))),
        "the file holds 16",
    ),
    "storage_of_2_to_62": (
        lambda: archive(tensor_pickle(numel=2**62)),
        "claims 4611686018427387904 x 4 bytes",
    ),
    "shape_past_the_storage": (
        lambda: archive(tensor_pickle(shape=(2, 3), strides=(3, 1))),
        "does not fit",
    ),
    "offset_past_the_storage": (lambda: archive(tensor_pickle(offset=3)), "does not fit"),
    "stride_past_the_storage": (lambda: archive(tensor_pickle(strides=(4, 1))), "does not fit"),
    "stride_zero_bomb": (
        lambda: archive(tensor_pickle(shape=(2**30, 2**30), strides=(0, 0))),
        "does not fit",
    ),
    "shape_overflows": (
        lambda: archive(tensor_pickle(shape=(2**62, 4), strides=(0, 0))),
        r"needs 2\^63 bytes",
    ),
    "empty_shape_overflows": (
        lambda: archive(tensor_pickle(shape=(0, 2**62), strides=(1, 1))),
        r"a: shape \(0, 4611686018427387904\) of float32 needs 2\^63 bytes",
    ),
    "two_records_in_one_place": (
        lambda: overlapping(archive(GOOD, {f"archive/data/{i}": bytes(16) for i in range(2)})),
        "records 'archive/data/0' and 'archive/data/1' overlap",
    ),
    "dimension_over_63_bits": (
        lambda: archive(tensor_pickle(shape=(2**64, 1))),
        "not a tuple of sizes",
    ),
    "negative_shape": (lambda: archive(tensor_pickle(shape=(-2, -2))), "not a tuple of sizes"),
    "negative_stride": (lambda: archive(tensor_pickle(strides=(-1, 1))), "not a tuple of sizes"),
    "negative_offset": (lambda: archive(tensor_pickle(offset=-1)), "a tensor at a int"),
    "more_strides_than_dimensions": (
        lambda: archive(tensor_pickle(strides=(2, 1, 1))),
        "2 dimensions and 3 strides",
    ),
    "hundred_dimensions": (
        lambda: archive(tensor_pickle(shape=(1,) * 100, strides=(1,) * 100)),
        "100 dimensions",
    ),
    "unknown_storage": (
        lambda: archive(tensor_pickle(storage="QInt8Storage")),
        "asks to run torch.QInt8Storage",
    ),
    "negative_numel": (lambda: archive(tensor_pickle(numel=-4)), "without type, name and size"),
    "text_file": (lambda: b"hello", "not a torch file"),
    "tar_of_old": (lambda: b"storages" + bytes(600), "not a torch file"),
    "an_lfs_pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
        "Git LFS pointer",
    ),
    "an_empty_file": (lambda: b"", "the file is empty"),
    "a_web_page": (lambda: b"\n  <html><body>log in</body></html>", "a web page, not the weights"),
    "pickle_with_a_flipped_bit": (
        lambda: archive(GOOD).replace(GOOD, GOOD[:-3] + b"!" + GOOD[-2:]),
        "'archive/data.pkl' is damaged: its CRC-32 is",
    ),
    "a_pickle_of_5_megabytes": (
        lambda: archive(b"\x80\x02" + b"}0" * (5 << 19) + b"}."),
        "the limit is 4194304",
    ),
    "a_directory_of_10_megabytes": (
        lambda: archive(GOOD, {"archive/" + "x" * 60_000 + str(i): b"" for i in range(160)}),
        "a.pt: a directory of 96[0-9]{5} bytes, the limit is 8388608",
    ),
}


@pytest.mark.parametrize("name", ZIPS)
def test_hostile_torch_files_are_refused(tmp_path, monkeypatch, name):
    content, message = ZIPS[name]
    monkeypatch.chdir(tmp_path)  # where some would leave their canary
    refuse(tmp_path / "a.pt", content(), message)


LEGACY = {
    "wrong_magic": (lambda: pickle.dumps(5, 2) + bytes(50), "neither a zip archive nor a legacy"),
    "wrong_protocol": (
        lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(99, 2),
        "protocol 99",
    ),
    "big_endian": (lambda: legacy(GOOD, system={"little_endian": False}), "not little-endian"),
    "no_system": (lambda: legacy(GOOD, system=[]), "not little-endian"),
    "truncated_storage": (
        lambda: legacy(GOOD, data=struct.pack("<q", 4) + bytes(15)),
        "needs 16 bytes, 15 are left",
    ),
    "truncated_length": (lambda: legacy(GOOD, data=bytes(4)), "truncated before storage"),
    "storage_of_2_to_60": (
        lambda: legacy(GOOD, data=struct.pack("<q", 2**60)),
        "truncated: storage '0' needs",
    ),
    "negative_storage": (lambda: legacy(GOOD, data=struct.pack("<q", -1)), "truncated"),
    "another_length_than_claimed": (
        lambda: legacy(GOOD, data=struct.pack("<q", 2) + bytes(8)),
        "the file holds 8",
    ),
    "bytes_at_the_end": (lambda: legacy(GOOD) + b"x", "1 bytes after the last storage"),
    "unnamed_storage": (lambda: legacy(GOOD, keys=("9",)), "storage '9' belongs to no tensor"),
    "the_same_storage_twice": (lambda: legacy(GOOD, keys=("0", "0")), "the list of storages"),
    "view_past_the_storage": (
        lambda: legacy(tensor_pickle(view=(1, 4))),
        "has 4 elements, a view takes 1..5",
    ),
    "view_not_a_view": (lambda: legacy(tensor_pickle(view=(-1, 4))), "not a view"),
    "no_storages": (lambda: legacy(GOOD, keys=(), data=b""), "storage '0' is not in the file"),
    "ends_after_the_object": (
        lambda: legacy(GOOD)[: -24 - len(pickle.dumps(["0"], 2))],
        "the pickle is damaged",
    ),
}


@pytest.mark.parametrize("name", LEGACY)
def test_hostile_legacy_files_are_refused(tmp_path, name):
    content, message = LEGACY[name]
    refuse(tmp_path / "a.pt", content(), message)


def test_the_good_parts_of_the_hostile_files_are_good(tmp_path):
    """What the cases above change one thing of is read."""
    for content in (archive(GOOD), legacy(GOOD)):
        (tmp_path / "a.pt").write_bytes(content)
        np.testing.assert_array_equal(
            torch_file.read_torch(tmp_path / "a.pt").tensors["a"], np.zeros((2, 2))
        )
    (tmp_path / "a.safetensors").write_bytes(header({"a": entry()}, bytes(8)))
    np.testing.assert_array_equal(
        torch_file.read_safetensors(tmp_path / "a.safetensors").tensors["a"], np.zeros(2)
    )


def test_a_stride_that_nothing_steps_over_may_be_anything(tmp_path):
    (tmp_path / "a.pt").write_bytes(archive(tensor_pickle(shape=(1, 4), strides=(2**62, 1))))
    np.testing.assert_array_equal(
        torch_file.read_torch(tmp_path / "a.pt").tensors["a"], np.zeros((1, 4))
    )


def test_views_of_old_storages_start_where_they_say(tmp_path):
    """torch before 0.4 stored a storage's views as (name, first element, number)."""
    data = struct.pack("<q4f", 4, 10, 11, 12, 13)
    (tmp_path / "a.pt").write_bytes(
        legacy(tensor_pickle(shape=(2,), strides=(1,), view=(1, 3)), data=data)
    )
    np.testing.assert_array_equal(torch_file.read_torch(tmp_path / "a.pt").tensors["a"], [11, 12])


@pytest.mark.parametrize("element", [0, 1, 2])
@pytest.mark.parametrize("shape, strides", [((2, 2), (2, 1)), ((3,), (1,)), ((2, 1), (3, 99))])
def test_a_tensor_ends_where_its_storage_ends(tmp_path, shape, strides, element):
    """The last element may be the storage's last, and no tensor is read past it."""
    last = element + sum((n - 1) * stride for n, stride in zip(shape, strides))
    # Beyond the storage the file goes on, so that reading too far would succeed.
    beyond = {"archive/data/1": bytes(64)}
    for numel in (last, last + 1):
        data = np.arange(numel, dtype=np.float32).tobytes()
        pickled = tensor_pickle(shape, strides, element, numel)
        (tmp_path / "a.pt").write_bytes(archive(pickled, {"archive/data/0": data} | beyond))
        if numel == last:
            with pytest.raises(TensorFileError, match=f"does not fit in its .* of {numel} elem"):
                torch_file.read_torch(tmp_path / "a.pt")
            continue
        read = torch_file.read_torch(tmp_path / "a.pt").tensors["a"]
        assert read.shape == shape and read.flat[0] == element and read.flat[-1] == last


def test_no_damage_to_a_good_file_gives_anything_but_a_clear_error(tmp_path):
    """Bytes changed and files cut anywhere: a message, or tensors no larger than the file."""
    rng = np.random.default_rng(0)
    torch.save({"a": torch.zeros(2, 2), "n": argparse.Namespace(x=1)}, tmp_path / "zip.pt")
    torch.save(
        {"a": torch.zeros(2, 2)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False
    )
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    for name in ("zip.pt", "legacy.pt", "a.safetensors"):
        good = (tmp_path / name).read_bytes()
        path = tmp_path / f"damaged_{name}"
        read = (
            torch_file.read_safetensors if path.suffix == ".safetensors" else torch_file.read_torch
        )
        for trial in range(600):
            damaged = bytearray(good)
            if trial % 3 == 0:
                del damaged[rng.integers(1, len(good)) :]
            for _ in range(rng.integers(1, 4)):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
            path.write_bytes(bytes(damaged))
            try:
                tensors = read(path).tensors
            except TensorFileError as error:
                assert "\n" not in str(error)
                continue
            for value in tensors.values():
                assert not isinstance(value, np.ndarray) or value.nbytes <= len(good)


def test_opening_a_file_costs_no_memory_for_its_tensors(tmp_path):
    """A sparse 64 GiB file opens: tensors are views of the map."""
    size = 64 << 30
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    ).encode()
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    tensors = torch_file.read_safetensors(tmp_path / "a.safetensors").tensors
    assert tensors["a"].nbytes == size and tensors["a"][-1] == 0

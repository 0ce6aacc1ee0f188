"""Files of the PyTorch world byte by byte, for files that lie: archives, pickles and headers."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest

from lit_jax.porting import pickles, torch_file
from lit_jax.porting.untrusted import TensorFileError


def header(entries, data=b"", length=None):
    """A safetensors file from a header (dict, or text)."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


READERS = {
    ".safetensors": torch_file.read_safetensors,
    ".pt": torch_file.read_torch,
    ".pickle": pickles.read_pickle,
}


def refuse(path, content, message):
    """The reader raises one line that names the file and the reason; nothing runs or is written."""
    path.write_bytes(content)
    canary = path.parent / "canary"
    with pytest.raises(TensorFileError, match=message) as caught:
        READERS[path.suffix](path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 400 + len(str(path))
    assert not canary.exists(), "the file's code ran"
    assert os.listdir(path.parent) == [path.name]


def archive(data_pkl, records=None, **options):
    """A torch zip archive with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", options.get("compression", zipfile.ZIP_STORED)) as file:
        file.writestr("archive/data.pkl", data_pkl)
        for name, data in ({"archive/data/0": bytes(16)} if records is None else records).items():
            file.writestr(name, data)
    return out.getvalue()


def tensor_pickle(
    shape=(2, 2),
    strides=(2, 1),
    offset=0,
    numel=4,
    storage="FloatStorage",
    key="0",
    name="a",
    view=None,
):
    """{name: tensor} as torch pickles it, with whatever numbers."""

    def number(value):
        data = value.to_bytes(17, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    persistent = (
        b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text(key) + text("cpu")
    )
    tail = b"tQ" if view is None else b"(" + text("v") + number(view[0]) + number(view[1]) + b"ttQ"
    return (
        b"\x80\x02}"
        + text(name)
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + persistent
        + number(numel)
        + tail
        + number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def patched(data, name, offset, value):
    """Overwrites bytes of the central directory's entry of a record."""
    data = bytearray(data)
    position = data.rindex(b"PK\1\2", 0, data.rindex(name.encode()))
    data[position + offset : position + offset + len(value)] = value
    return bytes(data)


def legacy(*parts, system=None, keys=("0",), data=None):
    """A file of the format before torch 1.6 around the pickle of the object."""
    head = [
        pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        pickle.dumps(1001, 2),
        pickle.dumps({"little_endian": True} if system is None else system, 2),
    ]
    tail = struct.pack("<q", 4) + bytes(16) if data is None else data
    return b"".join([*head, *parts, pickle.dumps(list(keys), 2), tail])

"""Leaves that are still in their file, and the strict matching that makes them."""

import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from lit_jax.porting.matching import Entry, Parts, Report, checksum, match
from lit_jax.porting.torch_checkpoint import PortingError, TorchCheckpoint

RNG = np.random.default_rng(0)
# Two layers of a joined linear map, a convolution, a vector, and a table.
TENSORS = {
    f"{layer}.{part}": RNG.normal(size=(4, 5)).astype(np.float32)
    for layer in range(2)
    for part in "ab"
}
TENSORS |= {
    "conv": RNG.normal(size=(6, 3, 2, 2)).astype(np.float16),
    "bias": RNG.normal(size=(6,)),
    "table": RNG.normal(size=(7, 5)).astype(np.float32),
}
ENTRIES = (
    Entry("blocks/fc/kernel", ("0", "1"), (2, 5, 8)),
    Entry("proj/kernel", ("conv",), (2, 2, 3, 6)),
    Entry("proj/bias", ("bias",), (6,)),
    Entry("table/embedding", ("table",), (7, 5)),
)


def read(tensors, entries=ENTRIES):
    source = TorchCheckpoint(pathlib.Path("a.pt"), tensors, {}, None, [], [])
    named = {key: Parts((tensors[key],), (key,)) for key in tensors if "." not in key}
    for layer in "01":
        keys = (f"{layer}.a", f"{layer}.b")
        named[layer] = Parts(tuple(tensors[key] for key in keys), keys)
    report = Report("a.pt", "test")
    return match(named, entries, source, report), report


@pytest.fixture
def leaves():
    return read(TENSORS)[0]


def expected():
    layers = [np.concatenate([TENSORS[f"{i}.a"], TENSORS[f"{i}.b"]]).T for i in range(2)]
    return {
        "blocks/fc/kernel": np.stack(layers),
        "proj/kernel": TENSORS["conv"].transpose(2, 3, 1, 0).astype(np.float32),
        "proj/bias": TENSORS["bias"].astype(np.float32),
        "table/embedding": TENSORS["table"],
    }


@pytest.mark.parametrize("path", expected())
def test_a_leaf_is_indexed_as_the_array_that_it_becomes(leaves, path):
    leaf, array = leaves[path], expected()[path]
    assert leaf.shape == array.shape and leaf.ndim == array.ndim and leaf.size == array.size
    np.testing.assert_array_equal(np.asarray(leaf), array)
    assert np.asarray(leaf).dtype == np.float32
    assert np.asarray(leaf, np.float64).dtype == np.float64
    for index in (0, -1, slice(None), slice(1, 2), slice(None, None, -1), (slice(0, 1),)):
        np.testing.assert_array_equal(leaf[index], array[index])
    if array.ndim > 1:
        for index in ((0, 1), (slice(None), slice(1, 4)), (slice(1, None), -1), (1, slice(2))):
            np.testing.assert_array_equal(leaf[index], array[index])


def test_what_goes_to_torch_is_what_came(leaves):
    for entry in ENTRIES:
        for layer, key in enumerate(entry.keys):
            names = (f"{key}.a", f"{key}.b") if key in ("0", "1") else (key,)
            theirs = np.concatenate([TENSORS[name] for name in names]).astype(np.float32)
            assert entry.torch_shape == theirs.shape
            np.testing.assert_array_equal(entry.to_torch(leaves[entry.path], layer), theirs)


def test_every_key_is_accounted_for():
    _, report = read(TENSORS)
    assert report.keys == {
        "0.a": "blocks/fc/kernel[0] part 1 of 2: transposed",
        "0.b": "blocks/fc/kernel[0] part 2 of 2: transposed",
        "1.a": "blocks/fc/kernel[1] part 1 of 2: transposed",
        "1.b": "blocks/fc/kernel[1] part 2 of 2: transposed",
        "conv": "proj/kernel: axes to (h, w, I, O), cast from float16",
        "bias": "proj/bias: as it is, cast from float64",
        "table": "table/embedding: as it is",
    }
    source = TorchCheckpoint(pathlib.Path("a.pt"), dict(TENSORS), {}, None, [], [])
    named = {"conv": Parts((TENSORS["conv"],), ("conv",))}
    with pytest.raises(PortingError, match="a.pt: nothing explains 0.a, 0.b, 1.a, 1.b, bias, tab"):
        match(named, ENTRIES[1:2], source, Report("a.pt", "test"))


def test_all_that_is_wrong_is_told_at_once():
    tensors = dict(TENSORS)
    tensors["extra"] = np.zeros(3, np.float32)
    tensors["1.b"] = np.zeros((4, 6), np.float32)
    tensors["table"] = np.zeros((7, 5), np.int64)
    del tensors["bias"]
    with pytest.raises(PortingError) as caught:
        read(tensors)
    assert str(caught.value) == (
        "a.pt: missing: bias; unexpected: extra; wrong: 1.a + 1.b (4, 5) + (4, 6), "
        "expected (8, 5), table of int64, expected a float"
    )
    assert caught.value.report.missing == ["bias"]


def test_a_checksum_is_of_names_shapes_and_float32_values(leaves):
    tree = unflatten_dict(leaves, sep="/")
    arrays = unflatten_dict(expected(), sep="/")
    assert checksum(tree) == checksum(arrays) == checksum(jax.tree.map(jax.numpy.asarray, arrays))
    assert checksum(tree) == checksum(dict(reversed(tree.items())))
    changed = [
        {**arrays, "table": {"embedding": arrays["table"]["embedding"].reshape(5, 7)}},
        {**arrays, "tablet": arrays["table"]},
        {**arrays, "table": {"embedding": np.nextafter(arrays["table"]["embedding"], 2)}},
    ]
    del changed[1]["table"]
    sums = {checksum(arrays), *map(checksum, changed)}
    assert len(sums) == 4
    arrays["blocks"]["fc"]["kernel"][1, 2, 3] = np.nan
    message = r"blocks/fc/kernel\[1\] holds values that are not finite"
    with pytest.raises(PortingError, match=message):
        checksum(arrays)

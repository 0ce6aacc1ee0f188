"""Inception-v3 against torch, layer by layer from random weights, and its weights files."""

import pickle

import jax
import numpy as np
import oracles
import pytest
import torch
import torch_inception

from lit_jax.evaluation import efficientnet_lite0, features, inception


@pytest.fixture(scope="module")
def torch_network():
    return torch_inception.randomise(torch_inception.Inception3())


@pytest.fixture(scope="module")
def params(torch_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(torch_network.state_dict(), path)
    return inception.load_params(path)


def test_inception_is_pytorch_fids_network_layer_by_layer(torch_network, params):
    extractor = features.make_inception_extractor("inception_adm", params)
    expected = torch_inception.record_outputs(torch_network)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 299, 299, 3)).astype(np.float32)
    pool, logits = torch_network(torch.from_numpy(x).movedim(-1, 1))
    actual, layers = torch_inception.run_with_layers(extractor.network)(params, x)

    compared = 0
    for name, value in layers.items():
        if name and name != "fc":
            oracles.assert_close(value, expected[name.replace("/", ".")], reduction=1024, what=name)
            compared += 1
    assert compared == 94 * 3 + 11  # 94 convolutions with norm and ReLU, 11 blocks
    oracles.assert_close(actual["pool"], pool, reduction=1024, what="pool")
    oracles.assert_close(
        actual["logits"], logits - torch_network.fc.bias, reduction=2048, what="logits"
    )
    assert np.abs(torch_network.fc.bias).max() > 1.0  # the bias that is left out would show

    branch = expected["Mixed_6d.branch1x1"]  # (2, 17, 17, 192)
    spatial = [branch[:, i, j, c] for i in range(17) for j in range(17) for c in range(7)]
    oracles.assert_close(
        actual["spatial"], np.stack(spatial, axis=1), reduction=1024, what="spatial"
    )
    sizes = {"pool": 2048, "spatial": 2023, "logits": 1008}
    assert {key: value.shape for key, value in actual.items()} == {
        key: (2, size) for key, size in sizes.items()
    }
    assert features.dims(extractor) == sizes
    assert extractor.frechet == {"pool": "fid", "spatial": "sfid"} and extractor.scores_classes


def test_a_flax_pickle_holds_the_same_network(params, tmp_path):
    path = tmp_path / "inception_v3_weights_fid.pickle"
    with_bias = params | {"fc": params["fc"] | {"bias": np.zeros(1008, np.float32)}}
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(with_bias, protocol))
        loaded = inception.load_params(path)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert features.hash_params(loaded) == features.hash_params(params)


class Malicious:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('was_run').touch()",))


endless: dict = {}
endless["fc"] = endless
doubled: dict = {}
for _ in range(100):
    doubled = {"a": doubled, "b": doubled}


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"fc": {"kernel": Malicious()}}, "asks to run builtins.eval, which is refused"),
        ({"fc": {"kernel": np.array([Malicious()], object)}}, "an array of type 'O8'"),
        ({"fc": {"kernel": np.arange(3)}}, "fc/kernel is a ndarray, expected an array of floats"),
        ({"fc": {"kernel": [1.0]}}, "fc/kernel is a list"),
        ([1.0], "holds a list, expected a nested dict of arrays"),
        (endless, "the dict fc/ is in the file at another place too"),
        (doubled, "the dict .* is in the file at another place too"),
    ],
)
def test_a_pickle_cannot_run_code_or_go_on_for_ever(tmp_path, monkeypatch, tree, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pickle"
    path.write_bytes(pickle.dumps(tree, 4))
    with pytest.raises(ValueError, match=message):
        inception.load_params(path)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        # A function of NumPy's own is no array either.
        (b"cnumpy\nload\n(S'was_run'\ntR.", "asks to run numpy.load, which is refused"),
        (b"\x80\x04not a pickle", "the pickle is damaged"),
    ],
)
def test_bytes_that_are_no_pickle_of_arrays_are_refused(tmp_path, content, message):
    path = tmp_path / "weights.pickle"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"weights.pickle: {message}"):
        inception.load_params(path)


def test_dicts_nested_too_deep_are_refused(tmp_path):
    path = tmp_path / "weights.pickle"
    path.write_bytes(b"\x80\x02" + b"}X\1\0\0\0a" * 10_000 + b"}" + b"s" * 10_000 + b".")
    with pytest.raises(ValueError, match="weights.pickle nests its dicts too deep"):
        inception.load_params(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"pos_embed": np.zeros(2), "a.b": np.zeros(2)}, "InceptionV3: missing .* and [0-9]+ more"),
        ({"model": {"pos_embed": np.zeros(2)}}, "'model' is a dict, not a named tensor; the file"),
        ({7: np.zeros(2)}, "7 is a ndarray, not a named tensor"),
        ({"\x1b[2J" + "n" * 5000: [1.0]}, "is a list, not a named tensor"),
    ],
)
def test_files_of_another_model_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"weights.pth.*{message}") as caught:
        inception.load_params(path)
    text = str(caught.value)
    assert "\n" not in text and "\x1b" not in text and len(text) < 1500
    if "pos_embed" in content:
        with pytest.raises(ValueError, match="weights.pth does not hold the weights of Efficient"):
            efficientnet_lite0.load_params(path)


def test_incomplete_weights_are_listed(params, tmp_path):
    broken = jax.tree.map(lambda x: x, params)
    del broken["Mixed_5b"]["branch1x1"]["conv"]["kernel"]
    broken["Mixed_5c"]["branch1x1"]["bn"]["var"] = np.ones(7, np.float32)
    broken["extra"] = {"kernel": np.ones(1, np.float32)}
    path = tmp_path / "weights.pickle"
    path.write_bytes(pickle.dumps(broken, 4))
    with pytest.raises(ValueError) as error:
        inception.load_params(path)
    for text in (
        "weights.pickle does not hold the weights of InceptionV3",
        "missing Mixed_5b/branch1x1/conv/kernel",
        "unknown extra/kernel",
        "Mixed_5c/branch1x1/bn/var has shape (7,), expected (64,)",
    ):
        assert text in str(error.value)
    with pytest.raises(FileNotFoundError, match="^weights = .*nowhere.pth: no such file"):
        features.make_extractor("inception_adm", tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="nowhere.pth not found"):
        inception.load_params(tmp_path / "nowhere.pth")

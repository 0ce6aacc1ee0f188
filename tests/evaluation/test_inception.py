"""The feature networks against torch, layer by layer from random weights; their weights files; and the resizes."""

import pickle

import jax
import jax.numpy as jnp
import matplotlib.cbook
import numpy as np
import oracles
import pytest
import sklearn.datasets
import torch
import torch_inception
from PIL import Image

from lit_jax.evaluation import efficientnet_lite0, features, inception


@pytest.fixture(scope="module")
def torch_network():
    return torch_inception.randomise(torch_inception.Inception3())


@pytest.fixture(scope="module")
def weights_file(torch_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(torch_network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def params(weights_file):
    return inception.load_params(weights_file)


def record_outputs(network):
    """Every module's output by its name, in channels-last NumPy, filled when the network runs."""
    outputs = {}

    def hook(name):
        def record(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            outputs[name] = output.movedim(1, -1).numpy() if output.ndim == 4 else output.numpy()

        return record

    for name, module in network.named_modules():
        module.register_forward_hook(hook(name))
    return outputs


def flatten_intermediates(state):
    """{"Mixed_5b/branch1x1": output} of every Flax module's call."""
    flat = {}
    for keys, value in jax.tree_util.tree_leaves_with_path(state["intermediates"]):
        names = [key.key for key in keys if hasattr(key, "key")]
        if (
            names[-1] == "__call__"
            and keys[-1] == jax.tree_util.SequenceKey(0)
            or "__call__" in names
        ):
            flat.setdefault("/".join(names[: names.index("__call__")]), np.asarray(value))
    return flat


def test_inception_is_pytorch_fids_network_layer_by_layer(torch_network, params):
    expected = record_outputs(torch_network)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 299, 299, 3)).astype(np.float32)
    pool, logits = torch_network(torch.from_numpy(x).movedim(-1, 1))
    actual, state = jax.jit(
        lambda p, x: inception.InceptionV3().apply(
            {"params": p}, x, capture_intermediates=True, mutable=["intermediates"]
        )
    )(params, x)
    layers = flatten_intermediates(state)
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
    assert actual["spatial"].shape == (2, 2023)


def test_a_flax_pickle_holds_the_same_network(params, tmp_path):
    path = tmp_path / "inception_v3_weights_fid.pickle"
    for protocol in (2, 4):
        path.write_bytes(
            pickle.dumps(
                params | {"fc": params["fc"] | {"bias": np.zeros(1008, np.float32)}}, protocol
            )
        )
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
        "missing Mixed_5b/branch1x1/conv/kernel",
        r"unknown extra/kernel",
        "Mixed_5c/branch1x1/bn/var has shape (7,), expected (64,)",
    ):
        assert text in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere.pth not found"):
        inception.load_params(tmp_path / "nowhere.pth")


def resize_tf1_oracle(image, size):
    """tf.compat.v1.image.resize_bilinear, align_corners=False: one output pixel after another, in float64.

    As in its kernel, the scale and the positions are float32.
    """
    H, W, C = image.shape
    out = np.empty((size, size, C))
    for i in range(size):
        y = np.float32(i) * (np.float32(H) / np.float32(size))
        top = int(np.floor(y))
        bottom, dy = min(top + 1, H - 1), float(y - np.float32(top))
        for j in range(size):
            x = np.float32(j) * (np.float32(W) / np.float32(size))
            left = int(np.floor(x))
            right, dx = min(left + 1, W - 1), float(x - np.float32(left))
            above = image[top, left] + (image[top, right] - image[top, left]) * dx
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            out[i, j] = above + (below - above) * dy
    return out


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (512, 512), (299, 299), (7, 5)])
def test_resize_is_tensorflow_1s(shape, size=299):
    images = np.random.default_rng(0).integers(0, 256, (1, *shape, 3)).astype(np.float32)
    actual = jax.jit(features.resize_tf1, static_argnums=1)(images, size)
    expected = resize_tf1_oracle(images[0].astype(np.float64), size)
    oracles.assert_close(actual[0], expected, factor=3.0, what=f"{shape} -> {size}")


def test_resize_has_the_known_pixels_of_tensorflow_1():
    """Corners stay, the far edge is repeated rather than reached, and a ramp is read at i * in / out."""
    ramp = jnp.broadcast_to(jnp.arange(4.0)[None, None, :, None], (1, 4, 4, 1))
    np.testing.assert_array_equal(
        features.resize_tf1(ramp, 8)[0, 0, :, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    )
    np.testing.assert_array_equal(features.resize_tf1(ramp, 2)[0, 0, :, 0], [0, 2])
    # With half-pixel centres, as pytorch-fid resizes, the same rows differ:
    np.testing.assert_allclose(
        features.resize_half_pixel(ramp, 8)[0, 0, :, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    )


@pytest.mark.parametrize("shape", [(32, 32), (256, 256), (512, 384)])
def test_half_pixel_resize_is_torchs(shape):
    images = np.random.default_rng(0).uniform(0, 1, (2, *shape, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(images).movedim(-1, 1),
        size=(299, 299),
        mode="bilinear",
        align_corners=False,
    ).movedim(1, -1)
    # A position near 512 is known to 2^-15 in float32, and a pixel can change by its full range from one to the next.
    oracles.assert_close(
        features.resize_half_pixel(images, 299), expected, factor=512.0, what=str(shape)
    )


def test_clean_resize_keeps_fractions_and_overshoot():
    images = np.zeros((1, 64, 64, 3), np.uint8)
    images[:, :, 32:] = 255
    resized = features.resize_clean(images, 299)
    assert resized.dtype == np.float32 and resized.shape == (1, 299, 299, 3)
    assert resized.min() < -1 and resized.max() > 256 and (resized != np.round(resized)).any()
    np.testing.assert_array_equal(
        features.resize_clean(np.full((1, 50, 50, 3), 7, np.uint8), 299), 7.0
    )


def expected_input(name, images):
    """Preprocessing of (B, H, W, 3) uint8 in torch and NumPy."""
    if name == "inception_adm":
        return (
            np.stack([resize_tf1_oracle(image.astype(np.float64), 299) for image in images]) - 128
        ) / 128
    if name == "inception_pytorch_fid":
        x = torch.from_numpy(images).movedim(-1, 1).float() / 255
        x = torch.nn.functional.interpolate(
            x, size=(299, 299), mode="bilinear", align_corners=False
        )
        return (2 * x - 1).movedim(1, -1).numpy()
    channels = [
        [
            Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC)
            for c in range(3)
        ]
        for image in images
    ]
    return (
        np.array([[np.asarray(c) for c in image] for image in channels]).transpose(0, 2, 3, 1) - 128
    ) / 128


def test_extractors_preprocess_as_their_protocol_says(params):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    seen = []
    for name in ("inception_adm", "inception_pytorch_fid", "inception_clean"):
        extractor = features.make_inception_extractor(name, params)
        seen.append(np.asarray(extractor.preprocess(jnp.asarray(extractor.prepare(images)))))
        oracles.assert_close(seen[-1], expected_input(name, images), factor=64.0, what=name)
    assert np.abs(seen[0] - seen[1]).max() > 0.1 and np.abs(seen[0] - seen[2]).max() > 0.1


def test_extract_gives_the_features_of_the_images(torch_network, params):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    extractor = features.make_inception_extractor("inception_adm", params)
    actual = next(features.extract(extractor, [images], 8))
    x = torch.from_numpy(expected_input("inception_adm", images).astype(np.float32)).movedim(-1, 1)
    oracles.assert_close(actual["pool"], torch_network(x)[0], reduction=2048, what="pool")
    assert (
        actual["pool"].shape == (3, 2048)
        and actual["spatial"].shape == (3, 2023)
        and actual["logits"].shape == (3, 1008)
    )


apply_efficientnet = jax.jit(
    lambda params, x: efficientnet_lite0.EfficientNetLite0().apply({"params": params}, x)
)


def check_efficientnet(network, path):
    outputs = record_outputs(network)
    params = efficientnet_lite0.load_params(path)
    rng = np.random.default_rng(0)
    smooth = (
        rng.uniform(-1, 1, (2, 8, 8, 3)).repeat(28, axis=1).repeat(28, axis=2).astype(np.float32)
    )
    pool, logits = network(torch.from_numpy(smooth).movedim(-1, 1))
    actual, state = jax.jit(
        lambda p, x: efficientnet_lite0.EfficientNetLite0().apply(
            {"params": p}, x, capture_intermediates=True, mutable=["intermediates"]
        )
    )(params, smooth)
    layers = flatten_intermediates(state)
    for index in range(16):
        oracles.assert_close(
            layers[f"blocks_{index}"],
            outputs[f"_blocks.{index}"],
            reduction=1152,
            what=f"block {index}",
        )
    oracles.assert_close(actual["pool"], pool, reduction=1280, what="pool")
    oracles.assert_close(actual["logits"], logits, reduction=1280, what="logits")


def test_efficientnet_is_its_torch_network_from_random_weights(tmp_path):
    network = torch_inception.randomise(torch_inception.EfficientNetLite0())
    torch.save(network.state_dict(), tmp_path / "lite0.pth")
    check_efficientnet(network, tmp_path / "lite0.pth")


def test_efficientnet_is_its_torch_network_at_the_published_weights():
    path = efficientnet_lite0.find_weights()
    network = torch_inception.EfficientNetLite0().eval().requires_grad_(False)
    network.load_state_dict(torch.load(path, weights_only=True))
    check_efficientnet(network, path)


def test_extract_drops_padding_and_repeats_grey_images():
    extractor = features.make_extractor("efficientnet_lite0")
    images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    whole = np.concatenate([f["pool"] for f in features.extract(extractor, [images], 16)])
    ragged = np.concatenate(
        [f["pool"] for f in features.extract(extractor, [images[:8], images[8:]], 8)]
    )
    assert whole.shape == ragged.shape == (11, 1280)
    oracles.assert_close(ragged, whole, reduction=1280, what="ragged last batch")
    grey = images[..., :1]
    from_grey, from_rgb = (
        next(features.extract(extractor, [x], 16))["pool"] for x in (grey, grey.repeat(3, -1))
    )
    np.testing.assert_array_equal(from_grey, from_rgb)


@pytest.mark.parametrize(
    "picture, label", [("matplotlib/grace_hopper.jpg", 652), ("sklearn/china.jpg", 698)]
)
def test_efficientnet_recognises_a_uniform_and_a_palace(picture, label):
    """The published weights under our preprocessing see what is there (ImageNet classes 652 and 698)."""
    package, file = picture.split("/")
    if package == "matplotlib":
        image = Image.open(matplotlib.cbook.get_sample_data(file))
    else:
        image = Image.fromarray(sklearn.datasets.load_sample_image(file))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = np.asarray(image.convert("RGB").crop((left, top, left + side, top + side)))
    extractor = features.make_extractor("efficientnet_lite0")
    logits = apply_efficientnet(extractor.params, jax.jit(extractor.preprocess)(image[None]))[
        "logits"
    ]
    assert int(logits[0].argmax()) == label


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="unknown features 'fid': expected one of inception_adm"):
        features.make_extractor("fid")
    with pytest.raises(FileNotFoundError, match="evaluate.weights is empty: inception_adm needs"):
        features.make_extractor("inception_adm")
    fake = features.Extractor(
        "x", "x", {}, False, {}, {}, lambda p, x: {"pool": x.mean((1, 2))}, lambda x: x, lambda x: x
    )
    with pytest.raises(ValueError, match=r"uint8, got \(2, 4, 4, 3\) float32"):
        next(features.extract(fake, [np.zeros((2, 4, 4, 3), np.float32)], 8))
    with pytest.raises(ValueError, match="between 1 and 8 images a batch, got 9"):
        next(features.extract(fake, [np.zeros((9, 4, 4, 3), np.uint8)], 8))

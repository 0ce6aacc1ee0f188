"""EfficientNet-Lite0 against torch, at random and at the published weights."""

import matplotlib.cbook
import numpy as np
import oracles
import pytest
import sklearn.datasets
import torch
import torch_inception
from PIL import Image

from lit_jax.evaluation import efficientnet_lite0, features


def apply(params, x):
    return efficientnet_lite0.EfficientNetLite0().apply({"params": params}, x)


run = torch_inception.run_with_layers(apply)  # compiled once, for two images


def check(network, path):
    """Every block and both outputs are those of the torch network."""
    outputs = torch_inception.record_outputs(network)
    params = efficientnet_lite0.load_params(path)
    coarse = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3))
    smooth = coarse.repeat(28, axis=1).repeat(28, axis=2).astype(np.float32)
    pool, logits = network(torch.from_numpy(smooth).movedim(-1, 1))
    actual, layers = run(params, smooth)
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
    check(network, tmp_path / "lite0.pth")


def test_efficientnet_is_its_torch_network_at_the_published_weights():
    path = efficientnet_lite0.find_weights()
    network = torch_inception.EfficientNetLite0().eval().requires_grad_(False)
    network.load_state_dict(torch.load(path, weights_only=True))
    check(network, path)


def test_another_networks_weights_are_refused(tmp_path):
    network = torch_inception.EfficientNetLite0()
    weights = network.state_dict()
    weights["_blocks.3._se_reduce.weight"] = weights.pop("_blocks.3._project_conv.weight")
    torch.save(weights, tmp_path / "b0.pth")
    with pytest.raises(ValueError) as error:
        efficientnet_lite0.load_params(tmp_path / "b0.pth")
    for text in (
        "b0.pth does not hold the weights of EfficientNetLite0",
        "missing blocks_3/project/conv/kernel",
        "unknown blocks_3/_se_reduce/kernel",
    ):
        assert text in str(error.value)


def square(image):
    """The square in the middle of a picture, (side, side, 3) uint8."""
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return np.asarray(image.convert("RGB").crop((left, top, left + side, top + side)))


def test_efficientnet_recognises_a_uniform_and_a_palace():
    """The published weights under our preprocessing see what is there (ImageNet's classes)."""
    extractor = features.make_extractor("efficientnet_lite0")
    uniform = Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg"))
    palace = Image.fromarray(sklearn.datasets.load_sample_image("china.jpg"))
    x = [extractor.preprocess(square(image)[None]) for image in (uniform, palace)]
    outputs, _ = run(extractor.params, np.concatenate(x))
    assert outputs["logits"].argmax(axis=1).tolist() == [652, 698]

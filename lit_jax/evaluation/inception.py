"""Inception-v3 as FID knows it: TensorFlow's 2015-12-05 graph.

The network differs from the usual Inception-v3 (arXiv 1512.00567) where that
graph does: average pools do not count their padding, the pool branch of the
last block takes the maximum, and there are 1008 classes. Modules have the
names of torchvision's, as in the published conversions.

Inference only, float32 with full-precision products: bfloat16 passes on a TPU
and TF32 on a GPU both move FID.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lit_jax.evaluation import pretrained
from lit_jax.porting import pickles
from lit_jax.porting.untrusted import TensorFileError

INPUT_SIZE = 299
NUM_CLASSES = 1008
# Of the 192 channels of Mixed_6d's 1x1 branch, sFID keeps the first ones.
SPATIAL_CHANNELS = 7


class ConvBN(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    # Every kernel here is odd, so SAME is symmetric at stride 1, as torch
    # pads.
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, h, w, features)"""
        x = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            self.padding,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        x = pretrained.FrozenBatchNorm(name="bn")(x)
        return nn.relu(x)


def _avg_pool(x):
    # torchvision's counts the padding.
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x):
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _halve(x):
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _concatenate(*branches):
    # In this order: the next block's weights count on it.
    return jnp.concatenate(branches, axis=-1)


class InceptionA(nn.Module):
    """Mixed_5b to Mixed_5d: 35 x 35."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, 35, 35, C) -> (B, 35, 35, 224 + pool_features)"""
        a = ConvBN(64, (1, 1), name="branch1x1")(x)

        b = ConvBN(48, (1, 1), name="branch5x5_1")(x)
        b = ConvBN(64, (5, 5), name="branch5x5_2")(b)

        c = ConvBN(64, (1, 1), name="branch3x3dbl_1")(x)
        c = ConvBN(96, (3, 3), name="branch3x3dbl_2")(c)
        c = ConvBN(96, (3, 3), name="branch3x3dbl_3")(c)

        d = _avg_pool(x)
        d = ConvBN(self.pool_features, (1, 1), name="branch_pool")(d)
        return _concatenate(a, b, c, d)


class InceptionB(nn.Module):
    """Mixed_6a: 35 x 35 -> 17 x 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, 35, 35, 288) -> (B, 17, 17, 768)"""
        a = ConvBN(384, (3, 3), 2, "VALID", name="branch3x3")(x)

        b = ConvBN(64, (1, 1), name="branch3x3dbl_1")(x)
        b = ConvBN(96, (3, 3), name="branch3x3dbl_2")(b)
        b = ConvBN(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(b)
        return _concatenate(a, b, _halve(x))


class InceptionC(nn.Module):
    """Mixed_6b to Mixed_6e: 17 x 17."""

    channels_7x7: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, 17, 17, 768) -> the same shape, and the block's 1x1 branch, (B, 17, 17, 192)."""
        C = self.channels_7x7
        a = ConvBN(192, (1, 1), name="branch1x1")(x)

        b = ConvBN(C, (1, 1), name="branch7x7_1")(x)
        b = ConvBN(C, (1, 7), name="branch7x7_2")(b)
        b = ConvBN(192, (7, 1), name="branch7x7_3")(b)

        c = ConvBN(C, (1, 1), name="branch7x7dbl_1")(x)
        c = ConvBN(C, (7, 1), name="branch7x7dbl_2")(c)
        c = ConvBN(C, (1, 7), name="branch7x7dbl_3")(c)
        c = ConvBN(C, (7, 1), name="branch7x7dbl_4")(c)
        c = ConvBN(192, (1, 7), name="branch7x7dbl_5")(c)

        d = ConvBN(192, (1, 1), name="branch_pool")(_avg_pool(x))
        # sFID reads the first branch of one of these blocks.
        return _concatenate(a, b, c, d), a


class InceptionD(nn.Module):
    """Mixed_7a: 17 x 17 -> 8 x 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, 17, 17, 768) -> (B, 8, 8, 1280)"""
        a = ConvBN(192, (1, 1), name="branch3x3_1")(x)
        a = ConvBN(320, (3, 3), 2, "VALID", name="branch3x3_2")(a)

        b = ConvBN(192, (1, 1), name="branch7x7x3_1")(x)
        b = ConvBN(192, (1, 7), name="branch7x7x3_2")(b)
        b = ConvBN(192, (7, 1), name="branch7x7x3_3")(b)
        b = ConvBN(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(b)
        return _concatenate(a, b, _halve(x))


class InceptionE(nn.Module):
    """Mixed_7b and Mixed_7c: 8 x 8."""

    # Of the pool branch: False in the first of the two blocks, True in the
    # second.
    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, 8, 8, C) -> (B, 8, 8, 2048)"""
        a = ConvBN(320, (1, 1), name="branch1x1")(x)

        b = ConvBN(384, (1, 1), name="branch3x3_1")(x)
        b1 = ConvBN(384, (1, 3), name="branch3x3_2a")(b)
        b2 = ConvBN(384, (3, 1), name="branch3x3_2b")(b)

        c = ConvBN(448, (1, 1), name="branch3x3dbl_1")(x)
        c = ConvBN(384, (3, 3), name="branch3x3dbl_2")(c)
        c1 = ConvBN(384, (1, 3), name="branch3x3dbl_3a")(c)
        c2 = ConvBN(384, (3, 1), name="branch3x3dbl_3b")(c)

        d = _max_pool(x) if self.max_pool else _avg_pool(x)
        d = ConvBN(192, (1, 1), name="branch_pool")(d)
        return _concatenate(a, b1, b2, c1, c2, d)


class InceptionV3(nn.Module):
    """Features of images, which are resized to 299 x 299 and about [-1, 1]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """(B, 299, 299, 3) float32 -> pool, spatial, logits.

        Returns: a dict with
          pool: (B, 2048), `pool_3` of the graph: FID, precision and recall.
          spatial: (B, 2023), the graph's `mixed_6/conv`, 17 x 17 x 7
            flattened with the channel fastest: sFID.
          logits: (B, 1008), for the Inception score.
        """
        x = ConvBN(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvBN(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = ConvBN(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _halve(x)  # (B, 73, 73, 64)
        x = ConvBN(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = ConvBN(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _halve(x)  # (B, 35, 35, 192)

        x = InceptionA(32, name="Mixed_5b")(x)
        x = InceptionA(64, name="Mixed_5c")(x)
        x = InceptionA(64, name="Mixed_5d")(x)
        x = InceptionB(name="Mixed_6a")(x)  # (B, 17, 17, 768)

        x, _ = InceptionC(128, name="Mixed_6b")(x)
        x, _ = InceptionC(160, name="Mixed_6c")(x)
        x, branch1x1 = InceptionC(160, name="Mixed_6d")(x)
        # The channel fastest, as ADM's evaluator flattens it. The distance does
        # not depend on the order, but the statistics in ADM's files do.
        spatial = branch1x1[..., :SPATIAL_CHANNELS]
        spatial = spatial.reshape(x.shape[0], -1)  # (B, 2023)
        x, _ = InceptionC(192, name="Mixed_6e")(x)

        x = InceptionD(name="Mixed_7a")(x)  # (B, 8, 8, 1280)
        x = InceptionE(False, name="Mixed_7b")(x)
        x = InceptionE(True, name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))  # (B, 2048)

        # Without the bias, as ADM's evaluator computes the Inception score.
        logits = nn.Dense(
            NUM_CLASSES,
            use_bias=False,
            precision=jax.lax.Precision.HIGHEST,
            name="fc",
        )(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def load_params(path: epath.PathLike) -> dict:
    """Reads a published weights file; no code in it is run.

    Args:
      path: pytorch-fid's or torch-fidelity's .pth, or jax-fid's .pickle.
    Returns: the parameters of `InceptionV3`, NumPy float32.
    Raises: ValueError that lists what is missing, unknown or of another shape;
      FileNotFoundError.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Inception weights {path} not found")
    if path.suffix in (".pickle", ".pkl"):
        flat = _read_flax_pickle(path)
    else:
        flat = _from_torch(pretrained.read_tensors(path))
    return pretrained.build_params(flat, InceptionV3(), INPUT_SIZE, path)


def _from_torch(state_dict):
    """Keys of torchvision's Inception3 are ours, with dots."""
    flat = {}
    for key, value in state_dict.items():
        module, _, name = key.rpartition(".")
        # A counter of training, and a bias that no score reads.
        if name == "num_batches_tracked" or key == "fc.bias":
            continue
        module = module.replace(".", "/")
        path, value = pretrained.from_torch(module, name, np.asarray(value))
        flat[path] = value
    return flat


def _read_flax_pickle(path):
    """jax-fid's nested dict: ours already, but for a classifier bias that no score reads."""
    tree = pickles.read_pickle(path)
    if not isinstance(tree, Mapping):
        raise ValueError(f"{path} holds a {type(tree).__name__}, expected a nested dict of arrays")
    flat = {}
    seen = set()

    def flatten(node, prefix):
        # A pickle may refer to one dict in many places, and so make a tree without end.
        if id(node) in seen:
            raise TensorFileError(
                f"{path}: the dict {prefix[:80]} is in the file at another place too"
            )
        seen.add(id(node))
        for name, value in node.items():
            if isinstance(value, Mapping):
                flatten(value, f"{prefix}{name}/")
            elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
                flat[f"{prefix}{name}"] = value
            elif value is not None:
                raise TensorFileError(
                    f"{path}: {f'{prefix}{name}'[:120]} is a {type(value).__name__}, "
                    "expected an array of floats"
                )

    try:
        flatten(tree, "")
    except RecursionError as error:
        raise ValueError(f"{path} nests its dicts too deep") from error
    flat.pop("fc/bias", None)
    return flat

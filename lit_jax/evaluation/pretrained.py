"""What the pretrained feature networks share: frozen batch norm, and strict loading of weights."""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from lit_jax.porting import torch_file
from lit_jax.porting.untrusted import TensorFileError, describe


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by stored statistics.

    The statistics are parameters here, for nothing in these networks is
    trained.
    """

    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., C) -> (..., C)"""
        C = x.shape[-1]
        mean = self.param("mean", nn.initializers.zeros, (C,))
        var = self.param("var", nn.initializers.ones, (C,))
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))

        # The suite forbids implicit rank promotion, so each vector gets all of
        # x's axes.
        shape = (1,) * (x.ndim - 1) + (C,)
        multiplier = scale * jax.lax.rsqrt(var + self.epsilon)
        centred = x - mean.reshape(shape)
        return centred * multiplier.reshape(shape) + bias.reshape(shape)


def read_tensors(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a torch or safetensors file, compared with its checksums.

    Raises: ValueError for a file of something else; FileNotFoundError.
    """
    file = torch_file.read_tensors(path)
    for key, value in file.tensors.items():
        if not isinstance(key, str) or not isinstance(value, np.ndarray):
            raise TensorFileError(
                f"{path}: {describe(key)} is a {type(value).__name__}, not a named tensor; "
                "the file must hold the state_dict of a feature network alone"
            )
    file.verify(file.tensors.values())
    return file.tensors


# torch's names of a batch normalisation's tensors, and ours.
BATCH_NORM_NAMES = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
}


def from_torch(module: str, name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """One tensor of a torch network under our name and in our layout.

    Args:
      module: the path of the module in our tree, "a/b/conv". Where it ends in
        "bn", it is a batch normalisation.
      name: the tensor's name in torch, "weight" for instance.
    Returns: the path and the value; (out, in, h, w) becomes (h, w, in, out),
      and (out, in) becomes (in, out).
    """
    if module.split("/")[-1] == "bn":
        return f"{module}/{BATCH_NORM_NAMES.get(name, name)}", value
    if name == "weight" and value.ndim == 4:
        return f"{module}/kernel", value.transpose(2, 3, 1, 0)
    if name == "weight" and value.ndim == 2:
        return f"{module}/kernel", value.T
    # An unknown name stays as it is, and `build_params` lists it.
    return f"{module}/{name}", value


@functools.cache  # tracing takes seconds
def param_shapes(network: nn.Module, input_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's parameters, by their paths "a/b/kernel"."""
    x = jax.ShapeDtypeStruct((1, input_size, input_size, 3), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)["params"]
    return {
        "/".join(key.key for key in keys): leaf.shape
        for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


def build_params(
    flat: Mapping[str, np.ndarray],
    network: nn.Module,
    input_size: int,
    path: epath.PathLike,
) -> dict:
    """Nests {"a/b/kernel": array} into the parameters of a network, float32.

    Args:
      input_size: height = width of the images that the network takes.
      path: the file that the arrays are from, for the error.
    Raises: ValueError that lists what is missing, what is unknown, and what
      has another shape.
    """
    expected = param_shapes(network, input_size)
    problems = [f"missing {key}" for key in expected if key not in flat]
    problems += [f"unknown {key}" for key in flat if key not in expected]
    problems += [
        f"{key} has shape {flat[key].shape}, expected {shape}"
        for key, shape in expected.items()
        if key in flat and flat[key].shape != shape
    ]
    if problems:
        # A file of another network has hundreds of them.
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "; ".join(problem[:120] for problem in problems[:8])
        # The names are a stranger's, and the error escapes them.
        raise TensorFileError(
            f"{path} does not hold the weights of {type(network).__name__}: {listed}{more}"
        )

    params: dict = {}
    for key, value in flat.items():
        *parents, last = key.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        # Contiguous, since the transposed arrays are views, and a device gets
        # them in one piece.
        node[last] = np.ascontiguousarray(value, np.float32)
    return params

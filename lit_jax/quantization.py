"""Low precision: products of the blocks in int8 by qwix, for drawing alone.

A weight is int8 with a float32 scale for each layer and output channel. An
activation, where it is int8 too, has a scale for each token, found as it comes:
qwix has one for each index of the axes that a product does not sum over. What
the weights of the blocks do not multiply stays as it is: the attention itself
with its normaliser, the norms, adaLN, the embedders and the final layer. See
docs/low_precision.md for what that costs.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax.kernels import linear_attention
from lit_jax.models import Model, init_params

KINDS = ("none", "int8_weights", "int8")

# The modules whose products are int8, by their paths in the model.
PRODUCTS = (
    r"blocks/attn/(q|kv|qkv|gate|proj)",
    r"blocks/cross_attn/(q|k|v|q_linear|kv_linear|proj)",
    r"blocks/mlp/fc[12]",
)
# What stays in high precision. --mode=benchmark
# measures what quantising it too would cost.
ALSO = {
    "adaLN": (r"blocks/adaLN_modulation",),
    "final_layer": (r"final_layer/(linear|adaLN_modulation)",),
    # State and read-out of linear attention.
    "attention": (r"blocks/attn",),
    # No product makes the normaliser, so it is no module's:
    # the features that it is the mean of are rounded.
    "normaliser": (),
}
FEATURES = "lit_jax.kernels.linear_attention.feature_map"


class QuantizedModel:
    """A model with products in int8, which takes the parameters of `quantize`.

    It is called as the model is.

    Args:
      kind: "int8_weights": they are int8 in memory, and float when they are
        multiplied; "int8": activations are int8 too.
      also: names of `ALSO` that are quantised too.
    Raises: ValueError whose text starts with `quantize` where qwix is not
      installed.
    """

    def __init__(self, model: Model, kind: str, also: Sequence[str] = ()):
        try:
            import qwix  # an extra: nothing else needs it
        except ImportError as error:
            raise ValueError(
                f"quantize = {kind} needs the package qwix: pip install qwix"
            ) from error
        self._quantize_params = qwix.quantize_params
        self.config = model.config
        self.dtype = model.dtype
        self.implementation = model.implementation
        self._model = qwix.quantize_model(model, make_provider(kind, also))
        init = functools.partial(init_params, self._model)
        self._shapes = jax.eval_shape(init, jax.random.key(0))

    def apply(self, variables: Any, *args: Any) -> jax.Array:
        """As the model's; `variables`: {"params": what `quantize` gave}."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(self._shapes)
        flat = flatten_dict(variables["params"], sep="/")
        named = [flat[_name(path)] for path, _ in leaves]
        params = jax.tree.unflatten(tree, named)
        return self._model.apply({"params": params}, *args)

    def quantize(self, params: Any) -> dict[str, Any]:
        """The model's parameters; an int8 one has parts "qvalue" and "scale".

        Returns: a plain tree of arrays: a file or a mesh takes it as any other.
        """
        return jax.jit(self._quantize)(params)

    def _quantize(self, params):
        quantize = self._quantize_params
        rest = dict(params)
        blocks = rest.pop("blocks")
        shapes = {name: self._shapes[name] for name in rest}
        one_layer = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
            self._shapes["blocks"],
        )
        # Layer by layer: qwix would give all layers of the scan one scale.
        by_layer = jax.vmap(lambda layer: quantize(layer, one_layer))
        quantized = quantize(rest, shapes) | {"blocks": by_layer(blocks)}
        leaves, _ = jax.tree_util.tree_flatten_with_path(quantized)
        flat = {_name(path): leaf for path, leaf in leaves}
        return unflatten_dict(flat, sep="/")


def make_provider(kind: str, also: Sequence[str] = ()) -> Any:
    """What qwix puts in the place of a model's products: a `qwix.PtqProvider`.

    Args: as for `QuantizedModel`.
    """
    import qwix

    class Provider(qwix.PtqProvider):
        def dot_general(self, lhs, rhs, *args, **kwargs):
            product = super().dot_general(lhs, rhs, *args, **kwargs)
            # A float32 scale would make float32 of a bfloat16 product.
            return product.astype(lhs.dtype)

        def get_intercept_map(self):
            found = super().get_intercept_map()
            return found | ({FEATURES: _int8_features} if "normaliser" in also else {})

    paths = [*PRODUCTS]
    for name in also:
        paths += ALSO[name]
    rule = qwix.QuantizationRule(
        module_path="|".join(paths),
        weight_qtype="int8",
        act_qtype="int8" if kind == "int8" else None,
    )
    return Provider([rule])


def _int8_features(x, kernel_function):
    """`feature_map`, (B, N, T, H), rounded to int8 with a scale for each token."""
    import qwix

    features = linear_attention.feature_map(x, kernel_function)
    axes = tuple(range(features.ndim - 1))
    return qwix.dequantize(qwix.quantize(features, "int8", channelwise_axes=axes))


def _name(path: Sequence[Any]) -> str:
    """The name of a leaf.

    Of the parts of an int8 weight its own and "qvalue" or "scale".
    """
    names = []
    for entry in path:
        name = getattr(entry, "name", entry)
        names.append(str(getattr(entry, "key", name)))
    return "/".join(name for name in names if name != "array")

"""Low precision: products of the blocks in int8 by qwix, for drawing alone (docs/low_precision.md).

A weight is int8 with a float32 scale for each output channel; an activation, where it is int8 too,
has a scale for each token, found as it comes. What the weights of the blocks do not multiply stays
as it is: the attention itself with its normaliser, the norms, adaLN, the embedders and the final
layer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax.models import Model, init_params

KINDS = ("none", "int8_weights", "int8")
# The modules whose products are int8, by their paths in the model.
PRODUCTS = r"blocks/(attn|cross_attn)/(q|k|v|kv|qkv|proj|q_linear|kv_linear)|blocks/mlp/fc[12]"

# What stays in high precision; --mode=benchmark measures what quantising it too would cost.
ALSO = {
    "adaLN": r"blocks/adaLN_modulation",
    "final_layer": r"final_layer/(linear|adaLN_modulation)",
    # Products of activations: state, read-out and normaliser of linear attention.
    "attention": r"blocks/attn",
}


class QuantizedModel:
    """A model with products in int8: called as the model, with the parameters of `quantize`.

    Args:
      kind: "int8_weights": they are int8 in memory, and float when they are multiplied; "int8":
        activations are int8 too.
      also: names of `ALSO` that are quantised too.
    Raises: ValueError whose text starts with `quantize` where qwix is not installed.
    """

    def __init__(self, model: Model, kind: str, also: Sequence[str] = ()):
        try:
            import qwix  # an extra: nothing else needs it
        except ImportError as error:
            raise ValueError(
                f'quantize = {kind} needs the package qwix: pip install "lit_jax[int8]"'
            ) from error
        self._quantize_params = qwix.quantize_params
        self.config = model.config
        self.dtype = model.dtype
        self.implementation = model.implementation

        class Provider(qwix.PtqProvider):
            """In the type of the activations: a float32 scale would make float32 of bfloat16."""

            def dot_general(self, lhs, rhs, *args, **kwargs):
                return super().dot_general(lhs, rhs, *args, **kwargs).astype(lhs.dtype)

        rule = qwix.QuantizationRule(
            module_path="|".join([PRODUCTS, *(ALSO[name] for name in also)]),
            weight_qtype="int8",
            act_qtype="int8" if kind == "int8" else None,
        )
        self._model = qwix.quantize_model(model, Provider([rule]))
        self._shapes = jax.eval_shape(
            functools.partial(init_params, self._model, jax.random.key(0))
        )

    def apply(self, variables: Any, *args: Any) -> jax.Array:
        """As the model's; `variables`: {"params": what `quantize` gave}."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(self._shapes)
        flat = flatten_dict(variables["params"], sep="/")
        params = jax.tree.unflatten(tree, [flat[_name(path)] for path, _ in leaves])
        return self._model.apply({"params": params}, *args)

    def quantize(self, params: Any) -> dict[str, Any]:
        """The model's parameters, with a part "qvalue" and a part "scale" of each that is int8.

        Returns: a plain tree of arrays: a file or a mesh takes it as any other.
        """
        return jax.jit(self._quantize)(params)

    def _quantize(self, params):
        quantize = self._quantize_params
        one_layer = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self._shapes["blocks"]
        )
        rest = {name: tree for name, tree in params.items() if name != "blocks"}
        shapes = {name: self._shapes[name] for name in rest}
        # Layer by layer: qwix would give all layers of the scan one scale.
        blocks = jax.vmap(lambda layer: quantize(layer, one_layer))(params["blocks"])
        quantized = quantize(rest, shapes) | {"blocks": blocks}
        leaves, _ = jax.tree_util.tree_flatten_with_path(quantized)
        return unflatten_dict({_name(path): leaf for path, leaf in leaves}, sep="/")


def _name(path: Sequence[Any]) -> str:
    """The name of a leaf; of the parts of an int8 weight its own and "qvalue" or "scale"."""
    names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
    return "/".join(name for name in names if name != "array")

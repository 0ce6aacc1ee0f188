"""The model families: `config.model.family` names one of them."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lit_jax.models.architecture import Architecture
from lit_jax.models.dit import DiT, DiTConfig
from lit_jax.models.pixart import PixArt, PixArtConfig
from lit_jax.models.pixart_t5 import PixArtT5, PixArtT5Config


class Model(Protocol):
    """A family's Flax module, (x, t, condition, drop) to (B, h, w, C_out) float32.

    Its fields are the architecture, `dtype`, `remat` and the attention's `implementation`.
    """

    @property
    def config(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def implementation(self) -> str | None: ...

    def apply(
        self,
        variables: Mapping[str, Any],
        x: jax.Array,
        t: jax.Array,
        condition: Mapping[str, jax.Array],
        drop: jax.Array | None = None,
    ) -> Any:
        """x (B, h, w, C), t (B,); the rows with `drop`, (B,) bool, see the model's null."""

    def clone(self, **fields: Any) -> Any:
        """The same model with other fields."""

    def init(self, rng: jax.Array, *args: Any) -> Any:
        """{"params": fresh parameters}."""


class Family(NamedTuple):
    """A family's architecture and its Flax module."""

    config: type[Architecture]
    model: Any


FAMILIES = {
    "dit": Family(DiTConfig, DiT),
    "pixart": Family(PixArtConfig, PixArt),
    "pixart_t5": Family(PixArtT5Config, PixArtT5),
}


def model_of(config: Architecture) -> Any:
    """The Flax module that an architecture is of."""
    return next(family.model for family in FAMILIES.values() if type(config) is family.config)


def init_params(model: Model, rng: jax.Array) -> Any:
    """Fresh parameters, float32. They do not depend on the size of the images."""
    config = model.config
    # One token: a fused kernel may refuse it, and what is drawn is the same in all of them.
    model = model.clone(implementation="xla")
    side = config.patch_size
    x = jnp.zeros((1, side, side, config.in_channels))
    condition = {
        name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in config.condition_shapes(1).items()
    }
    t = jnp.zeros((1,), jnp.int32)
    return model.init(rng, x, t, condition, jnp.zeros((1,), bool))["params"]


def param_shapes(config: Architecture) -> Any:
    """The tree of parameters as ShapeDtypeStructs; nothing is computed. `num_heads` is known."""
    # A tree of the caller's own, which it may change.
    return jax.tree.map(lambda leaf: leaf, _traced_shapes(config))


@functools.lru_cache(maxsize=64)
def _traced_shapes(config: Architecture) -> Any:
    """Traced once: a job asks several times for the shapes of its student and its teacher."""
    model = model_of(config)(config)
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

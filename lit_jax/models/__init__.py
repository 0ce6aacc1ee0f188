"""The model families: `config.model.family` names one of them."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lit_jax.models.dit import DiT, DiTConfig


class Architecture(Protocol):
    """What the config of a family answers; it is a frozen dataclass that checks itself.

    Every family has the fields below, and those of its attention (`attention.make_attention`).
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def depth(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def num_heads(self) -> int | None: ...
    @property
    def attention(self) -> str: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int] | None: ...

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> Any:
        """The config of a size's name; depth, width and num_heads of 0 are the size's own."""

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON values; the class method `from_json` takes them back."""

    def condition_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the model is told of each image besides x and t."""

    def attention_flops(self, input_size: tuple[int, int]) -> float:
        """FLOPs of one image's attention without its projections, in all layers."""

    def forward_flops(self, input_size: tuple[int, int]) -> float:
        """FLOPs of one image's forward pass."""

    @property
    def shared_with_teacher(self) -> tuple[str, ...]:
        """Fields in which a teacher must be as its student, whatever its size."""

    @property
    def conventions(self) -> tuple[str, ...]:
        """Fields that say how a checkpoint's own code computes, which no shape tells."""

    @property
    def teacher_defaults(self) -> tuple[str, ...]:
        """Fields that a teacher has as its student, as long as no checkpoint says otherwise."""


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


FAMILIES = {"dit": Family(DiTConfig, DiT)}


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
    model = model_of(config)(config)
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

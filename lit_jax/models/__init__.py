"""The model families: `config.model.family` names one of them."""

from typing import Any, NamedTuple

from lit_jax.models.dit import DiT, DiTConfig


class Family(NamedTuple):
    """A family's architecture and its Flax module."""

    config: Any
    model: Any


FAMILIES = {"dit": Family(DiTConfig, DiT)}


def model_of(config: Any) -> Any:
    """The Flax module that an architecture is of."""
    return next(family.model for family in FAMILIES.values() if type(config) is family.config)

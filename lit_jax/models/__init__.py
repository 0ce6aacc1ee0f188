"""The model families: `config.model.family` names one of them."""

from typing import NamedTuple

from lit_jax.models.dit import DiT, DiTConfig


class Family(NamedTuple):
    """A family's architecture and its Flax module."""

    config: type[DiTConfig]
    model: type[DiT]


FAMILIES = {"dit": Family(DiTConfig, DiT)}

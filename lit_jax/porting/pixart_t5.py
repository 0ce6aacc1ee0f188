"""PixArt with its text encoder as one model: our own tree in an Orbax checkpoint, and no other.

It leaves as a pipeline's folder (`pipeline.export_pipeline`), in which it is two models again.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from lit_jax.models import param_shapes
from lit_jax.models.pixart_t5 import PixArtT5Config
from lit_jax.porting.matching import Entry, Report, check_tree
from lit_jax.porting.told import checked_depth, checked_fields, make_config
from lit_jax.porting.torch_checkpoint import PortingError, TorchCheckpoint

WHAT = "a workdir of a PixArt that is trained with its text encoder"
NO_LAYOUT = (
    "a model with its text encoder has no layout of PyTorch's world as one; write it as a "
    "pipeline's folder, with layout = diffusers"
)


@dataclasses.dataclass(frozen=True)
class Overrides:
    """What a caller knows better than a checkpoint: nothing, for all are our own."""

    @classmethod
    def of_student(cls, config: PixArtT5Config, seed: int) -> "Overrides":
        """None are needed."""
        del config, seed
        return cls()

    def of_model(self, config: PixArtT5Config) -> PixArtT5Config:
        """The config as the checkpoint says it."""
        return config


def recognises(keys: Collection[str]) -> bool:
    """Whether the paths of a tree are those of the two models."""
    starts = {key.split("/")[0] for key in keys}
    return starts == {"text_encoder", "transformer"}


def read_torch(
    source: TorchCheckpoint, report: Report, overrides: Overrides
) -> tuple[dict[str, Any], PixArtT5Config]:
    """Raises PortingError: no file of torch holds both."""
    del report, overrides
    raise PortingError(f"{source.path}: {NO_LAYOUT}")


def read_tree(flat: Mapping[str, Any], stored: Any, report: Report) -> PixArtT5Config:
    """The architecture of our own parameters; see `pixart.read_tree`.

    Raises: PortingError with both sides.
    """
    path = report.source
    config = make_config(PixArtT5Config, checked_fields(PixArtT5Config, stored, path), path)
    checked_depth(config.depth, path)
    checked_depth(config.text_depth, path)
    check_tree(flat, _entries(config), report)
    return config


def override(
    params: dict[str, Any], config: PixArtT5Config, overrides: Overrides, report: Report
) -> PixArtT5Config:
    """The architecture as it is."""
    del params, overrides, report
    return config


def check_official(config: PixArtT5Config) -> None:
    """Raises PortingError: there is no such layout."""
    raise PortingError(NO_LAYOUT)


def check_diffusers(config: PixArtT5Config) -> None:
    """Raises PortingError: as one model there is none."""
    raise PortingError(NO_LAYOUT)


def torch_module(config: PixArtT5Config) -> pathlib.Path | None:
    """No module of PyTorch runs both models."""
    return None


def _entries(config):
    shapes = flatten_dict(param_shapes(config), sep="/")
    return [Entry(path, (path,), tuple(leaf.shape)) for path, leaf in shapes.items()]

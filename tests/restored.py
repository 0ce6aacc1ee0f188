"""The parameters of a checkpoint, all at once."""

from typing import Any

from etils import epath

from lit_jax import checkpoint


def restore_params(
    path: epath.PathLike, shardings: Any = None, *, ema: bool = True
) -> tuple[Any, dict]:
    """Params, and the metadata with what was read and where: "weights" and "path"."""
    saved = checkpoint.open_params(path, ema=ema)
    about = {"weights": saved.item, "path": str(saved.folder)}
    return saved.read(shardings), saved.metadata | about

"""What shapes, keys and metadata tell of a transformer's architecture, for all families.

A checkpoint comes from a stranger: what it says of itself is checked, and must agree
with its tensors.
"""

from collections.abc import Mapping
from typing import Any

from lit_jax.models.architecture import SIZES, Architecture
from lit_jax.porting.matching import plain, shape_of
from lit_jax.porting.torch_checkpoint import PortingError

MAX_DEPTH = 10_000  # lists of keys are made of it
Shapes = Mapping[str, tuple[int, ...]]


def told_by_shapes(
    shapes: Shapes, stored: Mapping[str, Any], path: Any, what: str
) -> dict[str, Any]:
    """The fields that the shapes of official keys tell, but for the depth.

    Args:
        shapes: those of the tensors, by official key.
        stored: what the checkpoint names itself. Designs with the same leaves differ in it.
        what: for errors, such as "a DiT or LiT checkpoint".
    Raises: PortingError for shapes that no architecture has.
    """

    def shape(key, ndim):
        return shape_of(shapes, key, ndim, path, what)

    D, C, p, _ = shape("x_embedder.proj.weight", 4)
    # A patch of the predicted noise, and perhaps another of the variance.
    features = shape("final_layer.linear.weight", 2)[0]
    patch = p * p * C
    if features not in (patch, 2 * patch):
        raise PortingError(
            f"{path}: final_layer.linear has {features} outputs; patch {p} and {C} channels "
            f"need {patch}, or {2 * patch} with learned variance"
        )
    told = {
        "width": D,
        "patch_size": p,
        "in_channels": C,
        "learn_sigma": features == 2 * patch,
    }
    is_linear = "blocks.0.attn.q.weight" in shapes
    attention = "linear" if is_linear else "softmax"
    # Another design than these two is taken by its name, with the fields that stand beside it. All
    # leaves must then be its own.
    if stored.get("attention", attention) not in ("softmax", "linear"):
        return told | {"attention": stored["attention"]}
    first = "q" if is_linear else "qkv"
    told |= {
        "attention": attention,
        "qkv_bias": f"blocks.0.attn.{first}.bias" in shapes,
        "conv_size": 0,
    }
    if is_linear and "blocks.0.attn.dwc.weight" in shapes:
        # There is a filter for each channel of a head, so their number tells
        # the heads.
        H, _, _, K = shape("blocks.0.attn.dwc.weight", 4)
        if D % H or K % 2 == 0:
            raise PortingError(
                f"{path}: {H} filters of size {K} in the convolution: the filters "
                f"must divide the width {D}, the size must be odd"
            )
        told |= {"conv_size": K, "num_heads": D // H}
    return told


def heads_of_shapes(config: Architecture) -> int | None:
    """The heads that the shapes follow; 1 where they follow none, so that one trace serves all.

    Of softmax and linear attention the heads decide the convolution's filters alone.
    """
    follows_none = config.attention in ("softmax", "linear") and not config.conv_size
    return 1 if follows_none else config.num_heads


def published_heads(told: Mapping[str, Any]) -> int | None:
    """The softmax heads of the published size of a depth and width; None: it is no such size."""
    published = {size[:2]: size[2] for size in SIZES.values()}
    return published.get((told["depth"], told["width"]))


def agreeing(
    told: Mapping[str, Any], says: Mapping[str, Any], path: Any, who: str
) -> Mapping[str, Any]:
    """What the checkpoint says of itself, which must agree with its tensors.

    Raises: PortingError with both sides.
    """
    for field, value in says.items():
        if told.get(field, value) != value:
            raise PortingError(
                f"{path}: {who} says {field} = {plain(value)}, the tensors say {told[field]}"
            )
    return says


def checked_fields(family: type[Architecture], stored: Any, path: Any) -> dict[str, Any]:
    """The fields that a checkpoint names itself, without those it does not know.

    Raises: PortingError for what is no such field, or holds what it cannot.
    """
    try:
        fields = family.check_fields(stored)
    except ValueError as error:
        raise PortingError(f"{path}: its metadata: {error}") from error
    return {field: value for field, value in fields.items() if value is not None}


def checked_depth(depth: int, path: Any) -> int:
    """The depth. Raises: PortingError where it is beyond reason."""
    if depth > MAX_DEPTH:
        raise PortingError(f"{path}: {depth} blocks, the limit is {MAX_DEPTH}")
    return depth


def make_config(family: type[Architecture], fields: Mapping[str, Any], path: Any) -> Any:
    """The architecture of a family. Raises: PortingError for fields that make none."""
    try:
        return family.from_json(fields)
    except ValueError as error:
        raise PortingError(f"{path}: {error}") from error

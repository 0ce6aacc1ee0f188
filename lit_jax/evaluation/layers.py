"""Which layers bear another attention: the error of replacing each one alone.

In one layer after the other the student's attention takes the place of the
teacher's; all else is the teacher's. A pattern lets some layers keep softmax:
best those that bear the student's attention least.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lit_jax import pictures, sharding
from lit_jax.evaluation import reports
from lit_jax.models import Architecture, Model
from lit_jax.models.blocks import ATTENTION, attention_outputs, replacing

Sums = dict[str, jax.Array]


# ---- The error of each layer -------------------------------------------------


def make_layer_sums(
    model: Model,
    teacher: Model,
    mesh: jax.sharding.Mesh,
) -> Callable[..., Sums]:
    """Builds the jitted (params, teacher_params, x_t, t, condition) -> sums.

    Args:
      model, teacher: of the same depth, width and patch size; the layers of the
        teacher are alike.
    Returns: the function. Its values are sums over a batch for `errors_of`,
      float32, (L,) or scalars.
    """
    patch = model.config.patch_size
    # The noise or the velocity; not the raw values of a variance.
    channels = model.config.in_channels

    def layer_sums(params, teacher_params, x_t, t, condition):
        frozen = {"params": teacher_params}
        told = (x_t, t, condition)
        apply: Any = teacher.apply  # that of Flax
        output, seen = apply(frozen, *told, mutable=[ATTENTION])
        output = output[..., :channels]
        # A list of one: `sow` appends.
        (read,), (gave,) = (seen[ATTENTION]["blocks"][name] for name in ("read", "gave"))
        grid = (x_t.shape[1] // patch, x_t.shape[2] // patch)
        instead = attention_outputs(model, params, read, grid)

        def change(layer):
            changed = apply(frozen | replacing(layer, instead), *told)
            return _square(changed[..., :channels] - output)

        difference = instead.astype(jnp.float32) - gave.astype(jnp.float32)
        return {
            "attention_distance": _square(difference, (1, 2, 3)),
            "attention_square": _square(gave, (1, 2, 3)),
            # One after the other: as much memory as one forward pass.
            "output_distance": jax.lax.map(change, jnp.arange(len(instead))),
            "output_square": _square(output),
        }

    on_all = sharding.replicated(mesh)
    return jax.jit(sharding.on_mesh(layer_sums, mesh), out_shardings=on_all)


def _square(x, axes=None):
    """The sum of squares over axes, or of all, float32."""
    return jnp.square(x.astype(jnp.float32)).sum(axes)


@dataclasses.dataclass(frozen=True)
class LayerErrors:
    """Squared distances relative to the teacher's mean square, of each layer."""

    # Of what the layer's attention gives, and of what the model then predicts.
    attention: tuple[float, ...]
    output: tuple[float, ...]

    @property
    def ranking(self) -> list[int]:
        """The layers, from 0; that which changes the output most comes first."""
        layers = range(len(self.output))
        return sorted(layers, key=lambda layer: -self.output[layer])


def errors_of(batches: Sequence[Sums], student: str) -> LayerErrors:
    """The errors over all batches, from the sums of each.

    Args: student: the name of its checkpoint, for the error.
    Raises: ValueError where an error is not finite.
    """
    total = {}
    for name in batches[0]:
        total[name] = sum(np.asarray(batch[name], np.float64) for batch in batches)
    found = {}
    for kind in ("attention", "output"):
        # Of an attention or a model that gives nothing there is no relative error.
        square = np.maximum(total[f"{kind}_square"], np.finfo(np.float64).tiny)
        found[kind] = np.asarray(total[f"{kind}_distance"] / square)
    for kind, errors in found.items():
        if not np.isfinite(errors).all():
            broken = np.flatnonzero(~np.isfinite(errors))
            raise ValueError(
                f"{student}: with the attention of layer "
                f"{', '.join(map(str, broken))} the error of the {kind} is not "
                f"finite; its weights are broken, or overflow: name an earlier checkpoint"
            )
    attention, output = (tuple(errors.tolist()) for errors in found.values())
    return LayerErrors(attention, output)


# ---- The pattern under a budget ----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Every so many-th layer keeps softmax: its cost, the summed errors of the others."""

    softmax_every: int  # 0: no layer keeps it
    kept: tuple[int, ...]  # layers, from 0
    flops_share: float  # of the teacher's forward pass
    attention: float = 0.0
    output: float = 0.0

    def with_errors(self, errors: LayerErrors) -> "Pattern":
        """The same with the errors of the layers that do not keep softmax."""
        depth = len(errors.output)
        replaced = [i for i in range(depth) if i not in self.kept]
        return dataclasses.replace(
            self,
            attention=sum(errors.attention[i] for i in replaced),
            output=sum(errors.output[i] for i in replaced),
        )


def patterns(
    config: Architecture, teacher: Architecture, input_size: tuple[int, int]
) -> list[Pattern]:
    """All patterns that a student of linear layers can have, without errors.

    Args:
      config: the student's, without a pattern.
      teacher: its softmax teacher's.
      input_size: (h, w) of the images or latents for which FLOPs are counted.
    """
    depth = config.depth
    heads = teacher.num_heads or 0
    whole = teacher.forward_flops(input_size)
    found = []
    groups = [k for k in range(2, depth + 1) if depth % k == 0]
    for every in (0, *groups):
        mixed = dataclasses.replace(config, softmax_every=every, softmax_heads=heads)
        kept = tuple(range(every - 1, depth, every)) if every else ()
        share = mixed.forward_flops(input_size) / whole
        found.append(Pattern(every, kept, share))
    return found


def choose(patterns: Sequence[Pattern], flops_share: float) -> Pattern:
    """Of those within the budget the pattern that changes the output least.

    Raises: ValueError where none is within it.
    """
    within = [each for each in patterns if each.flops_share <= flops_share]
    if not within:
        cheapest = min(each.flops_share for each in patterns)
        raise ValueError(
            f"flops_share = {flops_share:g}, but the cheapest pattern has "
            f"{cheapest:.4f} of the teacher's FLOPs; allow more, or count those "
            f"of larger images"
        )
    return min(within, key=lambda each: (each.output, each.flops_share))


# ---- The report --------------------------------------------------------------


def write_report(
    path: epath.Path,
    errors: LayerErrors,
    patterns: Sequence[Pattern],
    chosen: Pattern | None,
    about: dict[str, Any],
) -> str:
    """Writes path.json, path.md with the tables, and path.png with a bar for each layer.

    Args:
      patterns: with errors; none: there are no others than the student's own.
      about: JSON values: what was compared.
    Returns: the tables in Markdown.
    """
    rank = {layer: place for place, layer in enumerate(errors.ranking, 1)}
    rows = []
    for layer, (attention, output) in enumerate(zip(errors.attention, errors.output)):
        rows.append([layer, f"{attention:.4g}", f"{output:.4g}", rank[layer]])
    header = ["layer", "error of its attention", "change of the output", "rank"]
    lines = reports.table(header, rows)
    ranked = ", ".join(map(str, errors.ranking))
    lines += ["", f"From the layer that bears it least: {ranked}."]
    if patterns:
        lines += ["", *_pattern_table(patterns, chosen)]
    content = about | {
        "attention_error": errors.attention,
        "output_change": errors.output,
        "ranking": errors.ranking,
        "patterns": [dataclasses.asdict(pattern) for pattern in patterns],
        "chosen": chosen and dataclasses.asdict(chosen),
    }
    figure = draw(errors, chosen.kept if chosen else ())
    reports.write_texts(path, ["# Layers", "", *lines], content)
    pictures.save_png(reports.with_ending(path, ".png"), figure.savefig, dpi=110)
    return "\n".join(lines)


def _pattern_table(patterns, chosen):
    rows = []
    for pattern in patterns:
        kept = ", ".join(map(str, pattern.kept)) or "none"
        share = f"{pattern.flops_share:.4f}"
        mark = "yes" if pattern == chosen else ""
        rows.append([pattern.softmax_every, kept, share, f"{pattern.output:.4g}", mark])
    kept = "layers that keep softmax"
    share = "FLOPs, of the teacher's"
    return reports.table(["softmax_every", kept, share, "summed changes", "chosen"], rows)


def draw(errors: LayerErrors, kept: Sequence[int] = ()) -> Any:
    """A bar for each layer, a panel for each error.

    Args: kept: layers whose bars are grey, for they keep softmax.
    Returns: a matplotlib Figure.
    """
    # Not at the top, for it takes a second; not pyplot, which would look for
    # a display.
    from matplotlib.figure import Figure

    layers = range(len(errors.output))
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = {
        "error of the layer's attention": errors.attention,
        "change of the model's output": errors.output,
    }
    colors = ["tab:gray" if layer in kept else "tab:blue" for layer in layers]
    for axes, (title, values) in zip(figure.subplots(1, 2), panels.items()):
        axes.bar(layers, values, color=colors)
        axes.set(title=title, xlabel="layer replaced alone")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3, axis="y")
    return figure

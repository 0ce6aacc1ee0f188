"""Weight inheritance: a student takes everything but attention from a pretrained model.

These are guidelines 3 and 4 of the LiT paper: start from a fully converged model, and load all of
it but the attention, whose function is another one now.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lit_jax.models import attention

# Self-attention alone. Another attention, such as cross-attention, has its own path: it is the same
# function in both models, and inherited with the rest.
ATTENTION = "blocks/attn/"
# Of a model whose layers follow a pattern, blocks/layer_1/ holds layer 1 of each group.
GROUP = "blocks/layer_"
# What `load` may name: the parts of projections, and all modules that are none ("rest").
PARTS = (*dict.fromkeys(part for parts in attention.PARTS.values() for part in parts), "rest")


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Where each parameter of the student came from; values are numbers of parameters."""

    inherited: dict[str, int]
    at_init: dict[str, int]
    left_behind: dict[str, int]  # attention of the source that the student does not take

    def summary(self) -> str:
        """A line for each of the three, with the modules in it."""
        lines = ["inheritance"]
        parts = {
            "inherited": self.inherited,
            "new": self.at_init,
            "left behind": self.left_behind,
        }
        for title, leaves in parts.items():
            modules = sorted({path.rsplit("/", 1)[0] for path in leaves})
            names = ", ".join(modules) or "nothing"
            lines.append(f"  {title:<12}{sum(leaves.values()):>13,} parameters: {names}")
        return "\n".join(lines)

    def save(self, path: epath.Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def merge_params(
    loaded: Any, init: Any, *, load: tuple[str, ...] = (), keep_init: tuple[str, ...] = ()
) -> tuple[Any, MergeReport]:
    """Puts the leaves of `loaded` into the student's fresh parameters, strictly.

    Everything outside `blocks/attn` is taken and must match in name and shape. Attention stays at
    init but for the parts that `load` names. The q, k, v of a softmax source are the thirds of its
    `qkv`; a linear student's k and v are the halves of `kv`.

    Where every k-th layer of the student keeps softmax attention, that of a softmax source is taken
    whole in these layers. A source with a pattern of its own fits a student with the same.

    Args:
      loaded: the source's tree of NumPy-like leaves. They are read one by one, and may still be in
        a file.
      init: the student's tree of device arrays; their shardings are kept. A leaf that is inherited
        whole need not be there: a ShapeDtypeStruct with its sharding does.
      load: any of q, k, v, o, conv, and rest: all else that an attention has.
      keep_init: paths (a module or a leaf) that stay at init.
    Returns: the merged tree and the report.
    Raises: ValueError listing both sides: leaves that the source lacks, has too many of, has empty
      or in another shape.
    """
    plan, report = plan_merge(loaded, init, load=load, keep_init=keep_init)
    source = flatten_dict(loaded, sep="/")
    merged = flatten_dict(init, sep="/")
    for path, parts in plan.items():
        columns = [part and part.read(source) for part in parts]
        merged[path] = _place(columns, merged[path])
    return unflatten_dict(merged, sep="/"), report


def plan_merge(
    loaded: Any, init: Any, *, load: tuple[str, ...], keep_init: tuple[str, ...]
) -> tuple[dict[str, "list[Part | None]"], MergeReport]:
    """What `merge_params` would do, from shapes alone.

    Returns: the parts of each leaf that takes any, and the report.
    Raises: as `merge_params`.
    """
    source = flatten_dict(loaded, sep="/")
    target = flatten_dict(init, sep="/")
    _check_names(target, load, keep_init)

    plan: dict[str, list[Part | None]] = {}
    inherited: dict[str, int] = {}
    at_init: dict[str, int] = {}
    used: set[str] = set()
    problems: list[str] = []
    groups = len({path.split("/")[1] for path in target if path.startswith(GROUP)})
    # A uniform source has the layers of all groups in one leaf.
    spread = groups if not any(path.startswith(GROUP) for path in source) else 0
    for path, leaf in target.items():
        parts: list[Part | None] = []
        if not any(_is_under(path, kept) for kept in keep_init):
            parts = _find_parts(path, source, load, spread)
        taken = [part for part in parts if part]
        if not taken:
            at_init[path] = leaf.size
            continue
        missing = [part.path for part in taken if part.path not in source]
        if missing:
            problems.append(f"{path} {leaf.shape}: the source has no {missing[0]}")
            continue
        used |= {part.path for part in taken}
        # All parts of a leaf are of one width: its last axis is cut into as many.
        wanted = (*leaf.shape[:-1], leaf.shape[-1] // len(parts))
        wrong = [part.shape(source) for part in taken if part.shape(source) != wanted]
        if wrong or not leaf.size:
            found = wrong[0] if wrong else "empty"
            problems.append(f"{path}: {wanted} in the student, {found} in the source")
            continue
        plan[path] = parts
        inherited[path] = leaf.size * len(taken) // len(parts)
        if len(taken) < len(parts):
            at_init[path] = leaf.size - inherited[path]

    # What the source has besides is its attention, or it is of another model.
    left_behind: dict[str, int] = {}
    for path in source.keys() - used:
        is_kept = any(_is_under(path, kept) for kept in keep_init)
        shape = tuple(source[path].shape)
        if plain_path(path).startswith(ATTENTION) or is_kept:
            left_behind[path] = int(np.prod(shape))
        else:
            problems.append(f"{path} {shape}: the student has no such parameter")
    if problems:
        raise ValueError("the student cannot inherit: " + "; ".join(sorted(problems)))
    return plan, MergeReport(inherited, at_init, left_behind)


def parts_of(params: Any) -> tuple[str, ...]:
    """The parts of attention that a tree of parameters has, the modules of no part among them."""
    paths = map(plain_path, flatten_dict(params, sep="/"))
    leaves = [path for path in paths if path.startswith(ATTENTION)]
    modules = {path.removeprefix(ATTENTION).rpartition("/")[0] for path in leaves}
    known = [part for m, parts in attention.PARTS.items() if m in modules for part in parts]
    return (*known, *(["rest"] if modules - attention.PARTS.keys() else []))


def plain_path(path: str) -> str:
    """The path without the layer of a pattern: blocks/layer_1/attn/q is blocks/attn/q."""
    if not path.startswith(GROUP):
        return path
    return "blocks/" + path.removeprefix(GROUP).partition("/")[2]


def _check_names(target, load, keep_init):
    unknown = [part for part in load if part not in PARTS]
    if unknown:
        raise ValueError(f"load = {', '.join(unknown)}: it may name {', '.join(PARTS)}")
    plain = set(map(plain_path, target))
    leaves = sorted(path for path in plain if path.startswith(ATTENTION))
    if "conv" in load and not any(path.startswith(f"{ATTENTION}dwc/") for path in leaves):
        raise ValueError(
            f"load = conv, but the student has no convolution: its attention is {', '.join(leaves)}"
        )
    modules = sorted({path.rsplit("/", 1)[0] for path in target})
    for kept in keep_init:
        if not any(_is_under(path, kept) for path in target):
            raise ValueError(
                f"keep_init = {kept!r} is no parameter of the student; its modules: "
                f"{', '.join(modules)}"
            )


def _is_under(path: str, module: str) -> bool:
    return path == module or path.startswith(module + "/")


@dataclasses.dataclass(frozen=True)
class Part:
    """One of `count` equal parts of the last axis of a source leaf."""

    path: str
    index: int = 0
    count: int = 1
    first: int = 0  # the layers first, first + every, ... of the leaf
    every: int = 0  # 0: all of the leaf

    def shape(self, source: dict[str, Any]) -> tuple[int, ...]:
        *axes, last = source[self.path].shape
        if self.every:
            axes[0] = len(range(self.first, axes[0], self.every))
        return (*axes, last // self.count)

    def read(self, source: dict[str, Any]) -> Any:
        leaf = source[self.path]
        if self.every:
            leaf = leaf[self.first :: self.every]
        if self.count == 1:
            return leaf  # still in its file: a sharded load reads only what each device holds
        leaf = np.asarray(leaf)
        width = leaf.shape[-1] // self.count
        return leaf[..., self.index * width : (self.index + 1) * width]


def _find_parts(path: str, source: dict, load: tuple[str, ...], spread: int) -> list[Part | None]:
    """What makes up a leaf along its last axis; None for a part that stays at init.

    Args: spread: the layers of the student's pattern, of which the source has none; 0: as the
      student.
    """
    plain = plain_path(path)
    is_attention = plain.startswith(ATTENTION)
    if plain == path:
        return _attention_parts(path, source, load) if is_attention else [Part(path)]
    group = path.removesuffix(plain.removeprefix("blocks/"))
    first = int(group.removeprefix(GROUP).rstrip("/"))
    if not spread:
        own = {plain_path(name): leaf for name, leaf in source.items() if name.startswith(group)}
        parts = _attention_parts(plain, own, load) if is_attention else [Part(plain)]
        return [part and _in_group(part, group) for part in parts]
    # The last layer of a pattern is softmax attention, as all of the teacher's are.
    load = ("q", "k", "v", "o") if first == spread - 1 else load
    parts = _attention_parts(plain, source, load) if is_attention else [Part(plain)]
    return [part and dataclasses.replace(part, first=first, every=spread) for part in parts]


def _in_group(part: Part, group: str) -> Part:
    return dataclasses.replace(part, path=group + part.path.removeprefix("blocks/"))


def _attention_parts(path: str, source: dict, load: tuple[str, ...]) -> list[Part | None]:
    """`_find_parts` of an attention leaf, by its plain path."""
    module, _, leaf = path.removeprefix(ATTENTION).rpartition("/")
    if module not in attention.PARTS:
        return [Part(path) if "rest" in load else None]
    return [
        _find_part(name, leaf, source) if name in load else None for name in attention.PARTS[module]
    ]


def _find_part(name: str, leaf: str, source: dict) -> Part:
    """Where a source has a part, whichever module it is in."""
    modules = [m for m, parts in attention.PARTS.items() if name in parts]
    # A source of another design may lack it: the first of the paths is then reported missing.
    there = [m for m in modules if f"{ATTENTION}{m}/{leaf}" in source] or modules[-1:]
    parts = attention.PARTS[there[0]]
    return Part(f"{ATTENTION}{there[0]}/{leaf}", parts.index(name), len(parts))


def _place(columns: list[Any], leaf: Any) -> jax.Array:
    """Joins the parts on the last axis, with the leaf's sharding and dtype.

    Where a part is None, the leaf's own columns stay.
    """
    if all(part is not None for part in columns):
        # One part is still in its file: of that a device reads what it holds.
        whole = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=-1)
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.asarray(whole[index], leaf.dtype)
        )
    width = leaf.shape[-1] // len(columns)
    for i, part in enumerate(columns):
        if part is not None:
            # Under jit with the leaf's sharding: no device holds the whole leaf on the way.
            update = jax.jit(
                lambda x, part, i=i: x.at[..., i * width : (i + 1) * width].set(part),
                out_shardings=leaf.sharding,
            )
            leaf = update(leaf, jnp.asarray(part, leaf.dtype))
    return leaf

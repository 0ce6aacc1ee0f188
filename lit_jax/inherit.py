"""Weight inheritance: a student takes everything but attention from a pretrained model (paper, guidelines 3 and 4)."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

PARTS = ("q", "k", "v", "o", "conv")  # what inherit.load may name


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Where each parameter of the student came from; values are numbers of parameters."""

    inherited: dict[str, int]
    at_init: dict[str, int]
    left_behind: dict[str, int]  # attention of the source that the student does not take

    def summary(self) -> str:
        def line(title, leaves):
            modules = sorted({path.rsplit("/", 1)[0] for path in leaves})
            return f"  {title:<12}{sum(leaves.values()):>13,} parameters: {', '.join(modules) or 'nothing'}"

        return "\n".join(
            (
                "inheritance",
                line("inherited", self.inherited),
                line("new", self.at_init),
                line("left behind", self.left_behind),
            )
        )

    def save(self, path: pathlib.Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def merge_params(
    loaded: Any, init: Any, *, load: tuple[str, ...] = (), keep_init: tuple[str, ...] = ()
) -> tuple[Any, MergeReport]:
    """Puts the leaves of `loaded` into the student's fresh parameters, strictly.

    Everything outside `blocks/attn` is taken and must match in name and shape; attention stays at init but for the parts
    that `load` names. A softmax source's q, k, v are the thirds of its `qkv`; a linear student's k and v the halves of `kv`.

    Args:
      loaded: the source's tree (NumPy-like leaves, read one by one; they may still be in a file).
      init: the student's tree of device arrays; their shardings are kept.
      load: any of q, k, v, o, conv. keep_init: paths (a module or a leaf) that stay at init.
    Returns: the merged tree and the report.
    Raises: ValueError listing both sides: leaves the source lacks, has too many of, has empty or in another shape.
    """
    plan, report = plan_merge(loaded, init, load=load, keep_init=keep_init)
    source, target = flatten_dict(loaded, sep="/"), flatten_dict(init, sep="/")
    merged = {
        path: _place([part and part.read(source) for part in plan[path]], leaf)
        if path in plan
        else leaf
        for path, leaf in target.items()
    }
    return unflatten_dict(merged, sep="/"), report


def plan_merge(
    loaded: Any, init: Any, *, load: tuple[str, ...], keep_init: tuple[str, ...]
) -> tuple[dict[str, "list[Part | None]"], MergeReport]:
    """What `merge_params` would do, from shapes alone: the parts of each leaf that takes any, and the report."""
    source, target = flatten_dict(loaded, sep="/"), flatten_dict(init, sep="/")
    unknown = [part for part in load if part not in PARTS]
    if unknown:
        raise ValueError(f"inherit.load names {', '.join(unknown)}; it may name {', '.join(PARTS)}")
    if "conv" in load and not any(path.startswith("blocks/attn/dwc/") for path in target):
        raise ValueError(
            f"inherit.load names conv, but the student has no convolution: its attention is "
            f"{', '.join(sorted(p for p in target if p.startswith('blocks/attn/')))}"
        )
    for kept in keep_init:
        if not any(_under(path, kept) for path in target):
            raise ValueError(
                f"inherit.keep_init names {kept!r}, which is no parameter of the student; "
                f"its modules: {', '.join(sorted({p.rsplit('/', 1)[0] for p in target}))}"
            )

    plan, inherited, at_init, used, problems = {}, {}, {}, set(), []
    for path, leaf in target.items():
        parts = []
        if not any(_under(path, kept) for kept in keep_init):
            parts = (
                _attention_parts(path, source, load)
                if path.startswith("blocks/attn/")
                else [Part(path)]
            )
        if not any(parts):
            at_init[path] = leaf.size
            continue
        missing = [part.path for part in parts if part and part.path not in source]
        if missing:
            problems.append(f"{path} {leaf.shape}: the source has no {missing[0]}")
            continue
        used |= {part.path for part in parts if part}
        wanted = (*leaf.shape[:-1], leaf.shape[-1] // len(parts))
        wrong = [shape for part in parts if part and (shape := part.shape(source)) != wanted]
        if wrong or not leaf.size:
            problems.append(
                f"{path}: {wanted} in the student, {wrong[0] if wrong else 'empty'} in the source"
            )
            continue
        plan[path] = parts
        taken = sum(part is not None for part in parts)
        inherited[path] = leaf.size * taken // len(parts)
        if taken < len(parts):
            at_init[path] = leaf.size - inherited[path]

    left_behind, extra = {}, []
    for path in source.keys() - used:
        if path.startswith("blocks/attn/") or any(_under(path, kept) for kept in keep_init):
            left_behind[path] = int(np.prod(source[path].shape))
        else:
            extra.append(f"{path} {tuple(source[path].shape)}: the student has no such parameter")
    if problems or extra:
        raise ValueError(
            "the student cannot inherit: " + "; ".join(sorted(problems) + sorted(extra))
        )
    return plan, MergeReport(inherited, at_init, left_behind)


def _under(path: str, module: str) -> bool:
    return path == module or path.startswith(module + "/")


@dataclasses.dataclass(frozen=True)
class Part:
    """One of `count` equal parts of the last axis of a source leaf."""

    path: str
    index: int = 0
    count: int = 1

    def shape(self, source: dict) -> tuple[int, ...]:
        *axes, last = source[self.path].shape
        return (*axes, last // self.count)

    def read(self, source: dict) -> Any:
        leaf = source[self.path]
        if self.count == 1:
            return leaf  # still in its file
        leaf = np.asarray(leaf)
        width = leaf.shape[-1] // self.count
        return leaf[..., self.index * width : (self.index + 1) * width]


def _attention_parts(path: str, source: dict, load: tuple[str, ...]) -> list[Part | None]:
    """What makes up an attention leaf along its last axis; None for a part that stays at init."""
    module, leaf = path.removeprefix("blocks/attn/").split("/")
    if module in ("proj", "dwc"):
        return [Part(path) if {"proj": "o", "dwc": "conv"}[module] in load else None]
    if f"blocks/attn/qkv/{leaf}" in source:  # a softmax source
        parts = {name: Part(f"blocks/attn/qkv/{leaf}", "qkv".index(name), 3) for name in "qkv"}
    else:
        parts = {
            "q": Part(f"blocks/attn/q/{leaf}"),
            "k": Part(f"blocks/attn/kv/{leaf}", 0, 2),
            "v": Part(f"blocks/attn/kv/{leaf}", 1, 2),
        }
    return [parts[name] if name in load else None for name in module]  # module is q, kv or qkv


def _place(columns: list, leaf: jax.Array) -> jax.Array:
    """Joins the parts on the last axis, an absent one staying as in `leaf`, on the leaf's sharding and dtype."""
    if len(columns) == 1:
        whole = columns[0]
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: np.asarray(whole[index], leaf.dtype)
        )
    width = leaf.shape[-1] // len(columns)
    for i, part in enumerate(columns):
        if part is not None:
            update = jax.jit(
                lambda x, part, i=i: x.at[..., i * width : (i + 1) * width].set(part),
                out_shardings=leaf.sharding,
            )
            leaf = update(leaf, jnp.asarray(part, leaf.dtype))
    return leaf

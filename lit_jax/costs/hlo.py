"""Reads a compiled program: what it moves through memory and between chips.

XLA's own cost analysis counts the body of a loop once. Our blocks, microbatches
and sampling steps are loops, so here a body counts as often as it runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

# Of one element, by HLO's name of its type.
BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# What moves no bytes: names for other values, and loops (their bodies count).
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "while",
    "conditional",
    "call",
    "opt-barrier",
    "add-dependency",
)
# Calls of the TPU compiler's own that are names for memory too.
FREE_TARGETS = ('"AllocateBuffer"', '"ConcatBitcast"', '"AssumeGatherIndicesInBound"')
SLICES = ("dynamic-slice", "gather", "slice")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of an HLO computation."""

    name: str
    shape: str  # of the result, with layouts: "bf16[8,64]{1,0:T(8,128)S(1)}"
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # what follows the operands; of a constant its value, of a parameter its place
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program."""

    kind: str
    size: int  # bytes of the array: gathered, reduced, or before it is scattered
    group: int  # how many chips take part
    crosses_slices: bool
    times: int  # how often it runs
    name: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that each chip sends in all its runs, by a ring."""
        if self.kind == "collective-permute":
            share = 1.0
        else:
            # Around a ring of n chips each passes on n - 1 of n parts. A
            # reduction goes around twice: to sum, and to hand out the sums.
            rounds = 2.0 if self.kind == "all-reduce" else 1.0
            share = rounds * (self.group - 1) / self.group
        return share * self.size * self.times


Computation = dict[str, Instruction]


class Program:
    """The computations of an HLO module's text (`compiled.as_text()`)."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        current: Computation | None = None
        for line in text.splitlines():
            if line.endswith("{") and " -> " in line:
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                current = self.computations[name] = {}
                if line.startswith("ENTRY"):
                    self._entry = name
            elif current is not None and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction

    # ---- What runs, and how often --------------------------------------------

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every step of the program, its computation, and how often it runs.

        A fusion is one step.
        """
        yield from self._executed(self._entry, 1)

    def _executed(self, name, times):
        computation = self.computations[name]
        for instruction in computation.values():
            yield instruction, computation, times
            called = _called(instruction)
            if instruction.opcode == "while":
                turns = self._trip_count(called["condition"][0], called["body"][0])
                yield from self._executed(called["body"][0], times * turns)
            elif instruction.opcode in ("call", "conditional"):
                for branch in sum(called.values(), []):
                    yield from self._executed(branch, times)

    def _trip_count(self, condition: str, body: str) -> int:
        """Our loops count from 0 up to a constant of their condition.

        The compiler's own loops, in which matrix products and collectives overlap,
        are unrolled: they count by twos.
        """
        inside = self.computations[condition]
        for instruction in inside.values():
            operands = [inside[name] for name in instruction.operands]
            bounds = [x.attributes for x in operands if x.opcode == "constant"]
            if not bounds:
                continue
            is_bound = "direction=LT" in instruction.attributes
            # The comparison may be fused: then the counter and the bound go in.
            if instruction.opcode == "fusion":
                is_bound = "s32" in operands[0].shape + operands[-1].shape
            if is_bound:
                counters = [x.attributes for x in operands if x.opcode == "get-tuple-element"]
                step = self._step(body, counters[0]) if counters else 1
                return math.ceil(int(bounds[0]) / step)
        raise ValueError(f"the loop condition {condition} compares with no constant")

    def _step(self, body: str, counter: str) -> int:
        """How much a turn adds to the counter, the element of the state that is named."""
        inside = self.computations[body]
        (state,) = [i for i in inside.values() if i.is_root]
        found = re.search(r"index=(\d+)", counter)
        if not found or state.opcode != "tuple":
            return 1
        made_by = inside[state.operands[int(found[1])]]
        constants = [inside[x].attributes for x in made_by.operands if x in inside]
        steps = [int(x) for x in constants if re.fullmatch(r"\d+", x)]
        return steps[0] if made_by.opcode == "add" and steps else 1

    # ---- Bytes through memory ------------------------------------------------

    def traffic(self) -> float:
        """Bytes that a run moves through main memory.

        As if each instruction read its operands and wrote its result. What lies in
        on-chip memory costs nothing.
        """
        return sum(self.movers().values())

    def movers(self) -> dict[str, float]:
        """`traffic` by the part of the model that moves it, see `part_of`; most first.

        A fusion counts for the part of its result.
        """
        moved: dict[str, float] = collections.defaultdict(float)
        for instruction, computation, times in self.executed():
            size = times * self._bytes_moved(instruction, computation)
            if size:
                moved[part_of(instruction)] += size
        # A collective is read and written once, and stands in no step's count.
        for collective in self.collectives():
            moved["collectives"] += 2.0 * collective.size * collective.times
        return dict(sorted(moved.items(), key=lambda item: -item[1]))

    def _bytes_moved(self, instruction, computation):
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return 0.0
        if opcode.removesuffix("-start") in COLLECTIVES:
            return 0.0
        if opcode == "custom-call" and any(x in instruction.attributes for x in FREE_TARGETS):
            return 0.0

        names = [name for name in instruction.operands if name in computation]
        operands = [computation[name].shape for name in names]
        result = shape_bytes(instruction.shape)
        called = sum(_called(instruction).values(), [])
        if opcode == "async-start":
            if any(i.opcode in COLLECTIVES for i, _ in self._inside(instruction)):
                return 0.0
            # Another way to write slice-start and the like.
            (root,) = [i for i in self.computations[called[0]].values() if i.is_root]
            if root.opcode in ("copy", "slice"):
                opcode = f"{root.opcode}-start"
        if opcode in ("fusion", "async-start") and called:
            return self._fusion_bytes(self.computations[called[0]], result)
        if opcode in ("copy-start", "slice-start"):
            # The result names the destination, the source again and a token.
            moved = [
                array
                for array in _arrays(instruction.shape)
                if array not in operands and "32[]" not in array
            ]
            size = sum(shape_bytes(array, all_spaces=True) for array in moved)
            from_memory = bool(shape_bytes(operands[0]))
            return size * from_memory + sum(map(shape_bytes, moved))
        if opcode in ("dynamic-slice", "gather"):
            return 2.0 * result
        if opcode == "dynamic-update-slice":
            return 2.0 * shape_bytes(operands[1])
        return sum(map(shape_bytes, operands)) + result

    def _fusion_bytes(self, body, result):
        """Bytes of one fusion.

        One that takes a slice of an operand reads the slice; one that updates a
        slice writes the slice in place. A collective that runs next to a
        fusion's other work stands in the fusion, with its arrays: it is counted
        by itself.
        """
        roots = [i for i in body.values() if i.is_root]
        if roots[0].opcode == "tuple":
            roots = [body[name] for name in roots[0].operands]
        moved = result
        in_place = set()
        for root in roots:
            made_by = self._behind_bitcasts(body, root)
            if made_by.opcode == "dynamic-update-slice":
                updated, part = made_by.operands[:2]
                moved += shape_bytes(body[part].shape) - shape_bytes(root.shape)
                in_place.add(self._behind_bitcasts(body, body[updated]).name)
            elif made_by.opcode == "parameter" or made_by.opcode in COLLECTIVES:
                moved -= shape_bytes(root.shape)

        for parameter in body.values():
            if parameter.opcode == "parameter" and parameter.name not in in_place:
                moved += min(shape_bytes(parameter.shape), self._bytes_read(body, parameter))
        return max(moved, 0.0)

    def _bytes_read(self, body, parameter):
        """Bytes that a fusion reads of a parameter: of its slices, or all.

        A fusion inside it may take the slice.
        """
        total = 0.0
        for user, name in self._users(body, parameter.name):
            if user.opcode in ("tuple", *COLLECTIVES):
                continue
            size = shape_bytes(parameter.shape, all_spaces=True)
            if user.opcode in SLICES:
                size = shape_bytes(user.shape, all_spaces=True)
            elif user.opcode == "fusion":
                inner = self.computations[_called(user)["calls"][0]]
                number = str(user.operands.index(name))
                (taken,) = [
                    x for x in inner.values() if x.opcode == "parameter" and x.attributes == number
                ]
                size = min(size, self._bytes_read(inner, taken))
            total += size
        return total

    def _behind_bitcasts(self, body, instruction):
        """What made a value, seen through what leaves its bytes as they are."""
        while instruction.opcode in ("bitcast", "copy", "convert") or self._is_view(instruction):
            if instruction.operands[0] not in body:
                break
            instruction = body[instruction.operands[0]]
        return instruction

    def _users(self, body, name):
        """What reads a value, and by which name: its own, or that of a bitcast of it."""
        for instruction in body.values():
            if name in instruction.operands:
                if instruction.opcode == "bitcast" or self._is_view(instruction):
                    yield from self._users(body, instruction.name)
                else:
                    yield instruction, name

    def _is_view(self, instruction):
        """Whether it is a fusion that names other tiles for its operand, and writes nothing.

        TPU7x's compiler has these inside of fusions.
        """
        aliased = "output_to_operand_aliasing" in instruction.attributes
        if instruction.opcode != "fusion" or not aliased:
            return False
        body = self.computations[_called(instruction)["calls"][0]]
        return {x.opcode for x in body.values()} <= {"parameter", "copy", "bitcast"}

    # ---- Bytes between chips -------------------------------------------------

    def collectives(self, slices: int = 1) -> list[Collective]:
        """Every collective, wherever it stands.

        Args: slices: how many equal runs of chips are TPU slices of their own.
        """
        found: dict[str, Collective] = {}
        for step, computation, times in self.executed():
            inside = [(step, computation)]
            if step.opcode in ("fusion", "async-start"):
                inside += self._inside(step)
            for i, where in inside:
                groups = replica_groups(i.attributes)
                if i.opcode.removesuffix("-start") not in COLLECTIVES or groups.shape[1] == 1:
                    continue
                kind = self._kind(i, step)
                shapes = [where[name].shape for name in i.operands if name in where]
                size = sum(shape_bytes(shape, all_spaces=True) for shape in shapes)
                if kind == "all-gather":
                    size *= groups.shape[1]
                chips = (groups.max() + 1) // slices
                slice_of = groups // chips
                crosses = slices > 1 and bool((slice_of != slice_of[:, :1]).any())
                # One that runs next to several others stands in all
                # of them, as links of a chain. Channels tell
                # nothing: all that are fused with a slice share one.
                chain = re.search(r'chain_id="(\d+)"', i.attributes)
                key = chain.group() if chain else i.name
                collective = Collective(kind, int(size), groups.shape[1], crosses, times, i.name)
                found.setdefault(key, collective)
        return list(found.values())

    def _inside(self, instruction):
        """The instructions that it calls, also through custom calls, each with where it stands.

        What SparseCores do (TPU7x, v6e) is a call inside an asynchronous one.
        """
        for name in sum(_called(instruction).values(), []):
            body = self.computations[name]
            for inner in body.values():
                yield inner, body
                if inner.opcode == "custom-call":
                    yield from self._inside(inner)

    def _kind(self, instruction, step):
        kind = instruction.opcode.removesuffix("-start")
        # The TPU compiler's reduce-scatter is a fusion of all-reduce and slice.
        fused = instruction is not step
        if kind == "all-reduce" and fused and "scatter" in step.name + step.attributes:
            return "reduce-scatter"
        return kind

    # ---- Arrays --------------------------------------------------------------

    def largest_buffers(self, count: int = 5) -> list[tuple[int, str, str]]:
        """The largest arrays that steps of the program make: bytes, shape, instruction."""
        made_by = {}
        for instruction, _, _ in self.executed():
            opcode = instruction.opcode
            if opcode in FREE or opcode.endswith(("-done", "-update")):
                continue
            for array in _arrays(instruction.shape):
                shape = array.split("{")[0]
                made_by[(shape_bytes(array), shape)] = instruction.name
        largest = sorted(made_by.items(), reverse=True)[:count]
        return [(int(size), shape, name) for (size, shape), name in largest]


# ---- Text --------------------------------------------------------------------


def _parse(line: str) -> Instruction:
    """`  ROOT %name = shape opcode(operands), attributes`."""
    name, rest = line.strip().split(" = ", 1)
    # A tuple's shape has spaces; any other ends at the first.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape = rest[:end]
    rest = rest[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : close]
    return Instruction(
        name=name.removeprefix("ROOT ").lstrip("%"),
        shape=shape,
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        attributes=arguments if opcode in ("constant", "parameter") else rest[close + 1 :],
        is_root=name.startswith("ROOT "),
    )


# What JAX puts between the names of modules: transformations, loops, calls.
_BETWEEN = re.compile(
    r"jit\(.*|vmap\(.*|shard_map|while|body|cond|closed_call|checkpoint|remat\w*|LayerNorm_\d+"
)


def part_of(instruction: Instruction) -> str:
    """Which part of a model an instruction computes: "backward DiT/blocks/mlp/fc1".

    From the name that JAX gave the operation, less the operation itself; without
    one, the opcode.
    """
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    if not found:
        return instruction.opcode
    name = found[1]
    path, _, _ = re.sub(r"^jit\(\w+\)/", "", name).rpartition("/")
    # The two that say which pass it is are around a module's name: transpose(jvp(DiT)).
    scopes = path.replace("transpose(", "").replace("jvp(", "").split("/")
    names = [x.rstrip(")") for x in scopes if not _BETWEEN.fullmatch(x)]
    names = [x for x in names if x]
    passes = ""
    if "rematted_computation" in name:
        passes = "recomputed "
    elif "transpose(" in name:
        passes = "backward "
    elif "jvp(" in name:
        passes = "forward "
    return passes + ("/".join(names) or "elsewhere")


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no end of the parenthesis in {text[:80]!r}")


def _arrays(shape: str) -> list[str]:
    """The arrays of a shape, which may be a tuple, each with its layout."""
    return re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape)


def shape_bytes(shape: str, *, all_spaces: bool = False) -> float:
    """Bytes of an array or tuple.

    Args: all_spaces: also of what lies in on-chip memory, marked S(1) in a
      layout.
    """
    total = 0.0
    for array in _arrays(shape):
        if not all_spaces and re.search(r"S\([1-9]\)", array):
            continue
        kind, dimensions = array.split("{")[0].rstrip("]").split("[")
        elements = math.prod(int(d) for d in dimensions.split(",") if d)
        total += BYTES.get(kind, 0) * elements  # tokens and the like have no bytes
    return total


_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|(?:branch|called)_computations|\w+_computation)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)


def _called(instruction: Instruction) -> dict[str, list[str]]:
    """The computations that an instruction calls, by the attribute that names them."""
    found = {}
    for key, many, one in _CALLED.findall(instruction.attributes):
        # A reduction's computation is no step of the program; a call's is.
        if key != "to_apply" or instruction.opcode == "call":
            found[key] = [name.strip().lstrip("%") for name in many.split(",")] if many else [one]
    return found


# ---- Groups of chips ---------------------------------------------------------

# The ways in which HLO writes them.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LIST = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")


def replica_groups(attributes: str) -> np.ndarray:
    """The chips that a collective's attributes name, (groups, chips in a group).

    Of a permutation they are its pairs; of what is no collective, one chip.
    """
    if found := _MESH.search(attributes):
        return _mesh_groups(*found.groups())
    if found := _IOTA.search(attributes):
        shape, dimensions, order = found.groups()
        devices = np.arange(math.prod(_integers(dimensions))).reshape(_integers(dimensions))
        if order:
            devices = devices.transpose(_integers(order))
        return devices.reshape(_integers(shape))
    if found := _LIST.search(attributes):
        groups = re.findall(r"\{([\d, ]+)\}", found.group(1))
        return np.array([_integers(group) for group in groups])
    return np.zeros((1, 1), int)


def _integers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _mesh_groups(mesh: str, taking_part: str) -> np.ndarray:
    """The groups of `mesh['a'=2,'b'=4] {'b'}`; an axis may take part in part, 'a':(1)2."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    chosen = {
        name: (int(before or 1), int(size or axes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", taking_part)
    }
    # Each axis is three: what lies before the part that
    # takes part, the part, and what lies behind it.
    shape: list[int] = []
    inside = []
    for name, size in axes.items():
        before, part = chosen.get(name, (size, 1))
        inside += [len(shape) + 1]
        shape += [before, part, size // (before * part)]
    outside = [i for i in range(len(shape)) if i not in inside]
    group_size = math.prod(shape[i] for i in inside)
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(outside + inside).reshape(-1, group_size)

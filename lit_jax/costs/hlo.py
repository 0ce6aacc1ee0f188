"""Reads a compiled program: what it moves through memory and between chips, a loop's body counted as often as it runs.

XLA's own cost analysis counts the body of a loop once, and our blocks, microbatches and sampling steps are loops.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

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
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What moves no bytes of its own: names for other values, and loops, whose bodies are counted.
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


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program. `size` is the array in bytes: gathered, reduced, or before it is scattered."""

    kind: str
    size: int
    group: int  # how many chips take part
    crosses_slices: bool
    times: int  # how often it runs
    name: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that each chip sends in all runs of it, by a ring."""
        share = {"all-reduce": 2.0, "collective-permute": 1.0}.get(self.kind, 1.0)
        if self.kind != "collective-permute":
            share *= (self.group - 1) / self.group
        return share * self.size * self.times


class Program:
    """The computations of an HLO module's text (`compiled.as_text()`)."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        current = None
        for line in text.splitlines():
            if line.endswith("{") and " -> " in line:
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                current = self.computations[name] = {}
                if line.startswith("ENTRY"):
                    self._entry = name
            elif current is not None and " = " in line:
                instruction = _parse(line)
                current[instruction.name] = instruction

    def executed(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """Every instruction that is a step of the program, its computation, and how often it runs; fusions are one step."""
        yield from self._executed(self._entry, 1)

    def _executed(self, name, times):
        computation = self.computations[name]
        for instruction in computation.values():
            yield instruction, computation, times
            called = _called(instruction)
            if instruction.opcode == "while":
                yield from self._executed(
                    called["body"][0], times * self._trip_count(called["condition"][0])
                )
            elif instruction.opcode in ("call", "conditional"):
                for branch in sum(called.values(), []):
                    yield from self._executed(branch, times)

    def _trip_count(self, condition: str) -> int:
        """Our loops count from 0, one by one, up to the constant that their condition compares with."""
        body = self.computations[condition]
        for instruction in body.values():
            bounds = [
                body[name].attributes
                for name in instruction.operands
                if body[name].opcode == "constant"
            ]
            if (
                instruction.opcode == "compare"
                and "direction=LT" in instruction.attributes
                and bounds
            ):
                return int(bounds[0])
            if instruction.opcode == "fusion":
                bounds = [
                    body[name].attributes
                    for name in instruction.operands
                    if body[name].opcode == "constant"
                ]
                if (
                    bounds
                    and "s32"
                    in body[instruction.operands[-1]].shape + body[instruction.operands[0]].shape
                ):
                    return int(bounds[0])
        raise ValueError(f"the loop condition {condition} compares with no constant")

    def traffic(self) -> float:
        """Bytes that a run moves through main memory, if each instruction reads its operands and writes its result."""
        return sum(
            times * self._bytes_moved(instruction, where)
            for instruction, where, times in self.executed()
        ) + sum(2.0 * collective.size * collective.times for collective in self.collectives())

    def _bytes_moved(self, instruction, computation):
        opcode = instruction.opcode
        if (
            opcode in FREE
            or opcode.endswith("-done")
            or opcode.removesuffix("-start") in COLLECTIVES
        ):
            return 0.0
        operands = [computation[name].shape for name in instruction.operands if name in computation]
        result = shape_bytes(instruction.shape)
        called = sum(_called(instruction).values(), [])
        if opcode in ("fusion", "async-start") and called:
            return self._fusion_bytes(self.computations[called[0]], result)
        if opcode in (
            "copy-start",
            "slice-start",
        ):  # the result names the destination, the source again and a token
            moved = [
                array
                for array in _arrays(instruction.shape)
                if array not in operands and "32[]" not in array
            ]
            size = sum(shape_bytes(array, all_spaces=True) for array in moved)
            return size * bool(shape_bytes(operands[0])) + sum(map(shape_bytes, moved))
        if opcode in ("dynamic-slice", "gather"):
            return 2.0 * result
        if opcode == "dynamic-update-slice":
            return 2.0 * shape_bytes(operands[1])
        return sum(map(shape_bytes, operands)) + result

    def _fusion_bytes(self, body, result):
        """A fusion that takes a slice of an operand reads the slice; one that updates a slice writes the slice in place.

        A collective that runs beside a fusion's own work stands in the fusion, with its arrays: it is counted by itself.
        """
        roots = [i for i in body.values() if i.is_root]
        if roots[0].opcode == "tuple":
            roots = [body[name] for name in roots[0].operands]
        moved, in_place = result, set()
        for root in roots:
            made_by = self._behind_bitcasts(body, root)
            if made_by.opcode == "dynamic-update-slice":
                moved += shape_bytes(body[made_by.operands[1]].shape) - shape_bytes(root.shape)
                in_place.add(self._behind_bitcasts(body, body[made_by.operands[0]]).name)
            elif made_by.opcode == "parameter" or made_by.opcode in COLLECTIVES:
                moved -= shape_bytes(root.shape)
        for parameter in body.values():
            if parameter.opcode != "parameter" or parameter.name in in_place:
                continue
            users = [
                user
                for user in self._users(body, parameter.name)
                if user.opcode not in ("tuple", *COLLECTIVES)
            ]
            size = shape_bytes(parameter.shape)
            if all(user.opcode in ("dynamic-slice", "gather", "slice") for user in users):
                size = min(size, sum(shape_bytes(user.shape, all_spaces=True) for user in users))
            moved += size
        return max(moved, 0.0)

    def _behind_bitcasts(self, body, instruction):
        while (
            instruction.opcode in ("bitcast", "copy", "convert") and instruction.operands[0] in body
        ):
            instruction = body[instruction.operands[0]]
        return instruction

    def _users(self, body, name):
        for instruction in body.values():
            if name in instruction.operands:
                if instruction.opcode == "bitcast":
                    yield from self._users(body, instruction.name)
                else:
                    yield instruction

    def collectives(self, slices: int = 1) -> list[Collective]:
        """Every collective, wherever it stands; `slices`: how many equal runs of chips are slices of their own."""
        found = {}
        for instruction, computation, times in self.executed():
            inside = [(instruction, computation)]
            for name in (
                sum(_called(instruction).values(), [])
                if instruction.opcode in ("fusion", "async-start")
                else []
            ):
                inside += [(i, self.computations[name]) for i in self.computations[name].values()]
            for i, where in inside:
                kind = i.opcode.removesuffix("-start")
                groups = _groups(i.attributes)
                if kind not in COLLECTIVES or groups.shape[1] == 1:
                    continue
                size = sum(
                    shape_bytes(where[o].shape, all_spaces=True) for o in i.operands if o in where
                )
                if kind == "all-gather":
                    size *= groups.shape[1]
                if (
                    kind == "all-reduce"
                    and i is not instruction
                    and "scatter" in instruction.name + instruction.attributes
                ):
                    kind = "reduce-scatter"  # the TPU compiler's form of it: a fusion of all-reduce and slice
                chips = (groups.max() + 1) // slices
                crosses = slices > 1 and bool((groups // chips != groups[:, :1] // chips).any())
                # One that runs beside several others stands in all of them, as links of a chain. (Channels tell nothing:
                # all that are fused with a slice share one.)
                chain = re.search(r'chain_id="(\d+)"', i.attributes)
                found.setdefault(
                    chain.group() if chain else i.name,
                    Collective(kind, int(size), groups.shape[1], crosses, times, i.name),
                )
        return list(found.values())

    def largest_buffers(self, count: int = 5) -> list[tuple[int, str, str]]:
        """The largest arrays that steps of the program make: bytes, shape, instruction."""
        seen = {}
        for instruction, _, _ in self.executed():
            if instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
                for array in _arrays(instruction.shape):
                    seen[(shape_bytes(array), array.split("{")[0])] = instruction.name
        return [
            (int(size), shape, name)
            for (size, shape), name in sorted(seen.items(), reverse=True)[:count]
        ]


def _parse(line: str) -> Instruction:
    name, rest = line.strip().split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : close]))
    attributes = (
        rest[len(opcode) + 1 : close] if opcode == "constant" else rest[close + 1 :]
    )  # a constant's is its value
    return Instruction(
        name.removeprefix("ROOT ").lstrip("%"),
        shape,
        opcode,
        operands,
        attributes,
        name.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no end of the parenthesis in {text[:80]!r}")


def _arrays(shape: str) -> list[str]:
    return re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape)


def shape_bytes(shape: str, *, all_spaces: bool = False) -> float:
    """Bytes of an array or tuple, of what lies in main memory alone; on-chip memory is marked S(1) in a layout."""
    total = 0.0
    for array in _arrays(shape):
        if all_spaces or not re.search(r"S\([1-9]\)", array):
            kind, dimensions = re.match(r"(\w+)\[([\d,]*)\]", array).groups()
            total += BYTES.get(kind, 0) * math.prod(int(d) for d in dimensions.split(",") if d)
    return total


def _called(instruction: Instruction) -> dict[str, list[str]]:
    found = {}
    for key, many, one in re.findall(
        r"\b(calls|body|condition|to_apply|branch_computations|\w+_computation)="
        r"(?:\{([^}]*)\}|%?([\w.\-]+))",
        instruction.attributes,
    ):
        if key != "to_apply" or instruction.opcode == "call":
            found[key] = [name.strip().lstrip("%") for name in many.split(",")] if many else [one]
    return found


def _groups(attributes: str) -> np.ndarray:
    """Chips by group, (groups, chips): the three ways in which HLO writes replica groups, and pairs of a permutation."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
        chosen = {
            name: (int(before or 1), int(size or axes[name]))
            for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found.group(2))
        }
        # An axis of which only a part takes part is three: what lies before it, the part, what lies behind.
        shape, inside = [], []
        for name, size in axes.items():
            before, part = chosen.get(name, (size, 1))
            inside += [len(shape) + 1]
            shape += [before, part, size // (before * part)]
        order = [i for i in range(len(shape)) if i not in inside] + inside
        return (
            np.arange(math.prod(shape))
            .reshape(shape)
            .transpose(order)
            .reshape(-1, math.prod(shape[i] for i in inside))
        )
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, dimensions, order = (
            [int(x) for x in part.split(",")] if part else None for part in found.groups()
        )
        devices = np.arange(math.prod(dimensions)).reshape(dimensions)
        return (devices.transpose(order) if order else devices).reshape(shape)
    if found := re.search(
        r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes
    ):
        return np.array(
            [
                [int(x) for x in group.split(",")]
                for group in re.findall(r"\{([\d, ]+)\}", found.group(1))
            ]
        )
    return np.zeros((1, 1), int)

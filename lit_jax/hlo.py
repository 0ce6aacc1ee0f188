"""Reads a compiled program: what it moves through memory and between chips, a loop's body counted as often as it runs.

XLA's own cost analysis counts the body of a loop once, and our blocks, microbatches and sampling steps are loops.
"""
import dataclasses
import json
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What moves no bytes of its own: names for other values, and loops, whose bodies are counted.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
        "while", "conditional", "call", "opt-barrier", "add-dependency")


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
    group: int           # how many chips take part
    crosses_slices: bool
    times: int           # how often it runs
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
                yield from self._executed(called["body"][0], times * _trip_count(instruction))
            elif instruction.opcode in ("call", "conditional"):
                for branch in sum(called.values(), []):
                    yield from self._executed(branch, times)

    def traffic(self) -> float:
        """Bytes that a run moves through main memory, if each instruction reads its operands and writes its result."""
        return sum(times * self._bytes_moved(instruction, where) for instruction, where, times in self.executed())

    def _bytes_moved(self, instruction, computation):
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done"):
            return 0.0
        operands = [shape_bytes(computation[name].shape) for name in instruction.operands if name in computation]
        result = shape_bytes(instruction.shape)
        called = sum(_called(instruction).values(), [])
        if opcode in ("fusion", "async-start") and called:
            return self._fusion_bytes(self.computations[called[0]], operands, result)
        if opcode in ("dynamic-slice", "gather"):
            return 2.0 * result
        if opcode == "dynamic-update-slice":
            return 2.0 * operands[1]
        if opcode.endswith("-start"):  # its result holds the operand too
            return max(2.0 * sum(operands), result)
        return sum(operands) + result

    def _fusion_bytes(self, body, operands, result):
        """A fusion that takes a slice of an operand reads the slice; one that updates a slice writes the slice in place."""
        parameters = [i for i in body.values() if i.opcode == "parameter"]
        read, updated = 0.0, 0.0
        roots = [i for i in body.values() if i.is_root]
        if roots and roots[0].opcode == "tuple":
            roots = [body[name] for name in roots[0].operands]
        roots = [self._behind_bitcasts(body, root) for root in roots]
        for root in roots:
            if root.opcode == "dynamic-update-slice":
                whole = shape_bytes(root.shape)
                result -= whole
                updated += shape_bytes(body[root.operands[1]].shape)
        in_place = {self._behind_bitcasts(body, body[root.operands[0]]).name for root in roots
                    if root.opcode == "dynamic-update-slice"}
        for parameter in parameters:
            size = shape_bytes(parameter.shape)
            if parameter.name in in_place:
                continue
            users = list(self._users(body, parameter.name))
            slices = [u for u in users if u.opcode in ("dynamic-slice", "gather")]
            if users and len(slices) == len(users):
                size = min(size, sum(shape_bytes(u.shape) for u in slices))
            read += size
        return read + updated + max(result, 0.0)

    def _behind_bitcasts(self, body, instruction):
        while instruction.opcode in ("bitcast", "copy", "convert") and instruction.operands[0] in body:
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
        found = []
        for instruction, computation, times in self.executed():
            inside = [(instruction, computation)]
            for name in sum(_called(instruction).values(), []) if instruction.opcode in ("fusion", "async-start") else []:
                inside += [(i, self.computations[name]) for i in self.computations[name].values()]
            for i, where in inside:
                kind = i.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                sizes = [shape_bytes(where[o].shape, all_spaces=True) for o in i.operands if o in where]
                size = sum(sizes)
                groups = _groups(i.attributes)
                if kind == "all-gather":
                    size *= groups.shape[1]
                if kind == "all-reduce" and i is not instruction and "scatter" in instruction.name + instruction.attributes:
                    kind = "reduce-scatter"  # the TPU compiler's form of it: a fusion of all-reduce and slice
                per_slice = max(1, (groups.max() + 1) // slices) if groups.size else 1
                crosses = slices > 1 and bool((groups // per_slice != groups[:, :1] // per_slice).any())
                if groups.shape[1] > 1:
                    found.append(Collective(kind, int(size), groups.shape[1], crosses, times, i.name))
        return found

    def largest_buffers(self, count: int = 5) -> list[tuple[int, str, str]]:
        """The largest arrays that steps of the program make: bytes, shape, instruction."""
        seen = {}
        for instruction, _, _ in self.executed():
            if instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
                for array in _arrays(instruction.shape):
                    seen[(shape_bytes(array), array.split("{")[0])] = instruction.name
        return [(int(size), shape, name) for (size, shape), name in sorted(seen.items(), reverse=True)[:count]]


def _parse(line: str) -> Instruction:
    name, rest = line.strip().split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = rest[:rest.index("(")]
    close = _closing(rest, len(opcode))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode):close]))
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), shape, opcode, operands, rest[close + 1:],
                       name.startswith("ROOT "))


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
    for key, many, one in re.findall(r"(calls|body|to_apply|branch_computations|true_computation|false_computation)="
                                     r"(?:\{([^}]*)\}|%?([\w.\-]+))", instruction.attributes):
        if key != "to_apply" or instruction.opcode == "call":
            found[key] = [name.strip().lstrip("%") for name in many.split(",")] if many else [one]
    return found


def _trip_count(instruction: Instruction) -> int:
    found = re.search(r'"known_trip_count":\s*(\{[^}]*\})', instruction.attributes)
    return int(json.loads(found.group(1))["n"]) if found else 1


def _groups(attributes: str) -> np.ndarray:
    """Chips by group, (groups, chips): the two ways in which HLO writes replica groups, and pairs of a permutation."""
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dimensions, order = ([int(x) for x in part.split(",")] if part else None for part in found.groups())
        devices = np.arange(math.prod(dimensions)).reshape(dimensions)
        return (devices.transpose(order) if order else devices).reshape(shape)
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes):
        return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", found.group(1))])
    return np.zeros((1, 1), int)

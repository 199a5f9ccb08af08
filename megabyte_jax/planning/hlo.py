"""Reads the text of a compiled program (HLO), as `jax.stages.Compiled.as_text` gives it.

A program is computations, one of them the entry; a computation is instructions; some of these name
other computations: the body of a loop, what a fusion computes, the branches of a conditional.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_TILE = re.compile(r":T\(([\d,]+)\)")
_NAME = re.compile(r"%([^\s,(){}=]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


class Array(NamedTuple):
    """An array that an instruction makes.

    Attributes:
        dtype: as HLO spells it: f32, bf16, pred.
        shape: of it on one device.
        space: memory it lies in: 0 is the device's main memory, on TPU 1 is on the chip.
        tile: sizes that the most minor axes are filled up to multiples of, the minor last.
        order: of the axes, the most minor first; empty if none is given.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0
    tile: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> float:
        """Bytes of the elements, without what fills up tiles."""
        bits = re.search(r"\d+", self.dtype)
        width = 8 if self.dtype == "pred" else int(bits[0]) if bits else 0
        return self.size * width / 8

    @property
    def stored_bytes(self) -> float:
        """Bytes it takes, in whole tiles."""
        if not self.size:
            return 0
        sizes = dict(enumerate(self.shape))
        for axis, step in zip(self.order, reversed(self.tile), strict=False):
            sizes[axis] = -(-sizes[axis] // step) * step
        return self.num_bytes / self.size * math.prod(sizes.values())


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: unique in its program.
        opcode: what it does: dot, fusion, while, all-gather-start.
        results: the arrays it makes, those of a tuple one after another.
        operands: names of the instructions whose results it takes.
        literal: the text between the parentheses: of a constant its value, of a parameter its
            number.
        attributes: the text behind them.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str

    def called(self, *keys: str) -> list[str]:
        """Names of the computations behind `calls=`, `body=` and the like."""
        names = []
        for key in keys:
            if match := re.search(rf"\b{key}=(\{{[^}}]*\}}|%[^\s,]+)", self.attributes):
                names += _NAME.findall(match[1])
        return names

    def numbers(self, key: str) -> tuple[int, ...]:
        """The numbers of an attribute, as in lhs_contracting_dims={0,1} or index=5."""
        match = re.search(rf"\b{key}=\{{?([\d,]*)", self.attributes)
        return tuple(map(int, match[1].split(","))) if match and match[1] else ()


@dataclass
class Computation:
    """Instructions by name, in order; `root` is the one whose result is the computation's."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by their numbers."""
        return {
            int(x.literal): x.name for x in self.instructions.values() if x.opcode == "parameter"
        }

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each one's result."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)
        return users


@dataclass
class Program:
    """The computations of a program by name, and which one it starts with."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    Raises:
        ValueError: it has no entry.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", Computation("")
    for line in text.splitlines():
        if line.endswith("{") and "->" in line and not line.startswith(" "):
            (name,) = _NAME.findall(line)[:1]
            current = computations[name] = Computation(name)
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("  ") and " = " in line:
            head, _, rest = line.strip().partition(" = ")
            name = head.removeprefix("ROOT ").removeprefix("%")
            current.instructions[name] = _instruction(name, _COMMENT.sub("", rest))
            if head.startswith("ROOT "):
                current.root = name
    if not entry:
        raise ValueError("a program without an entry")
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    """Reads SHAPE OPCODE(OPERANDS), ATTRIBUTES."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    results = tuple(map(_array, _ARRAY.finditer(text[:end])))
    text = text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    literal = text[start + 1 : end - 1]
    operands = tuple(_NAME.findall(literal))
    return Instruction(name, text[:start], results, operands, literal, text[end:])


def _array(match: re.Match[str]) -> Array:
    layout = match[3] or ""
    space = _SPACE.search(layout)
    tile = _TILE.search(layout)
    return Array(
        match[1],
        _numbers(match[2]),
        int(space[1]) if space else 0,
        _numbers(tile[1]) if tile else (),
        _numbers(layout.partition(":")[0]),
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def _closing(text: str, start: int) -> int:
    """Position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"parentheses do not match: {text[:80]!r}")

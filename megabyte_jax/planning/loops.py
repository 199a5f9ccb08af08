"""How often the loops of a compiled program run."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megabyte_jax.planning.hlo import Computation, Instruction, Program


def trip_count(program: Program, where: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None if the text does not say.

    Either the compiler noted it, or the condition compares a counter, which the body increases by
    a constant, with a constant: the loops that `jax.lax.scan` and `fori_loop` become.

    Args:
        program: of the loop.
        where: the computation it stands in.
        loop: the instruction.
    """
    if match := re.search(r'known_trip_count"?:\{"n":"(\d+)"\}', loop.attributes):
        return int(match[1])
    (condition,), (body,) = (
        [program.computations[name] for name in loop.called(key)] for key in ("condition", "body")
    )
    found = _comparison(program, condition)
    if found is None:
        return None
    index, end, inclusive = found
    start = _tuple_constant(where, loop.operands[0], index)
    last = end if isinstance(end, int) else _tuple_constant(where, loop.operands[0], int(end))
    step = _step(body, index)
    if start is None or last is None or not step:
        return None
    return max(0, -(-(last + inclusive - start) // step))


def _comparison(program: Program, condition: Computation) -> tuple[int, int | str, int] | None:
    """Index of a loop's counter, what it stays below, and 1 if it may reach that.

    The bound is a number, or the index of an element of the loop's state, as text.
    """
    root = condition.instructions[condition.root]
    arguments = root.operands
    if root.opcode == "fusion":
        inner = program.computations[root.called("calls")[0]]
        compare = inner.instructions[inner.root]
        outer = {name: root.operands[number] for number, name in inner.parameters.items()}
        arguments = tuple(outer.get(name, name) for name in compare.operands)
        instructions = {**inner.instructions, **condition.instructions}
    else:
        compare, instructions = root, condition.instructions
    direction = re.search(r"direction=(\w+)", compare.attributes)
    if compare.opcode != "compare" or not direction or len(arguments) != 2:
        return None
    if direction[1] in ("GT", "GE"):
        arguments = arguments[::-1]
    elif direction[1] not in ("LT", "LE"):
        return None
    counter, bound = (_through_copies(instructions, name) for name in arguments)
    if counter.opcode != "get-tuple-element":
        return None
    (index,) = counter.numbers("index")
    inclusive = int(direction[1] in ("LE", "GE"))
    if bound.opcode == "constant":
        return index, int(bound.literal), inclusive
    if bound.opcode == "get-tuple-element":
        return index, str(bound.numbers("index")[0]), inclusive
    return None


def _through_copies(instructions: Mapping[str, Instruction], name: str) -> Instruction:
    instruction = instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
        instruction = instructions[instruction.operands[0]]
    return instruction


def _tuple_constant(where: Computation, name: str, index: int) -> int | None:
    """Value of an element of a tuple, if it is a constant."""
    made = where.instructions[name]
    if made.opcode != "tuple":
        return None
    element = _through_copies(where.instructions, made.operands[index])
    is_number = element.opcode == "constant" and re.fullmatch(r"-?\d+", element.literal)
    return int(element.literal) if is_number else None


def _step(body: Computation, index: int) -> int | None:
    """What the body of a loop adds to an element of its state, if it is a constant."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    result = _through_copies(body.instructions, root.operands[index])
    if result.opcode != "add":
        return None
    for name in result.operands:
        operand = _through_copies(body.instructions, name)
        if operand.opcode == "constant" and re.fullmatch(r"-?\d+", operand.literal):
            return int(operand.literal)
    return None

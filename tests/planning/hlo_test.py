import jax
import jax.numpy as jnp
import pytest

from megabyte_jax.planning import hlo, loops

# As the compiler for TPU writes them: layouts in tiles, S(1) on the chip, comments in tuples.
TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body (p: (s32[], bf16[6,128])) -> (s32[], bf16[6,128]) {
  %one = s32[]{:T(128)} constant(2)
  %p = (s32[]{:T(128)}, bf16[6,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %copy.6 = s32[]{:T(128)S(6)} copy(%i)
  %x = bf16[6,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %next = s32[]{:T(128)} add(%copy.6, %one)
  ROOT %t = (s32[]{:T(128)}, /*index=1*/bf16[6,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %x)
}

%condition (p: (s32[], bf16[6,128])) -> pred[] {
  %end = s32[]{:T(128)} constant(9)
  %p.1 = (s32[]{:T(128)}, bf16[6,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (a: bf16[6,128]) -> bf16[6,128] {
  %zero = s32[] constant(0)
  %a = bf16[6,128]{1,0:T(8,128)(2,1)} parameter(0), sharding={replicated}
  %start = (s32[]{:T(128)}, bf16[6,128]{1,0}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, bf16[6,128]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[6,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_instructions_are_read_with_shapes_places_and_operands():
    program = hlo.parse(TEXT)
    assert program.entry == "main" and set(program.computations) == {"main", "body", "condition"}
    tuple_ = program.computations["body"].instructions["t"]
    assert program.computations["body"].root == "t"
    assert tuple_.operands == ("next", "x")
    assert [array[:3] for array in tuple_.results] == [("s32", (), 0), ("bf16", (6, 128), 1)]
    assert [array.num_bytes for array in tuple_.results] == [4, 6 * 128 * 2]
    loop = program.computations["main"].instructions["loop"]
    assert loop.called("condition", "body") == ["condition", "body"]


def test_a_loop_runs_until_its_condition_fails():
    program = hlo.parse(TEXT)
    main = program.computations["main"]
    loop = main.instructions["loop"]
    assert loops.trip_count(program, main, loop) == 5  # 0, 2, 4, 6, 8
    inclusive = hlo.parse(TEXT.replace("constant(9)", "constant(8)").replace("=LT", "=LE"))
    assert loops.trip_count(inclusive, inclusive.computations["main"], loop) == 5


@pytest.mark.parametrize(
    ("old", "new"),
    [("constant(0)", "parameter(1)"), ("add(", "multiply("), ("direction=LT", "direction=NE")],
)
def test_a_loop_of_which_nothing_says_how_often_it_runs_is_not_guessed(old, new):
    program = hlo.parse(TEXT.replace(old, new))
    main = program.computations["main"]
    assert loops.trip_count(program, main, main.instructions["loop"]) is None


@pytest.mark.parametrize("length", [1, 3, 7])
def test_the_loops_that_jax_makes_run_as_often_as_they_are_long(length):
    def nested(x):
        inner = lambda x: jax.lax.fori_loop(0, 4, lambda i, x: jnp.cos(x) * i, x)  # noqa: E731
        return jax.lax.scan(lambda x, _: (inner(x), None), x, length=length)[0]

    program = hlo.parse(jax.jit(nested).lower(jnp.ones((5, 3))).compile().as_text())
    counts = [
        loops.trip_count(program, computation, x)
        for computation in program.computations.values()
        for x in computation.instructions.values()
        if x.opcode == "while"
    ]
    assert sorted(counts) == ([4] if length == 1 else sorted([length, 4]))


def test_types_have_their_widths():
    sizes = {"pred": 1, "s4": 0.5, "f8e4m3fn": 1, "bf16": 2, "f32": 4, "c64": 8, "token": 0}
    assert {t: hlo.Array(t, (), 0).num_bytes for t in sizes} == sizes
    assert hlo.Array("f32", (0, 7), 0).num_bytes == 0


def test_arrays_fill_whole_tiles():
    text = "ENTRY %m () -> () {\n  %a = (f32[12,700]{1,0:T(8,128)}, f32[5,4]{0,1:T(4,128)}, "
    text += "bf16[3,9,128]{2,1,0:T(8,128)(2,1)}, f32[0,7]{1,0:T(8,128)}, f32[9,9]{1,0}) tuple()\n}"
    arrays = hlo.parse(text).computations["m"].instructions["a"].results
    expected = [4 * 16 * 768, 4 * 128 * 4, 2 * 3 * 16 * 128, 0, 4 * 9 * 9]
    assert [array.stored_bytes for array in arrays] == expected


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="entry"):
        hlo.parse("HloModule nothing\n")

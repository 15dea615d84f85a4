"""HLO text read by hand-written snippets: shapes, calls, loops, frames."""

import pytest

from aether.plan.hlo import Shape, bits
from aether.plan.read import parse, shapes_of

LOOP = """HloModule m, is_scheduled=true

FileNames
1 "/x/aether/nn/linear.py"
2 "/x/jax/core.py"
3 "/x/aether/train/step.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=3 function_name_id=1 line=7 end_line=7 column=1 end_column=1}
2 {file_name_id=1 function_name_id=1 line=60 end_line=60 column=1 end_column=1}
3 {file_name_id=2 function_name_id=1 line=5 end_line=5 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(8)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(STEP)
  %c = s32[] copy(%i)
  %next = s32[] add(%c, %two)
  %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %t = (s32[], f32[8]) tuple(%next, %y)
}

%fused (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} multiply(%q, %q), metadata={op_name="jit(f)/mul(a, b)" stack_frame_id=3}
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0), metadata={op_name="state.params[\\'w\\'].value"}
  %zero = s32[] constant(START)
  %start = (s32[], /*index=1*/f32[8]) tuple(%zero, %a)
  %w = (s32[], f32[8]) while(%start), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""


def loop(start="0", step="1", text=LOOP):
    return parse(text.replace("START", start).replace("STEP", step))


def times(module, opcode):
    return [v.times for v in module.walk() if v.instruction.opcode == opcode]


@pytest.mark.parametrize(("start", "step", "trips"), [("0", "1", 7), ("3", "1", 4), ("0", "2", 4), ("9", "1", 0)])
def test_trips_are_counted_from_start_condition_and_step(start, step, trips):
    assert times(loop(start, step), "multiply") == [trips]


def test_the_compilers_own_trip_count_comes_first():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    assert times(loop(text=LOOP.replace("body=%body", known)), "multiply") == [5]


def test_a_loop_whose_limit_is_data_is_counted_once_and_named():
    module = loop(text=LOOP.replace("constant(7)", "get-tuple-element(%p), index=0"))
    assert times(module, "multiply") == [1]
    assert module.warnings == ["jit(f)/while has a number of trips that the program decides; 1 are counted"]


def test_such_a_loop_inside_a_loop_counts_as_causal_blocks():
    inner = "  %w2 = (s32[], f32[8]) while(%p), condition=%cond2, body=%body2\n"
    text = LOOP.replace("  ROOT %t = ", inner + "  ROOT %t = ")
    for name in ("body", "cond"):
        block = LOOP[LOOP.index(f"%{name} (p") :].split("\n}\n")[0] + "\n}\n\n"
        block = block.replace(f"%{name} (", f"%{name}2 (").replace("constant(7)", "get-tuple-element(%p), index=0")
        text = text.replace("ENTRY", block + "ENTRY", 1)
    module = loop(text=text)
    assert sorted(times(module, "multiply")) == [7, 7 * (7 + 1) // 2]
    assert "4 are counted" in module.warnings[0]


def test_what_is_in_loops_and_fusions_is_marked():
    visits = {v.instruction.name: v for v in loop().walk()}
    assert visits["m"].fused and visits["m"].in_loop and not visits["y"].fused and not visits["w"].in_loop
    assert visits["y"].instruction.estimated_cycles() == 10
    assert [caller.opcode for caller, _ in visits["m"].callers] == ["while", "fusion"]


def test_names_and_lines_are_ours():
    module = loop()
    multiply = next(v.instruction for v in module.walk() if v.instruction.opcode == "multiply")
    assert module.source(multiply) == "nn/linear.py:60" and multiply.op_name == "jit(f)/mul(a, b)"
    assert module.computations["main"].parameters[0].op_name == "state.params['w'].value"


def test_shapes_know_their_bytes_and_place():
    text = "(bf16[25,64]{1,0:T(8,128)(2,1)S(1)}, s4[3]{0}, pred[], f8e4m3fn[2,2]{1,0})"
    assert list(shapes_of(text)) == [
        *(Shape("bf16", (25, 64), True), Shape("s4", (3,)), Shape("pred", ()), Shape("f8e4m3fn", (2, 2))),
    ]
    assert [s.bytes for s in shapes_of(text)] == [3200, 2, 1, 4]
    assert bits("c64") == 64 and bits("u16") == 16


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule m\n")

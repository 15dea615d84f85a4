"""Collectives in hand-written HLO: groups in each notation, bytes by the formulas, what counts once."""

import pytest

from aether.plan.collectives import collectives, received
from aether.plan.layout import Layout, members_of
from aether.plan.read import parse

MESH = Layout({"data": 2, "fsdp": 4}, (0,) * 8)
SLICES = Layout({"data": 2, "fsdp": 4}, (0, 0, 0, 0, 1, 1, 1, 1))
ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
"""


def read(body, layout=MESH, inner=""):
    text = f"HloModule m\n{ADD}{inner}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return collectives(parse(text), layout)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", [0, 4]),
        ("replica_groups={{0},{1,2,3},{4}}", [1, 2, 3]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
        ("replica_groups={}", list(range(8))),
        ("source_target_pairs={{0,0},{1,5},{5,1}}", [1, 5]),
    ],
)
def test_groups_are_read_in_every_notation(text, ids):
    assert members_of(f", channel_id=1, {text}, metadata={{}}", 8) == ids


def test_groups_are_told_as_mesh_axes():
    assert MESH.spanned([0, 4]) == ("data",) and MESH.spanned([0, 1, 2, 3]) == ("fsdp",)
    assert MESH.spanned(range(8)) == ("data", "fsdp") and SLICES.across == ("data",)
    assert Layout({"data": 2}, (0, 0), ((0, 0), (0, 3))).extended([0, 1]) == (1,)


@pytest.mark.parametrize(
    ("kind", "operand", "result", "bytes_"),
    [
        ("all-gather", 100, 400, 300),
        ("reduce-scatter", 400, 100, 300),
        ("all-reduce", 400, 400, 600),
        ("all-to-all", 400, 400, 300),
        ("collective-permute", 400, 400, 400),
    ],
)
def test_bytes_follow_the_ring(kind, operand, result, bytes_):
    assert received(kind, operand, result, 4) == bytes_


def test_a_start_and_its_done_are_one():
    (c,) = read(
        "  %a = bf16[2,8]{1,0} parameter(0)\n"
        "  %s = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[8], dimensions={0}\n"
        "  ROOT %d = bf16[8,8]{1,0} all-gather-done(%s)"
    )
    assert (c.kind, c.axes, c.group, c.dtype, c.operand, c.result) == ("all-gather", ("fsdp",), 4, "bf16", 32, 128)
    assert (c.count, c.bytes, c.link) == (1, 96, "ici")


def test_an_async_wrapper_counts_what_it_calls():
    inner = """
%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %r = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}
"""
    (c,) = read(
        "  %a = f32[8]{0} parameter(0)\n"
        "  %s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%a), calls=%wrapped\n"
        "  ROOT %d = f32[2]{0} async-done(%s)",
        inner=inner,
    )
    assert (c.kind, c.operand, c.result, c.bytes) == ("reduce-scatter", 32, 8, 24)


def test_the_pieces_of_a_fused_collective_are_one():
    gather = "all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}"
    target = 'custom_call_target="AsyncCollective'
    inner = f"""
%start (p: f32[2]) -> f32[8] {{
  %p = f32[2]{{0}} parameter(0)
  %g = f32[8]{{0}} {gather}
  ROOT %c = f32[8]{{0}} custom-call(%g), {target}Start"
}}

%beside (p: f32[2]) -> f32[8] {{
  %p = f32[2]{{0}} parameter(0)
  ROOT %g = f32[8]{{0}} {gather}
}}

%done (p: f32[2]) -> f32[8] {{
  %p = f32[2]{{0}} parameter(0)
  %g = f32[8]{{0}} {gather}
  ROOT %c = f32[8]{{0}} custom-call(%g), {target}Done"
}}
"""
    calls = "\n".join(
        f"  %f{n} = f32[8]{{0}} fusion(%a), kind=kCustom, calls=%{name}"
        for n, name in enumerate(("start", "beside", "done"))
    )
    (c,) = read(f"  %a = f32[2]{{0}} parameter(0)\n{calls}\n  ROOT %n = f32[8]{{0}} negate(%f2)", inner=inner)
    assert (c.count, c.bytes) == (1, 24)


def test_each_collective_counts_once_a_trip_however_it_is_nested():
    """In a loop of three: a pair of instructions, a wrapped computation named three times, fusions in fusions."""
    groups, target = "replica_groups=[2,4]<=[8]", 'custom_call_target="AsyncCollective'
    gather = f"all-gather(%p), channel_id=3, {groups}, dimensions={{0}}"
    pieces = "".join(
        f"""
%{name}_inner (p: f32[2]) -> f32[8] {{
  %p = f32[2]{{0}} parameter(0)
  ROOT %g = f32[8]{{0}} {gather}
}}

%{name} (p: f32[2]) -> f32[8] {{
  %p = f32[2]{{0}} parameter(0)
  %f = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%{name}_inner
  ROOT %c = f32[8]{{0}} {end}
}}
"""
        for name, end in {
            "begin": f'custom-call(%f), {target}Start"',
            "beside": "negate(%f)",
            "done": f'custom-call(%f), {target}Done"',
        }.items()
    )
    loop = f"""
%wrapped (p: bf16[8]) -> bf16[2] {{
  %p = bf16[8]{{0}} parameter(0)
  ROOT %r = bf16[2]{{0}} reduce-scatter(%p), {groups}, dimensions={{0}}, to_apply=%add
}}
{pieces}
%cond (s: (s32[], f32[2], bf16[8])) -> pred[] {{
  %s = (s32[], f32[2], bf16[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(3)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}}

%body (s: (s32[], f32[2], bf16[8])) -> (s32[], f32[2], bf16[8]) {{
  %s = (s32[], f32[2], bf16[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[2]{{0}} get-tuple-element(%s), index=1
  %y = bf16[8]{{0}} get-tuple-element(%s), index=2
  %ps = (f32[2]{{0}}, f32[2]{{0}}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{{{0,1}},{{1,0}}}}
  %pd = f32[2]{{0}} collective-permute-done(%ps)
  %as = ((bf16[8]{{0}}), bf16[2]{{0}}, u32[]) async-start(%y), calls=%wrapped
  %au = ((bf16[8]{{0}}), bf16[2]{{0}}, u32[]) async-update(%as), calls=%wrapped
  %ad = bf16[2]{{0}} async-done(%au), calls=%wrapped
  %f0 = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%begin
  %f1 = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%beside
  %f2 = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%done
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[2], bf16[8]) tuple(%next, %pd, %y)
}}
"""
    found = read(
        "  %a = f32[2]{0} parameter(0)\n  %b = bf16[8]{0} parameter(1)\n  %z = s32[] constant(0)\n"
        "  %s = (s32[], f32[2], bf16[8]) tuple(%z, %a, %b)\n"
        "  ROOT %w = (s32[], f32[2], bf16[8]) while(%s), condition=%cond, body=%body",
        inner=loop,
    )
    assert {c.kind: (c.count, c.bytes, c.in_loop) for c in found} == {
        "all-gather": (3, 3 * 24, True),
        "reduce-scatter": (3, 3 * 12, True),
        "collective-permute": (3, 3 * 8, True),
    }


def test_the_tpus_fusion_of_all_reduce_and_slice_is_a_reduce_scatter():
    inner = """
%scatter (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  %r = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %z = s32[] constant(0)
  ROOT %s = f32[2]{0} dynamic-slice(%r, %z), dynamic_slice_sizes={2}
}
"""
    (c,) = read(
        "  %a = f32[8]{0} parameter(0)\n  ROOT %f = f32[2]{0} fusion(%a), kind=kCustom, calls=%scatter", inner=inner
    )
    assert (c.kind, c.operand, c.result, c.bytes) == ("reduce-scatter", 32, 8, 24)


def test_an_all_reduce_fused_with_other_work_stays_one():
    inner = """
%beside (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %r = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %n = f32[8]{0} negate(%r)
}
"""
    (c,) = read(
        "  %a = f32[8]{0} parameter(0)\n  ROOT %f = f32[8]{0} fusion(%a), kind=kCustom, calls=%beside", inner=inner
    )
    assert (c.kind, c.bytes) == ("all-reduce", 48)


def test_a_group_over_slices_is_split_into_both_networks():
    found = read(
        "  %a = f32[8]{0} parameter(0)\n"
        "  ROOT %r = f32[8]{0} all-reduce(%a), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add",
        SLICES,
    )
    assert [(c.link, c.group, c.bytes) for c in found] == [("ici", 4, 48), ("dcn", 2, 8)]


def test_a_megascale_send_is_the_part_across_slices():
    attributes = '_xla_megascale_transfer_type="ALL_REDUCE"'
    (c,) = read(
        "  %a = f32[8]{0} parameter(0)\n  %t = token[] after-all()\n"
        f"  %s = (f32[8]{{0}}, u32[], token[]) send(%a, %t), frontend_attributes={{{attributes}}}\n"
        "  ROOT %d = token[] send-done(%s)",
        SLICES,
    )
    assert (c.kind, c.link, c.axes, c.group, c.bytes) == ("all-reduce", "dcn", ("data",), 2, 32)


def test_a_gathered_parameter_is_named_and_an_activation_is_not():
    body = (
        "  %w = f32[2,8]{1,0} parameter(0), metadata={op_name=\"state.params[\\'head\\'][\\'kernel\\'].value\"}\n"
        "  %x = f32[2,8]{1,0} parameter(1), metadata={op_name=\"batch[\\'tokens\\']\"}\n"
        "  %h = bf16[2,8]{1,0} convert(%w)\n  %y = f32[2,8]{1,0} exponential(%x)\n"
        "  %g = bf16[8,8]{1,0} all-gather(%h), replica_groups=[2,4]<=[8], dimensions={0}, "
        'metadata={op_name="jit(step)/jvp()/dot"}\n'
        "  %k = f32[8,8]{1,0} all-gather(%y), replica_groups=[2,4]<=[8], dimensions={0}\n"
        "  ROOT %t = (bf16[8,8], f32[8,8]) tuple(%g, %k)"
    )
    activation, parameter = read(body)
    assert (parameter.parameter, parameter.phase) == ("head/kernel", "forward")
    assert (activation.parameter, activation.phase) == ("", "")

"""FLOPs and traffic: convolutions against brute force, dots, slices and updates by hand."""

import itertools

import pytest

from aether.plan.counts import count, flops
from aether.plan.read import parse

SIMPLE = """HloModule m
{inner}
ENTRY %main (a: f32[1]) -> f32[1] {{
{body}
}}
"""


def module(body, inner=""):
    return parse(SIMPLE.format(body=body, inner=inner))


def one(body):
    m = module(body)
    here = m.computations["main"]
    return flops(here.root, here)


def test_a_dot_is_two_times_its_multiplications():
    assert (
        one(
            "  %a = bf16[4,32,64]{2,1,0} parameter(0)\n  %b = bf16[4,64,16]{2,1,0} parameter(1)\n"
            "  ROOT %d = f32[4,32,16]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={1}"
        )
        == 2 * 4 * 32 * 16 * 64
    )


@pytest.mark.parametrize(
    ("left", "right", "out", "window", "labels", "wanted"),
    [
        # what the TPU compiler makes of (2, 1024, 1600) x (1600, 6400)
        ("2,1024,1600", "1600,6400,1", "2,1024,6400", "size=1", "0bf_io0->0bf", 2 * 2 * 1024 * 1600 * 6400),
        # of queries (2, 1024, 1600) x (25, 64, 1600), heads as places
        (
            *("2,1024,1600,1", "25,64,1600,1", "2,1024,25,64"),
            *("size=1x25 pad=0_0x24_24 rhs_reversal=0x1", "0bf1_1oi0->0b1f", 2 * 2 * 1024 * 1600 * 25 * 64),
        ),
        # of scores: batch and heads as places of a dilated input, 2 x 25 products of (1024, 64) and (1024, 64)
        (
            *("2,25,1024,64", "2,25,1024,64", "2,25,1024,1024"),
            *("size=2x25 stride=1x24 lhs_dilate=2x25", "01bf_01oi->01bf", 2 * 2 * 25 * 1024 * 1024 * 64),
        ),
    ],
)
def test_matrix_products_written_as_convolutions(left, right, out, window, labels, wanted):
    assert (
        one(
            f"  %a = bf16[{left}] parameter(0)\n  %b = bf16[{right}] parameter(1)\n"
            f"  ROOT %c = f32[{out}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}"
        )
        == wanted
    )


def brute(size, kernel, output, stride, low, spread, dilation):
    places = itertools.product(range(output), range(kernel))
    reads = (o * stride + k * dilation - low for o, k in places)
    return sum(0 <= at <= (size - 1) * spread and at % spread == 0 for at in reads)


def test_valid_pairs_agree_with_counting_them(rng):
    from aether.plan.counts import _valid

    for _ in range(500):
        size, kernel, output, stride, spread, dilation = (int(n) for n in rng.integers(1, 7, 6))
        low = int(rng.integers(0, 7))
        case = (size, kernel, output, stride, low, spread, dilation)
        assert _valid(*case) == brute(*case), case


def test_a_slice_of_a_large_operand_costs_the_slice():
    inner = """
%sliced (p: f32[48,1000], q: s32[]) -> f32[1,1000] {
  %p = f32[48,1000]{1,0} parameter(0)
  %q = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %s = f32[1,1000]{1,0} dynamic-slice(%p, %q, %z), dynamic_slice_sizes={1,1000}
}
"""
    body = (
        "  %a = f32[48,1000]{1,0} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %f = f32[1,1000]{1,0} fusion(%a, %i), kind=kLoop, calls=%sliced"
    )
    assert count(module(body, inner)).hbm_bytes == 4000 + 4000 + 4


def test_an_update_in_place_costs_the_update():
    inner = """
%updated (p: f32[48,1000], u: f32[1,1000], q: s32[]) -> f32[48,1000] {
  %p = f32[48,1000]{1,0} parameter(0)
  %u = f32[1,1000]{1,0} parameter(1)
  %q = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %s = f32[48,1000]{1,0} dynamic-update-slice(%p, %u, %q, %z)
}
"""
    body = (
        "  %a = f32[48,1000]{1,0} parameter(0)\n  %u = f32[1,1000]{1,0} parameter(1)\n  %i = s32[] parameter(2)\n"
        "  ROOT %f = f32[48,1000]{1,0} fusion(%a, %u, %i), kind=kLoop, calls=%updated"
    )
    assert count(module(body, inner)).hbm_bytes == 4000 + 4000 + 4


def test_what_stays_on_the_chip_costs_nothing_and_copies_cost_one_side():
    body = (
        "  %a = f32[1000]{0} parameter(0)\n"
        "  %s = (f32[1000]{0:T(1024)S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%a)\n"
        "  %d = f32[1000]{0:T(1024)S(1)} copy-done(%s)\n"
        "  ROOT %n = f32[1000]{0:T(1024)S(1)} negate(%d)"
    )
    assert count(module(body)).hbm_bytes == 4000 + 4  # the semaphore lies apart, at four bytes


def test_custom_calls_are_named_unless_they_do_nothing():
    body = (
        "  %a = f32[8]{0} parameter(0)\n"
        '  %k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"\n'
        '  ROOT %n = f32[8]{0} custom-call(%k), custom_call_target="AllocateBuffer"'
    )
    assert dict(count(module(body)).uncounted) == {"tpu_custom_call": 1}


def test_what_a_kernel_states_of_itself_is_counted_and_told_apart():
    config = (
        '{"custom_call_config":{"body":"x","cost_estimate":{"flops":"70","transcendentals":"3","bytes_accessed":"11"}}}'
    )
    body = f"""  %a = f32[4]{{0}} parameter(0)
  %k = f32[4]{{0}} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={config}
  ROOT %l = f32[4]{{0}} custom-call(%k), custom_call_target="other" """
    counts = count(module(body))
    assert (counts.kernel_flops, counts.kernel_bytes) == (70, 11)
    assert (counts.flops, counts.hbm_bytes) == (70, 11 + 2 * 16)
    assert (counts.stated, counts.uncounted) == ({"tpu_custom_call": 1}, {"other": 1})


def test_a_kernel_with_metadata_on_lines_of_its_own_ends_nothing():
    """As JAX's splash attention writes it: what follows was lost."""
    body = """  %a = f32[4,4]{1,0} parameter(0)
  %k = f32[4,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/attention/pallas_call"}
  ROOT %d = f32[4,4]{1,0} dot(%k, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"""
    m = module(body)
    counts = count(m)
    assert (counts.flops, counts.uncounted) == (2 * 4**3, {"tpu_custom_call": 1})
    assert m.computations["main"].instructions["k"].op_name == "jit(f)/attention/pallas_call"

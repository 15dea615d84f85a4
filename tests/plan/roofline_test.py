"""Times by hand for one chip, and the links that a torus gives."""

import pytest

from aether.chips import CHIPS, topology
from aether.plan.collectives import Collective
from aether.plan.counts import Counts
from aether.plan.roofline import roofline


def sent(bytes_, torus=(0,), link="ici"):
    rest = dict(operand=0, result=0, count=1, in_loop=False, parameter="", source="", phase="")
    return Collective(kind="all-gather", link=link, axes=(), group=4, dtype="f32", bytes=bytes_, torus=torus, **rest)


def test_each_resource_by_hand():
    counts = Counts(flops=int(197e12), cycles=1_502_990_723, hbm_bytes=int(2 * 819e9))
    times = roofline(counts, [sent(int(100e9), (0,)), sent(25 * 125_000_000 * 3, (), "dcn")], topology("v5e:16x16", 2))
    assert (times.compute, times.hbm, times.ici, times.dcn) == pytest.approx((1, 2, 1, 3))  # 2 links of 50 GB/s
    assert times.cycles == pytest.approx(1)
    assert times.bound == pytest.approx(3) and times.limited_by == "dcn" and times.serial == pytest.approx(2 + 1 + 3)


@pytest.mark.parametrize(
    ("name", "torus", "seconds"),
    [
        ("v5e:16x16", (0, 1), 0.5),  # two rings
        ("v5e:8x8", (0,), 2.0),  # open: only whole pods of v5e close their rings
        ("v5p:4x4x4", (2,), 0.5),  # links are twice as fast
        ("v5p:2x2x2", (2,), 1.0),
        ("tpu7x:4x4x4", (0,), 1.0),  # two devices share a chip's links
    ],
)
def test_a_torus_has_two_links_where_it_closes(name, torus, seconds):
    assert roofline(Counts(), [sent(int(100e9), torus)], topology(name)).ici == pytest.approx(seconds)


def test_collectives_on_other_dimensions_overlap_and_on_the_same_do_not():
    pod = topology("v5e:16x16")
    assert roofline(Counts(), [sent(int(100e9), (0,)), sent(int(100e9), (1,))], pod).ici == pytest.approx(1)
    assert roofline(Counts(), [sent(int(100e9), (0,)), sent(int(100e9), (0,))], pod).ici == pytest.approx(2)


def test_gpus_have_nvlink_and_no_cycles():
    times = roofline(Counts(hbm_bytes=None), [sent(int(450e9), ())], topology("h100:8"))
    assert times.ici == pytest.approx(1) and times.hbm == 0 and times.cycles is None
    assert CHIPS["h100"].clock is None

"""The table of chips, and topologies as people write them."""

import pytest

from aether.chips import CHIPS, GIB, chip_of, topology
from aether.errors import InputError


def test_a_chip_is_found_by_the_longest_name():
    assert chip_of("TPU v5 lite") is CHIPS["v5e"] and chip_of("TPU v5") is CHIPS["v5p"]
    assert chip_of("NVIDIA H200") is CHIPS["h200"] and chip_of("cpu") is None


@pytest.mark.parametrize(("name", "gigahertz"), [("v4", 1.05), ("v5e", 1.5), ("v5p", 1.75)])
def test_the_clock_that_the_peak_implies_is_the_known_one(name, gigahertz):
    assert CHIPS[name].clock == pytest.approx(gigahertz * 1e9, rel=3e-3)


def test_a_device_may_be_half_a_chip():
    assert CHIPS["tpu7x"].usable < CHIPS["tpu7x"].hbm / 2 and CHIPS["v5e"].usable == 15.75 * GIB


def test_topologies_are_read():
    pod, gpus = topology("v5e:16x16", 2), topology("h100:16")
    assert (pod.chips, pod.is_tpu, str(pod)) == (512, True, "2 x v5e:16x16")
    assert (gpus.chips, gpus.slices, gpus.is_tpu, str(gpus)) == (16, 2, False, "2 x h100:8")
    assert topology("a100:4").slices == 1


@pytest.mark.parametrize(
    ("text", "slices", "told"),
    [
        ("v5e:4x5", 1, "v5e comes as 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5p:8x8", 1, "8x8x8, 8x8x16"),
        ("v9:2x2", 1, "v5p:16x16x24"),
        ("v5e", 1, "comes as"),
        ("h100:12", 1, "a multiple of 8"),
        ("h100:x", 1, "a multiple of 8"),
        ("h100:16", 2, "are their nodes"),
    ],
)
def test_a_topology_that_does_not_exist_names_those_that_do(text, slices, told):
    with pytest.raises(InputError, match=told):
        topology(text, slices)

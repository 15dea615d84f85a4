"""Sizes of tiles: they cover the lengths, suit the lanes, and fit the memory of the chip."""

import math

import pytest

from aether.kernels.pallas.blocks import CHIPS, DEFAULT, LANES, blocks_of, chip_of


@pytest.mark.parametrize("kind", [*CHIPS, "TPU v5p", "TPU v6 lite", "TPU v4", "TPU9"])
@pytest.mark.parametrize("width", [32, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_cover_the_lengths_and_fit(kind, width, itemsize):
    for backward in (False, True):
        for t, s in ((1, 17), (128, 200), (1000, 1100), (4096, 65536)):
            b = blocks_of(kind, t, s, width, itemsize, backward=backward)
            assert b.rows % LANES == b.columns % LANES == b.held % b.columns == 0
            assert b.rows * math.ceil(t / b.rows) < t + LANES * math.ceil(t / b.rows)  # little is filled up
            tile = 4 * b.rows * b.columns
            gradients = 2 * 2 * 4 * b.held * max(width, LANES) if backward else 0
            assert 3 * tile + gradients <= b.vmem < chip_of(kind).vmem


def test_the_longest_name_decides():
    assert chip_of("TPU v5 lite") is CHIPS["TPU v5 lite"] and chip_of("TPU v5p") is CHIPS["TPU v5"]
    assert chip_of("TPU v6 lite") is CHIPS["TPU v6"] and chip_of("TPU v4") is DEFAULT


def test_a_narrow_window_has_narrow_tiles():
    wide, narrow = (blocks_of("TPU v5 lite", 4096, 4096, 64, 2, window=w) for w in (None, 300))
    assert (wide.rows, wide.columns) == (1024, 1024) and (narrow.rows, narrow.columns) == (384, 384)

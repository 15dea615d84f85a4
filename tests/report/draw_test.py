"""What is drawn: shares of places add up whatever their grid, pictures lie where they should."""

import io

import numpy as np
import pytest
from PIL import Image

from aether.explain.attribution import Attribution
from aether.report.draw import _tiled, draw_kernels, place_shares


def attribution(sources, weights=()):
    return Attribution(1.0, {}, {}, sources, dict.fromkeys(weights, np.zeros(0)), {})


@pytest.mark.parametrize("side", [8, 9])
def test_shares_of_places_keep_their_sum_on_pixels(rng, side):
    maps = {f"stages.{k}": rng.normal(size=(n, n)) + 0.3 for k, n in enumerate((8, 4, 2))}
    heads = rng.normal(size=(3, 17))  # a class token before sixteen patches
    found = place_shares(attribution(maps | {"blocks.0.attention": heads}, ["blocks.0.attention"]), side)
    want = sum(a.sum() for a in maps.values()) + heads[:, 1:].sum()
    np.testing.assert_allclose(found.sum(), want)


def test_a_places_share_lies_on_its_own_pixels():
    shares = np.array([[1.0, -1.2, 0.3], [0.5, -0.6, 0.1], [0.0, 2.0, -2.0]])  # of a sum near none
    found = place_shares(attribution({"a": shares}), 8)  # places of 3 x 3, 3 x 2 and 2 x 2 pixels
    rows = columns = [slice(0, 3), slice(3, 6), slice(6, 8)]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            block = found[row, column]
            assert np.ptp(block) == 0 and block.sum() == pytest.approx(shares[i, j])


def test_kernels_are_tiled_row_by_row():
    images = np.arange(5, dtype=float).reshape(5, 1, 1, 1).repeat(3, 1).repeat(3, 2) / 5
    sheet = _tiled(images, 3)
    pixel = 24
    assert sheet[0, 0] == 0.0 and sheet[0, pixel + 2] == 0.2 and sheet[pixel + 2, 0] == pytest.approx(0.6)
    assert sheet[0, pixel] == 1.0  # the line between two
    png = Image.open(io.BytesIO(draw_kernels([("one", images), ("one", images)])))
    assert png.width > png.height

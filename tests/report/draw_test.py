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
    corner = place_shares(attribution({"a": np.array([[1.0, 0.0], [0.0, 0.0]])}), 8)
    assert (corner[:4, :4] > 0).all() and corner.sum() == pytest.approx(1.0) and corner[4:].sum() == 0


def test_kernels_are_tiled_row_by_row():
    images = np.arange(5, dtype=float).reshape(5, 1, 1, 1).repeat(3, 1).repeat(3, 2) / 5
    sheet = _tiled(images, 3)
    pixel = 24
    assert sheet[0, 0] == 0.0 and sheet[0, pixel + 2] == 0.2 and sheet[pixel + 2, 0] == pytest.approx(0.6)
    assert sheet[0, pixel] == 1.0  # the line between two
    png = Image.open(io.BytesIO(draw_kernels({"one": images, "two": images})))
    assert png.width > png.height

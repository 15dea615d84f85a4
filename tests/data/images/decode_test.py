import io

import numpy as np
import pytest
from PIL import Image

from aether.data.images import augment, decode


def encoded(array, form="png", **options):
    file = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, form, **options)
    return file.getvalue()


def whole(width, height):
    return 0, 0, width, height


def triangle(image, box, size):
    """Resize a part of a picture in float64 by the triangle filter, widened to the scale where it shrinks."""

    def weights(start, stop, count):
        scale = (stop - start) / size
        support = max(scale, 1.0)
        centres = start + (np.arange(size) + 0.5) * scale
        distance = np.abs(np.arange(count) + 0.5 - centres[:, None]) / support
        w = np.clip(1 - distance, 0, None)
        return w / w.sum(1, keepdims=True)

    rows = weights(box[1], box[3], image.shape[0])
    columns = weights(box[0], box[2], image.shape[1])
    return np.einsum("xw,ywc->yxc", columns, np.tensordot(rows, image.astype(np.float64), 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", [(20, 31), (7, 5), (16, 16)])
def test_a_part_is_resized_as_the_triangle_filter_does(rng, sides, channels):
    image = rng.integers(0, 256, (*sides, channels), np.uint8)
    for box in ((0, 0, sides[1], sides[0]), (0.5, 0.25, sides[1] - 1.25, sides[0] - 0.5)):
        got = decode.square(image, 8, channels, lambda w, h, box=box: box)
        assert got.dtype == np.uint8 and got.shape == (8, 8, channels)
        np.testing.assert_allclose(got, triangle(image, box, 8), atol=2.5 if box[0] else 1.1)


def test_what_has_the_size_stays_as_it_is(rng):
    image = rng.integers(0, 256, (8, 8, 3), np.uint8)
    for data in (image, encoded(image)):
        assert np.array_equal(decode.square(data, 8, 3, whole), image)


@pytest.mark.parametrize("sides", [(1, 1), (1, 40), (449, 333), (640, 427), (1021, 769)])
def test_no_box_reaches_beyond_the_picture(rng, sides):
    data = encoded(rng.integers(0, 256, (*sides, 3), np.uint8), "jpeg", quality=20)
    for k in range(20):
        draw = lambda w, h, k=k: augment.resized_box(w, h, np.random.default_rng(k), 0.01)  # noqa: E731
        share = (k + 1) / 20
        for choose in (draw, lambda w, h, share=share: decode.centre(w, h, size=7, share=share)):
            assert decode.square(data, 7, 3, choose).shape == (7, 7, 3)


def test_the_centre():
    assert decode.centre(8, 8, size=8, share=0.875) == (0, 0, 8, 8)
    assert decode.centre(40, 60, size=8, share=0.5) == (10, 20, 30, 40)
    assert decode.centre(40, 60, size=8, share=1.0) == (0, 10, 40, 50)


def test_a_large_jpeg_is_decoded_small(smooth, monkeypatch):
    """A draft is close to the whole picture resized, for a part of it too, grey or in colour."""
    image = smooth(800, 1000)
    data, drafted = encoded(image, "jpeg", quality=95), []
    plain = decode._plain
    monkeypatch.setattr(decode, "_plain", lambda im, channels: drafted.append(im.size) or plain(im, channels))
    for box in ((0.0, 0.0, 1000.0, 800.0), (300.0, 100.0, 700.0, 500.0)):
        got = decode.square(data, 50, 3, lambda w, h, box=box: box)
        np.testing.assert_allclose(got, triangle(image, box, 50), atol=6)
    assert drafted == [(125, 100), (125, 100)]
    grey = decode.square(data, 50, 1, whole)
    luma = triangle(image, (0, 0, 1000, 800), 50) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(grey[..., 0], luma, atol=6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_that_a_camera_turned_are_upright(smooth, orientation):
    """The file holds the picture as the tag says it was turned; the box is meant in the upright one."""
    upright = smooth(80, 160)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[decode.ORIENTATION] = orientation
    data = encoded(np.ascontiguousarray(turned), "jpeg", quality=100, subsampling=0, exif=exif)
    seen = []
    got = decode.square(data, 20, 3, lambda w, h: seen.append((w, h)) or (60, 0, 140, 80))
    assert seen == [(160, 80)] and decode.facts(data)[:2] == (160, 80)
    np.testing.assert_allclose(got, triangle(upright, (60, 0, 140, 80), 20), atol=4)


def test_damaged_exif_is_no_reason_to_leave_a_picture_out(smooth):
    image = smooth(16, 16)
    data = encoded(image, "jpeg", quality=100, subsampling=0, exif=b"Exif\0\0no such thing")
    assert decode.facts(data) == (16, 16, False)
    np.testing.assert_allclose(decode.square(data, 16, 3, whole), image, atol=4)


def test_other_modes(rng):
    grey = rng.integers(0, 256, (6, 6), np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + rng.integers(0, 256, (6, 6), np.uint16))
    assert deep.mode.startswith("I;16")
    assert np.array_equal(decode.square(encoded(deep), 6, 1, whole)[..., 0], grey)
    colour = rng.integers(0, 256, (6, 6, 3), np.uint8)
    palette = Image.fromarray(colour).quantize(64)
    assert np.array_equal(decode.square(encoded(palette), 6, 3, whole), np.asarray(palette.convert("RGB")))
    assert np.array_equal(decode.square(grey[..., None], 6, 3, whole), np.stack([grey] * 3, -1))
    assert np.array_equal(decode.square(encoded(grey), 6, 3, whole), np.stack([grey] * 3, -1))
    cmyk = encoded(Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "jpeg")
    assert decode.square(cmyk, 6, 3, whole)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=4)


@pytest.mark.parametrize("form", ["png", "webp"])
def test_transparent_pixels_are_white(form):
    colour = np.full((6, 6, 4), (200, 10, 10, 255), np.uint8)
    colour[:, :3, 3] = 0
    got = decode.square(encoded(colour, form, **(dict(lossless=True) if form == "webp" else {})), 6, 3, whole)
    assert (got[:, :3] == 255).all() and (got[:, 3:] == (200, 10, 10)).all()


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (6, 6))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    got = decode.square(encoded(image, transparency=0), 6, 3, whole)
    assert got[0, 0].tolist() == [200, 100, 50] and (got[1:] == 255).all()


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_facts_see_where_a_file_ends_too_early(rng, form):
    data = encoded(rng.integers(0, 256, (50, 70, 3), np.uint8), form)
    assert decode.facts(data) == (70, 50, False)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(decode.BROKEN):
            decode.facts(data[: int(share * len(data))])
    grey = encoded(rng.integers(0, 256, (50, 70), np.uint8), "png")
    assert decode.facts(grey) == (70, 50, True)


def test_reasons_are_one_line_without_addresses():
    with pytest.raises(decode.BROKEN) as e:
        decode.facts(b"no picture")
    assert decode.reason(e.value) == "no picture that PIL knows"
    assert decode.reason(ValueError("a\nb")) == "a" and decode.reason(ValueError()) == "ValueError"

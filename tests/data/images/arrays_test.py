import gzip

import numpy as np
import pytest

from aether.data.images import arrays
from aether.errors import InputError


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (12, 5, 5), np.uint8)


LABELS = np.arange(12) % 3


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source, data = arrays.digits(), load_digits()
    assert source.shape == (8, 8, 1) and source.classes == tuple("0123456789") and len(source.train) == 1797
    assert source.train.images.max() == 255 and np.array_equal(source.train.targets, data.target)
    np.testing.assert_allclose(source.train.images[..., 0] / 255 * 16, data.images, atol=0.04)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r'pip install "aether\[vision\]"'):
        arrays.digits()


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_idx(tmp_path, write_idx, images, end, dot):
    for part, n in (("train", 12), ("t10k", 6)):
        write_idx(tmp_path / f"{part}-images{dot}idx3-ubyte{end}", images[:n])
        write_idx(tmp_path / f"{part}-labels{dot}idx1-ubyte{end}", LABELS[:n])
    source = arrays.open_idx(str(tmp_path))
    assert np.array_equal(source.train.images[..., 0], images) and np.array_equal(source.train.targets, LABELS)
    assert np.array_equal(source.held_out.images[..., 0], images[:6]) and source.classes == ("0", "1", "2")
    single = arrays.open_idx(str(tmp_path / f"train-images{dot}idx3-ubyte{end}"))
    assert np.array_equal(single.train.images, source.train.images) and single.held_out is None
    assert single.fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"\0\0\x0d\x03" + raw[4:], "begins with 00000d03, and idx files of bytes with 00000801"),
        (lambda raw: raw[:-7], r"bytes, which is not what its shape \(12, 5, 5\) needs"),
        (lambda raw: raw[:9], "bytes, which is not what its shape"),
        (lambda raw: b"", "begins with , and idx files"),
        (lambda raw: gzip.compress(raw)[:-20], "is a damaged gzip file"),
    ],
)
def test_damaged_idx(tmp_path, write_idx, images, damage, message):
    file = tmp_path / "train-images-idx3-ubyte"
    write_idx(file, images)
    write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=message):
        arrays.open_idx(str(tmp_path))


def test_idx_without_labels_or_training_images(tmp_path, write_idx, images):
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images)
    with pytest.raises(InputError, match="has t10k idx files but no train-images-idx3-ubyte"):
        arrays.open_idx(str(tmp_path))
    with pytest.raises(InputError, match=r"no labels beside it; add .*t10k-labels-idx1-ubyte\[\.gz\]"):
        arrays.open_idx(str(tmp_path / "t10k-images-idx3-ubyte"))


def test_several_idx_sets_in_a_folder(tmp_path, write_idx, images):
    for name in ("emnist-digits-", "emnist-letters-"):
        write_idx(tmp_path / f"{name}train-images-idx3-ubyte", images)
        write_idx(tmp_path / f"{name}train-labels-idx1-ubyte", LABELS)
    with pytest.raises(InputError, match="holds the sets emnist-digits-, emnist-letters-; name one file"):
        arrays.open_idx(str(tmp_path))
    assert len(arrays.open_idx(str(tmp_path / "emnist-letters-train-images-idx3-ubyte")).train) == 12


def test_npz(tmp_path, images):
    colour = np.stack([images, images // 2, images // 3], -1)
    file = str(tmp_path / "a.npz")
    np.savez_compressed(
        file, train_images=colour, train_labels=LABELS, test_images=colour[:4].astype(int), test_labels=LABELS[:4]
    )
    source = arrays.open_npz(file)
    assert source.shape == (5, 5, 3) and np.array_equal(source.train.images, colour)
    assert np.array_equal(source.held_out.images, colour[:4]) and source.held_out.images.dtype == np.uint8
    np.savez(file, images=images, labels=LABELS)
    assert arrays.open_npz(file).held_out is None


def with_nan(images):
    images = images / 255
    images[3, 2, 1] = np.nan
    return images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=LABELS[:-1]), r"12 pictures and labels of the shape \(11,\)"),
        (dict(labels=LABELS.astype(float)), "labels of type float64; they must be integers"),
        (dict(labels=LABELS - 1), "labels from -1 to 1 for 12 pictures"),
        (dict(labels=LABELS * 100), "labels from 0 to 200 for 12 pictures"),
        (dict(labels=np.eye(3)[LABELS]), r"labels of the shape \(12, 3\)"),
        (dict(images=with_nan), "NaN pixels, first in picture 3"),
        (dict(images=lambda x: x / 255), r"is of type float64 with values from 0\.0.* to .*; convert it to uint8"),
        (dict(images=lambda x: x.astype(int) + 1), "is of type int64 with values from .* to 256"),
        (dict(images=lambda x: np.stack([x, x, x], 1)), r"has the shape \(12, 3, 5, 5\); it takes"),
        (dict(images=lambda x: x.astype(object)), "holds pickled objects, which are never loaded"),
        (dict(images=lambda x: x[:0]), r"has the shape \(0, 5, 5\)"),
        (dict(labels=None), "has no labels, it has images"),
        (dict(labels=None, images=None, x=LABELS), "has no images and no labels, it has x"),
    ],
)
def test_bad_npz(tmp_path, images, change, message):
    content = dict(images=images, labels=LABELS) | change
    content = {k: v(images) if callable(v) else v for k, v in content.items() if v is not None}
    file = str(tmp_path / "a.npz")
    np.savez(file, **content)
    with pytest.raises(InputError, match=message):
        arrays.open_npz(file)


def test_damaged_npz(tmp_path, images):
    file = tmp_path / "a.npz"
    np.savez(file, images=images, labels=LABELS)
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + bytes(20) + whole[220:])
    with pytest.raises(InputError, match=r"a\.npz is damaged \(.*CRC"):
        arrays.open_npz(str(file))
    file.write_bytes(whole[:300])
    with pytest.raises(InputError, match=r"a\.npz is no \.npz file, or only a part of one"):
        arrays.open_npz(str(file))


def test_held_out_pictures_of_another_form_or_class(tmp_path, images):
    file = str(tmp_path / "a.npz")
    parts = dict(train_images=images, train_labels=LABELS, test_images=images[:4], test_labels=np.array([0, 1, 2, 3]))
    np.savez(file, **parts)
    with pytest.raises(InputError, match="has the class 3 among held-out pictures, .* classes 0 to 2"):
        arrays.open_npz(file)
    np.savez(file, **parts | dict(test_images=images[:4, :4], test_labels=LABELS[:4]))
    with pytest.raises(InputError, match=r"training pictures of \(5, 5, 1\) and held-out ones of \(4, 5, 1\)"):
        arrays.open_npz(file)

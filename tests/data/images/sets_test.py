import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

from aether.config import DataConfig, ImageConfig
from aether.data.images.load import load_images
from aether.data.loader import TrainSet, evaluation_batches, train_batches
from aether.errors import InputError, StorageError

DRAWN = dict(flip=True, jitter=0.3, randaugment=2, cutout=3)


@pytest.fixture
def files(tmp_path, class_folder):
    """A function (image keys) -> the training set of a folder with pictures of 20 x 30 pixels."""
    root = class_folder(tmp_path / "set", sides=(20, 30))
    data = DataConfig(path=str(root), validation_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    return lambda **image: load_images(data, ImageConfig(**image)).train


@pytest.fixture
def arrays(tmp_path, rng):
    """A function (image keys) -> the training set of a .npz with pictures of 12 x 12 pixels."""
    images, labels = rng.integers(0, 256, (20, 12, 12, 3), np.uint8), np.arange(20) % 4
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    data = DataConfig(path=str(tmp_path / "a.npz"), validation_fraction=0.0)
    return lambda **image: load_images(data, ImageConfig(**image)).train


def check_form(example, size, channels=3):
    assert example["images"].shape == (size, size, channels) and example["images"].dtype == np.uint8
    assert example["labels"].dtype == example["mask"].dtype == np.int32 and example["labels"].shape == ()


def test_examples_as_evaluated(arrays, files):
    found = arrays()
    source = np.load(found.path)
    for i in range(20):
        check_form(found[i], 12)
        assert np.array_equal(found[i]["images"], source["images"][i]) and found[i]["labels"] == i % 4
        assert found[i]["mask"] == 1 and found.name(i) == str(i)
    blank = found.blank()
    check_form(blank, 12)
    assert not blank["images"].any() and blank["mask"] == 0
    small = files(size=14, eval_crop=0.7)
    got, image = small[1]["images"], Image.open(f"{small.path}/{small.name(1)}")
    assert small.name(1) == "cat/1.png"
    np.testing.assert_array_equal(got, np.asarray(image.crop((8, 3, 22, 17))))


@pytest.mark.parametrize("crop", ["none", "pad", "resized"])
def test_a_draw_is_a_function_of_the_generator(arrays, files, crop):
    for found in (
        arrays(size=12, crop=crop, **DRAWN),
        arrays(size=9, crop=crop, **DRAWN),
        files(size=16, crop=crop, **DRAWN),
    ):
        again, seen = pickle.loads(pickle.dumps(found)), set()
        for k in range(30):
            one, two = (s.draw(3, [5, k]) for s in (found, again))
            check_form(one, found.size)
            assert np.array_equal(one["images"], two["images"]) and one["labels"] == found[3]["labels"]
            seen.add(one["images"].tobytes())
        assert len(seen) > 25


@pytest.mark.parametrize(
    "image", [dict(flip=True), dict(crop="pad"), dict(cutout=4), dict(jitter=0.5), dict(randaugment=1)]
)
def test_each_augmentation_is_drawn_where_it_is_set_and_not_in_evaluation(arrays, image):
    plain, found = arrays(), arrays(**image)
    drawn = {found.draw(0, [k])["images"].tobytes() for k in range(30)}
    assert len(drawn) >= 2
    assert np.array_equal(plain.draw(0, [0])["images"], plain[0]["images"])
    assert np.array_equal(found[0]["images"], plain[0]["images"])


@pytest.mark.filterwarnings("ignore")
def test_worker_processes_make_the_same_batches(files, image_tfds):
    """Files and records are opened anew there."""
    tfds = load_images(
        DataConfig(path="tfds:small_image", tfds_dir=image_tfds[0]), ImageConfig(size=16, flip=True)
    ).train
    sets = [TrainSet("files", 1.0, files(size=16, crop="resized", **DRAWN)), TrainSet("records", 1.0, tfds)]
    data = DataConfig(batch_size=4)
    flags.FLAGS.mark_as_parsed()
    here, there = (list(islice(train_batches(sets, replace(data, workers=workers), 3, 2), 4)) for workers in (0, 2))
    for one, two in zip(here, there, strict=True):
        assert one.keys() == two.keys() == {"images", "labels", "mask"} and one["images"].shape == (4, 16, 16, 3)
        assert all(np.array_equal(one[key], two[key]) for key in one)


@pytest.mark.filterwarnings("ignore")
def test_evaluation_in_threads_gives_the_same_batches(files, image_tfds):
    """Records are opened in all of them at once."""
    data = DataConfig(path="tfds:small_image", tfds_dir=image_tfds[0], batch_size=5, workers=4)
    for found in (files(size=16), load_images(data, ImageConfig(size=16)).validation["validation"]):
        batches = list(evaluation_batches(found, data))
        for key in ("images", "labels", "mask"):
            rows = np.concatenate([batch[key] for batch in batches])
            assert np.array_equal(rows[: len(found)], [found[i][key] for i in range(len(found))])
            assert len(rows) % 5 == 0 and not rows[len(found) :].any()


def test_what_is_cut_out_is_the_mean(arrays):
    found = arrays(cutout=6)
    assert found.fill == round(255 * np.load(found.path)["images"].mean() / 255)
    out = found.draw(0, [0])["images"]
    changed = (out != found[0]["images"]).any(-1)
    assert changed.any() and (out[changed] == found.fill).all()


@pytest.mark.parametrize(("channels", "own"), [(1, 3), (3, 1)])
def test_pictures_in_grey_or_in_colour(tmp_path, rng, channels, own):
    images = rng.integers(0, 256, (6, 5, 5, own), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6) % 2)
    data = DataConfig(path=str(tmp_path / "a.npz"), validation_fraction=0.0)
    found = load_images(data, ImageConfig(channels=channels, crop="resized", **DRAWN)).train
    check_form(found.draw(0, [0]), 5, channels)
    want = images[0] @ [0.299, 0.587, 0.114] if own == 3 else images[0][..., 0]
    for channel in range(channels):
        np.testing.assert_allclose(found[0]["images"][..., channel], want, atol=1)


def test_a_file_that_breaks_or_goes_later_is_named(files):
    found = files(size=16)
    file = Path(found.path, found.name(4))
    file.write_bytes(file.read_bytes()[:60])
    for example in (found.__getitem__, lambda i: found.draw(i, [0])):
        with pytest.raises(InputError, match=r"set: cat/4\.png cannot be decoded \(.*\); mend or remove it"):
            example(4)
    file.unlink()
    with pytest.raises(StorageError, match=r"cat/4\.png cannot be read: No such file"):
        found[4]

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from aether.config import DataConfig, ImageConfig, Pictures
from aether.data.images.load import Labels, load_images, load_validation
from aether.errors import InputError


@pytest.fixture
def npz(tmp_path, rng):
    """A function (name, arrays) -> the path of a .npz: 30 pictures of three uneven classes, or what is given."""
    images = rng.integers(0, 256, (30, 6, 6), np.uint8)
    labels = np.array([0] * 20 + [1] * 8 + [2] * 2)

    def make(name="a", **content):
        np.savez(tmp_path / f"{name}.npz", **(content or dict(images=images, labels=labels)))
        return str(tmp_path / f"{name}.npz")

    return make


def names(images):
    return {images.name(i) for i in range(len(images))}


def counts(images):
    return np.bincount([images[i]["labels"] for i in range(len(images))], minlength=3).tolist()


@pytest.mark.parametrize(("fraction", "held"), [(0.2, [4, 2, 1]), (0.01, [1, 1, 1]), (0.9, [18, 7, 1])])
def test_a_share_of_every_class_is_held_out(npz, fraction, held):
    data = DataConfig(path=npz(), validation_fraction=fraction)
    images = load_images(data, ImageConfig())
    validation = images.validation["validation"]
    assert counts(validation) == held and counts(images.train) == [20 - held[0], 8 - held[1], 2 - held[2]]
    assert names(images.train).isdisjoint(names(validation)) and len(names(images.train) | names(validation)) == 30
    assert names(load_images(data, ImageConfig()).validation["validation"]) == names(validation)
    assert names(validation) != {str(i) for i in range(held[0])} | {"20", "28"}, "not the first ones"


def test_the_choice_does_not_depend_on_the_place(npz, tmp_path, class_folder):
    data = DataConfig(path=str(class_folder(tmp_path / "one/set", count=10)), validation_fraction=0.3)
    other = replace(data, path=str(class_folder(tmp_path / "two/set", count=10)))
    one, two = (load_images(d, ImageConfig()).validation["validation"] for d in (data, other))
    assert names(one) == names(two) and len(one) == 6


def test_nothing_is_held_out_if_so_asked(npz):
    images = load_images(DataConfig(path=npz(), validation_fraction=0.0), ImageConfig())
    assert not images.validation and len(images.train) == 30
    own = npz("split", **{f"{part}_{k}": v for part in ("train", "test") for k, v in np.load(npz()).items()})
    for fraction, held in ((0.1, ["validation"]), (0.0, [])):
        images = load_images(DataConfig(path=own, validation_fraction=fraction), ImageConfig())
        assert list(images.validation) == held and len(images.train) == 30


def test_size_channels_mean_and_deviation_are_the_datas_own(npz):
    path = npz()
    images = load_images(DataConfig(path=path), ImageConfig())
    pixels = np.concatenate([images.train[i]["images"].ravel() for i in range(len(images.train))]) / 255
    pictures = images.labels.pictures
    assert (pictures.classes, pictures.size, pictures.channels) == (3, 6, 1) and images.labels.names == ("0", "1", "2")
    np.testing.assert_allclose([pictures.mean, pictures.std], [pixels.mean(), pixels.std()], rtol=1e-12)
    given = load_images(DataConfig(path=path), ImageConfig(size=4, channels=3, mean=0.5, std=0.25)).labels.pictures
    assert given == Pictures(3, 4, 3, 0.5, 0.25)
    half = load_images(DataConfig(path=path), ImageConfig(std=0.25)).labels.pictures
    assert half == replace(pictures, std=0.25)


def test_mean_and_deviation_of_files_are_of_what_is_evaluated(tmp_path, class_folder):
    data = DataConfig(path=str(class_folder(tmp_path / "set", sides=(20, 30))), validation_fraction=0.0)
    images = load_images(data, ImageConfig(size=10))
    pixels = np.stack([images.train[i]["images"] for i in range(len(images.train))]) / 255
    pictures = images.labels.pictures
    np.testing.assert_allclose([pictures.mean, pictures.std], [pixels.mean(), pixels.std()], rtol=1e-12)


def test_another_set_for_validation(npz, rng):
    train, pixels = npz(), rng.integers(0, 256, (4, 9, 9, 3), np.uint8)
    held = npz(
        "b", train_images=pixels, train_labels=np.arange(4) % 3, test_images=pixels[:2], test_labels=np.array([1, 0])
    )
    images = load_images(DataConfig(path=train, validation=dict(far=held, whole=train)), ImageConfig())
    assert len(images.train) == 30 and {k: len(v) for k, v in images.validation.items()} == dict(far=2, whole=30)
    far = images.validation["far"]
    assert [int(far[i]["labels"]) for i in range(2)] == [1, 0] and far[0]["images"].shape == (6, 6, 1)


def test_classes_of_another_set_are_matched_by_name(tmp_path, class_folder):
    train = class_folder(tmp_path / "train", ("cat", "dog", "eel"))
    other = class_folder(tmp_path / "other", ("dog", "eel"), count=2)
    images = load_images(DataConfig(path=str(train), validation=dict(other=str(other))), ImageConfig())
    found = images.validation["other"]
    assert [(found.name(i), int(found[i]["labels"])) for i in range(4)] == [
        ("dog/0.jpg", 1), ("dog/1.png", 1), ("eel/0.jpg", 2), ("eel/1.png", 2)
    ]  # fmt: skip
    with pytest.raises(
        InputError, match=r"train has the class 'cat', which the training images do not have \(.*dog, eel\)"
    ):
        load_images(DataConfig(path=str(other), validation=dict(other=str(train))), ImageConfig())
    again = load_validation(str(other), DataConfig(), ImageConfig(), images.labels)
    assert np.array_equal(again[3]["images"], found[3]["images"])


def test_the_fingerprint_changes_with_what_is_trained_on(npz, rng):
    path = npz()
    data, base = DataConfig(path=path), load_images(DataConfig(path=path), ImageConfig()).fingerprint
    content = dict(np.load(path))
    assert load_images(replace(data, path=npz("copy", **content)), ImageConfig(flip=True)).fingerprint == base
    content["images"] = content["images"].copy()
    content["images"][0, 0, 0] ^= 1
    others = [
        load_images(replace(data, path=npz("pixel", **content)), ImageConfig()).fingerprint,
        load_images(replace(data, validation_fraction=0.2), ImageConfig()).fingerprint,
        load_images(data, ImageConfig(size=5)).fingerprint,
        load_images(data, ImageConfig(channels=3)).fingerprint,
    ]
    assert len({base, *others}) == 5


def test_the_summary_names_what_was_left_out(tmp_path, class_folder):
    root = class_folder(tmp_path / "set")
    for i in range(7):
        (root / f"cat/bad{i}.png").write_bytes(b"no picture")
    lines = []
    images = load_images(DataConfig(path=str(root), validation_fraction=0.2), ImageConfig(), lines.append)
    assert lines == images.summary
    assert lines[0] == f"train: 10 images of 2 classes, 8 x 8 x 3, from {root}"
    assert lines[1].startswith(f"{root}: skipped 7 files: cat/bad0.png (no picture that PIL knows), cat/bad1.png")
    assert lines[1].endswith("cat/bad4.png (no picture that PIL knows) and 2 more")
    assert lines[2] == f"validation: 2 images of 2 classes, 8 x 8 x 3, from {root}"
    with pytest.raises(InputError, match="bad0.png cannot be used"):
        load_images(DataConfig(path=str(root)), ImageConfig(strict=True))


def test_labels_are_kept_in_a_file(tmp_path):
    labels = Labels(("Hund", "großer Aal"), Pictures(2, 8, 3, 0.4, 0.2))
    labels.save(str(tmp_path))
    assert Labels.restore(str(tmp_path)) == labels
    (tmp_path / "classes.json").write_text('{"names": ["a"]}')
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"classes\.json is missing or damaged"):
            Labels.restore(str(folder))
    replace(labels, names=("Hund",)).save(str(tmp_path))
    with pytest.raises(InputError, match=r"classes\.json has 1 names for 2 classes"):
        Labels.restore(str(tmp_path))


def test_data_that_do_not_fit_the_config(npz, tmp_path, class_folder):
    def fails(message, path, image=None, **data):
        with pytest.raises(InputError, match=message):
            load_images(DataConfig(path=path, **data), ImageConfig(**image or {}))

    path, ones = npz(), np.ones((4, 6, 6), np.uint8)
    fails("has 1 class; it takes at least two", npz("one", images=ones, labels=np.zeros(4, int)))
    fails("has pixels that are all 1;", npz("flat", images=ones, labels=np.arange(4) % 2))
    wide = npz("wide", images=np.ones((4, 6, 8), np.uint8), labels=np.arange(4) % 2)
    fails(r"pictures of 8 x 6 pixels and image\.size is 0; set image\.size", wide)
    fails(r"image\.padding is 6 and pictures have 6 pixels a side", path, dict(crop="pad", padding=6))
    fails(r"image\.cutout is 7 and pictures have 6", path, dict(cutout=7))
    fails(r"image\.channels is 2; it takes 1 .*, 3", path, dict(channels=2))
    fails(r"data\.mixture is for texts", path, mixture=dict(a=path))
    root = class_folder(tmp_path / "set")
    Image.new("RGB", (9, 9)).save(root / "cat/other.png")
    fails(r"has pictures of different sizes and image\.size is 0", str(root))

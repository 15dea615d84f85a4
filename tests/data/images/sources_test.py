import pickle

import numpy as np
import pytest

from aether.config import DataConfig, ImageConfig
from aether.data.images.load import load_images
from aether.data.images.sources import open_source
from aether.errors import InputError


def opened(path, **keys):
    return open_source(str(path), DataConfig(**keys), False, lambda line: None)


def test_an_unknown_path_lists_what_is_accepted(tmp_path):
    with pytest.raises(InputError, match=r"nowhere does not exist: set data\.path .*digits, tfds:NAME.*\.npz"):
        opened(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(InputError, match=r"a\.txt is none of these"):
        opened(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"^data\.path is empty; set it .* to digits, tfds:NAME"):
        opened("")
    with pytest.raises(InputError, match="gs://bucket/set is remote, .* copy them there, or take tfds:NAME"):
        opened("gs://bucket/set")


@pytest.mark.filterwarnings("ignore")
def test_tfds_reads_pictures_and_labels_with_the_test_split_held_out(image_tfds):
    folder, module = image_tfds
    images = load_images(DataConfig(path="tfds:small_image", tfds_dir=folder), ImageConfig())
    assert images.labels.names == ("cat", "dog", "eel") and images.labels.pictures.size == 6
    for split, found in (("train", images.train), ("test", images.validation["validation"])):
        want = {module.picture(split, i).tobytes(): i % 3 for i in range(module.COUNTS[split])}
        examples = [found[i] for i in range(len(found))]
        assert {e["images"].tobytes(): int(e["labels"]) for e in examples} == want
        assert found.name(1) == f"{split}:1"
    images.train[0]
    again = pickle.loads(pickle.dumps(images.train))
    assert again.store.opened == [] and np.array_equal(again[3]["images"], images.train[3]["images"])


@pytest.mark.filterwarnings("ignore")
def test_a_tfds_split_by_name_is_divided_by_class(image_tfds):
    folder, _ = image_tfds
    data = DataConfig(path="tfds:small_image:train", tfds_dir=folder, validation_fraction=0.25)
    images = load_images(data, ImageConfig())
    held = images.validation["validation"]
    assert len(images.train) == 9 and sorted(int(held[i]["labels"]) for i in range(3)) == [0, 1, 2]
    assert {held.name(i) for i in range(3)}.isdisjoint(images.train.name(i) for i in range(9))


@pytest.mark.filterwarnings("ignore")
def test_tfds_pictures_without_labels(image_tfds):
    folder, _ = image_tfds
    data = DataConfig(path="tfds:train_only_image:unlabelled", tfds_dir=folder, validation_fraction=0.0)
    with pytest.raises(InputError, match="unlabelled:0 has the label -1, and the classes are numbered 0 to 2"):
        load_images(data, ImageConfig(mean=0.5, std=0.5)).train[0]


@pytest.mark.filterwarnings("ignore")
def test_tfds_sets_of_something_else(tmp_path, monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    import small_text_dataset

    small_text_dataset.SmallText(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(InputError, match=r"features text \(Text\); it takes a set with an image and a label"):
        opened("tfds:small_text", tfds_dir=str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_a_remote_tfds_set_is_fetched(image_tfds, far, tmp_path):
    import shutil

    folder, module = image_tfds
    shutil.copytree(folder, far / "bucket/tfds")
    data = DataConfig(path="tfds:small_image", tfds_dir="far://bucket/tfds", cache_dir=str(tmp_path / "cache"))
    here = load_images(DataConfig(path="tfds:small_image", tfds_dir=folder), ImageConfig())
    there = load_images(data, ImageConfig())
    assert there.fingerprint == here.fingerprint
    assert np.array_equal(there.train[5]["images"], here.train[5]["images"])

"""Pictures on disks for the tests."""

import importlib
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def smooth():
    """A function (height, width, channels) -> a uint8 picture without noise, different at every corner."""

    def make(height, width, channels=3):
        y, x = np.mgrid[0:height, 0:width] / (max(height, width) - 1)
        planes = [200 * y + 30, 180 * x + 40, 120 * (x + y) / 2 + 60][:channels]
        return np.stack(planes, -1).round().astype(np.uint8)

    return make


@pytest.fixture
def class_folder(smooth):
    """A function (folder, classes, count, sides) that fills class folders with JPEG, PNG and WebP files in turn."""

    def make(folder, classes=("cat", "dog"), count=6, sides=(8, 8)):
        for k, name in enumerate(classes):
            (folder / name).mkdir(parents=True)
            for i in range(count):
                picture = np.roll(smooth(*sides), k + i, (0, 1, 2)[i % 3])
                Image.fromarray(picture).save(folder / name / f"{i}.{('jpg', 'png', 'webp')[i % 3]}")
        return folder

    return make


@pytest.fixture
def write_idx():
    """A function (path, array) that writes an idx file, compressed if its name says so."""
    import gzip

    def make(path, array):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        data = head + array.astype(np.uint8).tobytes()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)

    return make


@pytest.fixture(scope="session")
def image_tfds(tmp_path_factory):
    """The folder of two small TFDS sets, prepared as ArrayRecord, and the module that made them."""
    folder = tmp_path_factory.mktemp("tfds")
    here = str(Path(__file__).parent)
    sys.path.insert(0, here)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("small_image_dataset")
        for builder in (module.SmallImage, module.TrainOnlyImage):
            builder(data_dir=folder, file_format="array_record").download_and_prepare()
        yield str(folder), module
    sys.path.remove(here)

"""TFDS builders for the tests; TFDS finds a builder's files by its module, so they have one of their own."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CLASSES = ["cat", "dog", "eel"]
COUNTS = {"train": 12, "test": 6}


def picture(split: str, i: int) -> np.ndarray:
    """The picture `i` of a split."""
    return np.random.default_rng([len(split), i]).integers(0, 256, (6, 6, 3), np.uint8)


class SmallImage(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    COUNTS = COUNTS

    def _info(self):
        features = dict(
            image=tfds.features.Image(shape=(6, 6, 3)),
            label=tfds.features.ClassLabel(names=CLASSES),
            file_name=tfds.features.Text(),
        )
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, count) for split, count in self.COUNTS.items()}

    def _generate_examples(self, split, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(picture(split, i)).save(file, "png")
            label = -1 if split == "unlabelled" else i % 3
            yield i, dict(image=io.BytesIO(file.getvalue()), label=label, file_name=f"{split}-{i}.png")


class TrainOnlyImage(SmallImage):
    COUNTS = {"train": 12, "unlabelled": 3}

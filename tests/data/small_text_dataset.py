"""A TFDS builder for the tests; TFDS finds a builder's files by its module, so it has one of its own."""

import tensorflow_datasets as tfds

TEXTS = {"train": [f"story {i} " * (i + 1) for i in range(20)], "validation": [f"held out {i}" for i in range(5)]}


class SmallText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(texts) for split, texts in TEXTS.items()}

    def _generate_examples(self, texts):
        yield from ((i, {"text": text}) for i, text in enumerate(texts))

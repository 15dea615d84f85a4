"""A set of pictures of one size with labels, as they are evaluated and as they are trained on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from aether.config import ImageConfig
from aether.data.examples import Example
from aether.data.images import augment, decode
from aether.data.images.randaugment import randaugment
from aether.data.images.stores import Store
from aether.errors import InputError


@dataclass(frozen=True)
class ImageSet:
    """Random access to examples: `images` uint8 (size, size, channels), `labels` and `mask` int32.

    It travels to Grain's worker processes by pickle.

    Attributes:
      path: what the user called it.
      numbers: the label of each class of this set among those of the training set.
      fill: the grey of what an augmentation leaves empty.
    """

    path: str
    store: Store
    numbers: tuple[int, ...]
    image: ImageConfig
    size: int
    channels: int
    fill: int = 0

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Example:
        """Return an example as it is evaluated: the central square of `image.eval_crop` of the shorter side.

        Raises:
          InputError: the picture cannot be decoded.
        """
        data, label = self.store[index]
        return self._example(index, self._evaluated(index, data), label)

    def draw(self, index: int, seed: Sequence[int]) -> Example:
        """Return an example as it is trained on: cropped, mirrored and changed at random, as `image` says."""
        data, label = self.store[index]
        return self._example(index, self._augmented(index, data, np.random.default_rng(seed)), label)

    def blank(self) -> Example:
        """Return an example that does not count."""
        zero = np.int32(0)
        return dict(images=np.zeros((self.size, self.size, self.channels), np.uint8), labels=zero, mask=zero)

    def fetch(self, indices: Iterable[int]) -> None:
        """Do nothing: pictures lie on this machine."""

    def name(self, index: int) -> str:
        """Return the file's path in its folder, or the number of the picture."""
        return self.store.name(index)

    def _example(self, index: int, image: np.ndarray, label: int) -> Example:
        if not 0 <= label < len(self.numbers):
            raise InputError(
                f"{self.path}: {self.name(index)} has the label {label}, and the classes are numbered 0 to "
                f"{len(self.numbers) - 1}; take a split with labels."
            )
        return dict(images=image, labels=np.int32(self.numbers[label]), mask=np.int32(1))

    def _evaluated(self, index: int, data: bytes | np.ndarray) -> np.ndarray:
        if isinstance(data, np.ndarray) and data.shape == (self.size, self.size, self.channels):
            return data
        return self._square(index, data, partial(decode.centre, size=self.size, share=self.image.eval_crop))

    def _square(self, index: int, data: bytes | np.ndarray, choose: decode.Choose) -> np.ndarray:
        try:
            return decode.square(data, self.size, self.channels, choose)
        except decode.BROKEN as e:
            raise InputError(
                f"{self.path}: {self.name(index)} cannot be decoded ({decode.reason(e)}); mend or remove it."
            ) from e

    def _augmented(self, index: int, data: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        c = self.image
        if c.crop == "resized":
            picture = self._square(index, data, partial(augment.resized_box, rng=rng, min_scale=c.min_scale))
        else:
            picture = self._evaluated(index, data)
        if c.crop == "pad":
            picture = augment.pad_crop(picture, rng, c.padding)
        if c.flip:
            picture = augment.flip(picture, rng)
        if c.jitter:
            picture = augment.jitter(picture, rng, c.jitter)
        if c.randaugment:
            picture = randaugment(picture, rng, c.randaugment, c.magnitude, self.fill)
        if c.cutout:
            picture = augment.cutout(picture, rng, c.cutout, self.fill)
        return picture

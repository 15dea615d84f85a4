"""The image sets of a run: opened, divided into training and validation, and brought to one size."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import numpy as np

from aether.config import DataConfig, ImageConfig, Pictures
from aether.data.files import Log, key_of, read_json, write_json
from aether.data.images.sets import ImageSet
from aether.data.images.sources import KEYS, open_source
from aether.data.images.stores import Arrays, Source, Store
from aether.errors import InputError

SAMPLE = 2000  # pictures that tell mean and standard deviation where the set is not in memory
CLASSES = "classes.json"


@dataclass(frozen=True)
class Labels:
    """What a run must know of its images to meet others: the names of its classes and their form."""

    names: tuple[str, ...]
    pictures: Pictures

    def save(self, folder: str) -> None:
        """Write `classes.json`."""
        write_json(os.path.join(folder, CLASSES), dict(names=self.names, **asdict(self.pictures)))

    @classmethod
    def restore(cls, folder: str) -> "Labels":
        """Read `classes.json`.

        Raises:
          InputError: it is missing or damaged.
        """
        file = os.path.join(folder, CLASSES)
        record = read_json(file)
        try:
            names = tuple(record.pop("names")) if record else ()
            labels = cls(names, Pictures(**record or {}))
        except (KeyError, TypeError) as e:
            raise InputError(f"{file} is missing or damaged; copy it again from the run that wrote it.") from e
        if labels.pictures.classes != len(names):
            have = labels.pictures.classes
            raise InputError(f"{file} has {len(names)} names for {have} classes; copy it again from its run.")
        return labels


@dataclass(frozen=True)
class Images:
    """All images of a run.

    Attributes:
      fingerprint: changes when the training pictures, their split, classes or form change.
      summary: lines a person wants to see at start-up.
    """

    train: ImageSet
    validation: dict[str, ImageSet]
    labels: Labels
    fingerprint: str
    summary: list[str]


def load_images(data: DataConfig, image: ImageConfig, log: Log = lambda line: None) -> Images:
    """Open the images of a run; a split that comes with them is held out, else a share of every class.

    Raises:
      InputError: data that are missing or damaged, of other classes, or do not fit `image`.
    """
    if data.mixture:
        raise InputError("data.mixture is for texts; images take one set: clear it and set data.path.")
    source = open_source(data.path, data, image.strict, log)
    if len(source.classes) < 2:
        raise InputError(f"{data.path} has {len(source.classes)} class; it takes at least two to tell apart.")
    fraction = 0.0 if data.validation else data.validation_fraction
    train, held_out = hold_out(source, fraction)
    labels = Labels(source.classes, _pictures(source, train, image))
    train_set = image_set(source, train, labels, image)
    validation, summary = {}, _describe("train", train_set) + _skipped(source)
    if held_out is not None:
        validation["validation"] = image_set(source, held_out, labels, image)
        summary += _describe("validation", validation["validation"])
    for name, path in data.validation.items():
        validation[name] = load_validation(path, data, image, labels, log)
        summary += _describe(name, validation[name])
    for line in summary:
        log(line)
    form = asdict(labels.pictures)
    fingerprint = key_of([source.fingerprint, source.classes, len(train), form["size"], form["channels"]])
    return Images(train_set, validation, labels, fingerprint, summary)


def load_validation(
    path: str,
    data: DataConfig,
    image: ImageConfig,
    labels: Labels,
    log: Log = lambda line: None,
    key: str = KEYS,
) -> ImageSet:
    """Open a set for evaluation by a model with these labels: its held-out split if it has one, else all of it.

    `key` is what a person set to the path.

    Raises:
      InputError: it has other classes.
    """
    source = open_source(path, data, image.strict, log, key)
    for line in _skipped(source):
        log(line)
    return image_set(source, source.train if source.held_out is None else source.held_out, labels, image)


def image_set(source: Source, store: Store, labels: Labels, image: ImageConfig) -> ImageSet:
    """Put pictures of a source into the form that a model with these labels takes."""
    numbers = {name: i for i, name in enumerate(labels.names)}
    if extra := [name for name in source.classes if name not in numbers]:
        raise InputError(
            f"{source.path} has the class {extra[0]!r}, which the training images do not have (they have "
            f"{_some(labels.names)}); give a set of the same classes."
        )
    form = labels.pictures
    places = tuple(numbers[name] for name in source.classes)
    fill = round(255 * min(form.mean, 1.0))
    return ImageSet(source.path, store, places, image, form.size, form.channels, fill)


def hold_out(source: Source, fraction: float) -> tuple[Store, Store | None]:
    """Return what is trained on and what is held out: the data's own split, or a share of every class.

    The share is chosen by a hash of the pictures' names or numbers, so that it is the same for every run; of a class
    with two pictures or more, one at least stays on each side.
    """
    if not fraction or source.held_out is not None:
        return source.train, source.held_out if fraction else None
    labels = source.train.labels()
    ranks = np.array([_hash(source.train.name(i)) for i in range(len(labels))])
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[np.argsort(ranks[members], kind="stable")[:count]]] = True
    return source.train.take(np.flatnonzero(~held)), source.train.take(np.flatnonzero(held))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"held out {name}".encode()).digest()[:8], "big")


def _pictures(source: Source, train: Store, image: ImageConfig) -> Pictures:
    """Decide size and channels, by the data where the config leaves them open, then mean and standard deviation."""
    height, width, own = source.shape
    size, channels = image.size or (height if height == width else 0), image.channels or own
    if not size:
        what = f"of {width} x {height} pixels" if height else "of different sizes"
        raise InputError(f"{source.path} has pictures {what} and image.size is 0; set image.size to pixels a side.")
    if channels not in (1, 3):
        raise InputError(f"image.channels is {channels}; it takes 1 (grey), 3 (colour) or 0 (the data's own).")
    if image.crop == "pad" and image.padding >= size:
        raise InputError(
            f"image.padding is {image.padding} and pictures have {size} pixels a side; make it smaller, or set "
            "image.crop to none or resized."
        )
    if image.cutout > size:
        raise InputError(f"image.cutout is {image.cutout} and pictures have {size} pixels a side; make it smaller.")
    form = Pictures(len(source.classes), size, channels, image.mean, image.std)
    if image.mean and image.std:
        return form
    mean, std = _moments(image_set(source, train, Labels(source.classes, form), image))
    if not (image.std or std):
        raise InputError(f"{source.path} has pixels that are all {round(255 * mean)}; give other pictures.")
    return replace(form, mean=image.mean or mean, std=image.std or std)


def _moments(images: ImageSet) -> tuple[float, float]:
    """Return mean and standard deviation of pixels in 0..1, as evaluated: of all in memory, or of a fixed sample."""
    store, counts = images.store, np.zeros(256, np.int64)
    if isinstance(store, Arrays) and store.images.shape[1:] == (images.size, images.size, images.channels):
        for begin in range(0, len(store), SAMPLE):
            counts += np.bincount(store.images[begin : begin + SAMPLE].ravel(), minlength=256)
    else:
        chosen = np.unique(np.linspace(0, len(store) - 1, SAMPLE).round().astype(int)).tolist()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for example in pool.map(images.__getitem__, chosen):
                counts += np.bincount(example["images"].ravel(), minlength=256)
    values, weights = np.arange(256) / 255, counts / counts.sum()
    mean = float(values @ weights)
    return mean, float(np.sqrt((values - mean) ** 2 @ weights))


def _describe(name: str, images: ImageSet) -> list[str]:
    form = f"{images.size} x {images.size} x {images.channels}"
    return [f"{name}: {len(images):,} images of {len(images.numbers)} classes, {form}, from {images.path}"]


def _skipped(source: Source) -> list[str]:
    count = len(source.skipped)
    return [f"{source.path}: skipped {count} files: {_some(source.skipped)}"] if count else []


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

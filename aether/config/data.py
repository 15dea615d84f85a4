"""What is learned from: texts and images, and how batches are made of them."""

import math
from dataclasses import dataclass

from aether.config.section import Section, knob
from aether.errors import InputError


@dataclass(frozen=True)
class DataConfig(Section, prefix="data"):
    """The text or the images, and how batches are cut from them."""

    path: str = knob(
        "python:stdlib",
        "the training text: file, folder, glob, prepared folder, python:stdlib or tfds:NAME; or the training images: a "
        "folder with one of each class, MNIST's idx files, a .npz, tfds:NAME or digits",
    )
    mixture: dict[str, str] = knob({}, "several training texts, NAME -> path, instead of data.path")
    weights: dict[str, float] = knob({}, "share of each text of the mixture, NAME -> weight (default: equal)")
    validation: dict[str, str] = knob(
        {}, "validation texts or images, NAME -> path (default: `validation`, held out of data.path)"
    )
    validation_fraction: float = knob(
        0.1,
        "share held out when data.validation is empty and the data have no split for it (0: none, that split neither)",
        low=0.0,
        high=0.9,
    )
    tokenizer: str = knob("bytes", "bytes, chars, a SentencePiece .model file, or gpt2:FOLDER with GPT-2's BPE files")
    text_key: str = knob("text", "the field with the text in JSONL, Parquet and TFDS records")
    tfds_dir: str = knob("", "where TFDS data sets lie prepared (empty: TFDS's default)", free=True)
    context: int = knob(256, "tokens a sequence that the model sees and predicts", low=2)
    batch_size: int = knob(32, "sequences or images a step, over all hosts", low=1)
    mask_rate: float = knob(
        0.15,
        "share of the tokens that minibert and bert fill in: 80 % masked, 10 % another id, 10 % as they are",
        low=0.001,
        high=0.9,
    )
    segments: bool = knob(True, "keep attention inside documents that are packed together")
    workers: int = knob(
        0,
        "processes that read batches, and threads that read those of an evaluation (0: a thread)",
        low=0,
        high=256,
        free=True,
    )
    prefetch: int = knob(
        4, "batches read ahead, and two more for each process of data.workers", low=1, high=1024, free=True
    )
    cache_dir: str = knob("", "where prepared corpora are kept (empty: $AETHER_CACHE or ~/.cache/aether)", free=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.weights) - set(self.mixture):
            extra = ", ".join(sorted(set(self.weights) - set(self.mixture)))
            raise InputError(
                f"data.weights names {extra}, which data.mixture does not have; it has {sorted(self.mixture)}."
            )
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"data.weights.{name} is {weight}; it takes a number above 0.")
        if "train" in self.validation:
            raise InputError(
                "data.validation.train is a reserved name (metrics.jsonl uses it); call the set something else."
            )


@dataclass(frozen=True)
class ImageConfig(Section, prefix="image"):
    """How images are brought to one size, augmented and mixed; the texts' counterpart is `data.context`."""

    size: int = knob(0, "pixels a side (0: the data's own)", low=0, auto=True)
    channels: int = knob(0, "1 grey, 3 colour (0: the data's own)", low=0, high=3, auto=True)
    mean: float = knob(
        0.0, "subtracted from pixels in 0..1 (0: the training images' mean)", low=0.0, high=1.0, auto=True
    )
    std: float = knob(0.0, "what is left is divided by this (0: their standard deviation)", low=0.0, auto=True)
    crop: str = knob(
        "none",
        "random window of the image with a margin (pad), or of a random part of it, resized (resized)",
        choices=("none", "pad", "resized"),
    )
    padding: int = knob(4, "margin in pixels of image.crop=pad", low=1)
    min_scale: float = knob(0.25, "smallest share of the area that image.crop=resized takes", low=0.01, high=1.0)
    flip: bool = knob(False, "mirror left and right half of the time")
    jitter: float = knob(0.0, "strength of random brightness, contrast and saturation", low=0.0, high=1.0)
    randaugment: int = knob(0, "operations of RandAugment an image (Cubuk et al., 2020)", low=0, high=14)
    magnitude: int = knob(9, "their strength, of 30", low=0, high=30)
    cutout: int = knob(0, "side in pixels of a square that is blanked (DeVries and Taylor, 2017)", low=0)
    mixup: float = knob(0.0, "a of the Beta(a, a) by which pairs are blended (Zhang et al., 2018; 0: none)", low=0.0)
    cutmix: float = knob(
        0.0, "a of the Beta(a, a) share pasted from another image (Yun et al., 2019; 0: none)", low=0.0
    )
    label_smoothing: float = knob(0.0, "weight of the uniform distribution in the targets", low=0.0, high=0.9)
    eval_crop: float = knob(
        0.875, "share of the shorter side that evaluation keeps of images of another size", low=0.1, high=1.0
    )
    strict: bool = knob(False, "stop at a file that is no image, instead of leaving it out", free=True)


@dataclass(frozen=True)
class Pictures:
    """What only the data know of images: how many classes, and what "auto" means in `ImageConfig`."""

    classes: int
    size: int
    channels: int
    mean: float
    std: float

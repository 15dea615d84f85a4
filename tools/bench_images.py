"""What `python -m tools.bench --what=images` measures: pictures a second that one process reads and augments."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aether.config import DataConfig, ImageConfig
from aether.data.images.load import load_images
from aether.data.images.sets import ImageSet

JPEGS, SIDES = 64, (375, 500)  # ImageNet's pictures have about 400 x 350 pixels


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for pictures in memory, grey and in colour, and one for JPEG files, which are decoded."""
    with tempfile.TemporaryDirectory() as folder:
        grey, colour, files = made(Path(folder))
        cases = {
            "crop and flip, 28 x 28 in memory": (grey, dict(crop="pad", flip=True)),
            "crop and flip, 32 x 32 x 3 in memory": (colour, dict(crop="pad", flip=True)),
            "crop, flip, jitter and cutout, 32 x 32 x 3": (colour, dict(crop="pad", flip=True, jitter=0.4, cutout=16)),
            "RandAugment of two, 32 x 32 x 3": (colour, dict(randaugment=2)),
            f"resized crop to 224, JPEG of {SIDES[1]} x {SIDES[0]}": (files, dict(crop="resized", size=224, flip=True)),
        }
        for what, (path, keys) in cases.items():
            data = DataConfig(path=path, validation_fraction=0.0, cache_dir=os.path.join(folder, "cache"))
            images = load_images(data, ImageConfig(**keys)).train  # type: ignore[arg-type]
            rates = [rate(images) for _ in range(rounds)]
            yield dict(what=f"images a second of one process: {what}", median=statistics.median(rates), all=rates)


def rate(images: ImageSet, seconds: float = 1.0) -> float:
    """Return the examples a second, each with a generator of its own, as the loader makes them."""
    begin = time.perf_counter()
    for count in itertools.count(1):
        images.draw(count % len(images), [0, count])
        if (spent := time.perf_counter() - begin) > seconds:
            return count / spent
    raise AssertionError("unreachable")


def made(folder: Path) -> list[str]:
    """Write noise as two .npz files and photograph-like JPEG files in two classes; return the three paths."""
    rng = np.random.default_rng(0)
    for name, sides in (("grey", (28, 28)), ("colour", (32, 32, 3))):
        images = rng.integers(0, 256, (1000, *sides), np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(1000) % 10)
    for i in range(JPEGS):
        place = folder / "files" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize(SIDES[::-1], Image.Resampling.BICUBIC), np.float64)
        noisy = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(place / f"{i}.jpg", quality=90)
    return [str(folder / name) for name in ("grey.npz", "colour.npz", "files")]

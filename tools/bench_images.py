"""What `python -m tools.bench --what=images` measures: pictures a second that one process reads and augments.

Of a config it is the trainer's loader, and beside it the training step that it has to feed.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aether.config import DataConfig, ImageConfig
from aether.data.images.load import load_images
from aether.data.images.sets import ImageSet
from aether.errors import InputError
from launch.overrides import make_config
from tools import bench_step
from tools.bench_compare import sample, seconds
from tools.bench_where import here

JPEGS, SIDES = 64, (375, 500)  # ImageNet's pictures have about 400 x 350 pixels


def rows(args: Any) -> Iterator[dict[str, Any]]:
    """Yield the row of --config, or without it those of pictures made here."""
    yield from [against_step(args)] if args.config else made_up(args.rounds)


def against_step(args: Any) -> dict[str, Any]:
    """Return the images a second of a config's loader, read by one thread, and of its step: in turn, and the ratio.

    Raises:
      InputError: the config's data are texts, or cannot be opened.
    """
    config = make_config(args.config, args.override)
    device = here(args.backend, args.memory)
    from aether.data.corpus import open_corpus  # Grain imports JAX, of which the device is chosen before
    from aether.data.loader import train_batches

    if config.unit != "images":
        raise InputError(f"--what=images takes a config of images, and {args.config} is of {config.model.kind}.")
    corpus = open_corpus(config)
    config = corpus.resolved(config)
    call = bench_step.compiled(config, device.mesh).start()
    batches = train_batches(corpus.train, replace(config.data, workers=0), config.train.seed)
    seconds(call)
    length, pairs = seconds(call), []
    for _ in range(args.rounds):
        loader = loaded(batches, config.data.prefetch)
        pairs.append((loader, config.data.batch_size / sample(call, length)))
    batches.close()  # type: ignore[attr-defined]  # a generator
    ratios = [loader / step for loader, step in pairs]
    return dict(
        what=f"images a second of the loader's one thread / of the {config.model.kind}'s step, {config.data.path}",
        **dict(zip(("loader", "step"), map(statistics.median, zip(*pairs, strict=True)), strict=True)),
        ratio=statistics.median(ratios),
        all=ratios,
    )


def loaded(batches: Iterator[Any], ahead: int, least: float = 1.0) -> float:
    """Return the images a second that come out of the loader, after those that it has read ahead."""
    for _ in range(ahead + 1):
        next(batches)
    begin, images = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < least or not images:
        images += len(next(batches)["labels"])
    return images / spent


def made_up(rounds: int) -> Iterator[dict[str, Any]]:
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

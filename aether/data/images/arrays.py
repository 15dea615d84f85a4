"""Image sets that fit into memory: scikit-learn's digits, MNIST-style idx files, and .npz files."""

import gzip
import hashlib
import math
import os
import re
import zipfile
import zlib

import numpy as np

from aether.data.images.stores import Arrays, Source, read_file
from aether.errors import InputError

DIGITS = "digits"
IDX = re.compile(r"(.*?)(train|t10k|test)-images([-.])idx\d-ubyte(\.gz)?")
IDX_UINT8 = 8  # the third byte of the magic number


def digits() -> Source:
    """Open scikit-learn's handwritten digits: 1,797 grey pictures of 8 x 8, values 0 to 16.

    Raises:
      InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise InputError('data.path=digits takes the pictures from scikit-learn: pip install "aether[vision]".') from e
    data = load_digits()
    return _source(DIGITS, _arrays(DIGITS, np.rint(data.images * (255 / 16)).astype(np.uint8), data.target), None)


def open_idx(path: str) -> Source:
    """Open a folder with train-images-idx3-ubyte[.gz] and labels, t10k-... held out, or one file of images.

    Raises:
      InputError: labels are missing, a file is damaged, or the two do not belong together.
    """
    if os.path.isfile(path):
        return _source(path, _idx_pair(path), None)
    matches = [m for m in map(IDX.fullmatch, sorted(os.listdir(path))) if m]
    if len(sets := sorted({m[1] for m in matches})) > 1:
        raise InputError(f"{path} holds the sets {', '.join(sets)}; name one file of images, or part the sets.")
    found = {m[2]: os.path.join(path, m[0]) for m in matches}
    if "train" not in found:
        raise InputError(f"{path} has {', '.join(found)} idx files but no train-images-idx3-ubyte[.gz]; add it.")
    held = found.get("t10k") or found.get("test")
    return _source(path, _idx_pair(found["train"]), _idx_pair(held) if held else None)


def _idx_pair(file: str) -> Arrays:
    match = IDX.fullmatch(os.path.basename(file))
    if not match:
        raise InputError(f"{file} is not named as images of an idx set; call it train-images-idx3-ubyte[.gz].")
    stem = os.path.join(os.path.dirname(file), f"{match[1]}{match[2]}-labels{match[3]}idx1-ubyte")
    labels = next((f for f in (f"{stem}{match[4] or ''}", stem, f"{stem}.gz") if os.path.exists(f)), None)
    if labels is None:
        raise InputError(f"{file} has no labels beside it; add {stem}[.gz].")
    return _arrays(file, read_idx(file), read_idx(labels))


def read_idx(file: str) -> np.ndarray:
    """Return the uint8 array of an idx file: 0, 0, 8, number of dimensions, each of them in four bytes, values.

    Raises:
      InputError: it is damaged or of another type.
    """
    data = read_file(file)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{file} is a damaged gzip file ({e}); fetch it again.") from e
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != IDX_UINT8 or not 1 <= data[3] <= 4:
        raise InputError(f"{file} begins with {data[:4].hex()}, and idx files of bytes with 00000801 to 00000804.")
    head = 4 + 4 * data[3]
    shape = tuple(int(n) for n in np.frombuffer(data[4:head], ">u4", len(data[4:head]) // 4))
    if len(shape) < data[3] or len(data) - head != math.prod(shape):
        raise InputError(f"{file} has {len(data)} bytes, which is not what its shape {shape} needs; fetch it again.")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def open_npz(path: str) -> Source:
    """Open `{train,test}_{images,labels}`, test held out, or `images` and `labels`.

    Raises:
      InputError: it is damaged, or has no such arrays.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no .npz file, or only a part of one; save it again with numpy.savez.")
    try:
        with open(path, "rb") as f, np.lib.npyio.NpzFile(f, allow_pickle=False) as archive:
            names = _wanted(path, set(archive.files))
            arrays = [archive[name] for name in names]
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
        pickled = "Object arrays" in str(e)
        why = "holds pickled objects, which are never loaded" if pickled else f"is damaged ({e})"
        raise InputError(f"{path} {why}; save arrays of uint8 and of integers with numpy.savez.") from e
    parts = [_arrays(f"{path}:{names[i]}", *arrays[i : i + 2]) for i in range(0, len(names), 2)]
    return _source(path, parts[0], parts[1] if len(parts) > 1 else None)


def _wanted(path: str, have: set[str]) -> list[str]:
    """Return the names of images and labels, then of those that are held out if there are any."""
    prefixes = [p for p in ("train_", "test_") if f"{p}images" in have] if "train_images" in have else [""]
    wanted = [f"{prefix}{what}" for prefix in prefixes for what in ("images", "labels")]
    if lacking := [name for name in wanted if name not in have]:
        raise InputError(
            f"{path} has no {' and no '.join(lacking)}, it has {', '.join(sorted(have)) or 'nothing'}; "
            "give it images and labels, or train_images, train_labels, test_images and test_labels."
        )
    return wanted


def _arrays(name: str, images: np.ndarray, labels: np.ndarray) -> Arrays:
    """Check that these are pictures and labels."""
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)) or not images.size:
        raise InputError(
            f"{name} has the shape {images.shape}; it takes (n, height, width) or (n, height, width, 1 or 3)."
        )
    if labels.shape != images.shape[:1]:
        raise InputError(
            f"{name} has {len(images)} pictures and labels of the shape {labels.shape}; give one label a picture."
        )
    if labels.dtype.kind not in "iu":
        raise InputError(f"{name} has labels of type {labels.dtype}; they must be integers from 0 on.")
    if labels.min() < 0 or labels.max() >= len(labels):
        raise InputError(
            f"{name} has labels from {labels.min()} to {labels.max()} for {len(labels)} pictures; "
            "number the classes from 0 on."
        )
    images = _bytes(name, images)
    images = images.reshape(*images.shape[:3], -1)
    numbers = np.arange(len(images))
    return Arrays(images, labels.astype(np.int32), numbers)


def _bytes(name: str, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind == "f" and np.isnan(images).any():
        first = int(np.flatnonzero(np.isnan(images).reshape(len(images), -1).any(1))[0])
        raise InputError(f"{name} has NaN pixels, first in picture {first}; repair it, and save uint8 from 0 to 255.")
    if images.dtype.kind not in "iu" or images.min() < 0 or images.max() > 255:
        span = f" with values from {images.min()} to {images.max()}" if images.dtype.kind in "iuf" else ""
        raise InputError(f"{name} is of type {images.dtype}{span}; convert it to uint8 from 0 to 255.")
    return images.astype(np.uint8)


def _source(path: str, train: Arrays, held_out: Arrays | None) -> Source:
    """Name the classes by their numbers."""
    count = int(train.targets.max()) + 1
    if held_out is not None:
        if held_out.images.shape[1:] != train.images.shape[1:]:
            raise InputError(
                f"{path} has training pictures of {train.images.shape[1:]} and held-out ones of "
                f"{held_out.images.shape[1:]}; make them alike."
            )
        if held_out.targets.max() >= count:
            raise InputError(
                f"{path} has the class {held_out.targets.max()} among held-out pictures, and training pictures of the "
                f"classes 0 to {count - 1}; correct the labels."
            )
    parts = [train.digest()] + ([held_out.digest()] if held_out is not None else [])
    digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    height, width, channels = train.images.shape[1:]
    classes = tuple(str(i) for i in range(count))
    return Source(path, classes, (height, width, channels), train, held_out, digest)

"""Where pictures come from: a path becomes a `Source`."""

import os

import numpy as np

from aether import remote
from aether.config import DataConfig
from aether.data import tfds
from aether.data.files import Log, key_of
from aether.data.images import arrays
from aether.data.images.folders import open_folder
from aether.data.images.stores import Records, Source
from aether.data.sources import TFDS, find_source
from aether.errors import InputError

KEYS = "data.path (or data.validation)"
ACCEPTED = (
    "digits, tfds:NAME[:SPLIT], a folder of pictures by class, a folder with idx files (train-images-idx3-ubyte[.gz]) "
    "or one of them, or an .npz file"
)


def open_source(path: str, config: DataConfig, strict: bool, log: Log, key: str = KEYS) -> Source:
    """Open the pictures behind a path; `key` is what a person set to it.

    Raises:
      InputError: nothing of the kind is there, or it cannot be used.
    """
    if not path:
        raise InputError(f"data.path is empty; set it (or the path in data.validation) to {ACCEPTED}.")
    if path == arrays.DIGITS:
        return arrays.digits()
    if path.startswith(TFDS):
        return _tfds(path, config)
    if remote.is_remote(path):
        raise InputError(
            f"{path} is remote, and pictures are read from a local disk; copy them there, or take tfds:NAME, of which "
            "data.tfds_dir may be remote."
        )
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        idx = any(arrays.IDX.fullmatch(name) for name in os.listdir(place))
        return arrays.open_idx(place) if idx else open_folder(place, config, strict, log)
    if os.path.isfile(place) and place.endswith(".npz"):
        return arrays.open_npz(place)
    if os.path.isfile(place) and arrays.IDX.fullmatch(os.path.basename(place)):
        return arrays.open_idx(place)
    what = "is none of these" if os.path.exists(place) else "does not exist"
    raise InputError(f"{path} {what}: set {key} to {ACCEPTED}.")


def _tfds(path: str, config: DataConfig) -> Source:
    """Open a prepared TFDS set with the features `image` and `label`."""
    found = find_source(path, config)
    items = (*found.items, *found.held_out)
    builders = [tfds.open_split(path, item.name, config) for item in items]
    info = builders[0].info
    features = dict(info.features) if hasattr(info.features, "items") else {}
    if "image" not in features or not hasattr(features.get("label"), "names"):
        have = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise InputError(f"{path} has the features {have}; it takes a set with an image and a label (ClassLabel).")
    height, width, channels = (side or 0 for side in features["image"].shape)
    stores = [
        Records(path, str(builder.data_dir), item.name, np.arange(item.size))
        for builder, item in zip(builders, items, strict=True)
    ]
    shards = [[item.name, info.splits[item.name].shard_lengths, info.splits[item.name].num_bytes] for item in items]
    return Source(
        path,
        tuple(features["label"].names),
        (height, width, channels if channels in (1, 3) else 3),
        stores[0],
        stores[1] if len(stores) > 1 else None,
        key_of([info.full_name, shards]),
    )

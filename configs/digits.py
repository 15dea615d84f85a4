"""Handwritten digits: a small AetherResNet on the 1,797 images that come with scikit-learn, without a network.

What:     three stages of one ⵟ block, widths 16, 32 and 64, on 8 x 8 grey images; one image in five is held out.
Install:  pip install -e ".[vision]"
Command:  python -m launch.train --config=configs/digits.py
Pictures: python -m launch.evaluate --workdir=runs/digits
Baseline: the same with --config.model.kind=resnet --workdir=runs/digits_resnet
Time:     42 s on two CPU cores that did other work too.
Result:   accuracy 99.16 % of the 359 held-out images, loss 0.032.
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run."""
    config = default_config()
    config.model.kind = "aether_resnet"
    config.model.stages = "1,1,1"
    config.model.width = 16
    config.model.dtype = "float32"
    config.data.path = "digits"
    config.data.validation_fraction = 0.2
    config.data.batch_size = 64
    config.image.crop = "pad"
    config.image.padding = 1
    config.optim.warmup_steps = 50
    config.train.steps = 1000
    config.train.eval_every = 250
    config.checkpoint.every = 250
    return config

"""CIFAR-100: AetherResNet-18 at full width on a hundred classes.

What:     as configs/cifar10_resnet18.py, with RandAugment and CutMix in place of Cutout: a class has 500
          images only.
Prepare:  python -c "import tensorflow_datasets as tfds; tfds.builder('cifar100', file_format='array_record')\
              .download_and_prepare()"
Command:  python -m launch.train --config=configs/cifar100_resnet18.py
Baseline: the same with --config.model.kind=resnet --workdir=runs/cifar100_resnet18_baseline
Time:     not measured yet: no accelerator was at hand.
Result:   not measured yet.
"""

from ml_collections import ConfigDict

from aether.config import default_config


def get_config() -> ConfigDict:
    """Return the settings of this run."""
    config = default_config()
    config.model.kind = "aether_resnet"
    config.model.size = "18"
    config.model.stem = "cifar"
    config.model.dtype = "bfloat16"
    config.data.path = "tfds:cifar100"
    config.data.batch_size = 128
    config.data.workers = 8
    config.data.prefetch = 16
    config.image.crop = "pad"
    config.image.flip = True
    config.image.randaugment = 2
    config.image.magnitude = 5
    config.image.cutmix = 1.0
    config.image.label_smoothing = 0.1
    config.optim.weight_decay = 0.1
    config.optim.warmup_steps = 2000
    config.train.steps = 78_000
    config.train.eval_every = 3900
    config.train.log_every = 50
    config.checkpoint.every = 3900
    return config

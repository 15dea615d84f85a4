"""CIFAR-10: AetherResNet-18 at full width, the field's usual setting; the ResNet baseline is one override away.

What:     18 layers, widths 64 to 512 (11.2 million parameters), a 3 x 3 stem; 50,000 colour images of 32 x 32, 200
          epochs of 128 images, shifts by 4 pixels, mirroring, Cutout, label smoothing.
Prepare:  python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10', file_format='array_record')\
              .download_and_prepare()"
Command:  python -m launch.train --config=configs/cifar10_resnet18.py
Baseline: the same with --config.model.kind=resnet --workdir=runs/cifar10_resnet18_baseline
Small:    --config.model.stages=2,2,2 --config.model.width=16 --config.model.stem=stride2 trains on a CPU.
Time:     not measured yet: no accelerator was at hand.
Result:   not measured yet; the small one errs on 26.7 ± 0.5 % of a subset's images, ResNet on 32.5 ± 0.3 % (LOG.md).
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
    config.data.path = "tfds:cifar10"
    config.data.batch_size = 128
    config.data.workers = 4
    config.data.prefetch = 16
    config.image.crop = "pad"
    config.image.flip = True
    config.image.cutout = 8
    config.image.label_smoothing = 0.1
    config.optim.weight_decay = 0.1
    config.optim.warmup_steps = 2000
    config.train.steps = 78_000
    config.train.eval_every = 3900
    config.train.log_every = 50
    config.checkpoint.every = 3900
    return config
